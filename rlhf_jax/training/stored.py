"""A tree of arrays in a folder, whole or not at all.

`<folder>/state/` holds the arrays, written by Orbax; `about.json` name, shape and dtype of each,
what the caller adds, and a checksum of every file. The folder is written as `tmp-<name>` and
renamed, so one without the prefix is whole. Orbax does not notice a flipped bit in its data, hence
the checksums.
"""

import logging as std_logging
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhf_jax.parallel import hosts
from rlhf_jax.training import files
from rlhf_jax.training.loop import NonFiniteError
from rlhf_jax.types import UserError


def _tensors(tree: Any) -> dict[str, list]:
  """{"params/trunk/embed": [[512, 64], "float32"], ...} of arrays or their abstract values."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.isfinite(leaf).all() for leaf in leaves]


def check_finite(tree: Any, step: int | None, kept: str) -> None:
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


def begin(
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


def read(path: pathlib.Path, abstract: Any, about: dict) -> Any:
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
