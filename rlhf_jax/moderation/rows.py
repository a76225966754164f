"""From texts to rows of a `LabelBatch`: tokens, windows of long texts, and their labels."""

import collections.abc
import dataclasses
import functools

import numpy as np

from rlhf_jax.data import packing
from rlhf_jax.data.moderation import CATEGORIES, ModerationExample, label_arrays
from rlhf_jax.data.rows import Rows
from rlhf_jax.moderation.classifier import LabelBatch
from rlhf_jax.text.tokenizer import Tokenizer

OVERLAP = 0.25  # of a window; what is cut in one window is whole in another


@dataclasses.dataclass(frozen=True)
class Item:
  """One text, or one window of it, as the network reads it."""

  inputs: np.ndarray  # [t] int32 ids; or the stream [t, D] after the frozen blocks
  labels: np.ndarray  # [C] float32
  known: np.ndarray  # [C] float32, 0 where the label is unknown

  def __len__(self) -> int:
    return len(self.inputs)


def windows(ids: collections.abc.Sequence[int], max_tokens: int) -> list[np.ndarray]:
  """A text's ids in pieces of at most `max_tokens`, each beginning a quarter before the last ends.

  A text is scored by the worst of its windows, so nothing hides behind a long beginning.
  """
  ids = np.asarray(ids, np.int32)
  stride = max(max_tokens - int(max_tokens * OVERLAP), 1)
  starts = range(0, max(len(ids) - max_tokens, 0) + stride, stride)
  return [ids[start : start + max_tokens] for start in starts]


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
  """Ids of a text; of one that has none, its end alone."""
  return tokenizer.encode(text) or [tokenizer.eos_id]


def items(
  examples: collections.abc.Sequence[ModerationExample], inputs: collections.abc.Sequence
) -> list[Item]:
  """Examples with what the network reads of each."""
  return [Item(x, y, k) for x, y, k in zip(inputs, *label_arrays(examples))]


def unlabelled(inputs: collections.abc.Iterable[np.ndarray]) -> list[Item]:
  """Texts that nothing is known of, to be scored."""
  nothing = np.zeros(len(CATEGORIES), np.float32)
  return [Item(x, nothing, nothing) for x in inputs]


def label_rows(
  some: collections.abc.Sequence[Item], max_tokens: int, max_texts: int, seed: int
) -> tuple[Rows, list[list[int]]]:
  """Rows with up to `max_texts` texts each, and which text stands in which slot of which row."""
  plan = packing.pack([len(item) for item in some], max_tokens, seed, max_texts)
  stream = some[0].inputs if some and some[0].inputs.ndim > 1 else np.zeros(0, np.int32)
  build = functools.partial(
    label_row,
    shape=(max_tokens, *stream.shape[1:]),
    dtype=stream.dtype,
    max_texts=max_texts,
  )
  return Rows([tuple(some[i] for i in row) for row in plan], build, 0), plan


def label_row(
  some: collections.abc.Sequence[Item], *, shape: tuple[int, ...], dtype, max_texts: int
) -> LabelBatch:
  """One row of a `LabelBatch` (its fields without B) that holds the texts from the left.

  What stands on the padding does not matter: its segment is 0.
  """
  inputs, (segments, positions) = np.zeros(shape, dtype), np.zeros((2, shape[0]), np.int32)
  labels, known = np.zeros((2, max_texts, len(CATEGORIES)), np.float32)
  start = 0
  for slot, item in enumerate(some):
    place = slice(start, start + len(item))
    inputs[place], segments[place] = item.inputs, slot + 1
    positions[place] = np.arange(len(item))
    labels[slot], known[slot] = item.labels, item.known
    start += len(item)
  return LabelBatch(inputs, segments, positions, labels, known)
