"""The plan of a run: bytes and work of programs whose cost can be told by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import config as config_lib
from rlhf_jax.experiment import ExperimentConfig
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel.mesh import MeshConfig
from rlhf_jax.plan import hlo, programs, roofline
from rlhf_jax.plan.roofline import Chip

B, D, F, L = 64, 32, 48, 5


@pytest.fixture(scope="module")
def mesh():
  return mesh_lib.make(MeshConfig(8, 1, 1))


def array(mesh, shape, *spec):
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def cost(function, *arguments, loops=1):
  return hlo.cost(jax.jit(function).lower(*arguments).compile().as_text(), loops)


def test_a_product_costs_two_flops_a_term_on_the_rows_of_a_device(mesh):
  found = cost(jnp.dot, array(mesh, (B, D), "data"), array(mesh, (D, F)))
  assert found.flops == 2 * (B / 8) * D * F
  assert found.bytes == 4 * (B / 8 * D + D * F + B / 8 * F)
  assert not found.sent


def test_a_loop_costs_its_body_as_often_as_it_goes_round(mesh):
  layers, x = array(mesh, (L, D, D)), array(mesh, (B, D), "data")
  scanned = lambda x, layers: jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0]
  assert cost(scanned, x, layers).flops == L * 2 * (B / 8) * D * D
  until = lambda x, w: jax.lax.while_loop(lambda x: jnp.max(x) < 9.0, lambda x: x @ w, x)
  found = cost(until, x, array(mesh, (D, D)), loops=7)
  assert found.flops == 7 * 2 * (B / 8) * D * D
  assert found.times["all-reduce"] > 0


def test_what_devices_send_is_counted_by_the_ring_algorithms(mesh):
  summed = lambda x: jnp.sum(x, axis=0)
  found = cost(summed, array(mesh, (B, F), "data"))
  assert found.sent["all-reduce"] == 2 * (7 / 8) * 4 * F
  gathered = jax.jit(lambda x: x + 1.0, out_shardings=NamedSharding(mesh, PartitionSpec()))
  text = gathered.lower(array(mesh, (B, F), "data")).compile().as_text()
  assert hlo.cost(text, 1).sent == {"all-gather": (7 / 8) * 4 * B * F}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """Programs of the village's tiny config by name, with the mesh they are for."""
  config = runs.tiny(tmp_path_factory.mktemp("data"), mesh__fsdp=2, mesh__tensor=2)
  built = config_lib.build(ExperimentConfig, config)
  mesh = mesh_lib.make(built.mesh)
  return {p.name: p for p in programs.of_run(built, mesh)}, mesh


def test_every_program_of_the_hot_path_is_planned(planned):
  names = ["sft step", "reward step", "ppo generate", "ppo score", "ppo update"]
  assert list(planned[0]) == names


@pytest.mark.parametrize("name", ["sft step", "ppo generate", "ppo update"])
def test_the_compiler_sees_the_arguments_that_are_told(planned, name):
  program = planned[0][name]
  compiled = program.compile()
  told = sum(program.arguments.values())
  # XLA drops what is not read and rounds each array up; neither is much.
  assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(told, rel=0.02)
  found = roofline.estimate(program, compiled, roofline.CHIPS["h200"])
  assert found.flops > 0 and found.temporary > 0 and found.peak > told
  assert found.least == found.seconds[found.bottleneck] == max(found.seconds.values())


def test_ppo_keeps_the_same_in_memory_whatever_it_does(planned):
  kept = {
    "ppo generate": ("policy",),
    "ppo score": ("judges", "critic"),
    "ppo update": ("state", "frozen"),
  }
  sizes = [
    planned[0][name].beside + sum(planned[0][name].arguments[part] for part in parts)
    for name, parts in kept.items()
  ]
  assert sizes[0] == sizes[1] == sizes[2] > 0


def test_what_is_offloaded_is_not_kept_beside(planned, tmp_path):
  config = runs.tiny(tmp_path, mesh__fsdp=2, mesh__tensor=2, ppo__offload=("judges", "optimizers"))
  built = config_lib.build(ExperimentConfig, config)
  away = {p.name: p for p in programs.of_run(built, planned[1])}
  saved = {name: planned[0][name].beside - away[name].beside for name in away}
  judges = away["ppo score"].arguments["judges"]
  assert saved["ppo update"] == judges > 0
  assert saved["ppo generate"] == judges + saved["ppo score"] and saved["ppo score"] > judges
  assert away["ppo update"].beside == 0


def test_what_does_not_fit_is_named_with_what_would_help(planned):
  program = planned[0]["sft step"]
  compiled = program.compile()
  roomy = Chip(1e9, 1e12, 1e12, 1e12)
  found = roofline.estimate(program, compiled, roomy)
  assert roofline.advice(found, roomy) is None
  small = Chip(found.peak - 1e3, 1e12, 1e12, 1e12)
  assert "sft step needs" in roofline.advice(found, small)


def test_bytes_of_a_split_array_are_those_of_its_piece(mesh):
  tree = {"split": array(mesh, (B, D), "data"), "whole": array(mesh, (D,))}
  assert programs.bytes_of(tree) == 4 * (B * D // 8 + D)
  key = jax.eval_shape(lambda: jax.random.key(0))
  placed = jax.ShapeDtypeStruct((), key.dtype, sharding=mesh_lib.replicated(mesh))
  assert programs.bytes_of(placed) == np.asarray(jax.random.key_data(jax.random.key(0))).nbytes


def test_the_tiny_model_is_what_the_plan_of_it_says(mesh):
  params = tiny.params(tiny.POLICY, 0)
  told = programs.bytes_of(programs.parameters(tiny.POLICY, mesh))
  assert told == sum(x.nbytes for x in jax.tree.leaves(params))
