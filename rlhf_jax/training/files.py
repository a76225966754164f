"""Files that are whole or absent: atomic JSON, checksummed directories, clear disk errors."""

import errno
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from typing import Any

from rlhf_jax.types import UserError

SPARE = 1 << 20  # bytes that a disk must have left beside what is about to be written


def write_json_atomic(path: str | pathlib.Path, obj: Any) -> None:
  """Writes `obj` so that `path` holds either the old text or the whole new one, also after a crash.

  Raises:
    UserError: the disk is full or `path` cannot be written; what was there stays.
  """
  write_text_atomic(path, json.dumps(obj, indent=2) + "\n")


def write_text_atomic(path: str | pathlib.Path, text: str) -> None:
  """As `write_json_atomic`, for any text."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_directory(path.parent)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise UserError(
      f"{path} could not be written: {error}. What was there is unchanged."
    ) from error


def read_json(path: str | pathlib.Path) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: it is not there, or is no JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"{path} could not be read: {error}.") from error
  except ValueError as error:
    raise UserError(f"{path} is no JSON: {error}.") from error


def ensure_writable(directory: pathlib.Path) -> None:
  """Makes `directory` and writes a byte into it.

  Raises:
    UserError: it cannot be made or written.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory) as probe:
      probe.write(b"0")
      probe.flush()
  except OSError as error:
    raise UserError(f"{directory} cannot be written: {error}. Choose another workdir.") from error


def ensure_space(directory: pathlib.Path, needed: int) -> None:
  """Checks that the disk, and the user's quota of it, has `needed` bytes to spare.

  Raises:
    UserError: it has not; nothing was written.
  """
  free = shutil.disk_usage(directory).free
  try:
    if free < needed + SPARE:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):  # reserving shows quotas and limits that `free` does not
      with tempfile.TemporaryFile(dir=directory) as probe:
        os.posix_fallocate(probe.fileno(), 0, needed + SPARE)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise UserError(
        f"{directory}: a checkpoint needs {needed / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB "
        f"free ({error.strerror}). Free some space or choose another workdir; older checkpoints "
        "are as they were."
      ) from error
    raise


class Appender:
  """Appends to a file without a buffer: what a call wrote is with the system when it returns.

  A kill can cut off the last call's bytes, and closing cannot fail.

  Raises:
    UserError: the file cannot be opened or written, such as on a full disk.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      self._file = open(path, "ab", buffering=0)
    except OSError as error:
      raise UserError(f"{path} cannot be written: {error}.") from error

  def append(self, data: bytes) -> None:
    try:
      while data:
        data = data[self._file.write(data) :]
    except OSError as error:
      raise UserError(
        f"{self.path} could not be written: {error}. Free some space; the same command goes on."
      ) from error

  def close(self) -> None:
    self._file.close()


def replace_directory(source: pathlib.Path, target: pathlib.Path) -> None:
  """Renames `source` to `target`; an older `target` goes once the new one stands."""
  old = target.with_name(f"tmp-old-{target.name}")
  shutil.rmtree(old, ignore_errors=True)
  if target.exists():
    target.rename(old)
  source.rename(target)
  _fsync_directory(target.parent)
  shutil.rmtree(old, ignore_errors=True)


def free_name(path: pathlib.Path) -> pathlib.Path:
  """`path`, or `path.1`, `path.2`, ...: the first that is not taken."""
  taken, number = path, 0
  while taken.exists():
    number += 1
    taken = path.with_name(f"{path.name}.{number}")
  return taken


def write_about(directory: pathlib.Path, about: dict) -> None:
  """Writes `directory`/about.json: `about`, with size and CRC-32 of every file beside it."""
  names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
  about = {**about, "files": {name: _fingerprint(directory / name) for name in names}}
  write_json_atomic(directory / "about.json", {"about": about, "crc32": _crc_of_json(about)})


def read_about(directory: pathlib.Path) -> dict:
  """What `write_about` was given, and the fingerprints."""
  return read_json(directory / "about.json")["about"]


def about_damage(directory: pathlib.Path) -> str | None:
  """What is wrong with `directory`/about.json, or None."""
  try:
    stored = json.loads((directory / "about.json").read_bytes())
    if stored["crc32"] == _crc_of_json(stored["about"]):
      return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    return f"about.json: {type(error).__name__}: {error}"
  return "about.json: its checksum is another"


def damage(directory: pathlib.Path) -> str | None:
  """What is wrong with a directory that `write_about` closed, or None where every byte is there."""
  problem = about_damage(directory)
  if problem:
    return problem
  for name, fingerprint in read_about(directory)["files"].items():
    if not (directory / name).is_file():
      return f"{name} is missing"
    if _fingerprint(directory / name) != fingerprint:
      return f"{name} is not what was written"
  return None


def _fingerprint(path: pathlib.Path) -> list[int]:
  crc, size = 0, 0
  with open(path, "rb") as file:
    while chunk := file.read(1 << 22):
      crc, size = zlib.crc32(chunk, crc), size + len(chunk)
  return [size, crc]


def _crc_of_json(obj: Any) -> int:
  return zlib.crc32(json.dumps(obj, sort_keys=True).encode())


def _fsync_directory(directory: pathlib.Path) -> None:
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
