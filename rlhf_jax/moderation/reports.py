"""What people's reports of false positives do: the moderator before and after it learns from them.

The reporters are simulated. The moderator reads one half of a pool of labelled texts; those of the
other class to which it gives the highest scores are what people would complain of first. `count` of
them come back as examples that say 0 for the category, and nothing about the others, and the fit is
done again with them. Both moderators are measured on the other half of the pool and, for what the
reports cost, on a held-out fold of the evaluated texts.
"""

from typing import Any

import numpy as np

from rlhf_jax.data import moderation as data_lib
from rlhf_jax.data.moderation import CATEGORIES, ModerationExample, label_arrays, write_jsonl
from rlhf_jax.moderation import calibration, folds, measures, rows
from rlhf_jax.moderation.bench import Bench
from rlhf_jax.moderation.fitting import done, fit_items, score
from rlhf_jax.moderation.study import assign_folds, heads_of
from rlhf_jax.parallel import hosts
from rlhf_jax.training import files
from rlhf_jax.types import UserError

SHOWN_RECALLS = (0.3, 0.5, 0.7, 0.9)  # of the table


def simulate(
  pool: list[ModerationExample], scores: np.ndarray, category: str, count: int
) -> list[ModerationExample]:
  """`count` reports: the highest-scored texts [n] of the pool whose label for the category is 0.

  Raises:
    UserError: fewer texts are known not to belong to it.
  """
  innocent = [i for i, example in enumerate(pool) if example.labels.get(category) == 0]
  if len(innocent) < count:
    raise UserError(
      f"config reports.count {count}: only {len(innocent)} texts of the pool are known not to be "
      f"{category}; use at most {len(innocent)}, or a larger pool."
    )
  worst = sorted(innocent, key=lambda i: -scores[i])[:count]
  return [ModerationExample(pool[i].text, {category: 0}, "reports") for i in worst]


def study(bench: Bench) -> dict[str, Any]:
  """The effect of the reports on the threshold curve of their category, as JSON.

  The training texts are those of the evaluated source but for fold 0. The pool is divided in
  halves, near copies together; the reports are kept in workdir/reports/reports.jsonl.
  """
  config, main = bench.config.reports, bench.config.data.evaluated
  c, fold = CATEGORIES.index(config.category), assign_folds(bench)[main]
  seen = {example.identity for example in bench.evaluated}
  pool = data_lib.tweets(config.pool, bench.config.seed)
  pool = [example for example in pool if example.identity not in seen]
  groups = folds.groups([e.text for e in pool], bench.config.evaluation.near_duplicate)
  half = folds.assign(groups, 2, bench.config.seed)
  pool_windows = bench.windows([example.text for example in pool])
  windows = bench.windows([example.text for example in bench.evaluated])
  tests = {
    "other half of the pool": (chosen(pool, half == 1), chosen(pool_windows, half == 1)),
    f"held-out fold of {main}": (chosen(bench.evaluated, fold == 0), chosen(windows, fold == 0)),
  }
  asked = chosen(pool, half == 0)
  train = {main: chosen(heads_of(bench, bench.evaluated), fold != 0)}
  weights = {main: 1.0, "reports": config.weight}

  def measured(name: str, items: dict[str, list[rows.Item]], read=()) -> dict[str, Any]:
    def work():
      params = fit_items(bench, f"reports/{name}", items, weights, [])
      found = {test: score(bench, params, some)[:, c].tolist() for test, (_, some) in tests.items()}
      also = score(bench, params, read)[:, c].tolist() if read else []
      return {"tests": found, "pool": also}

    return done(bench.workdir / "reports" / name, work)

  before = measured("before", train, chosen(pool_windows, half == 0))
  reports = simulate(asked, np.array(before["pool"]), config.category, config.count)
  keep_reports(bench, reports)
  after = measured("after", {**train, "reports": heads_of(bench, reports)})
  return {
    "category": config.category,
    "count": config.count,
    "pool": len(asked),
    "trained_on": len(train[main]),
    "tests": {
      name: compare(some, before["tests"][name], after["tests"][name], config.category)
      for name, (some, _) in tests.items()
    },
  }


def chosen(some: list, where: np.ndarray) -> list:
  """The elements of `some` at which `where` [n] is true."""
  return [some[i] for i in np.flatnonzero(where)]


def keep_reports(bench: Bench, reports: list[ModerationExample]) -> None:
  """Writes the reports as a file that `data.reports` of a config reads."""
  if hosts.is_first():
    files.write_text_atomic(bench.workdir / "reports" / "reports.jsonl", write_jsonl(reports))


def compare(
  examples: list[ModerationExample], before: list[float], after: list[float], category: str
) -> dict[str, Any]:
  """The two curves on one set of texts, and what they cost at equal recall.

  Scores are sigmoids of the logits, as they come: a calibration would be fitted to the very shift
  that is to be seen.
  """
  labels, known = label_arrays(examples)
  c, found = CATEGORIES.index(category), {}
  for name, logits in (("before", before), ("after", after)):
    scores = calibration.sigmoid(np.array(logits))
    scores, truth = measures.known_only(scores, labels[:, c], known[:, c])
    curve = measures.curve(scores, truth)
    found[name] = {
      "auprc": measures.average_precision(scores, truth),
      "thresholds": curve.thresholds.tolist(),
      "precision": curve.precision.tolist(),
      "recall": curve.recall.tolist(),
      "false_positive_rate": curve.false_positive_rate.tolist(),
      "at_half": measures.at_threshold(scores, truth, 0.5),
      "at_recall": [at_recall(curve, r) for r in SHOWN_RECALLS] if truth.any() else [],
    }
  return measures.for_json({"known": len(truth), "positives": int(truth.sum()), **found})


def at_recall(curve: measures.Curve, recall: float) -> dict[str, float]:
  """The highest threshold that finds so much, and what it costs."""
  i = int(np.argmax(curve.recall >= recall))
  return {
    "recall": recall,
    "threshold": float(curve.thresholds[i]),
    "precision": float(curve.precision[i]),
    "false_positive_rate": float(curve.false_positive_rate[i]),
  }
