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
from rlhf_jax.types import PromptBatch, UserError


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
  contents, skipped = [], 0
  for record in prompts:
    ids = prompt_ids(record, template, tokenizer, max_tokens=max_tokens, on_too_long=on_too_long)
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
  max_prompts: int,
  max_responses: int,
  on_too_long: OnTooLong,
  packing_seed: int,
) -> Rows:
  """Rows of a `RankingBatch`: M = `max_prompts` slots for prompts, K = `max_responses` for answers.

  All answers to a prompt see the same context, cut to whole turns such that it and its answers fit
  into a row. Answers themselves are never cut: that would change what the labeler ranked.

  Raises:
    UserError: a comparison has more answers than there are slots, or (by choice) one does not fit.
  """
  groups, skipped = [], 0
  for record in comparisons:
    if len(record.responses) > max_responses:
      raise UserError(
        f"comparison {record.identity} of {record.source} ranks {len(record.responses)} responses, "
        f"but there are {max_responses} slots; raise max_responses."
      )
    responses = [dialogue.encode_response(r, template, tokenizer) for r in record.responses]
    room = max_tokens - sum(map(len, responses))
    prompt = prompt_ids(record, template, tokenizer, max_tokens=room, on_too_long=on_too_long)
    if prompt is None:
      skipped += 1
      continue
    ids = [np.array(part, np.int32) for part in (prompt, *responses)]
    groups.append(packing.Group(ids[0], tuple(ids[1:]), record.ranks))
  plan = packing.pack([len(group) for group in groups], max_tokens, packing_seed, max_prompts)
  build = functools.partial(
    packing.ranking_row,
    max_tokens=max_tokens,
    max_prompts=max_prompts,
    max_responses=max_responses,
    pad_id=tokenizer.pad_id,
  )
  return Rows([tuple(groups[i] for i in row) for row in plan], build, skipped)


def prompt_ids(
  record: Prompt | Comparison,
  template: ChatTemplate,
  tokenizer: Tokenizer,
  *,
  max_tokens: int,
  on_too_long: OnTooLong,
) -> tuple[int, ...] | None:
  """Ids of a record's prompt, cut to whole turns; None for one that does not fit, by choice."""
  encode = functools.partial(dialogue.encode_prompt, template=template, tokenizer=tokenizer)
  fit = _Fit(template, tokenizer, on_too_long)
  return fit(record, record.conversation, max_tokens, encode)


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
