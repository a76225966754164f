"""One device and eight give the same numbers; what does not divide is an error that says so."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from rlhf_jax import ppo, rollout, sft
from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.networks import heads
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.parallel.mesh import MeshConfig
from rlhf_jax.rollout import Judges
from rlhf_jax.training import optim
from rlhf_jax.types import TokenBatch, UserError

B, P = 16, 5
MODEL = tiny.changed(tiny.MODEL, n_layers=1)
POLICY, SCALAR = heads.Policy(MODEL), heads.ScalarNetwork(MODEL)
MESHES = {"data=8": (8, 1, 1), "data=2, fsdp=2, tensor=2": (2, 2, 2)}
# Adam divides by the root of v, so where a gradient is all but 0 its rounding would be blown up.
OPTIM = tiny.changed(tiny.OPTIM, eps=1e-2)
CONFIG = tiny.changed(
  tiny.PPO,
  rollout__batch_size=B,
  epochs=1,
  whiten_rewards=True,
  ema_decay=0.9,
  policy_optim=OPTIM,
  value_optim=OPTIM,
)
LEARNER = ppo.make_learner(POLICY, SCALAR, CONFIG, stem_blocks=0)


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
  if jax.device_count() != 8:
    pytest.skip("needs eight devices: --xla_force_host_platform_device_count=8")


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
  return mesh_lib.make(MeshConfig(*MESHES[request.param]))


@pytest.fixture(scope="module")
def networks():
  return {
    "policy": tiny.params(POLICY, 0),
    "critic": tiny.params(SCALAR, 3),
    "judges": Judges(tiny.params(POLICY, 1), tiny.params(SCALAR, 2)),
  }


def assert_split(tree, mesh):
  """Every matrix of `tree` is laid out as the table says; on a mixed mesh most are split."""
  expected = rules.partition(tree, mesh)
  jax.tree.map(
    lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), tree, expected
  )
  cut = [mesh_lib.shard_count(s, x.shape) for x, s in zip(*map(jax.tree.leaves, (tree, expected)))]
  assert (max(cut) > 1) == (mesh.shape["fsdp"] > 1)


def sample(policy, critic, judges, prompts, key):
  completion = decode.generate(
    POLICY, policy, prompts, key, config=tiny.SAMPLING, stops=Stops((1, 2, 3)), pad_id=tiny.PAD
  )
  parts = (judges, critic, prompts, completion)
  return rollout.score(POLICY, SCALAR, *parts, temperature=1.0, eos_id=tiny.EOS)


@pytest.fixture(scope="module")
def on_one_device(networks):
  """SFT state and metrics, rollout, PPO state and metrics, on the first device alone."""
  state, batch = sft_start(networks)
  supervised = jax.jit(sft_step)(state, batch)
  parts = (networks["policy"], networks["critic"], networks["judges"])
  seen = jax.jit(sample)(*parts, tiny.mixed_prompts(B, P, 0), jax.random.key(5))
  return supervised, seen, jax.jit(ppo_step)(ppo_start(networks), seen)


def sft_start(networks):
  optimizer = optim.make(OPTIM, 10)
  tokens, ones = tiny.random_tokens((B, 8), 1), np.ones((B, 8))
  places = np.tile(np.arange(8, dtype=np.int32), (B, 1))
  mask = (np.arange(8)[None, :] > np.arange(B)[:, None] % 5).astype(np.float32)
  batch = TokenBatch(tokens, ones.astype(np.int32), places, mask)
  return sft.init(jax.tree.map(jnp.copy, networks["policy"]), optimizer), batch


def sft_step(state, batch, micro_batches=1):
  optimizer = optim.make(OPTIM, 10)
  return sft.step(state, batch, {}, policy=POLICY, optimizer=optimizer, micro_batches=micro_batches)


def ppo_start(networks):
  copies = jax.tree.map(jnp.copy, (networks["policy"], networks["critic"]))
  return ppo.init(LEARNER, *copies, jax.random.key(5))


def ppo_step(state, seen):
  return ppo.update(state, ({}, {}), seen, None, LEARNER)


def assert_close(got, expected):
  """To 1e-5 on every leaf; PRNG keys bit by bit."""
  raw = lambda tree: jax.tree.map(
    lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree
  )
  tiny.assert_trees_close(raw(got), raw(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_of_sft_is_the_same_on_one_device_and_on_eight(
  networks, mesh, on_one_device, micro_batches
):
  state, batch = sft_start(networks)
  state = rules.place(state, mesh)
  step = functools.partial(sft_step, micro_batches=micro_batches)
  step = rules.compile_step(step, state, mesh)
  state, metrics = step(state, mesh_lib.put_batch(mesh, batch))
  assert_split(state.params, mesh)
  assert_close((state, metrics), on_one_device[0])


def test_rollouts_are_the_same_on_one_device_and_on_eight(networks, mesh, on_one_device):
  placed = rules.place(networks, mesh)
  prompts = mesh_lib.put_batch(mesh, tiny.mixed_prompts(B, P, 0))
  key = mesh_lib.put_replicated(mesh, jax.random.key(5))
  parts = (placed["policy"], placed["critic"], placed["judges"])
  seen = jax.jit(sample)(*parts, prompts, key)
  np.testing.assert_array_equal(seen.responses, on_one_device[1].responses)
  assert_close(seen, on_one_device[1])


def test_an_update_of_ppo_is_the_same_on_one_device_and_on_eight(networks, mesh, on_one_device):
  state = rules.place(ppo_start(networks), mesh)
  step = rules.compile_step(ppo_step, state, mesh)
  seen = mesh_lib.put_batch(mesh, jax.device_get(on_one_device[1]))
  state, metrics = step(state, seen)
  assert_split(state.critic, mesh)
  assert_split(state.ema, mesh)
  assert_close((state, metrics), on_one_device[2])


# The mesh.


def test_data_minus_1_takes_the_devices_that_are_left():
  mesh = mesh_lib.make(MeshConfig(data=-1, fsdp=2, tensor=2))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert mesh_lib.batch_devices(mesh) == 4


@pytest.mark.parametrize("axes", [(3, 1, 1), (-1, 3, 1), (8, 2, 1), (-1, 16, 1)])
def test_axes_that_do_not_multiply_to_the_devices_are_an_error_with_all_numbers(axes):
  shown = " x ".join(map(str, axes))
  with pytest.raises(UserError, match=re.escape(f"{shown} does not use the 8 devices")):
    mesh_lib.make(MeshConfig(*axes))


def test_a_batch_that_does_not_split_is_an_error_with_the_nearest_sizes(mesh):
  devices = mesh_lib.batch_devices(mesh)
  mesh_lib.check_batch(mesh, 2 * devices, "sft.batch_size")
  message = f"sft.batch_size: {2 * devices + 1} rows .* {devices} devices .* use {2 * devices} or"
  with pytest.raises(UserError, match=message):
    mesh_lib.check_batch(mesh, 2 * devices + 1, "sft.batch_size")
  with pytest.raises(UserError, match=f"use {devices}$|use {devices}\\."):
    mesh_lib.check_batch(mesh, 1, "sft.batch_size")


def test_a_batch_is_split_over_the_batch_axes(mesh):
  batch = mesh_lib.put_batch(mesh, {"x": np.zeros((16, 3)), "y": np.zeros(16)})
  for leaf in jax.tree.leaves(batch):
    assert mesh_lib.shard_count(leaf.sharding, leaf.shape) == mesh_lib.batch_devices(mesh)
  stacked = mesh_lib.put_batch(mesh, np.zeros((3, 16)), axis=1)
  assert stacked.sharding.shard_shape((3, 16)) == (3, 16 // mesh_lib.batch_devices(mesh))


# The rules.


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_table_covers_whole_train_states_of_both_layouts(mesh, scan_layers):
  config = tiny.changed(tiny.MODEL, compute__scan_layers=scan_layers)
  policy, scalar = heads.Policy(config), heads.ScalarNetwork(config)
  learner = ppo.make_learner(policy, scalar, CONFIG, stem_blocks=0)

  def start(key):
    return ppo.init(learner, heads.init(policy, key), heads.init(scalar, key), key)

  state = jax.eval_shape(start, jax.random.key(0))
  shardings = rules.partition(state, mesh)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  spec = lambda tree: [s.spec for s in jax.tree.leaves(tree)]
  assert spec(shardings.ema) == spec(shardings.policy)
  moments = [s for p, s in jax.tree_util.tree_leaves_with_path(shardings.policy_opt)
             if "kernel" in jax.tree_util.keystr(p)]  # fmt: skip
  kernels = [s for p, s in jax.tree_util.tree_leaves_with_path(shardings.policy)
             if "kernel" in jax.tree_util.keystr(p)]  # fmt: skip
  assert [m.spec for m in moments] == 2 * [k.spec for k in kernels]


def test_the_first_rule_that_matches_wins_and_names_the_last_axes(mesh):
  table = ((r"a/kernel$", PartitionSpec("tensor")), (r"kernel$", PartitionSpec("fsdp", None)))
  tree = {"a": {"kernel": jnp.zeros((3, 2))}, "b": {"kernel": jnp.zeros((5, 2, 3))}}
  got = rules.partition(tree | {"count": jnp.int32(0)}, mesh, table)
  assert got["a"]["kernel"].spec == PartitionSpec(None, "tensor")
  assert got["b"]["kernel"].spec == PartitionSpec(None, "fsdp", None)
  assert got["count"].spec == PartitionSpec()


def test_a_tensor_without_a_rule_is_an_error_that_names_it(mesh):
  tree = {"trunk": {"mystery": jnp.zeros((3, 2))}}
  with pytest.raises(UserError, match=re.escape("no rule matches 'trunk/mystery' of shape (3, 2)")):
    rules.partition(tree, mesh)


def test_a_tensor_that_does_not_divide_is_an_error_with_both_numbers():
  mesh = mesh_lib.make(MeshConfig(data=2, fsdp=1, tensor=4))
  tree = {"attn": {"key": {"kernel": jnp.zeros((16, 2, 4))}}}  # two key-value heads, four devices
  message = (
    "an axis of 2 of 'attn/key/kernel' (shape (16, 2, 4)) does not split over the 4 devices of "
    "mesh axis 'tensor'; 1, 2 would do"
  )
  with pytest.raises(UserError, match=re.escape(message)):
    rules.partition(tree, mesh)
