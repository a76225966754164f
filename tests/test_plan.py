"""The plan of a run: bytes and work of programs whose cost can be told by hand."""

import importlib.util

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
from rlhf_jax.plan import hlo, programs, roofline, topology
from rlhf_jax.plan.roofline import Chip
from rlhf_jax.types import UserError

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


# What a TPU's compiler writes, and its slices.

TPU = """
HloModule jit_step, num_partitions=4

%all-reduce-scatter.1 (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0:T(8,128)} parameter(0)
  %sum = f32[16,8]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.1 = f32[4,8]{1,0:T(8,128)} dynamic-slice(%sum, %zero, %zero)
}

%condition (state: (s32[], f32[16,8], s32[])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[16,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %n = s32[]{:T(128)} get-tuple-element(%state), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (state: (s32[], f32[16,8], s32[])) -> (s32[], f32[16,8], s32[]) {
  %state = (s32[]{:T(128)}, f32[16,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %x = f32[16,8]{1,0} get-tuple-element(%state), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[16,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, {"estimated_cycles":"100"}
  ROOT %next = (s32[]{:T(128)}, f32[16,8]{1,0}, s32[]{:T(128)}) tuple(%i, %y, %n)
}

ENTRY %main (x: f32[16,8]) -> f32[4,8] {
  %x = f32[16,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %five = s32[]{:T(128)} constant(5)
  %start = (s32[]{:T(128)}, f32[16,8]{1,0}, s32[]{:T(128)}) tuple(%zero, %x, %five)
  %loop = (s32[], f32[16,8]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  %y = f32[16,8]{1,0} get-tuple-element(%loop), index=1
  %all = f32[32,8]{1,0} all-gather(%y), replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  ROOT %own = f32[4,8] fusion(%y), calls=%all-reduce-scatter.1, {"estimated_cycles":"30"}
}
"""


def test_loops_scatters_and_cycles_of_a_tpu_are_read():
  found = hlo.cost(TPU, 1)
  assert found.flops == 5 * 2 * 16 * 8 * 8 and found.cycles == 5 * 100 + 30
  assert found.sent == {"all-gather": 32 * 8 * 4 / 2, "reduce-scatter": 16 * 8 * 4 * 3 / 4}
  assert found.times == {"all-gather": 1, "reduce-scatter": 1}


@pytest.mark.parametrize(
  ("left", "right", "out", "attributes", "flops"),
  [
    # [1024, 64] x [64, 32]
    ("f32[1024,64]", "f32[64,32]", "f32[1024,32]", "dim_labels=bf_io->bf", 2 * 1024 * 64 * 32),
    # [2, 512, 64] x [64, 8, 4], the heads a window over nothing
    (
      "f32[2,512,64,1]",
      "f32[64,4,8,1]",
      "f32[2,512,4,8]",
      "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_io10->0bf1",
      2 * 2 * 512 * 64 * 8 * 4,
    ),
    # 8 products [64, 32] x [32, 16], as a window that steps from one to the next
    (
      "f32[8,64,32]",
      "f32[8,32,16]",
      "f32[8,64,16]",
      "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
      2 * 8 * 64 * 32 * 16,
    ),
    # the same as groups of features
    (
      "f32[64,256]",
      "f32[32,128]",
      "f32[64,128]",
      "dim_labels=bf_io->bf, feature_group_count=8",
      2 * 8 * 64 * 32 * 16,
    ),
  ],
  ids=["plain", "heads", "window", "groups"],
)
def test_a_product_that_is_a_convolution_costs_what_it_costs(left, right, out, attributes, flops):
  lines = f"""
ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left}{{1,0:T(8,128)}} parameter(0)
  %b = {right}{{1,0:T(8,128)}} parameter(1)
  ROOT %c = {out}{{1,0:T(8,128)}} convolution(%a, %b), {attributes}
}}"""
  assert hlo.cost(lines, 1).flops == pytest.approx(flops)


def test_a_slice_of_tpus_is_as_square_as_can_be():
  sides = lambda axes: [topology.sides(count, axes) for count in (1, 2, 4, 8, 32, 64)]
  assert sides(2) == [(1, 1), (2, 1), (2, 2), (2, 4), (4, 8), (8, 8)]
  assert sides(3) == [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 4, 4), (4, 4, 4)]


@pytest.mark.parametrize(
  ("chip", "count", "message"),
  [("h200", 8, "none of v5e, v5p, v6e"), ("v5e", 6, "--devices=6: a slice of TPUs has 1, 2, 4")],
)
def test_what_is_no_slice_of_tpus_is_an_error(chip, count, message):
  with pytest.raises(UserError, match=message):
    topology.tpus(chip, count)


HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_the_error_says_how_to_install_it():
  with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[tpu\]'; it needs no TPU"):
    topology.tpus("v5e", 4)


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'rlhf_jax[tpu]'")
@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_programs_compile_for_tpus_with_the_products_that_they_have_on_a_cpu(attention, tmp_path):
  sizes = {"model__n_heads": 1, "model__n_kv_heads": 1, "model__head_dim": 128}
  config = runs.tiny(tmp_path, model__compute__attention=attention, **sizes)
  built = config_lib.build(ExperimentConfig, config)
  tpus = mesh_lib.make(built.mesh, topology.tpus("v5e", 4))
  cpus = mesh_lib.make(built.mesh, jax.devices()[:4])
  for here, there in zip(programs.of_run(built, cpus), programs.of_run(built, tpus)):
    found, expected = (
      hlo.cost(program.compile().as_text(), program.loops) for program in (there, here)
    )
    assert found.cycles > 0
    # Not counted are products of few rows, which become sums, and what is in splash attention.
    if attention == "plain" and here.name in ("sft step", "reward step", "ppo update"):
      assert found.flops == pytest.approx(expected.flops, rel=0.05), here.name
