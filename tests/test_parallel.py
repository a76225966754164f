"""One device, eight, and several processes give the same; what does not divide is an error."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import stages
import tiny
from jax.sharding import PartitionSpec

from rlhf_jax import ppo
from rlhf_jax.networks import heads
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.parallel.mesh import MeshConfig
from rlhf_jax.plan import hlo
from rlhf_jax.types import UserError

# The first two are always tested, all of them by `make matrix`.
MESHES = [(8, 1, 1), (2, 2, 2)]
MORE = [(1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2), (1, 2, 4)]


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
  if jax.device_count() != 8:
    pytest.skip("needs eight devices: --xla_force_host_platform_device_count=8")


def name(axes):
  return "x".join(map(str, axes))


@pytest.fixture(scope="module", params=MESHES, ids=name)
def mesh(request):
  return mesh_lib.make(MeshConfig(*request.param))


@pytest.fixture(scope="module")
def on_one_device():
  return stages.results(stages.one_device())


def assert_split(tree, mesh, axes=("fsdp", "tensor")):
  """Every array of `tree` lies as the table says, each device with its own piece and no more."""
  for array, sharding in zip(*map(jax.tree.leaves, (tree, rules.partition(tree, mesh)))):
    assert array.sharding.is_equivalent_to(sharding, array.ndim)
    piece = sharding.shard_shape(array.shape)
    assert {shard.data.shape for shard in array.addressable_shards} == {piece}
  cut = [x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(tree)]
  assert max(cut) == math.prod(mesh.shape[axis] for axis in axes)


@pytest.mark.parametrize("axes", MESHES + [pytest.param(m, marks=pytest.mark.matrix) for m in MORE],
                         ids=name)  # fmt: skip
def test_every_stage_gives_the_same_on_one_device_and_on_eight(axes, on_one_device):
  found = stages.results(mesh_lib.make(MeshConfig(*axes)))
  tiny.assert_trees_close(found, on_one_device, rtol=1e-5, atol=1e-5)
  names = {path.split("/")[0] for path in found}
  assert names == {"sft", "reward", "rollouts", "ppo"}


@pytest.mark.matrix
@pytest.mark.parametrize(("count", "axes"), [(2, (2, 2, 2)), (4, (1, 4, 2))])
def test_every_stage_gives_the_same_in_one_process_and_in_several(
  count, axes, on_one_device, tmp_path
):
  output = tmp_path / "found.npz"
  coordinator = f"localhost:{runs.free_port()}"
  running = [
    runs.spawn(stages.__file__, coordinator, count, i, *axes, output, devices=8 // count)
    for i in range(count)
  ]
  for process in running:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
  with np.load(output) as found:
    tiny.assert_trees_close(dict(found), on_one_device, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [*MESHES, (4, 2, 1), (4, 1, 2)], ids=name)
@pytest.mark.parametrize("stage", ["supervised", "ranked", "improved"])
def test_micro_batches_on_a_mesh_give_the_whole_batch(axes, stage):
  mesh = mesh_lib.make(MeshConfig(*axes))

  def moved(micro_batches):
    step, *inputs = getattr(stages, stage)(mesh, micro_batches=micro_batches)
    inputs = inputs if len(inputs) == 2 else (*inputs, stages.rollouts(mesh))
    return stages.flat(step(*inputs))

  tiny.assert_trees_close(moved(2), moved(1), rtol=1e-5, atol=1e-5)


def test_states_stay_split_from_step_to_step(mesh):
  step, state, batch = stages.supervised(mesh)
  state, _ = step(state, batch)
  assert_split(state.params, mesh)
  assert_split(state.opt_state, mesh, stages.AXES)
  step, state = stages.improved(mesh)
  state, _ = step(state, stages.rollouts(mesh))
  for tree in (state.policy, state.critic, state.ema):
    assert_split(tree, mesh)
  for tree in (state.policy_opt, state.critic_opt):
    assert_split(tree, mesh, stages.AXES)


KEPT = """
import sys
import jax.numpy as jnp
from rlhf_jax.parallel import mesh as mesh_lib

def program(x):
  return jnp.sum(x)

mesh = mesh_lib.make(mesh_lib.MeshConfig(*map(int, sys.argv[1:])))
mesh_lib.jit(program, mesh)(jnp.ones(4))
jnp.cumsum(jnp.ones(3))
"""


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=name)
def test_programs_that_gather_parameters_are_not_read_back_on_a_cpu(axes, tmp_path, monkeypatch):
  script, cache = tmp_path / "kept.py", tmp_path / "cache"
  script.write_text(KEPT)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  process = runs.spawn(script, *axes, devices=2)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  names = {path.name for path in cache.iterdir()}
  assert any(name.startswith("jit_program") for name in names) == (axes == (2, 1, 1))
  assert any(name.startswith("jit_cumsum") for name in names)  # others are, whatever the mesh


# What the compiler sends from device to device.


def sent(compiled, kind):
  """Bytes of the largest piece that each `kind` of collective brings to a device."""
  pattern = rf"= \(?([a-z0-9]+)\[([0-9,]*)\][^=]*? {kind}(?:-start)?\("
  sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
  count = lambda axes: math.prod(map(int, filter(None, axes.split(","))))
  return [sizes[dtype] * count(axes) for dtype, axes in re.findall(pattern, compiled.as_text())]


def compiled_sft(axes, **changes):
  mesh = mesh_lib.make(MeshConfig(*axes))
  policy = heads.Policy(tiny.changed(stages.MODEL, **changes))
  step, state, batch = stages.supervised(mesh, policy=policy)
  return step.lower(state, batch).compile(), state


def matrices(*trees):
  """Bytes of each parameter that the table splits, in order of size."""
  leaves = jax.tree_util.tree_leaves_with_path(trees)
  return sorted(x.nbytes for path, x in leaves if x.ndim > 1 and "score" not in str(path))


def test_where_only_the_batch_is_split_a_parameter_is_gathered_once_when_it_has_moved():
  compiled, state = compiled_sft((8, 1, 1))
  assert sorted(sent(compiled, "all-gather")) == matrices(state.params)
  assert sent(compiled, "all-reduce")  # of the gradients


@pytest.mark.parametrize("stage", ["supervised", "ranked"])
def test_gradients_of_micro_batches_are_added_up_over_data_once(stage):
  mesh = mesh_lib.make(MeshConfig(8, 1, 1))

  def received(micro_batches):
    step, state, batch = getattr(stages, stage)(mesh, micro_batches=micro_batches)
    return hlo.cost(step.lower(state, batch).compile().as_text(), 1).sent["all-reduce"]

  assert 0 < received(2) < 1.02 * received(1)


def test_a_loop_over_minibatches_carries_whole_parameters():
  mesh = mesh_lib.make(MeshConfig(8, 1, 1))
  step, state = stages.improved(mesh)
  compiled = step.lower(state, stages.rollouts(mesh)).compile()
  expected = matrices(state.policy, state.critic)
  rows = [size for size in sent(compiled, "all-gather") if size < expected[0]]  # of a minibatch
  assert sorted(sent(compiled, "all-gather")) == sorted(rows + expected)


def test_moments_that_are_shared_out_move_parameters_as_whole_ones_do():
  mesh = mesh_lib.make(MeshConfig(8, 1, 1))
  whole = ((r"(mu|nu)/", PartitionSpec()), *rules.TRANSFORMER)
  moved = []
  for table in (rules.TRANSFORMER, whole):
    step, state, batch = stages.supervised(mesh, table=table)
    for _ in range(2):
      state, metrics = step(state, batch)
    moved.append(stages.flat((state, metrics)))
    cut = [x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(state.opt_state)]
    assert max(cut) == (1 if table is whole else 8)
  tiny.assert_trees_close(*moved, rtol=1e-5, atol=1e-6)


def test_where_tensors_are_split_no_kernel_is_gathered():
  compiled, state = compiled_sft((1, 1, 8), d_ff=512)  # far larger than an activation
  assert not [size for size in sent(compiled, "all-gather") if size >= kernel(state)]


def test_fsdp_gathers_a_layer_at_a_time_never_the_whole_model():
  layers = 4
  compiled, state = compiled_sft((1, 8, 1), n_layers=layers, compute__scan_layers=True)
  gathered = sent(compiled, "all-gather")
  assert gathered and max(gathered) <= max(kernel(state), table(state))
  assert layers * kernel(state) > max(kernel(state), table(state))  # or the line above says nothing


def kernel(state):
  """Bytes of the largest kernel of one layer."""
  return max(
    x.nbytes // (len(x) if "blocks" in rules.path_name(path) else 1)
    for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    if "block" in rules.path_name(path)
  )


def table(state):
  """Bytes of the embedding."""
  return state.params["trunk"]["embed"]["embedding"].nbytes


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
  learner = ppo.make_learner(policy, scalar, stages.CONFIG, stem_blocks=0)

  def start(key):
    return ppo.init(learner, heads.init(policy, key), heads.init(scalar, key), key)

  state = jax.eval_shape(start, jax.random.key(0))
  shardings = rules.partition(state, mesh)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  spec = lambda tree: [s.spec for s in jax.tree.leaves(tree)]
  assert spec(shardings.ema) == spec(shardings.policy)

  def pieces(layout, tree):
    flat = zip(jax.tree_util.tree_leaves_with_path(layout), jax.tree.leaves(tree))
    kernels = [(sharding, x) for (path, sharding), x in flat if "kernel" in rules.path_name(path)]
    return [mesh_lib.shard_count(sharding, x.shape) for sharding, x in kernels]

  kernels = pieces(shardings.policy, state.policy)
  moments = pieces(shardings.policy_opt, state.policy_opt)
  assert moments == 2 * [count * mesh.shape["data"] for count in kernels]


def test_the_first_rule_that_matches_wins_and_names_the_last_axes(mesh):
  table = ((r"a/kernel$", PartitionSpec("tensor")), (r"kernel$", PartitionSpec("fsdp", None)))
  tree = {"a": {"kernel": jnp.zeros((3, 2))}, "b": {"kernel": jnp.zeros((5, 2, 3))}}
  got = rules.partition(tree | {"count": jnp.int32(0)}, mesh, table)
  assert got["a"]["kernel"].spec == PartitionSpec(None, "tensor")
  assert got["b"]["kernel"].spec == PartitionSpec(None, "fsdp", None)
  assert got["count"].spec == PartitionSpec()


@pytest.mark.parametrize(
  ("shape", "rule", "expected"),
  [
    ((4, 6), ("fsdp", "tensor"), (("fsdp", "data"), "tensor")),  # the first axis that divides
    ((2, 8), ("fsdp", "tensor"), ("fsdp", ("tensor", "data"))),
    ((2, 2), ("fsdp", "tensor"), ("fsdp", "tensor")),  # none does
    ((8, 2, 2), ("fsdp", "tensor"), ("data", "fsdp", "tensor")),  # a stack of layers
    ((8, 8), (None, None), (None, None)),  # a rule that splits nothing
  ],
)
def test_moments_are_shared_out_over_data_besides(shape, rule, expected):
  mesh = mesh_lib.make(MeshConfig(2, 2, 2))
  table = ((r"kernel$", PartitionSpec(*rule)),)
  tree = {"mu": {"kernel": jnp.zeros(shape)}, "a": {"kernel": jnp.zeros(shape)}}
  got = rules.partition(tree, mesh, table)
  assert got["mu"]["kernel"].is_equivalent_to(
    jax.sharding.NamedSharding(mesh, PartitionSpec(*expected)), len(shape)
  )
  stacked = (None,) * (len(shape) - len(rule))
  assert got["a"]["kernel"].spec == PartitionSpec(*stacked, *rule)


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


@pytest.mark.parametrize("axes", [(2, 4, 1), (1, 2, 4), None], ids=lambda axes: str(axes))
def test_a_checkpoint_of_one_mesh_restores_onto_another_bit_for_bit(axes, tmp_path):
  _, saved, _ = stages.supervised(mesh_lib.make(MeshConfig(1, 8, 1)))
  with tiny.checkpointer(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, saved)
  mesh = mesh_lib.make(MeshConfig(*axes)) if axes else stages.one_device()
  wanted = rules.abstract(jax.eval_shape(lambda: saved), mesh)
  restored = tiny.checkpointer(tmp_path, keep=1).restore(wanted).state
  assert tiny.digest(restored) == tiny.digest(saved)
  for array, sharding in zip(*map(jax.tree.leaves, (restored, rules.partition(saved, mesh)))):
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.mark.parametrize(
  ("rows", "expected"), [(8, ("data", "fsdp")), (2, "data"), (6, "data"), (3, None), (1, None)]
)
def test_an_axis_is_split_over_as_many_devices_as_divide_it(rows, expected):
  mesh = mesh_lib.make(MeshConfig(2, 2, 2))
  lay_out = mesh_lib.jit(lambda x: rules.constrain(x, "rows"), mesh)
  sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(expected))
  assert lay_out(jnp.zeros((rows, 3))).sharding.is_equivalent_to(sharding, 2)
