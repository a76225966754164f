"""Comparisons, collected as the ChatGPT post says.

Take conversations with the assistant, pick one of its messages at random, sample several
alternatives to it from the current policy, and have a labeler rank them. What is stored says who
ranked and which model wrote each answer.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import numpy as np

from rlhf_jax.config import Count, PositiveInt, Range
from rlhf_jax.data.records import Comparison, Demonstration, Prompt
from rlhf_jax.generation.respond import Responder
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
  """One round of comparisons."""

  prompts: PositiveInt  # conversations a round
  responses: Annotated[int, Range(low=2)]  # K sampled alternatives (InstructGPT: 4 to 9)
  include_original: bool  # rank the message that stood there too
  heldout_prompts: Count  # further conversations, never trained on, that measure accuracy
  batch_size: PositiveInt  # rows sampled at once
  prompt_length: PositiveInt  # P, tokens
  sampling: SamplingConfig


def choose_turn(conversation: Conversation, seed: int) -> tuple[Conversation, str]:
  """One assistant message, drawn uniformly, as (its true prefix, what it said).

  The draw is a hash of the conversation and the seed: the same in any order, process or restart.
  Messages that open the conversation answer nobody and are not drawn.
  """
  turns = [i for i in conversation.assistant_turns if i > 0]
  digest = hashlib.sha256(f"{seed}\n{conversation.to_json()}".encode()).digest()
  index = turns[int.from_bytes(digest[:8], "big") % len(turns)]
  return conversation.prompt_before(index), conversation.messages[index].content


def draw_prompts(
  records: Sequence[Demonstration | Prompt], count: int, seed: int, fits: Callable
) -> list[tuple[Conversation, str | None]]:
  """`count` prompts with what was said there (None where nobody answered yet), in a random order.

  Passes over the records in a new order each time they run out; a dialogue drawn again may give
  another of its turns. Prompts for which `fits(prompt)` is false are passed over.
  """
  chosen = []
  for epoch in range(1 + count):
    order = np.random.default_rng([seed, epoch]).permutation(len(records))
    before = len(chosen)
    for i in order:
      record = records[int(i)]
      pick = (record.conversation, None)
      if isinstance(record, Demonstration):
        pick = choose_turn(record.conversation, seed + epoch)
      if fits(pick[0]):
        chosen.append(pick)
      if len(chosen) == count:
        return chosen
    if len(chosen) == before:
      break
  raise ValueError(f"none of the {len(records)} records gives a prompt that fits")


def collect(
  config: ComparisonConfig,
  responder: Responder,
  params: Params,
  prompts: Sequence[tuple[Conversation, str | None]],
  key: jax.Array,
  *,
  rank: Callable[[Conversation, Sequence[str]], Sequence[int]],
  labeler: str,
  author: str,
) -> list[Comparison]:
  """Samples K alternatives to each prompt and has them ranked.

  Args:
    config: K, and whether the original is ranked as well.
    responder: samples the answers.
    params: of the policy that answers.
    prompts: conversations that wait for a reply, with the one that was given, if any.
    key: of this round.
    rank: (conversation, answers) to ranks, 0 for the best, ties allowed.
    labeler: who ranks, as the records will say.
    author: which policy answers, as the records will say.
  """
  K = config.responses
  repeated = [conversation for conversation, _ in prompts for _ in range(K)]
  replies = responder.respond(params, repeated, key)
  collected = []
  for i, (conversation, original) in enumerate(prompts):
    answers = [reply.text for reply in replies[i * K : (i + 1) * K]]
    authors = [author] * K
    if config.include_original and original is not None:
      answers.append(original)
      authors.append("original")
    ranks = tuple(int(r) for r in rank(conversation, answers))
    collected.append(
      Comparison(
        conversation=conversation,
        responses=tuple(answers),
        ranks=ranks,
        authors=tuple(authors),
        labeler=labeler,
        source=author,
      )
    )
  return collected
