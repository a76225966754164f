"""What a moderator says of a text, what is done about it, and how OpenAI's API writes it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf_jax.data.moderation import CATEGORIES

Action = Literal["none", "warn", "block"]
Side = Literal["input", "output"]  # what a person wrote, or what the model did
SEVERITY = ("none", "warn", "block")


@dataclasses.dataclass(frozen=True)
class Actions:
  """What is done about a category that is flagged."""

  input: Action
  output: Action


@dataclasses.dataclass(frozen=True)
class CategoryVerdict:
  """One category's part of a verdict."""

  category: str
  score: float  # calibrated probability that the text belongs to the category
  threshold: float
  flagged: bool  # score >= threshold
  action: Action  # "none" where it is not flagged


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a moderator says of one text, as input or as output."""

  side: Side
  categories: tuple[CategoryVerdict, ...]  # in the order of `CATEGORIES`

  @property
  def flagged(self) -> bool:
    return any(c.flagged for c in self.categories)

  @property
  def action(self) -> Action:
    """The most severe of the flagged categories' actions."""
    return max((c.action for c in self.categories), key=SEVERITY.index, default="none")

  @property
  def scores(self) -> dict[str, float]:
    return {c.category: c.score for c in self.categories}

  def of(self, category: str) -> CategoryVerdict:
    """The part about one category."""
    return next(c for c in self.categories if c.category == category)

  def to_json(self) -> dict[str, Any]:
    """All of it, for a record of what was decided and why."""
    return {
      "side": self.side,
      "flagged": self.flagged,
      "action": self.action,
      "categories": [dataclasses.asdict(c) for c in self.categories],
    }


def judge(
  scores: Sequence[float],
  thresholds: Mapping[str, float],
  actions: Mapping[str, Actions],
  side: Side,
) -> Verdict:
  """The verdict on calibrated scores [C], in the order of `CATEGORIES`."""
  parts = []
  for category, score in zip(CATEGORIES, scores, strict=True):
    flagged = float(score) >= thresholds[category]
    action = getattr(actions[category], side) if flagged else "none"
    parts.append(CategoryVerdict(category, float(score), thresholds[category], flagged, action))
  return Verdict(side, tuple(parts))


def openai_format(verdicts: Sequence[Verdict], *, id: str, model: str) -> dict[str, Any]:
  """The response body of OpenAI's `POST /v1/moderations`, one result a verdict.

  `categories` says what is flagged, `category_scores` how likely it is; the names are OpenAI's.
  """
  return {
    "id": id,
    "model": model,
    "results": [
      {
        "flagged": verdict.flagged,
        "categories": {c.category: c.flagged for c in verdict.categories},
        "category_scores": verdict.scores,
      }
      for verdict in verdicts
    ],
  }
