"""What is bound to the same settings is compiled once, whoever asks; nothing else is shared."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from rlhf_jax import sft
from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.training import optim

TRACED = []


def scaled(factor, x, *, shift=0.0):
  TRACED.append((factor, shift))
  return factor * x + shift


@pytest.fixture(autouse=True)
def nothing_traced():
  TRACED.clear()


@pytest.fixture(scope="module")
def mesh():
  return tiny.mesh((1, 1, 1))


def test_bound_functions_of_the_same_settings_are_traced_once(mesh):
  for _ in range(3):
    run = mesh_lib.jit(mesh_lib.bind(scaled, 2.0, shift=1.0), mesh)
    assert float(run(jnp.float32(3.0))) == 7.0
  assert TRACED == [(2.0, 1.0)]


def test_other_settings_layouts_or_meshes_have_programs_of_their_own(mesh):
  one = mesh_lib.jit(mesh_lib.bind(scaled, 5.0), mesh)
  others = [
    mesh_lib.jit(mesh_lib.bind(scaled, 6.0), mesh),
    mesh_lib.jit(mesh_lib.bind(scaled, 5.0, shift=1.0), mesh),
    mesh_lib.jit(mesh_lib.bind(scaled, 5.0), mesh, out_shardings=mesh_lib.replicated(mesh)),
    mesh_lib.jit(mesh_lib.bind(scaled, 5.0), mesh, donate_argnums=0),
  ]
  assert all(one is not other for other in others)
  assert [float(run(jnp.float32(1.0))) for run in (one, *others)] == [5.0, 6.0, 6.0, 5.0, 5.0]


def test_a_program_has_the_name_of_what_was_bound(mesh):
  lowered = mesh_lib.jit(mesh_lib.bind(scaled, 7.0), mesh).lower(jnp.float32(1.0))
  assert lowered.as_text().startswith("module @jit_scaled ")


def test_settings_that_cannot_be_hashed_are_refused(mesh):
  with pytest.raises(TypeError, match="unhashable"):
    mesh_lib.jit(mesh_lib.bind(scaled, [2.0]), mesh)


def test_a_stage_that_begins_again_has_the_step_of_the_one_before(mesh):
  steps = []
  for _ in range(2):
    optimizer = optim.make(tiny.OPTIM, 10)
    state = rules.place(sft.init(tiny.params(tiny.POLICY, 0), optimizer), mesh)
    step = mesh_lib.bind(sft.step, policy=tiny.POLICY, optimizer=optimizer, micro_batches=1)
    steps.append(rules.compile_step(step, state, mesh))
  assert steps[0] is steps[1]
  assert optim.make(tiny.OPTIM, 11) is not optimizer


def test_a_bound_function_is_what_a_partial_is():
  prompts = tiny.mixed_prompts(2, 4, 0)
  how = {"config": tiny.SAMPLING, "stops": Stops((tiny.EOS,)), "pad_id": 0}
  bound = mesh_lib.bind(decode.generate, tiny.POLICY, **how)
  params, key = tiny.params(tiny.POLICY, 0), jax.random.key(1)
  plain = decode.generate(tiny.POLICY, params, prompts, key, **how)
  assert jnp.array_equal(bound(params, prompts, key).tokens, plain.tokens)
