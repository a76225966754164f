"""Simulated labelers: they know the gold score, and slip, disagree, and like long answers.

Labeler l ranks the answers y to a prompt x by

  u_l(x, y) = gold(x, y) + length_bias * words(y) + disagreement * t_l(y) + noise * e_l(x, y)

with t and e standard normal. The taste t belongs to labeler and wording: it is the same wherever
that answer is given, so that labelers differ in a way that more labels do not average out. The
slip e belongs to the single item. Both are hashes of (seed, labeler, texts): an item gets the same
label in any order, in any process, and in a run that was resumed.
"""

import dataclasses
import hashlib
import statistics
from collections.abc import Sequence

from rlhf_jax.config import Count, Fraction, NonNegative, PositiveInt
from rlhf_jax.labelers.base import ScoreFn, checked_scores, dense_ranks
from rlhf_jax.text.dialogue import Conversation
from rlhf_jax.types import UserError

_NORMAL = statistics.NormalDist()


@dataclasses.dataclass(frozen=True)
class LabelerConfig:
  """The habits of a panel of simulated labelers; utilities are in units of the gold score."""

  seed: Count
  labelers: PositiveInt  # how many
  noise: NonNegative  # standard deviation of a slip
  disagreement: NonNegative  # standard deviation of a labeler's taste
  length_bias: float  # utility per word; negative for a taste for brevity
  tie_margin: NonNegative  # answers closer than this are called equally good
  flip_rate: Fraction  # of labels of two answers turned round (Coste et al. 2023 use 0.25)


@dataclasses.dataclass(frozen=True)
class SimulatedLabeler:
  """One labeler; with all habits at 0 the ranks are the order of the scores, ties included."""

  name: str
  score_fn: ScoreFn
  config: LabelerConfig

  def rank(self, conversation: Conversation, responses: Sequence[str]) -> tuple[int, ...]:
    """Ranks [K] of K responses.

    Raises:
      UserError: fewer than 2 responses, a score is not finite, or labels are to be flipped where
        there are more than 2 responses. (The pairs of a ranking cannot be flipped independently:
        A > B > C > A is no ranking.)
    """
    if self.config.flip_rate > 0.0 and len(responses) > 2:
      raise UserError(
        f"flip_rate {self.config.flip_rate:g} turns labels of 2 responses round, but "
        f"{len(responses)} are to be ranked; sample 2, or set flip_rate 0 and use noise."
      )
    utilities = self.utilities(conversation, responses)
    ranks = dense_ranks(utilities, self.config.tie_margin)
    return ranks[::-1] if self._flips(conversation, responses) else ranks

  def utilities(self, conversation: Conversation, responses: Sequence[str]) -> list[float]:
    """u_l(x, y) of each response [K]."""
    config = self.config
    prompt = _text(conversation)
    utilities = []
    for text, gold in zip(responses, checked_scores(self.score_fn, conversation, responses)):
      length = config.length_bias * len(text.split())
      taste = config.disagreement * self._normal("taste", text)
      slip = config.noise * self._normal("slip", prompt, text)
      utilities.append(gold + length + taste + slip)
    return utilities

  def _flips(self, conversation: Conversation, responses: Sequence[str]) -> bool:
    """One draw for a pair of texts, whichever comes first."""
    return self._uniform("flip", _text(conversation), *sorted(responses)) < self.config.flip_rate

  def _normal(self, *texts: str) -> float:
    return _NORMAL.inv_cdf(self._uniform(*texts))

  def _uniform(self, *texts: str) -> float:
    """A number inside (0, 1) that is the labeler's own for these texts."""
    parts = [str(self.config.seed), self.name, *texts]
    # Lengths go before the texts, so that no two lists of texts read alike.
    data = "".join(f"{len(part)}:{part}" for part in parts).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.sha256(data).digest()[:6], "big")
    return (number + 0.5) / 2.0**48


def panel(score_fn: ScoreFn, config: LabelerConfig) -> tuple[SimulatedLabeler, ...]:
  """`config.labelers` labelers with the same habits and different tastes and slips."""
  return tuple(SimulatedLabeler(f"simulated-{i}", score_fn, config) for i in range(config.labelers))


def _text(conversation: Conversation) -> str:
  parts = [part for m in conversation.messages for part in (m.role, m.content)]
  return "".join(f"{len(part)}:{part}" for part in parts)
