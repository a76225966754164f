"""Checkpoints that survive being killed.

`<directory>/<step>/` is one checkpoint, a folder as `stored.py` writes it, with step, score and
what the caller adds in its `about.json`. One with a number for a name is whole.

`save` returns when the state is copied to the host and may be donated to the next step; a thread
writes it while training goes on. The next `save` or `finish` waits for it, and raises its error.
"""

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from flax import traverse_util

from rlhf_jax.config import PositiveInt
from rlhf_jax.parallel import hosts
from rlhf_jax.training import files, stored
from rlhf_jax.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Which checkpoints of a stage stay; the newest and the best always do."""

  keep: PositiveInt  # the newest so many
  keep_every: PositiveInt | None  # and those of every so many steps
  background: bool  # training goes on while one is written


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held."""

  step: int  # 0: nothing was there, `state` is the initial one
  state: Any
  extra: dict  # what the caller gave to `save`; {} at step 0


class Checkpointer:
  """The checkpoints of one run: the newest `keep`, the one with the best score, and every m-th.

  As a context it ends with `finish`.

  Raises:
    UserError: `directory` cannot be written.
  """

  def __init__(self, directory: str | pathlib.Path, config: CheckpointConfig):
    self.directory = pathlib.Path(directory).absolute()
    self.config = config
    self._finish: Callable[[], None] | None = None  # of the checkpoint that is being written
    files.ensure_writable(self.directory)
    if hosts.is_first():
      for unfinished in self.directory.glob("tmp-*"):  # of a process that was killed
        shutil.rmtree(unfinished)
    hosts.wait(f"opened {self.directory}")

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind, error, traceback):
    if not (isinstance(error, Exception) and hosts.is_lost(error)):  # the others cannot finish
      self.finish()

  def steps(self) -> list[int]:
    """The steps whose checkpoints are whole, oldest first."""
    return sorted(int(p.name) for p in self.directory.iterdir() if re.fullmatch(r"\d+", p.name))

  def latest_step(self) -> int | None:
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the highest `score`, the earliest of equals; None where none has a score."""
    scores = {step: self._score(step) for step in self.steps()}
    scores = {step: score for step, score in scores.items() if score is not None}
    return max(scores, key=lambda step: (scores[step], -step), default=None)

  def describe_latest(self) -> str:
    """The newest checkpoint in words, for messages; waits for one that is being written."""
    self.finish()
    step = self.latest_step()
    return "no checkpoint yet" if step is None else f"checkpoint {self.directory / str(step)}"

  def save(self, step: int, state: Any, extra: dict | None = None, *, score: float | None = None):
    """Writes the state after `step`; `extra` is anything JSON holds, a higher `score` is better.

    Steps only go up; saving the newest step again does nothing. Older checkpoints are deleted when
    the new one is whole.

    Raises:
      NonFiniteError: the state holds a NaN or an infinity; it is not saved.
      UserError: `step` is not after the newest, or as `finish`.
    """
    self.finish()
    latest = self.latest_step()
    if latest is not None and step <= latest:
      if step == latest:
        return
      raise UserError(
        f"{self.directory}: checkpoint {step} would come after {latest}, which is newer; move the "
        f"newer ones away to go on from an older one."
      )
    stored.check_finite(state, step, self.describe_latest())
    about = {"step": step, "score": score, "extra": extra or {}}
    path = self.directory / str(step)
    self._finish = stored.begin(path, state, about, kept=self.describe_latest(), then=self._prune)
    if not self.config.background:
      self.finish()

  def finish(self) -> None:
    """Waits until the checkpoint that is being written, if any, is whole.

    Raises:
      UserError: it could not be written (full or read-only disk); the older ones are as they were.
    """
    finish, self._finish = self._finish, None
    if finish is not None:
      finish()

  def _prune(self) -> None:
    """Deletes what does not stay."""
    steps, m = self.steps(), self.config.keep_every
    kept = {*steps[-self.config.keep :], self.best_step()}
    kept |= {step for step in steps if m is not None and step % m == 0}
    for old in set(steps) - kept:
      shutil.rmtree(self.directory / str(old))

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
    """Reads the newest whole checkpoint (or that of `step`) onto `abstract_state`'s shardings.

    A damaged newest one is reported, set aside as `damaged-<step>`, and the one before is read.

    Args:
      abstract_state: arrays or `jax.ShapeDtypeStruct`s in the tree that was saved; leaves without a
        sharding are placed on the default device.
      step: which one; None is the newest.

    Raises:
      UserError: nothing to restore, nothing undamaged, or tensors of another name, shape or dtype
        (found before any is read).
    """
    self.finish()
    asked = self.steps()[::-1] if step is None else [step]
    damaged = {}
    for candidate in asked:
      path = self.directory / str(candidate)
      problem = files.damage(path)
      if problem is None:
        about = files.read_about(path)
        restored = Restored(candidate, stored.read(path, abstract_state, about), about["extra"])
        self._set_aside(damaged)
        return restored
      damaged[candidate] = problem
      logging.warning("checkpoint %s is damaged (%s)", path, problem)
    found = "; ".join(f"{key}: {value}" for key, value in damaged.items()) or "no checkpoint"
    raise UserError(
      f"{self.directory}: nothing to restore ({found}). Choose another workdir, or move this "
      f"directory away to start anew."
    )

  def restore_or_init(self, state: Any) -> Restored:
    """The newest checkpoint in the place of `state`, or `state` itself where none was saved."""
    if not self.steps():
      return Restored(0, state, {})
    restored = self.restore(state)
    logging.info("going on from %s", self.directory / str(restored.step))
    return restored

  def _score(self, step: int) -> float | None:
    path = self.directory / str(step)
    return None if files.about_damage(path) else files.read_about(path)["score"]

  def _set_aside(self, damaged: dict[int, str]):
    if hosts.is_first():
      for step in damaged:
        target = files.free_name(self.directory / f"damaged-{step}")
        (self.directory / str(step)).rename(target)
        logging.warning("checkpoint %s set aside as %s", step, target)
    hosts.wait("set aside")


def save_params(directory: str | pathlib.Path, params: Params, config: dict) -> None:
  """Writes a finished stage: parameters, with `config.json` (what is needed to use them) beside.

  It is whole when it appears under its name; an older one of that name is replaced.

  Raises:
    NonFiniteError, UserError: as `Checkpointer.save`.
  """
  path = pathlib.Path(directory).absolute()
  files.ensure_writable(path.parent)
  stored.check_finite(params, None, "what was there")
  about = {"step": None, "score": None, "extra": {}}
  stored.begin(path, params, about, config, kept="what was there")()


def load_params(directory: str | pathlib.Path, abstract: Params | None = None):
  """Reads (params, config) of a finished stage, onto the shardings of `abstract`.

  Without `abstract` the nested dict comes back as it was saved, on the default device.

  Raises:
    UserError: nothing there, damaged, or tensors of another name, shape or dtype.
  """
  path = pathlib.Path(directory).absolute()
  problem = files.damage(path) if path.is_dir() else "there is no such directory"
  if problem:
    raise UserError(f"{path}: no parameters to load: {problem}.")
  about = files.read_about(path)
  if abstract is None:
    leaf = lambda shape, dtype: jax.ShapeDtypeStruct(tuple(shape), dtype)
    tensors = {name: leaf(*tensor) for name, tensor in about["tensors"].items()}
    abstract = traverse_util.unflatten_dict(tensors, sep="/")
  return stored.read(path, abstract, about), files.read_json(path / "config.json")
