"""Plain text for the language-model loss that PPO-ptx mixes in (InstructGPT, section 3.5).

Files with ".json" in their name hold documents under the key "text". Every other file is running
text and divided into documents at blank lines: paragraphs are gathered until a document has
`document_chars` characters, so that a book can be shuffled and partly held out.
"""

import collections.abc
import dataclasses
import pathlib
import re
from typing import Any, Literal

import tensorflow_datasets as tfds

from rlhf_jax.config import PositiveInt
from rlhf_jax.data import builders, files
from rlhf_jax.data.records import Text
from rlhf_jax.types import UserError

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Where documents are, and how long those cut from running text become."""

  paths: tuple[str, ...]  # JSON or text, each may end in .gz
  on_malformed: Literal["error", "skip"]
  document_chars: PositiveInt  # characters after which a document of running text ends


class PlainText(builders.RecordBuilder, skip_registration=True):
  """Documents."""

  VERSION = tfds.core.Version("1.0.0")
  OBTAIN = "Any UTF-8 text will do; see docs/data.md for public ones."

  @classmethod
  def items(cls, path: str, config: TextConfig) -> collections.abc.Iterator[files.LocatedItem]:
    if ".json" in pathlib.Path(path).name:
      yield from files.items(path)
      return
    for number, text in enumerate(documents(files.read_text(path), config.document_chars), start=1):
      yield f"{path} document {number}", lambda text=text: {"text": text}

  @classmethod
  def parse(cls, item: Any, source: str, config: TextConfig) -> collections.abc.Iterator[Text]:
    if not isinstance(item, dict) or "text" not in item:
      raise UserError(f"a document must have a 'text', got {item!r:.200}.")
    yield Text(item["text"], source)


def documents(text: str, document_chars: int) -> collections.abc.Iterator[str]:
  """Running text in pieces of whole paragraphs, each of at least `document_chars` but the last."""
  gathered, length = [], 0
  for paragraph in _BLANK_LINES.split(text):
    if not paragraph.strip():
      continue
    gathered.append(paragraph)
    length += len(paragraph)
    if length >= document_chars:
      yield "\n\n".join(gathered)
      gathered, length = [], 0
  if gathered:
    yield "\n\n".join(gathered)
