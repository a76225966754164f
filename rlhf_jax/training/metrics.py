"""Where numbers go: JSON lines, TensorBoard, the terminal.

`metrics.jsonl` holds one line a step with nothing in it that depends on the clock, floats as the
shortest text that reads back the same; so a run that was killed and resumed ends with the same
bytes as one that was not. Wall-clock seconds are in `timing.jsonl` beside it.

  with metrics.recording(workdir, "sft", after=state.step, num_steps=1000, shown=("loss",)) as out:
    loop.run(step_fn, state, batches, 1000, writers=[*out, loop.finite_guard(...)])
"""

import collections
import contextlib
import json
import os
import pathlib
import socket
import struct
import sys
import time

import rich.console
import rich.progress

from rlhf_jax.parallel import hosts
from rlhf_jax.training import files
from rlhf_jax.types import UserError

RATE_WINDOW = 20  # steps that a shown rate is averaged over
PLAIN_PERIOD = 5.0  # seconds between lines where the terminal cannot redraw


@contextlib.contextmanager
def recording(
  directory: str | pathlib.Path,
  name: str,
  *,
  after: int,
  num_steps: int,
  per_step: float = 1.0,
  unit: str = "steps",
  shown: tuple[str, ...] = (),
):
  """The writers of one stage: metrics.jsonl, timing.jsonl, tensorboard/ and the screen.

  Of several processes, the first one alone has any.

  Args:
    directory: of the stage; the files lie in it.
    name: of the stage, on the screen.
    after: the step that was restored, 0 for none; records of later steps are dropped.
    num_steps: where the run ends.
    per_step: how many `unit`s ("tokens", "episodes") a step does, for the rate.
    shown: the metrics on the screen, two or three.

  Raises:
    UserError: `directory` cannot be written, or a file in it is broken.
  """
  directory = pathlib.Path(directory)
  files.ensure_writable(directory)
  if not hosts.is_first():
    yield []
    return
  with (
    Jsonl(directory / "metrics.jsonl", after=after) as jsonl,
    TensorBoard(directory / "tensorboard", after=after) as tensorboard,
    Timing(directory / "timing.jsonl", after=after) as timing,
    Progress(name, num_steps, per_step=per_step, unit=unit, shown=shown) as progress,
  ):
    yield [jsonl, timing, tensorboard, progress]


@contextlib.contextmanager
def heldout(directory: str | pathlib.Path, *, after: int):
  """The writer of held-out figures, to heldout.jsonl; it writes in the first process alone."""
  if not hosts.is_first():
    yield lambda step, figures: None
    return
  with Jsonl(pathlib.Path(directory) / "heldout.jsonl", after=after) as jsonl:
    yield jsonl


class Jsonl:
  """Appends {"step": s, name: value, ...} lines; each reaches the system before the call returns.

  Raises:
    UserError: the file cannot be written, or a line before the last is no JSON.
  """

  def __init__(self, path: str | pathlib.Path, *, after: int):
    path = pathlib.Path(path)
    _drop_later(path, after)
    self._file = files.Appender(path)

  def __call__(self, step: int, metrics: dict[str, float]) -> None:
    self._file.append((json.dumps({"step": step, **metrics}) + "\n").encode())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()


def read_jsonl(path: str | pathlib.Path) -> list[dict]:
  """The records of a file that `Jsonl` wrote; a last line cut off by a kill is left out.

  Raises:
    UserError: the file is not there, or a line before the last is no JSON.
  """
  return [record for record, _ in _parsed_lines(pathlib.Path(path))]


def _parsed_lines(path: pathlib.Path) -> list[tuple[dict, str]]:
  try:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  except OSError as error:
    raise UserError(f"{path} could not be read: {error}.") from error
  parsed = []
  for number, line in enumerate(lines, start=1):
    try:
      parsed.append((json.loads(line), line))
    except ValueError as error:
      if number < len(lines):
        raise UserError(f"{path}, line {number} is no JSON: {error}. Move it away.") from error
  return parsed


def _drop_later(path: pathlib.Path, after: int) -> None:
  """Rewrites `path` without the records of steps after `after`, in one rename."""
  if path.exists():
    kept = [line for record, line in _parsed_lines(path) if record["step"] <= after]
    files.write_text_atomic(path, "".join(kept))


class Timing:
  """Appends {"step": s, "seconds": a step, "clock": Unix time} lines, one a second at most.

  "seconds" is the mean over the steps since the line before. The first line is the first step,
  which compiles.
  """

  def __init__(self, path: str | pathlib.Path, *, after: int):
    self._out = Jsonl(path, after=after)
    self._first, self._step, self._time = True, after, time.perf_counter()

  def __call__(self, step: int, metrics: dict[str, float]) -> None:
    now = time.perf_counter()
    if self._first or now - self._time >= 1.0:
      seconds = (now - self._time) / (step - self._step)
      self._out(step, {"seconds": seconds, "clock": time.time()})
      self._first, self._step, self._time = False, step, now

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._out.__exit__(*exception)


@contextlib.contextmanager
def _not_found(module: str):
  """What is imported inside does not find `module`, unless it is there already."""
  hidden = module not in sys.modules
  if hidden:
    sys.modules[module] = None
  try:
    yield
  finally:
    if hidden:
      del sys.modules[module]


class TensorBoard:
  """Scalars for TensorBoard: a TFRecord file of one event a step, which holds all its values.

  The messages are tensorboardX's. Its writer is not used: it writes from a thread, which on a full
  disk fails where nobody can catch it.
  """

  def __init__(self, directory: str | pathlib.Path, *, after: int):
    # Imported here because it takes a second, which a process that only reads would pay as well.
    with _not_found("torch"):  # whose import takes three, for one of its writers
      from tensorboardX import record_writer
      from tensorboardX.proto import event_pb2, summary_pb2

    self._crc, self._event = record_writer.masked_crc32c, event_pb2.Event
    self._summary = summary_pb2.Summary
    directory = pathlib.Path(directory)
    files.ensure_writable(directory)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    self._file = files.Appender(directory / name)
    self._append(file_version="brain.Event:2")
    # TensorBoard hides what an earlier run wrote from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._append(step=after + 1, session_log=start)

  def __call__(self, step: int, metrics: dict[str, float]) -> None:
    values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
    self._append(step=step, summary=self._summary(value=values))

  def _append(self, **fields) -> None:
    data = self._event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    crcs = (struct.pack("<I", self._crc(part)) for part in (length, data))
    self._file.append(length + next(crcs) + data + next(crcs))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()


class Progress:
  """Step, rate, time left and a few metrics: a bar on a terminal, a line now and then elsewhere.

  Where the output is no terminal (a log file, a test) a line comes every `PLAIN_PERIOD` seconds;
  a run shorter than that says nothing.
  """

  def __init__(
    self,
    name: str,
    num_steps: int,
    *,
    per_step: float = 1.0,
    unit: str = "steps",
    shown: tuple[str, ...] = (),
    console: rich.console.Console | None = None,
  ):
    self.name, self.num_steps, self.per_step, self.unit = name, num_steps, per_step, unit
    self.shown = shown
    self._console = console or rich.console.Console(file=sys.stderr)
    # Empty at first: the first step compiles, so rates count from its end.
    self._times = collections.deque(maxlen=RATE_WINDOW + 1)
    self._printed = time.monotonic()
    self._bar = None
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=self._console,
        refresh_per_second=4,
      )
      self._task = self._bar.add_task(name, total=num_steps, text="compiling")

  def __call__(self, step: int, metrics: dict[str, float]) -> None:
    now = time.monotonic()
    self._times.append((step, now))
    if self._bar is not None:
      self._bar.update(self._task, completed=step, text=self._text(step, metrics))
    elif now - self._printed >= PLAIN_PERIOD:
      self._printed = now
      self._console.print(
        f"{self.name} {self._text(step, metrics)}", highlight=False, soft_wrap=True
      )

  def _text(self, step: int, metrics: dict[str, float]) -> str:
    """Such as "step 120/1000  5,300 tokens/s  2:41 left  loss 1.93"."""
    (first, since), (last, now) = self._times[0], self._times[-1]
    parts = [f"step {step}/{self.num_steps}"]
    if now > since:
      steps_per_second = (last - first) / (now - since)
      rate = steps_per_second * self.per_step
      left = round((self.num_steps - step) / steps_per_second)
      parts += [f"{rate:,.0f} {self.unit}/s" if rate >= 100 else f"{rate:.3g} {self.unit}/s"]
      parts += [f"{left // 60}:{left % 60:02d} left"]
    parts += [f"{name} {metrics[name]:.4g}" for name in self.shown if name in metrics]
    return "  ".join(parts)

  def __enter__(self):
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.stop()
