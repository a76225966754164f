"""Records: exact, resumable byte for byte, readable on a screen and in TensorBoard."""

import io
import itertools
import json
import math
import struct

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import tiny

from rlhf_jax.training import loop, metrics
from rlhf_jax.types import UserError


def test_floats_read_back_bit_for_bit(tmp_path):
  numbers = np.random.default_rng(0).normal(size=20).astype(np.float32) ** 9
  with metrics.Jsonl(tmp_path / "m.jsonl", after=0) as write:
    for step, number in enumerate(numbers, start=1):
      write(step, {"loss": float(number)})
  back = [record["loss"] for record in metrics.read_jsonl(tmp_path / "m.jsonl")]
  assert struct.pack("20f", *back) == numbers.tobytes()


def test_a_nan_stays_on_record(tmp_path):
  with metrics.Jsonl(tmp_path / "m.jsonl", after=0) as write:
    write(1, {"loss": math.nan})
  assert math.isnan(metrics.read_jsonl(tmp_path / "m.jsonl")[0]["loss"])


def test_a_record_has_reached_the_file_when_the_writer_returns(tmp_path):
  write = metrics.Jsonl(tmp_path / "m.jsonl", after=0)
  write(1, {"loss": 0.5})
  assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_resuming_drops_later_records_and_a_line_cut_off_by_a_kill(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1.0}\n{"step": 3}\n{"ste')
  with metrics.Jsonl(path, after=2) as write:
    write(3, {"loss": 1.0})
  assert path.read_text() == (
    '{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1.0}\n{"step": 3, "loss": 1.0}\n'
  )


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_dropped(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
  with pytest.raises(UserError, match="m.jsonl, line 2 is no JSON"):
    metrics.Jsonl(path, after=1)
  assert path.read_text() == '{"step": 1}\nbroken\n{"step": 3}\n'


@flax.struct.dataclass
class State:
  step: jax.Array
  weight: jax.Array
  key: jax.Array


@jax.jit
def noisy_step(state, batch):
  noise = jax.random.normal(jax.random.fold_in(state.key, state.step))
  weight = state.weight + 0.1 * jnp.tanh(noise * batch)
  return state.replace(step=state.step + 1, weight=weight), {"weight": weight, "noise": noise}


class Killed(BaseException):
  """Stands for the end of a process."""


def train(directory, *, kill_at=None):
  """Twelve steps with a checkpoint every four; `kill_at` ends it when that step is dispatched."""
  state = State(jnp.int32(0), jnp.float32(1), jax.random.key(0))
  checkpoints = tiny.checkpointer(directory / "checkpoints", keep=2)
  restored = checkpoints.restore_or_init(state)
  batches = (jnp.float32(math.sin(i)) for i in itertools.count(restored.step))

  def step_fn(state, batch):
    if kill_at is not None and int(state.step) + 1 == kill_at:
      raise Killed
    return noisy_step(state, batch)

  save = loop.every(4, lambda step, state, m: checkpoints.save(step, state))
  recording = metrics.recording(directory, "toy", after=restored.step, num_steps=12)
  with checkpoints, recording as writers:
    return loop.run(step_fn, restored.state, batches, 12, writers=writers, hooks=[save])


@pytest.mark.conformance("B24")
def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(tmp_path):
  undisturbed = train(tmp_path / "whole")
  for kill_at in (3, 5, 8, 9, 12):  # before, just after, just before and at a checkpoint's step
    with pytest.raises(Killed):
      train(tmp_path / "killed", kill_at=kill_at)
  resumed = train(tmp_path / "killed")
  whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
  assert [r["step"] for r in metrics.read_jsonl(whole)] == list(range(1, 13))
  assert killed.read_bytes() == whole.read_bytes()
  assert np.asarray(resumed.weight).tobytes() == np.asarray(undisturbed.weight).tobytes()


def test_metrics_hold_no_clock_and_timing_holds_it(tmp_path):
  train(tmp_path)
  keys = {key for record in metrics.read_jsonl(tmp_path / "metrics.jsonl") for key in record}
  assert keys == {"step", "weight", "noise"}
  first = metrics.read_jsonl(tmp_path / "timing.jsonl")[0]
  assert first["step"] == 1 and first["seconds"] > 0 and first["clock"] > 1.7e9


def test_tensorboard_holds_the_scalars_and_where_the_run_was_resumed(tmp_path):
  with metrics.TensorBoard(tmp_path, after=4) as write:
    write(5, {"loss": 0.5, "policy/kl": 0.25})
  (path,) = tmp_path.iterdir()
  events = tensorboard_events(path.read_bytes())
  assert events[0].file_version == "brain.Event:2"
  scalars = {v.tag: (e.step, v.simple_value) for e in events for v in e.summary.value}
  assert scalars == {"loss": (5, 0.5), "policy/kl": (5, 0.25)}
  assert [e.step for e in events if e.HasField("session_log")] == [5]


def tensorboard_events(data):
  """The events of a TFRecord file: length, CRC, message, CRC, and again."""
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  events = []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    message = data[12 : 12 + length]
    crcs = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length : 16 + length])
    assert crcs == (masked_crc32c(data[:8]), masked_crc32c(message))
    events.append(Event.FromString(message))
    data = data[16 + length :]
  return events


def progress(monkeypatch, *, terminal, period=5.0):
  """A Progress on a screen made of text, and a clock that the test moves."""
  clock = [0.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
  out = io.StringIO()
  console = rich.console.Console(file=out, force_terminal=terminal, width=120)
  shown = metrics.Progress(
    "sft", 100, per_step=4096, unit="tokens", shown=("loss",), console=console
  )
  return shown, clock, out


def test_progress_shows_step_rate_time_left_and_metrics(monkeypatch):
  shown, clock, out = progress(monkeypatch, terminal=True)
  with shown:
    clock[0] = 60.0  # the compilation, which no rate may include
    shown(1, {"loss": 3.0})
    clock[0] = 62.0
    shown(5, {"loss": 1.23456, "other": 9.0})
  # Four steps in two seconds: 8,192 tokens/s, and 95 steps left take 48 s.
  assert "step 5/100  8,192 tokens/s  0:48 left  loss 1.235" in out.getvalue()
  assert "other" not in out.getvalue()


def test_progress_without_a_terminal_is_a_line_every_five_seconds(monkeypatch):
  shown, clock, out = progress(monkeypatch, terminal=False)
  with shown:
    for step in range(1, 25):
      clock[0] = 0.5 * step
      shown(step, {"loss": 1.0})
  lines = out.getvalue().splitlines()
  assert [line.split()[2] for line in lines] == ["10/100", "20/100"]
  assert lines[1] == "sft step 20/100  8,192 tokens/s  0:40 left  loss 1"


def test_a_run_shorter_than_five_seconds_says_nothing_without_a_terminal(monkeypatch):
  shown, clock, out = progress(monkeypatch, terminal=False)
  with shown:
    clock[0] = 4.9
    shown(1, {})
  assert out.getvalue() == ""


def test_jsonl_that_cannot_be_written_is_a_clear_error(tmp_path):
  (tmp_path / "m.jsonl").mkdir()
  with pytest.raises(UserError, match="m.jsonl"):
    metrics.Jsonl(tmp_path / "m.jsonl", after=0)


def test_a_full_disk_ends_the_run_with_one_clear_error(tmp_path, monkeypatch):
  class Full(io.RawIOBase):
    room = 100  # bytes; then a short write, then none, as a real disk does

    def writable(self):
      return True

    def write(self, data):
      if not self.room:
        raise OSError(28, "No space left on device")
      written, self.room = min(len(data), self.room), max(self.room - len(data), 0)
      return written

  monkeypatch.setattr(metrics.files, "open", lambda *_, **__: Full(), raising=False)
  with pytest.raises(UserError, match="m.jsonl could not be written: .*No space left"):
    with metrics.Jsonl(tmp_path / "m.jsonl", after=0) as write:
      for step in range(1, 100):
        write(step, {"loss": 1.0})


def test_records_are_plain_json_for_other_programs(tmp_path):
  train(tmp_path)
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
