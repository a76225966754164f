"""Comparisons, collected as the ChatGPT post says.

Take conversations with the assistant, pick one of its messages at random, sample several
alternatives to it from the current policy, and have a labeler rank them. What is stored says who
ranked and which model wrote each answer.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Protocol

import jax
import numpy as np

from rlhf_jax.config import Count, PositiveInt, Range
from rlhf_jax.data.records import Comparison, Demonstration
from rlhf_jax.generation.respond import Responder
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
  """One round of comparisons."""

  prompts: PositiveInt  # conversations a round
  responses: Annotated[int, Range(low=2)]  # K sampled alternatives (InstructGPT: 4 to 9)
  include_original: bool  # rank the message that stood there too
  include_recorded: bool  # train the reward model on the data sources' own comparisons as well
  heldout_prompts: Count  # further conversations, never trained on, that measure accuracy
  batch_size: PositiveInt  # rows sampled at once
  prompt_length: PositiveInt  # P, tokens
  sampling: SamplingConfig


@dataclasses.dataclass(frozen=True)
class Unranked:
  """Answers to one prompt before anybody has ranked them."""

  conversation: Conversation
  responses: tuple[str, ...]  # [K], or K + 1 with the original
  authors: tuple[str, ...]  # who wrote each


class Labeler(Protocol):
  """Who ranks; see `labelers/`."""

  name: str

  def rank(self, conversation: Conversation, responses: Sequence[str]) -> tuple[int, ...]:
    """Ranks [K], 0 for the best; equal ranks are ties."""
    ...


def choose_turn(conversation: Conversation, seed: int) -> tuple[Conversation, str] | None:
  """One assistant message, drawn uniformly, as (its true prefix, what it said).

  The draw is a hash of the conversation and the seed: the same in any order, process or restart.
  Messages that open the conversation, or follow another of the assistant's, answer nobody and are
  not drawn; None where there are no others.
  """
  answers = lambda i: i > 0 and conversation.messages[i - 1].role == "user"
  turns = list(filter(answers, conversation.assistant_turns))
  if not turns:
    return None
  digest = hashlib.sha256(f"{seed}\n{conversation.to_json()}".encode()).digest()
  index = turns[int.from_bytes(digest[:8], "big") % len(turns)]
  return conversation.prompt_before(index), conversation.messages[index].content


def draw_prompts(
  demonstrations: Sequence[Demonstration], count: int, seed: int, fits: Callable
) -> list[tuple[Conversation, str]]:
  """`count` prompts with what was said there, from dialogues in a random order.

  Goes through the dialogues in a new order each time they run out; one that is drawn again may
  give another of its turns. Prompts for which `fits(prompt)` is false are passed over.

  Raises:
    UserError: no dialogue gives a prompt that fits.
  """
  chosen, epoch = [], 0
  while len(chosen) < count:
    order = np.random.default_rng([seed, epoch]).permutation(len(demonstrations))
    picks = (choose_turn(demonstrations[int(i)].conversation, seed + epoch) for i in order)
    found = [pick for pick in picks if pick is not None and fits(pick[0])]
    if not found:
      raise UserError(
        f"none of {len(demonstrations)} dialogues gives a prompt that fits; raise prompt_length."
      )
    chosen, epoch = chosen + found, epoch + 1
  return chosen[:count]


def sample(
  config: ComparisonConfig,
  responder: Responder,
  params: Params,
  prompts: Sequence[tuple[Conversation, str | None]],
  key: jax.Array,
  *,
  author: str,
) -> list[Unranked]:
  """Samples K alternatives to each prompt; the arguments are those of `collect`."""
  K = config.responses
  replies = responder.respond(params, [conversation for conversation, _ in prompts], key)
  found = []
  for i, (conversation, original) in enumerate(prompts):
    answers = [reply.text for reply in replies[i * K : (i + 1) * K]]
    authors = [author] * K
    if config.include_original:
      answers.append(original)
      authors.append("original")
    found.append(Unranked(conversation, tuple(answers), tuple(authors)))
  return found


def collect(
  config: ComparisonConfig,
  responder: Responder,
  params: Params,
  prompts: Sequence[tuple[Conversation, str | None]],
  key: jax.Array,
  *,
  labelers: Sequence[Labeler],
  author: str,
) -> list[Comparison]:
  """Samples K alternatives to each prompt and has them ranked.

  Args:
    config: K, and whether the original is ranked as well.
    responder: samples K answers to a prompt.
    params: of the policy that answers.
    prompts: conversations that wait for a reply, with the one that was given.
    key: of this round.
    labelers: take turns; each ranks whole prompts.
    author: which policy answers, as the records will say.
  """
  return rank(sample(config, responder, params, prompts, key, author=author), labelers, author)


def rank(asked: Sequence[Unranked], labelers: Sequence[Labeler], source: str) -> list[Comparison]:
  """Comparisons by labelers who take turns."""
  ranked = []
  for i, unranked in enumerate(asked):
    labeler = labelers[i % len(labelers)]
    ranked.append(
      Comparison(
        conversation=unranked.conversation,
        responses=unranked.responses,
        ranks=labeler.rank(unranked.conversation, unranked.responses),
        authors=unranked.authors,
        labeler=labeler.name,
        source=source,
      )
    )
  return ranked
