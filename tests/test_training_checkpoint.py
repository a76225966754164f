"""Checkpoints: bit-exact, atomic under kill -9, checked for damage, clear when they do not fit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.training import checkpoint, files, loop
from rlhf_jax.types import UserError


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  optimizer: tuple
  key: jax.Array


def state_of(step, width=64, seed=0):
  """A state like a stage's: parameters, Adam's moments, a typed key; random, so incompressible."""
  keys = jax.random.split(jax.random.key(seed + step), 2)
  params = {
    "layer": {"kernel": jax.random.normal(keys[0], (width, width)), "bias": jnp.zeros(width)}
  }
  moments = optax.adam(1e-3).init(params)
  return State(jnp.int32(step), params, moments, keys[1])


def bits(tree):
  raw = lambda leaf: (
    jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  )
  return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def saved(directory, steps, keep=5):
  checkpoints = tiny.checkpointer(directory, keep=keep)
  for step in steps:
    checkpoints.save(step, state_of(step), {"position": 10 * step})
  checkpoints.finish()
  return checkpoints


@pytest.mark.conformance("B25")
def test_everything_comes_back_bit_for_bit_in_one_piece(tmp_path):
  restored = saved(tmp_path, [1, 2]).restore(state_of(0))
  assert (restored.step, restored.extra) == (2, {"position": 20})
  assert bits(restored.state) == bits(state_of(2))
  assert jax.tree.structure(restored.state) == jax.tree.structure(state_of(2))


@pytest.mark.conformance("B24")
def test_a_restored_key_draws_the_same_numbers(tmp_path):
  restored = saved(tmp_path, [3]).restore(state_of(0))
  draw = lambda state: jax.random.normal(jax.random.fold_in(state.key, 7), (4,))
  np.testing.assert_array_equal(draw(restored.state), draw(state_of(3)))


def test_restore_needs_shapes_only_and_obeys_shardings(tmp_path):
  checkpoints = saved(tmp_path, [1])
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spec = lambda leaf: P("data") if leaf.ndim == 2 else P()
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(leaf))
    ),
    jax.eval_shape(lambda: state_of(0)),
  )
  restored = checkpoints.restore(abstract).state
  assert restored.params["layer"]["kernel"].sharding.spec == P("data")
  assert bits(restored) == bits(state_of(1))


def test_restore_or_init_keeps_the_initial_state_where_nothing_was_saved(tmp_path):
  initial = state_of(0)
  restored = tiny.checkpointer(tmp_path, keep=1).restore_or_init(initial)
  assert restored.state is initial and (restored.step, restored.extra) == (0, {})


def test_the_newest_and_the_best_are_kept(tmp_path):
  checkpoints = tiny.checkpointer(tmp_path, keep=2)
  for step, score in enumerate([0.1, 0.9, 0.3, 0.9, 0.2], start=1):
    checkpoints.save(step, state_of(step), score=score)
  checkpoints.finish()
  assert checkpoints.best_step() == 2  # the earlier of equals
  assert checkpoints.steps() == [2, 4, 5]
  assert checkpoints.restore(state_of(0), step=2).step == 2


def test_every_third_is_kept_for_good_beside_the_newest(tmp_path):
  with tiny.checkpointer(tmp_path, keep=1, keep_every=3) as checkpoints:
    for step in range(1, 9):
      checkpoints.save(step, state_of(step))
  assert checkpoints.steps() == [3, 6, 8]


@pytest.mark.parametrize("background", [True, False])
def test_a_state_that_is_donated_right_after_save_is_saved_as_it_was(tmp_path, background):
  state = state_of(1, width=512)
  before = bits(state)
  move = jax.jit(
    lambda state: jax.tree.map(
      lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + 1, state
    ),
    donate_argnums=0,
  )
  with tiny.checkpointer(tmp_path, background=background) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(3):
      state = move(state)
  assert bits(checkpoints.restore(state_of(0, width=512)).state) == before
  assert bits(state) != before


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
  write, may_write = files.write_about, threading.Event()
  wait_and_write = lambda *args: (may_write.wait(timeout=60), write(*args))
  monkeypatch.setattr(files, "write_about", wait_and_write)
  checkpoints = tiny.checkpointer(tmp_path)
  checkpoints.save(1, state_of(1))
  assert checkpoints.steps() == []  # `save` is back, and nothing counts as written
  may_write.set()
  checkpoints.finish()
  assert checkpoints.steps() == [1]


def test_what_went_wrong_in_the_background_is_said_by_the_next_save(tmp_path, monkeypatch):
  def full(directory, about):
    raise OSError(28, "No space left on device")

  checkpoints = saved(tmp_path, [1])
  monkeypatch.setattr(files, "write_about", full)
  checkpoints.save(2, state_of(2))
  with pytest.raises(UserError, match="2 could not be written: .*No space left.*Kept: .*1. Free"):
    checkpoints.save(3, state_of(3))
  assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_the_newest_step_may_be_saved_twice_an_older_one_not(tmp_path):
  checkpoints = saved(tmp_path, [4])
  checkpoints.save(4, state_of(9))
  assert bits(checkpoints.restore(state_of(0)).state) == bits(state_of(4))
  with pytest.raises(UserError, match="checkpoint 3 would come after 4"):
    checkpoints.save(3, state_of(3))


def largest_file(directory):
  return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


DAMAGES = {
  "a flipped bit in the data": lambda d: flip_a_bit(largest_file(d)),
  "a truncated file": lambda d: os.truncate(largest_file(d), 100),
  "a missing file": lambda d: largest_file(d).unlink(),
  "an empty about.json": lambda d: (d / "about.json").write_text(""),
  "a changed about.json": lambda d: flip_a_bit(d / "about.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage, caplog):
  checkpoints = saved(tmp_path, [1, 2])
  DAMAGES[damage](tmp_path / "2")
  restored = checkpoints.restore(state_of(0))
  assert restored.step == 1 and bits(restored.state) == bits(state_of(1))
  assert "2 is damaged" in caplog.text
  assert (tmp_path / "damaged-2").is_dir()  # set aside, not deleted
  checkpoints.save(2, state_of(2))  # the run comes by again
  assert checkpoints.restore(state_of(0)).step == 2


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_anew(tmp_path):
  checkpoints = saved(tmp_path, [1, 2])
  for step in (1, 2):
    flip_a_bit(largest_file(tmp_path / str(step)))
  for _ in range(2):  # nor at the second try
    with pytest.raises(UserError, match="nothing to restore.*2: state/.* is not what was written"):
      checkpoints.restore_or_init(state_of(0))
  assert checkpoints.steps() == [1, 2]


def test_other_shapes_are_named_with_both_shapes(tmp_path):
  checkpoints = saved(tmp_path, [1])
  with pytest.raises(
    UserError, match=r"kernel: saved \[64, 64\] float32, wanted \[32, 32\] float3"
  ):
    checkpoints.restore(state_of(0, width=32))
  assert checkpoints.steps() == [1]


def test_other_tensors_are_named(tmp_path):
  checkpoints = saved(tmp_path, [1])
  other = state_of(0).replace(
    params={"layer": {"kernel": jnp.zeros((64, 64)), "gate": jnp.ones(1)}}
  )
  with pytest.raises(UserError, match="gate: missing in the checkpoint.*bias: only in the checkp"):
    checkpoints.restore(other)


def test_a_nan_is_refused_and_named(tmp_path):
  checkpoints = saved(tmp_path, [1])
  bad = state_of(2)
  bad = bad.replace(params={"layer": bad.params["layer"] | {"bias": jnp.full(64, jnp.nan)}})
  with pytest.raises(loop.NonFiniteError, match="params/layer/bias.*Kept: checkpoint .*1"):
    checkpoints.save(2, bad)
  assert checkpoints.steps() == [1]


KILLED = textwrap.dedent("""
  import sys
  sys.path.insert(0, {tests!r})
  import conftest, test_training_checkpoint as t
  import tiny
  checkpoints = tiny.checkpointer({directory!r}, keep=2)
  restored = checkpoints.restore_or_init(t.state_of(0))
  assert t.bits(restored.state) == t.bits(t.state_of(restored.step)), "not what was saved"
  sys.stdout.write(f"{{restored.step}}\\n")
  sys.stdout.flush()
  for step in range(restored.step + 1, 10**6):
    checkpoints.save(step, t.state_of(step))
""")


def test_killed_in_mid_save_the_last_good_checkpoint_is_used(tmp_path):
  script = KILLED.format(tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path))
  delays, resumed = random.Random(0), []
  for _ in range(3):
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    resumed.append(int(child.stdout.readline()))
    try:
      child.wait(timeout=0.3 + 0.3 * delays.random())
    except subprocess.TimeoutExpired:
      child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
  assert resumed[0] == 0 and resumed == sorted(set(resumed))
  final = tiny.checkpointer(tmp_path, keep=2)
  assert not list(tmp_path.glob("tmp-*"))  # what the kill left is swept
  restored = final.restore(state_of(0))
  assert restored.step > resumed[-1] and bits(restored.state) == bits(state_of(restored.step))


LIMITED = textwrap.dedent("""
  import resource, sys
  sys.path.insert(0, {tests!r})
  import conftest, test_training_checkpoint as t
  from rlhf_jax.training import files
  from rlhf_jax.types import UserError
  checkpoints = t.saved({directory!r}, [1])
  if not {look_first}:
    files.ensure_space = lambda directory, needed: None
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
  try:
    checkpoints.save(2, t.state_of(2))
    checkpoints.finish()
  except UserError as error:
    sys.exit(f"UserError: {{error}}")
""")


@pytest.mark.parametrize("look_first", [True, False])
def test_a_limit_hit_in_mid_save_leaves_a_clear_error_and_the_older_checkpoint(
  tmp_path, look_first
):
  script = LIMITED.format(
    tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path), look_first=look_first
  )
  child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert child.returncode == 1
  if look_first:  # noticed before the first byte, so there is nothing else to read
    assert child.stderr.startswith("UserError: ") and "File too large" in child.stderr
  else:
    assert f"UserError: {tmp_path / '2'} could not be written" in child.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["1"]
  assert tiny.checkpointer(tmp_path, keep=1).restore(state_of(0)).step == 1


def test_too_little_space_is_noticed_before_the_first_byte(tmp_path, monkeypatch):
  checkpoints = saved(tmp_path, [1])
  usage = files.shutil.disk_usage(tmp_path)._replace(free=2**20)
  monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(UserError, match=r"needs 0\.0 MB, the disk has 1\.0 MB free"):
    checkpoints.save(2, state_of(2))
  assert checkpoints.steps() == [1]


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="file/run cannot be written.*another workdir"):
    tiny.checkpointer(tmp_path / "file" / "run", keep=1)


def test_a_finished_stage_gives_back_parameters_and_config(tmp_path):
  params = state_of(1).params
  checkpoint.save_params(tmp_path / "final", params, {"d_model": 64})
  loaded, config = checkpoint.load_params(tmp_path / "final")
  assert bits(loaded) == bits(params) and config == {"d_model": 64}
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  checkpoint.save_params(tmp_path / "final", state_of(2).params, {"d_model": 65})
  loaded, config = checkpoint.load_params(tmp_path / "final", params)
  assert bits(loaded) == bits(state_of(2).params) and config == {"d_model": 65}
  assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_parameters_that_are_missing_damaged_or_of_another_shape_are_clear_errors(tmp_path):
  with pytest.raises(UserError, match="there is no such directory"):
    checkpoint.load_params(tmp_path / "final")
  checkpoint.save_params(tmp_path / "final", state_of(1).params, {})
  with pytest.raises(UserError, match=r"saved \[64, 64\] float32, wanted \[32, 32\] float32"):
    checkpoint.load_params(tmp_path / "final", state_of(1, width=32).params)
  flip_a_bit(largest_file(tmp_path / "final"))
  with pytest.raises(UserError, match="is not what was written"):
    checkpoint.load_params(tmp_path / "final")


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "lineage.json"
  files.write_json_atomic(path, {"round": 1})

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(UserError, match="No space left.*unchanged"):
    files.write_json_atomic(path, {"round": 2})
  assert files.read_json(path) == {"round": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["lineage.json"]


def test_json_floats_come_back_bit_for_bit(tmp_path):
  numbers = np.random.default_rng(0).normal(size=50).tolist()
  files.write_json_atomic(tmp_path / "numbers.json", numbers)
  assert files.read_json(tmp_path / "numbers.json") == numbers
