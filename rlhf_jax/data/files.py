"""Reading `.jsonl`, `.json` and text files, gzipped or not, so that every error names its place."""

import collections.abc
import functools
import gzip
import json
import pathlib
import zlib
from typing import Any, BinaryIO

from rlhf_jax.types import UserError

# Where an item stands ("pairs.jsonl line 7"), and a call that parses it.
LocatedItem = tuple[str, collections.abc.Callable[[], Any]]


def require(paths: collections.abc.Iterable[str], obtain: str) -> None:
  """Raises UserError for the first path that is no file, with `obtain` as the remedy."""
  for path in paths:
    if not pathlib.Path(path).expanduser().is_file():
      raise UserError(f"data file {path} does not exist. {obtain}")


def stem(path: str) -> str:
  """The file's name without folders, compression and format: `a/train.jsonl.gz` -> `train`."""
  return pathlib.Path(path).name.split(".")[0]


def items(path: str) -> collections.abc.Iterator[LocatedItem]:
  """The JSON values of a file: the elements if it is one list, else one value a line.

  The content decides, not the name: C4, for one, calls files of lines `.json.gz`. Parsing a line is
  left to the caller, who may skip a broken one and go on with the next.
  """
  if next((line for line in _lines(path) if line.strip()), b"").lstrip().startswith(b"["):
    yield from _list_items(path)
    return
  for number, line in enumerate(_lines(path), start=1):
    if line.strip():
      yield f"{path} line {number}", functools.partial(_loads, line)


def read_text(path: str) -> str:
  """A whole text file in UTF-8."""
  return _decode(b"".join(_lines(path)), path)


def _lines(path: str) -> collections.abc.Iterator[bytes]:
  try:
    with _open(path) as file:
      yield from file
  except (EOFError, zlib.error, OSError) as error:
    raise UserError(f"{path} cannot be read: {error}. Is the file complete?") from error


def _open(path: str) -> BinaryIO:
  file = pathlib.Path(path).expanduser()
  return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _list_items(path: str) -> collections.abc.Iterator[LocatedItem]:
  try:
    content = _loads(read_text(path))
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  for number, item in enumerate(content, start=1):
    yield f"{path} item {number}", functools.partial(_same, item)


def _same(item: Any) -> Any:
  return item


def _loads(text: str | bytes) -> Any:
  try:
    return json.loads(text)
  except UnicodeDecodeError as error:
    raise UserError(f"not UTF-8: {error.reason} at byte {error.start}.") from error
  except json.JSONDecodeError as error:
    raise UserError(f"not valid JSON: {error}.") from error


def _decode(data: bytes, path: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error
