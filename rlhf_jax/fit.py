"""One stage from its last checkpoint to its end: loop, records, held-out figures, checkpoints."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_jax.training import checkpoint, loop, metrics, profile


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage does and how it is shown."""

  name: str
  directory: pathlib.Path
  num_steps: int
  eval_every: int  # steps between held-out figures, each with a checkpoint
  unit: str  # what a step processes: "tokens", "prompts", "episodes"
  per_step: float  # how many of them
  shown: tuple[str, ...]  # metrics on the progress line
  checkpoints: checkpoint.CheckpointConfig  # which of them stay
  profile: profile.ProfileConfig  # which steps are traced
  writers: tuple[loop.Writer, ...] = ()  # who else sees each step's metrics


def fit(
  stage: Stage,
  step_fn: Callable,
  state: Any,
  batches_from: Callable[[int], Iterator],
  evaluate: Callable[[Any], dict[str, float]],
) -> tuple[Any, checkpoint.Checkpointer]:
  """Trains `state` to the end of the stage, going on from its newest checkpoint if there is one.

  Args:
    stage: what it is called, how long it is, where its files go.
    step_fn: `(state, batch) -> (state, metrics)`.
    state: the initial state.
    batches_from: the endless batches from a step on.
    evaluate: held-out figures of a state; the one named "score", if any, says which checkpoint is
      the best.

  Returns:
    The final state and the checkpoints.
  """
  checkpoints = checkpoint.Checkpointer(stage.directory / "checkpoints", stage.checkpoints)
  restored = checkpoints.restore_or_init(state)
  recording = metrics.recording(
    stage.directory,
    stage.name,
    after=restored.step,
    num_steps=stage.num_steps,
    per_step=stage.per_step,
    unit=stage.unit,
    shown=stage.shown,
  )
  step_fn = profile.traced(step_fn, stage.profile, stage.directory, restored.step, stage.num_steps)
  heldout = metrics.heldout(stage.directory, after=restored.step)
  with recording as writers, heldout as write_heldout, checkpoints:
    guard = loop.finite_guard(checkpoints.describe_latest)

    def assess(step, state, _):
      figures = evaluate(state)
      write_heldout(step, figures)
      guard(step, figures)  # a state that fails here is none to go back to
      checkpoints.save(step, state, score=figures.get("score"))

    state = loop.run(
      step_fn,
      restored.state,
      batches_from(restored.step),
      stage.num_steps,
      writers=[*writers, guard],
      hooks=[loop.every(stage.eval_every, assess)],
      save=checkpoints.save,
    )
  return state, checkpoints
