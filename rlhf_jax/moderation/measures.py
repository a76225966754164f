"""How well scores rank a category's texts, with what is known and no more; NumPy, on the host.

Every function here takes the scores and labels of texts whose label is known. `known_only` picks
them: an unknown label is neither a positive nor a negative.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from rlhf_jax.types import UserError


def known_only(
  scores: np.ndarray, labels: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The scores and labels of one category, all [n], where the label is known; as [m] and [m]."""
  keep = np.asarray(known) > 0
  return np.asarray(scores, np.float64)[keep], np.asarray(labels)[keep] > 0


@dataclasses.dataclass(frozen=True)
class Curve:
  """What each threshold gives; a text is flagged where its score is at least the threshold."""

  thresholds: np.ndarray  # [m] the distinct scores, from the highest on
  true_positives: np.ndarray  # [m]
  false_positives: np.ndarray  # [m]
  positives: int
  negatives: int

  @property
  def precision(self) -> np.ndarray:
    return self.true_positives / (self.true_positives + self.false_positives)

  @property
  def recall(self) -> np.ndarray:
    return self.true_positives / max(self.positives, 1)

  @property
  def false_positive_rate(self) -> np.ndarray:
    return self.false_positives / max(self.negatives, 1)

  @property
  def f1(self) -> np.ndarray:
    """2 TP / (2 TP + FP + FN)."""
    return 2 * self.true_positives / (self.true_positives + self.false_positives + self.positives)


def curve(scores: np.ndarray, labels: np.ndarray) -> Curve:
  """The curve of scores [n] with labels [n]; tied scores are flagged together."""
  if not np.isfinite(scores).all():
    raise UserError("a score is NaN or infinite, so nothing can be said about thresholds.")
  order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
  scores, labels = np.asarray(scores, np.float64)[order], np.asarray(labels)[order] > 0
  lasts = np.flatnonzero(np.append(np.diff(scores) != 0, len(scores) > 0))
  hits = np.cumsum(labels)[lasts]
  positives = int(labels.sum())
  return Curve(scores[lasts], hits, lasts + 1 - hits, positives, len(labels) - positives)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
  """AUPRC as average precision, sum_k (R_k - R_{k-1}) P_k over thresholds from the highest down.

  Not the trapezoid under the curve, which is too optimistic (Davis & Goadrich 2006, section 4). NaN
  without a positive: there is nothing to rank. A constant score gives the prevalence.
  """
  found = curve(scores, labels)
  if not found.positives:
    return float("nan")
  return float(np.sum(np.diff(found.recall, prepend=0.0) * found.precision))


def bootstrap(
  scores: np.ndarray, labels: np.ndarray, *, samples: int, level: float, seed: int
) -> tuple[float, float]:
  """Percentile interval of the average precision (Efron & Tibshirani 1993, section 13.3).

  Positives and negatives are drawn apart, so that every draw has the prevalence of the data; with
  22 positives in a thousand, it would else be the prevalence that varies most.
  """
  scores, labels = np.asarray(scores, np.float64), np.asarray(labels) > 0
  positives, negatives = np.flatnonzero(labels), np.flatnonzero(~labels)
  if not len(positives):
    return float("nan"), float("nan")
  rng, found = np.random.default_rng(seed), []
  for _ in range(samples):
    drawn = [rng.choice(some, len(some)) for some in (positives, negatives) if len(some)]
    drawn = np.concatenate(drawn)
    found.append(average_precision(scores[drawn], labels[drawn]))
  low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def at_threshold(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
  """Precision, recall and false-positive rate of one threshold; precision is NaN if none is."""
  flagged, labels = np.asarray(scores) >= threshold, np.asarray(labels) > 0
  hits, wrong = int(np.sum(flagged & labels)), int(np.sum(flagged & ~labels))
  return {
    "precision": hits / (hits + wrong) if hits + wrong else float("nan"),
    "recall": hits / int(labels.sum()) if labels.any() else float("nan"),
    "false_positive_rate": wrong / int((~labels).sum()) if (~labels).any() else float("nan"),
    "flagged": hits + wrong,
  }


def for_json(found: Any) -> Any:
  """`found` with None for every NaN, which JSON does not have."""
  if isinstance(found, dict):
    return {key: for_json(value) for key, value in found.items()}
  if isinstance(found, list):
    return [for_json(value) for value in found]
  return None if isinstance(found, float) and math.isnan(found) else found
