"""Who ranks: the protocol of labelers, and scores turned into ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from rlhf_jax.text.dialogue import Conversation
from rlhf_jax.types import UserError

ScoreFn = Callable[[Conversation, Sequence[str]], Sequence[float]]
"""(conversation, K responses) -> K scores, higher is better."""


class Labeler(Protocol):
  """Anybody who ranks answers: a person, a rule, a bigger reward model, a judge."""

  name: str

  def rank(self, conversation: Conversation, responses: Sequence[str]) -> tuple[int, ...]:
    """Ranks [K] of K responses to one prompt: 0 is best, equal is a tie, no rank is left out."""
    ...


def dense_ranks(scores: Sequence[float], tie_margin: float) -> tuple[int, ...]:
  """Ranks by score, highest first; `dense_ranks([2., 5., 2.], 0.) == (1, 0, 1)`.

  "Within the margin" is not transitive, so a tie reaches from the best score of its group down to
  `tie_margin` below it; the first score beyond opens the next group. Order of input is irrelevant.

  Raises:
    UserError: a score is not finite.
  """
  if not all(math.isfinite(score) for score in scores):
    raise UserError(f"a labeler needs finite scores to rank, got {list(scores)}.")
  rank_of, rank, top = {}, -1, math.inf
  for score in sorted(set(scores), reverse=True):
    if rank < 0 or score < top - tie_margin:
      rank, top = rank + 1, score
    rank_of[score] = rank
  return tuple(rank_of[score] for score in scores)


def checked_scores(
  score_fn: ScoreFn, conversation: Conversation, responses: Sequence[str]
) -> list[float]:
  """The scores of at least two responses; raises UserError where their number is wrong."""
  if len(responses) < 2:
    raise UserError(f"ranking needs at least 2 responses, got {len(responses)}; sample more.")
  scores = [float(score) for score in score_fn(conversation, responses)]
  if len(scores) != len(responses):
    raise UserError(f"the score function gave {len(scores)} scores for {len(responses)} responses.")
  return scores
