"""From records to rows: the element of a batch, with static shapes, for each kind of record.

Rows are tokenized once, when a run starts, so that all that cannot fit is known (an error, or a
counted skip) before the first step; they are padded only when they are asked for.
"""

import collections.abc
import dataclasses
import functools
from typing import Any, Literal

import numpy as np

from rlhf_jax.data import packing
from rlhf_jax.data.records import Comparison, Demonstration, Prompt, Record, Text
from rlhf_jax.text import dialogue
from rlhf_jax.text.dialogue import ChatTemplate, OnTooLong
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import PromptBatch, RankingBatch, UserError


@dataclasses.dataclass(frozen=True)
class Rows(collections.abc.Sequence):
  """Random access to rows: `build(contents[i])` is row i, `build(())` a row of nothing."""

  contents: collections.abc.Sequence[collections.abc.Sequence]
  build: collections.abc.Callable[[collections.abc.Sequence], Any]
  skipped: int  # records that did not fit

  def __len__(self) -> int:
    return len(self.contents)

  def __getitem__(self, index: int) -> Any:
    return self.build(self.contents[index])

  @property
  def empty(self) -> Any:
    """A row without tokens, which weighs nothing in any loss."""
    return self.build(())


def demonstration_rows(
  demonstrations: collections.abc.Iterable[Demonstration],
  template: ChatTemplate,
  tokenizer: Tokenizer,
  *,
  max_tokens: int,
  supervise: Literal["all", "last"],
  on_too_long: OnTooLong,
  packing_seed: int | None,
) -> Rows:
  """Rows of a `TokenBatch` with dialogues; `packing_seed` None puts each into a row of its own.

  What the user says after the assistant's last message teaches nothing and is left out.
  """
  fit = _Fit(template, tokenizer, on_too_long)
  encode = functools.partial(
    dialogue.encode, template=template, tokenizer=tokenizer, supervise=supervise
  )
  documents, skipped = [], 0
  for record in demonstrations:
    whole = record.conversation
    whole = whole.prompt_before(whole.assistant_turns[-1] + 1)
    encoded = fit(record, whole, max_tokens, encode)
    if encoded is None:
      skipped += 1
    else:
      mask = np.array(encoded.loss_mask, np.float32)
      documents.append(packing.Document(np.array(encoded.ids, np.int32), mask))
  return _token_rows(documents, tokenizer, max_tokens, packing_seed, skipped)


def text_rows(
  texts: collections.abc.Iterable[Text],
  tokenizer: Tokenizer,
  *,
  max_tokens: int,
  packing_seed: int | None,
) -> Rows:
  """Rows of a `TokenBatch` with running text; every token that has a predecessor is a target.

  A document longer than a row is cut into pieces of `max_tokens`; a last piece of one token has
  nothing to predict and is left out.
  """
  pieces = []
  for record in texts:
    ids = np.array(tokenizer.encode(record.text), np.int32)
    for start in range(0, len(ids) - 1, max_tokens):
      piece = ids[start : start + max_tokens]
      if len(piece) > 1:
        pieces.append(packing.Document(piece, (np.arange(len(piece)) > 0).astype(np.float32)))
  return _token_rows(pieces, tokenizer, max_tokens, packing_seed, 0)


def prompt_rows(
  prompts: collections.abc.Iterable[Prompt],
  template: ChatTemplate,
  tokenizer: Tokenizer,
  *,
  max_tokens: int,
  on_too_long: OnTooLong,
) -> Rows:
  """Rows of a `PromptBatch`, `max_tokens` = P wide."""
  fit = _Fit(template, tokenizer, on_too_long)
  encode = functools.partial(dialogue.encode_prompt, template=template, tokenizer=tokenizer)
  contents, skipped = [], 0
  for record in prompts:
    ids = fit(record, record.conversation, max_tokens, encode)
    if ids is None:
      skipped += 1
    else:
      contents.append(np.array(ids, np.int32))
  build = functools.partial(_prompt_row, max_tokens=max_tokens, pad_id=tokenizer.pad_id)
  return Rows(contents, build, skipped)


def ranking_rows(
  comparisons: collections.abc.Iterable[Comparison],
  template: ChatTemplate,
  tokenizer: Tokenizer,
  *,
  max_tokens: int,
  max_responses: int,
  on_too_long: OnTooLong,
) -> Rows:
  """Rows of a `RankingBatch`: a prompt with all its answers, K = `max_responses` slots of T ids.

  All answers to a prompt see the same context, cut to whole turns such that the longest answer
  fits. Answers themselves are never cut: that would change what the labeler ranked.

  Raises:
    UserError: a comparison has more answers than there are slots, or (by choice) one does not fit.
  """
  fit = _Fit(template, tokenizer, on_too_long)
  encode = functools.partial(dialogue.encode_prompt, template=template, tokenizer=tokenizer)
  contents, skipped = [], 0
  for record in comparisons:
    if len(record.responses) > max_responses:
      raise UserError(
        f"comparison {record.identity} of {record.source} ranks {len(record.responses)} responses, "
        f"but there are {max_responses} slots; raise max_responses."
      )
    responses = [dialogue.encode_response(r, template, tokenizer) for r in record.responses]
    room = max_tokens - max(map(len, responses))
    prompt = fit(record, record.conversation, room, encode)
    if prompt is None:
      skipped += 1
      continue
    contents.append(
      tuple(
        (np.array(prompt + response, np.int32), len(response), rank)
        for response, rank in zip(responses, record.ranks)
      )
    )
  build = functools.partial(
    _ranking_row, max_tokens=max_tokens, max_responses=max_responses, pad_id=tokenizer.pad_id
  )
  return Rows(contents, build, skipped)


@dataclasses.dataclass(frozen=True)
class _Fit:
  """Encodes a conversation, cut to whole turns if that is what it takes to fit."""

  template: ChatTemplate
  tokenizer: Tokenizer
  on_too_long: OnTooLong

  def __call__(self, record: Record, conversation: Conversation, max_tokens: int, encode) -> Any:
    """What `encode` gives, at most `max_tokens` long, or None; errors name the record."""
    encoded = encode(conversation)
    if len(encoded) <= max_tokens:
      return encoded
    try:
      kept = dialogue.truncate(
        conversation, max_tokens, self.template, self.tokenizer, on_too_long=self.on_too_long
      )
    except UserError as error:
      kind = type(record).__name__.lower()
      raise UserError(f"{kind} {record.identity} of {record.source}: {error}") from error
    return None if kept is None else encode(kept)


def _token_rows(
  documents: list[packing.Document],
  tokenizer: Tokenizer,
  max_tokens: int,
  packing_seed: int | None,
  skipped: int,
) -> Rows:
  if packing_seed is None:
    contents = [(document,) for document in documents]
  else:
    plan = packing.pack([len(document) for document in documents], max_tokens, packing_seed)
    contents = [tuple(documents[i] for i in row) for row in plan]
  build = functools.partial(packing.token_row, max_tokens=max_tokens, pad_id=tokenizer.pad_id)
  return Rows(contents, build, skipped)


def _prompt_row(ids: collections.abc.Sequence[int], *, max_tokens: int, pad_id: int) -> PromptBatch:
  tokens, mask = np.full(max_tokens, pad_id, np.int32), np.zeros(max_tokens, np.float32)
  start = max_tokens - len(ids)
  tokens[start:], mask[start:] = ids, 1.0
  return PromptBatch(tokens=tokens, mask=mask)


def _ranking_row(
  answers: collections.abc.Sequence[tuple[np.ndarray, int, int]],
  *,
  max_tokens: int,
  max_responses: int,
  pad_id: int,
) -> RankingBatch:
  tokens = np.full((max_responses, max_tokens), pad_id, np.int32)
  mask = np.zeros((max_responses, max_tokens), np.float32)
  ranks, lengths = np.zeros((2, max_responses), np.int32)
  valid = np.zeros(max_responses, np.float32)
  for k, (ids, length, rank) in enumerate(answers):
    tokens[k, : len(ids)], mask[k, : len(ids)] = ids, 1.0
    ranks[k], lengths[k], valid[k] = rank, length, 1.0
  return RankingBatch(tokens=tokens, mask=mask, ranks=ranks, valid=valid, lengths=lengths)
