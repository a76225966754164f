"""Average precision, intervals, calibration and thresholds against hand values and other code."""

import math

import numpy as np
import pytest
import scipy.optimize

from rlhf_jax.config import build
from rlhf_jax.moderation import calibration, folds, measures
from rlhf_jax.moderation.calibration import ThresholdConfig


def random_scores(n, seed, ties=False):
  """Scores that know something of labels with a prevalence of about a quarter."""
  rng = np.random.default_rng(seed)
  labels = rng.random(n) < 0.25
  scores = rng.normal(size=n) + 1.2 * labels
  return (np.round(scores) if ties else scores), labels


def target(name, value=0.0, min_positives=1, fallback=0.5):
  fields = dict(target=name, value=value, min_positives=min_positives, fallback=fallback)
  return build(ThresholdConfig, fields)


# Average precision.


def test_average_precision_of_a_hand_worked_table():
  # Ranked 1 0 1 1 0: precision 1/1 at the first positive, 2/3 at the second, 3/4 at the third.
  scores, labels = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1, 0, 1, 1, 0])
  assert measures.average_precision(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_a_loop_over_thresholds(ties):
  scores, labels = random_scores(200, 0, ties)
  total, before = 0.0, 0.0
  for threshold in sorted(set(scores), reverse=True):
    flagged = [label for score, label in zip(scores, labels) if score >= threshold]
    recall = sum(flagged) / sum(labels)
    total += (recall - before) * sum(flagged) / len(flagged)
    before = recall
  assert measures.average_precision(scores, labels) == pytest.approx(total)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_and_curve_are_scikit_learns(ties):
  metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
  scores, labels = random_scores(300, 1, ties)
  expected = metrics.average_precision_score(labels, scores)
  assert measures.average_precision(scores, labels) == pytest.approx(expected)
  precision, recall, thresholds = metrics.precision_recall_curve(labels, scores)
  found = measures.curve(scores, labels)
  np.testing.assert_allclose(found.thresholds[::-1], thresholds)
  np.testing.assert_allclose(found.precision[::-1], precision[:-1])
  np.testing.assert_allclose(found.recall[::-1], recall[:-1])


def test_a_constant_score_gets_the_prevalence_and_no_positive_gets_nan():
  assert measures.average_precision(np.zeros(8), np.array([1, 0] * 4)) == 0.5
  assert math.isnan(measures.average_precision(np.arange(3.0), np.zeros(3)))


@pytest.mark.conformance("A65")
def test_texts_with_a_missing_label_change_no_average_precision():
  scores, labels = random_scores(120, 2)
  expected = measures.average_precision(scores, labels)
  # Unknown texts with the highest scores of all: as negatives they would halve the precision.
  scores, labels = np.append(scores, [9.0] * 40), np.append(labels, [False] * 40)
  known = np.append(np.ones(120), np.zeros(40))
  kept = measures.known_only(scores, labels, known)
  assert measures.average_precision(*kept) == expected
  assert measures.average_precision(scores, labels) < 0.7 * expected


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
  # The population is 40,000 draws; each of 60 samples of 150 gives one interval.
  truth = measures.average_precision(*random_scores(40_000, 99))
  covered = 0
  for seed in range(60):
    scores, labels = random_scores(150, seed)
    low, high = measures.bootstrap(scores, labels, samples=150, level=0.9, seed=0)
    covered += low <= truth <= high
  assert 47 <= covered <= 60  # 54 expected; with 0.9 each, fewer than 47 comes once in 150


def test_a_bootstrap_is_the_same_for_the_same_seed_and_narrower_for_more_texts():
  interval = lambda n, seed: measures.bootstrap(
    *random_scores(n, 3), samples=100, level=0.95, seed=seed
  )
  assert interval(200, 0) == interval(200, 0) != interval(200, 1)
  width = lambda pair: pair[1] - pair[0]
  assert width(interval(3_000, 0)) < 0.6 * width(interval(200, 0))


# Calibration.


def test_platts_fit_is_that_of_a_general_minimiser():
  scores, labels = random_scores(300, 4)
  positives, negatives = labels.sum(), (~labels).sum()
  targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))

  def nll(weights):
    p = 1 / (1 + np.exp(-(weights[0] * scores + weights[1])))
    return -np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p))

  expected = scipy.optimize.minimize(nll, [1.0, 0.0], method="Nelder-Mead", tol=1e-10).x
  found = calibration.fit_platt(scores, labels, 10)
  np.testing.assert_allclose([found.slope, found.bias], expected, rtol=1e-4)
  assert found.note == "fitted"


def test_overconfident_logits_become_probabilities_that_are_right_as_often_as_they_say():
  rng = np.random.default_rng(5)
  logits = rng.normal(size=20_000) * 2
  labels = rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
  p = calibration.fit_platt(logits, labels, 10)(logits)
  for low in np.arange(0.0, 0.6, 0.1):
    inside = (p >= low) & (p < low + 0.1)
    assert labels[inside].mean() == pytest.approx(p[inside].mean(), abs=0.03)


def test_logits_that_separate_the_classes_still_have_a_finite_fit():
  logits, labels = np.array([-3.0, -2.0, 2.0, 3.0] * 10), np.array([0, 0, 1, 1] * 10)
  found = calibration.fit_platt(logits, labels, 5)
  assert 0 < found.slope < 20 and np.isfinite(found.bias)


@pytest.mark.parametrize(
  ("labels", "note"),
  [
    ([1, 0, 0, 0, 0, 0, 0, 0], "slope 1: 1 positives and 7 negatives, needs 3"),
    ([1, 1, 1, 1, 0, 0, 0, 0], "slope 1: the fitted one is not above 0"),
  ],
)
def test_too_few_positives_or_a_reversed_ranking_fit_the_base_rate_alone(labels, note):
  logits = np.arange(8.0)  # rises while labels fall
  found = calibration.fit_platt(logits, np.array(labels), 3)
  assert (found.slope, found.note) == (1.0, note)
  p = (sum(labels) + 1) / (sum(labels) + 2), 1 / (8 - sum(labels) + 2)
  expected = sum(labels) * p[0] + (8 - sum(labels)) * p[1]
  assert found(logits).sum() == pytest.approx(expected)  # the mean is the smoothed base rate


# Thresholds.


@pytest.mark.parametrize("value", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("name", ["precision", "recall"])
def test_a_threshold_meets_its_target_and_the_next_one_would_not_do_better(name, value):
  scores, labels = random_scores(400, 6)
  p = calibration.sigmoid(scores)
  chosen = calibration.choose_threshold(p, labels, target(name, value))
  assert chosen.note == f"{name} >= {value}"
  got = measures.at_threshold(p, labels, chosen.value)
  assert got[name] >= value
  other = "recall" if name == "precision" else "precision"
  every = [measures.at_threshold(p, labels, t) for t in p]
  meeting = [each for each in every if each[name] >= value]
  if name == "precision":
    assert got[other] == max(each[other] for each in meeting)
  else:
    assert got["flagged"] == min(each["flagged"] for each in meeting)


def test_the_f1_threshold_is_the_best_of_all():
  scores, labels = random_scores(300, 7)
  p = calibration.sigmoid(scores)
  f1 = lambda got: 2 * got["precision"] * got["recall"] / (got["precision"] + got["recall"])
  chosen = calibration.choose_threshold(p, labels, target("f1"))
  best = max(f1(measures.at_threshold(p, labels, t)) for t in p if np.any(labels[p >= t]))
  assert f1(measures.at_threshold(p, labels, chosen.value)) == pytest.approx(best)


def test_too_few_positives_and_a_target_out_of_reach_fall_back_and_say_so():
  p, labels = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 1, 0, 1])
  few = calibration.choose_threshold(p, labels, target("precision", 0.5, 3, 0.25))
  assert few.value == 0.25 and "2 positives and 2 negatives, needs 3" in few.note
  high = calibration.choose_threshold(p, labels, target("precision", 0.9, 1, 0.25))
  assert high.value == 0.25 and "out of reach, the most is 0.50" in high.note


# Folds.


def test_near_copies_share_a_group_and_different_texts_do_not():
  base = "The quick brown fox jumps over the lazy dog near the river bank at dawn every day."
  copies = [base, base.upper() + "  ", base.replace("day", "days"), "Something else entirely here."]
  assert folds.groups(copies, 0.7).tolist() == [0, 0, 0, 3]


def test_groups_are_those_of_comparing_every_pair():
  rng = np.random.default_rng(0)
  words = [f"word{i}" for i in range(12)]
  texts = [" ".join(rng.choice(words, 12)) for _ in range(40)]
  texts += [text + " and more" for text in texts[:15]]
  sets = [folds.shingles(text) for text in texts]
  group = list(range(len(texts)))
  for i in range(len(texts)):
    for j in range(i):
      if len(sets[i] & sets[j]) >= 0.7 * len(sets[i] | sets[j]):
        low, high = sorted((group[i], group[j]))
        group = [low if g == high else g for g in group]
  assert folds.groups(texts, 0.7).tolist() == group
  assert len(set(group)) < len(texts) - 10


def test_folds_keep_groups_whole_and_are_of_nearly_one_size():
  groups = np.array([i // 3 for i in range(90)])
  fold = folds.assign(groups, 5, 0)
  assert all(len(set(fold[groups == g].tolist())) == 1 for g in range(30))
  assert np.bincount(fold).tolist() == [18] * 5
