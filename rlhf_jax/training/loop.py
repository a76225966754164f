"""The training loop: a function, writers that see every step, and hooks that fire now and then.

There is no trainer class. A stage gives `step_fn(state, batch) -> (state, metrics)`; whoever runs
it says what is recorded (`writers`) and what else happens (`hooks`):

  loop.run(
    step_fn, state, batches, num_steps=1000,
    writers=[jsonl.write, progress.write, loop.finite_guard(checkpointer.describe_latest)],
    hooks=[loop.every(50, evaluate), loop.every(200, save)],
  )

A *writer* is `(step, metrics) -> None` and gets each step's numbers on the host, one step late:
the next step is dispatched before they are fetched, so the device never waits for Python. A *hook*
is `(step, state, metrics) -> None`. Before one fires, all metrics up to its step have reached the
writers; so a checkpoint never holds a step that is not on record or that was not finite.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf_jax.parallel import hosts
from rlhf_jax.training import preemption
from rlhf_jax.types import Metrics, UserError

Writer = Callable[[int, dict[str, float]], None]
Fire = Callable[[int, Any, dict[str, float]], None]


class NonFiniteError(UserError):
  """A metric or a parameter became NaN or infinite; training stopped at that step."""


@dataclasses.dataclass(frozen=True)
class Hook:
  """Calls `fire(step, state, metrics)` after every `period` steps, and after the last one."""

  fire: Fire
  period: int | None  # steps; None: after the last step only

  def due(self, step: int, num_steps: int) -> bool:
    return step == num_steps or (self.period is not None and step % self.period == 0)


def every(period: int, fire: Fire) -> Hook:
  """A hook that fires after every `period` steps, and after the last step of the run."""
  if period < 1:
    raise UserError(f"a hook cannot fire every {period} steps; use 1 or more.")
  return Hook(fire, period)


def at_end(fire: Fire) -> Hook:
  """A hook that fires once, after the last step of the run."""
  return Hook(fire, None)


def run(
  step_fn: Callable,
  state: Any,
  batches: Iterable,
  num_steps: int,
  *,
  writers: Sequence[Writer] = (),
  hooks: Sequence[Hook] = (),
  save: Callable[[int, Any], None] | None = None,
) -> Any:
  """Runs `step_fn` from `state.step` to `num_steps` over endless `batches`; returns the state.

  Step s turns the state after s - 1 steps into the one after s; `state.step` counts them. Metrics
  are dicts of scalars. The state may be donated: nothing here keeps an old one. A batch is drawn
  only when its step is about to run, so the batch source's position belongs to the last step.

  With `save(step, state)` a process that is told to end (SIGTERM) does so after the step at hand,
  saved.

  Raises:
    UserError: `batches` ended before `num_steps`.
    Preempted: the process was told to end.
  """
  start, pending = int(state.step), collections.deque()
  step = start
  with preemption.watching() if save else contextlib.nullcontext():
    for step, batch in zip(range(start + 1, num_steps + 1), batches):
      state, metrics = step_fn(state, batch)
      pending.append((step, metrics))
      due = [hook for hook in hooks if hook.due(step, num_steps)]
      preempted = save is not None and step < num_steps and preemption.is_due(step)
      while len(pending) > (0 if due or preempted or step == num_steps else 1):
        metrics = _record(*pending.popleft(), writers)
      for hook in due:
        hook.fire(step, state, metrics)
      if preempted:
        save(step, state)
        raise preemption.Preempted(f"after step {step} of {num_steps}, which is saved")
  if step < num_steps:
    raise UserError(f"the batches ended after step {step} of {num_steps}; they must be endless.")
  return state


def _record(step: int, metrics: Metrics, writers: Sequence[Writer]) -> dict[str, float]:
  """Waits for the metrics of `step`, hands them to every writer, and returns them."""
  fetched = {name: float(value) for name, value in hosts.whole(metrics).items()}
  for write in writers:
    write(step, fetched)
  return fetched


def finite_guard(last_good: Callable[[], str]) -> Writer:
  """A writer that stops the run at the first metric that is NaN or infinite.

  Put it last, so that the numbers of that step are on record. `last_good` names what to go back to,
  as `Checkpointer.describe_latest` does; it is not touched.
  """

  def write(step: int, metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
      if not math.isfinite(value):
        raise NonFiniteError(
          f"step {step}: metric {name!r} is {value}; training stopped. Kept: {last_good()}. Try a "
          f"lower learning rate or a smaller clip_norm; the same command goes on from what is kept."
        )

  return write
