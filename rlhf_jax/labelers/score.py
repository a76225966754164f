"""A labeler made from a score function, such as a bigger reward model (Gao et al. 2022)."""

import dataclasses
from collections.abc import Sequence

from rlhf_jax.labelers.base import ScoreFn, checked_scores, dense_ranks
from rlhf_jax.text.dialogue import Conversation


@dataclasses.dataclass(frozen=True)
class ScoreLabeler:
  """Ranks by score alone: Gao, Schulman and Hilton's gold labels are deterministic (section 2)."""

  name: str
  score_fn: ScoreFn
  tie_margin: float  # in units of the score; 0 ties only what scores the same

  def rank(self, conversation: Conversation, responses: Sequence[str]) -> tuple[int, ...]:
    """Ranks [K]; raises UserError if there are fewer than 2 responses or a score is not finite."""
    return dense_ranks(checked_scores(self.score_fn, conversation, responses), self.tie_margin)
