"""Where the time of training steps goes: a trace of some of them, and its dearest operations.

The trace lies in `<stage>/profile/`: perfetto_trace.json.gz for ui.perfetto.dev, and the rest for
TensorBoard with XProf, which also names the line of Python behind an operation.
"""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable

import jax
import rich.box
import rich.console
import rich.table

from rlhf_jax.config import PositiveInt
from rlhf_jax.parallel import hosts

NANO = 1e-9


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Which training steps of every stage are traced."""

  first_step: PositiveInt | None  # None traces nothing; step 1 also compiles
  num_steps: PositiveInt
  operations: PositiveInt  # the dearest so many of each compiled program are shown


@dataclasses.dataclass(frozen=True)
class Operation:
  """All calls of one operation in a trace; on several devices or cores these add up."""

  program: str  # "jit_update"
  name: str  # as in the compiled program: "fusion.12"
  seconds: float  # without the operations that it calls
  calls: int


def traced(
  step_fn: Callable, config: ProfileConfig, directory: pathlib.Path, after: int, num_steps: int
) -> Callable:
  """`step_fn`, of which the steps of `config` are traced; `after` is the last one that was done.

  The first process alone traces.
  """
  if config.first_step is None or not hosts.is_first():
    return step_fn
  last = min(config.first_step + config.num_steps - 1, num_steps)
  steps, folder = itertools.count(after + 1), directory / "profile"

  def step(state, batch):
    number = next(steps)
    if number == config.first_step:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
    state, metrics = step_fn(state, batch)
    if config.first_step <= number == last:
      jax.block_until_ready((state, metrics))
      jax.profiler.stop_trace()
      show(operations(folder), config.operations, folder)
    return state, metrics

  return step


def operations(folder: pathlib.Path) -> list[Operation]:
  """What the newest trace in `folder` holds, the dearest first."""
  newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  seconds, calls = collections.Counter(), collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
    for line in plane.lines:
      for key, own in own_times(line.events):
        seconds[key] += own * NANO
        calls[key] += 1
  found = [Operation(*key, seconds[key], calls[key]) for key in seconds]
  return sorted(found, key=lambda operation: -operation.seconds)


def own_times(events: Iterable) -> Iterable[tuple[tuple[str, str], float]]:
  """((program, operation), nanoseconds) of each event of a line, without the events inside it."""
  named = []
  for event in events:
    stats = dict(event.stats)
    if "hlo_op" in stats and "hlo_module" in stats:
      named.append((event.start_ns, event.end_ns, (stats["hlo_module"], stats["hlo_op"])))
  own = [end - start for start, end, _ in named]
  around = []  # those that have begun and not ended
  for i in sorted(range(len(named)), key=lambda i: (named[i][0], -named[i][1])):
    start, end, _ = named[i]
    while around and named[around[-1]][1] <= start:
      around.pop()
    if around:
      own[around[-1]] -= end - start
    around.append(i)
  return [(key, time) for (_, _, key), time in zip(named, own)]


def show(found: list[Operation], count: int, folder: pathlib.Path) -> None:
  """Prints the dearest operations of each program, the dearest program first."""
  console = rich.console.Console()
  totals = collections.Counter()
  for operation in found:
    totals[operation.program] += operation.seconds
  for program, total in totals.most_common():
    table = rich.table.Table(title=f"{program}: {total:.3f} s", box=rich.box.SIMPLE)
    table.add_column("operation", no_wrap=True)
    for name in ("seconds", "share", "calls"):
      table.add_column(name, justify="right")
    for one in [operation for operation in found if operation.program == program][:count]:
      table.add_row(one.name, f"{one.seconds:.3f}", f"{one.seconds / total:.0%}", str(one.calls))
    console.print(table)
  console.print(f"the trace is in {folder}", highlight=False)
