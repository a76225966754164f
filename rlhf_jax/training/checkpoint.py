"""Checkpoints that survive being killed.

`<directory>/<step>/` is one checkpoint: `state/` (arrays, written by Orbax) and `about.json` (step,
score, what the caller adds, name, shape and dtype of each tensor, a checksum of every file). It is
written as `tmp-<step>` and renamed, so a directory with a number for a name is whole. Orbax does
not notice a flipped bit in its data, hence the checksums.

`save` returns when the state is copied to the host and may be donated to the next step; a thread
writes it while training goes on. The next `save` or `finish` waits for it, and raises its error.
"""

import dataclasses
import logging as std_logging
import pathlib
import re
import shutil
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util

from rlhf_jax.config import PositiveInt
from rlhf_jax.parallel import hosts
from rlhf_jax.training import files
from rlhf_jax.training.loop import NonFiniteError
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
    _check_finite(state, step, self.describe_latest())
    about = {"step": step, "score": score, "extra": extra or {}}
    path = self.directory / str(step)
    self._finish = _begin(path, state, about, kept=self.describe_latest(), then=self._prune)
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
        restored = Restored(candidate, _read(path, abstract_state, about), about["extra"])
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
  _check_finite(params, None, "what was there")
  about = {"step": None, "score": None, "extra": {}}
  _begin(path, params, about, config, kept="what was there")()


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
  return _read(path, abstract, about), files.read_json(path / "config.json")


def _tensors(tree: Any) -> dict[str, list]:
  """{"params/trunk/embed": [[512, 64], "float32"], ...} of arrays or their abstract values."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.isfinite(leaf).all() for leaf in leaves]


def _check_finite(tree: Any, step: int | None, kept: str) -> None:
  """Raises NonFiniteError where a float array holds a NaN or an infinity."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  floats = [(path, leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
  finite = hosts.whole(_all_finite([leaf for _, leaf in floats]))
  for (path, _), fine in zip(floats, finite):
    if not fine:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      where = "the parameters to save" if step is None else f"step {step}: the state"
      raise NonFiniteError(
        f"{where}: {name!r} holds a NaN or an infinity, so it was not saved. Kept: {kept}. Try a "
        f"lower learning rate or a smaller clip_norm."
      )


def _begin(
  path: pathlib.Path,
  tree: Any,
  about: dict,
  config: dict | None = None,
  *,
  kept: str,
  then: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
  """Begins to write `path`, whole or not at all: into a sibling first, then one rename.

  When it returns, `tree` is on the host and may be donated. What it returns waits for the rest, and
  raises a UserError where that failed; it is called once. `then` is called in the first process
  when `path` is whole.
  """
  temporary = path.with_name(f"tmp-{path.name}")
  if hosts.is_first():
    shutil.rmtree(temporary, ignore_errors=True)
    files.ensure_space(path.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    temporary.mkdir()
  hosts.wait(f"begin {path.name}")
  std_logging.getLogger("absl").addFilter(_is_not_of_orbax)
  about = {**about, "tensors": _tensors(tree)}
  writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
  errors = []

  def write() -> None:
    try:
      writer.wait_until_finished()
      if hosts.is_first():
        if config is not None:
          files.write_json_atomic(temporary / "config.json", config)
        files.write_about(temporary, about)
        files.replace_directory(temporary, path)
        then()
    except Exception as error:  # tensorstore reports a full disk as a ValueError, Orbax as others
      errors.append(error)

  thread = threading.Thread(target=write, name=f"writes {path.name}", daemon=True)

  def finish() -> None:
    if thread.ident is not None:
      thread.join()
    writer.close()
    if errors:
      shutil.rmtree(temporary, ignore_errors=True)
      raise UserError(
        f"{path} could not be written: {str(errors[0])[:300]}. Kept: {kept}. Free some space or "
        f"choose another workdir; the same command goes on from what is kept."
      ) from errors[0]
    hosts.wait(f"end {path.name}")

  try:
    writer.save(temporary / "state", args=ocp.args.StandardSave(tree))
    thread.start()
  except Exception as error:
    errors.append(error)
    finish()
  return finish


def _read(path: pathlib.Path, abstract: Any, about: dict) -> Any:
  """Restores onto `abstract` after comparing names, shapes and dtypes."""
  saved, wanted = about["tensors"], _tensors(abstract)
  problems = [f"{name}: missing in the checkpoint" for name in wanted if name not in saved]
  problems += [f"{name}: only in the checkpoint" for name in saved if name not in wanted]
  problems += [
    f"{name}: saved {_show(saved[name])}, wanted {_show(wanted[name])}"
    for name in wanted
    if name in saved and saved[name] != wanted[name]
  ]
  if problems:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise UserError(
      f"{path} does not fit this configuration: {'; '.join(problems[:3])}{more}. Use the "
      f"configuration it was made with, or another workdir."
    )
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  sharding = lambda leaf: getattr(leaf, "sharding", None) or default
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), abstract
  )
  return ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
    path / "state", args=ocp.args.StandardRestore(target)
  )


def _show(tensor: list) -> str:
  return f"{tensor[0]} {tensor[1]}"


def _is_not_of_orbax(record: std_logging.LogRecord) -> bool:
  """Orbax logs pages of traceback from its threads before it raises."""
  return "/orbax/" not in record.pathname
