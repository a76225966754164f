"""From logits to probabilities that mean what they say, and to thresholds; NumPy, on the host.

Both are chosen on scores of texts that the scoring model has not seen (held out, or out of fold),
category by category, from the texts whose label is known.
"""

import dataclasses
from typing import Literal

import numpy as np

from rlhf_jax.config import Fraction, PositiveInt
from rlhf_jax.moderation import measures

NEWTON_STEPS, TOLERANCE = 100, 1e-10


@dataclasses.dataclass(frozen=True)
class ThresholdConfig:
  """What thresholds are chosen for."""

  target: Literal["precision", "recall", "f1"]  # at least `value` of it; the highest, for f1
  value: Fraction  # not read for f1
  min_positives: PositiveInt  # with fewer known positives, or negatives, nothing is chosen
  fallback: Fraction  # the threshold then, and where the target is out of reach


@dataclasses.dataclass(frozen=True)
class Platt:
  """probability = sigmoid(slope * logit + bias)."""

  slope: float
  bias: float
  positives: int  # known labels that it was fitted to
  negatives: int
  note: str  # "fitted", or why it is not a fit of both numbers

  def __call__(self, logits: np.ndarray) -> np.ndarray:
    return sigmoid(self.slope * np.asarray(logits, np.float64) + self.bias)


@dataclasses.dataclass(frozen=True)
class Threshold:
  """The probability from which on a category is flagged."""

  value: float
  note: str  # "precision >= 0.8", or why it is the fallback


def sigmoid(x: np.ndarray) -> np.ndarray:
  """1 / (1 + e^-x) without overflow."""
  return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def fit_platt(logits: np.ndarray, labels: np.ndarray, min_positives: int) -> Platt:
  """Platt 1999 by Newton's method with a line search (Lin, Lin & Weng 2007, algorithm 1).

  Labels are smoothed to (N+ + 1) / (N+ + 2) and 1 / (N- + 2) (Platt 1999, eq. 14), so that logits
  which separate the classes still have a finite fit. With fewer than `min_positives` on either side
  only the bias is fitted, as if the slope were known to be 1; a slope that came out below 0 says
  that the logits rank worse than chance, and is not followed either.
  """
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels) > 0
  positives, negatives = int(labels.sum()), int((~labels).sum())
  targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
  if min(positives, negatives) >= min_positives:
    slope, bias = _newton(np.stack([logits, np.ones_like(logits)], 1), targets, np.zeros(0))
    if slope > 0:
      return Platt(float(slope), float(bias), positives, negatives, "fitted")
    note = "slope 1: the fitted one is not above 0"
  else:
    note = f"slope 1: {positives} positives and {negatives} negatives, needs {min_positives}"
  if not len(logits):
    return Platt(1.0, 0.0, 0, 0, note)
  (bias,) = _newton(np.ones((len(logits), 1)), targets, logits)
  return Platt(1.0, float(bias), positives, negatives, note)


def _newton(features: np.ndarray, targets: np.ndarray, offset: np.ndarray) -> np.ndarray:
  """Logistic regression on features [n, k] beside a fixed offset [n] (or none); the k weights."""
  offset = offset if len(offset) else np.zeros(len(features))
  weights = np.zeros(features.shape[1])
  nll = lambda w: np.sum(np.logaddexp(0.0, z := features @ w + offset) - targets * z)
  value = nll(weights)
  for _ in range(NEWTON_STEPS):
    p = sigmoid(features @ weights + offset)
    gradient = features.T @ (p - targets)
    hessian = features.T @ (features * (p * (1 - p))[:, None])
    step = np.linalg.solve(hessian + 1e-12 * np.eye(len(weights)), gradient)
    scale = 1.0
    while scale > TOLERANCE and nll(weights - scale * step) > value - 1e-4 * scale * (
      gradient @ step
    ):
      scale /= 2
    weights = weights - scale * step
    value = nll(weights)
    if np.max(np.abs(gradient)) < TOLERANCE * len(features):
      break
  return weights


def choose_threshold(
  probabilities: np.ndarray, labels: np.ndarray, config: ThresholdConfig
) -> Threshold:
  """The threshold that meets the target on these texts.

  For a precision it is the lowest that has it, which finds most; for a recall the highest that has
  it, which disturbs least. Where the target is out of reach, or labels are too few to tell, it is
  `fallback`, and the note says so.
  """
  curve = measures.curve(probabilities, labels)
  if min(curve.positives, curve.negatives) < config.min_positives:
    return Threshold(
      config.fallback,
      f"fallback: {curve.positives} positives and {curve.negatives} negatives, needs "
      f"{config.min_positives}",
    )
  if config.target == "f1":
    best = int(np.argmax(curve.f1))
    return Threshold(float(curve.thresholds[best]), f"highest f1, {curve.f1[best]:.2f}")
  reached = np.flatnonzero(getattr(curve, config.target) >= config.value)
  if not len(reached):
    best = float(np.max(getattr(curve, config.target)))
    note = f"fallback: {config.target} {config.value:g} is out of reach, the most is {best:.2f}"
    return Threshold(config.fallback, note)
  chosen = reached[-1] if config.target == "precision" else reached[0]
  return Threshold(float(curve.thresholds[chosen]), f"{config.target} >= {config.value:g}")
