"""Several documents in one row of fixed length, told apart by their segments.

A packed row costs as much as a padded one and wastes little of it. Documents are never cut, and
`TokenBatch.segments` keeps attention inside each of them, so the loss is what it would be unpacked.
"""

import collections
import collections.abc
import dataclasses

import numpy as np

from rlhf_jax.types import RankingBatch, TokenBatch, UserError


@dataclasses.dataclass(frozen=True)
class Document:
  """Ids of one document and which of them are targets of the loss."""

  ids: np.ndarray  # [T] int32
  loss_mask: np.ndarray  # [T] float32, 0 on the first token, which nothing predicts

  def __len__(self) -> int:
    return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Group:
  """Ids of a prompt and of the ranked answers to it."""

  prompt: np.ndarray  # [P] int32
  answers: tuple[np.ndarray, ...]  # [R] int32 each
  ranks: tuple[int, ...]  # 0 is best

  def __len__(self) -> int:
    return len(self.prompt) + sum(map(len, self.answers))


def pack(
  lengths: collections.abc.Sequence[int], capacity: int, seed: int, most: int | None = None
) -> list[list[int]]:
  """Assigns documents to rows, `most` to a row: best fit, over the documents in a shuffled order.

  Each document goes to the row with the least room that still holds it (of several, the one that
  has waited longest), or opens a new row. Shuffling before makes rows, and so batches, a fair
  sample of the documents; sorting by length, which packs a little tighter, would not.

  Returns:
    for each row, the indices of its documents in the order in which they stand there.

  Raises:
    UserError: a document is longer than a row.
  """
  if max(lengths, default=0) > capacity:
    raise UserError(f"a document of {max(lengths)} tokens does not fit a row of {capacity}.")
  rows = []
  rows_by_room = collections.defaultdict(collections.deque)
  for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
    room = next((r for r in range(lengths[i], capacity + 1) if rows_by_room[r]), None)
    if room is None:
      room, row = capacity, len(rows)
      rows.append([])
    else:
      row = rows_by_room[room].popleft()
    rows[row].append(i)
    if len(rows[row]) != most:
      rows_by_room[room - lengths[i]].append(row)
  return rows


def token_row(
  documents: collections.abc.Sequence[Document], *, max_tokens: int, pad_id: int
) -> TokenBatch:
  """One row of a `TokenBatch` (its fields without B) that holds the documents from the left."""
  tokens = np.full(max_tokens, pad_id, np.int32)
  segments, positions = np.zeros((2, max_tokens), np.int32)
  loss_mask = np.zeros(max_tokens, np.float32)
  start = 0
  for segment, document in enumerate(documents, start=1):
    place = slice(start, start + len(document))
    tokens[place], loss_mask[place] = document.ids, document.loss_mask
    segments[place], positions[place] = segment, np.arange(len(document))
    start += len(document)
  return TokenBatch(tokens=tokens, segments=segments, positions=positions, loss_mask=loss_mask)


def ranking_row(
  groups: collections.abc.Sequence[Group],
  *,
  max_tokens: int,
  max_prompts: int,
  max_responses: int,
  pad_id: int,
) -> RankingBatch:
  """One row of a `RankingBatch` (its fields without B) that holds the groups from the left."""
  tokens = np.full(max_tokens, pad_id, np.int32)
  segments, branches, positions = np.zeros((3, max_tokens), np.int32)
  ends, ranks, lengths = np.zeros((3, max_prompts, max_responses), np.int32)
  valid = np.zeros((max_prompts, max_responses), np.float32)
  start = 0
  for m, group in enumerate(groups):
    before = 0  # the prompt starts the dialogue; every answer goes on from it
    for branch, ids in enumerate((group.prompt, *group.answers)):
      place = slice(start, start + len(ids))
      tokens[place], segments[place], branches[place] = ids, m + 1, branch
      positions[place] = np.arange(before, before + len(ids))
      start, before = start + len(ids), len(group.prompt)
      if branch:
        ends[m, branch - 1], lengths[m, branch - 1] = start - 1, len(ids)
    ranks[m, : len(group.ranks)], valid[m, : len(group.ranks)] = group.ranks, 1.0
  return RankingBatch(tokens, segments, branches, positions, ends, ranks, valid, lengths)
