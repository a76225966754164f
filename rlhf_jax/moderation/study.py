"""Cross-validation, calibration, and the moderator that comes of them.

Each text is scored by a classifier that has seen neither it nor a near copy of it. Calibration and
thresholds are chosen on these scores, and serve the classifier that is then fitted to all texts
(the cross-fitting of Platt 1999, section 2.2).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.moderation import CATEGORIES, ModerationExample, label_arrays
from rlhf_jax.moderation import calibration, folds, measures, rows
from rlhf_jax.moderation.bench import Bench
from rlhf_jax.moderation.calibration import Platt, Threshold
from rlhf_jax.moderation.fitting import done, fit_items, score
from rlhf_jax.moderation.moderator import Design, Moderator, Rule
from rlhf_jax.moderation.rows import Item
from rlhf_jax.types import UserError


def heads_of(bench: Bench, examples: Sequence[ModerationExample]) -> list[Item]:
  """Examples as training reads them: the first window of each, for labels are of whole texts."""
  windows = bench.windows([example.text for example in examples])
  return rows.items(examples, [some[0] for some in windows])


def assign_folds(bench: Bench) -> dict[str, np.ndarray]:
  """The fold of every example of every source; near copies are in one, across sources too."""
  config = bench.config.evaluation
  texts = [example.text for some in bench.examples.values() for example in some]
  groups = folds.groups(texts, config.near_duplicate)
  ends = np.cumsum([len(some) for some in bench.examples.values()])
  by_source = dict(zip(bench.examples, np.split(groups, ends[:-1])))
  evaluated = by_source[bench.config.data.evaluated]
  kept = folds.assign(evaluated, config.folds, bench.config.seed)
  fold_of = dict(zip(evaluated.tolist(), kept.tolist()))
  # A text of another source trains in every fold (-1), but for that of its near copy.
  found = {
    name: np.array([fold_of.get(group, -1) for group in groups.tolist()])
    for name, groups in by_source.items()
  }
  _check_folds(bench, kept)
  return found


def _check_folds(bench: Bench, fold: np.ndarray) -> None:
  for number in range(bench.config.evaluation.folds):
    if not np.any(fold == number):
      raise UserError(
        f"config evaluation.folds: fold {number} of {bench.config.evaluation.folds} is empty; "
        f"{len(bench.evaluated)} texts, near copies counted once, are too few."
      )


def cross_validate(bench: Bench) -> np.ndarray:
  """Logits [n, C] of the evaluated texts, each by a classifier that has not seen its like."""
  fold = assign_folds(bench)
  items = {name: heads_of(bench, some) for name, some in bench.examples.items()}
  windows = bench.windows([example.text for example in bench.evaluated])
  main = bench.config.data.evaluated
  found = np.zeros((len(bench.evaluated), len(CATEGORIES)))
  for number in range(bench.config.evaluation.folds):
    name, out = f"fold_{number}", np.flatnonzero(fold[main] == number)

    def fit_and_score(name=name, number=number, out=out):
      train = {
        source: [some[i] for i in np.flatnonzero(fold[source] != number)]
        for source, some in items.items()
      }
      weights = bench.config.data.weights
      params = fit_items(bench, name, train, weights, [items[main][i] for i in out])
      scored = score(bench, params, [windows[i] for i in out])
      return {"texts": [bench.evaluated[i].identity for i in out], "logits": scored.tolist()}

    kept = done(bench.workdir / name, fit_and_score)
    if kept["texts"] != [bench.evaluated[i].identity for i in out]:
      raise UserError(f"{bench.workdir / name} scored other texts; choose another --workdir.")
    found[out] = kept["logits"]
  return found


def choose(
  bench: Bench, logits: np.ndarray, labels: np.ndarray, known: np.ndarray
) -> list[tuple[Platt, Threshold]]:
  """Calibration and threshold of each category, from the logits [n, C] of unseen texts."""
  config, chosen = bench.config.thresholds, []
  for c in range(len(CATEGORIES)):
    scores, truth = measures.known_only(logits[:, c], labels[:, c], known[:, c])
    platt = calibration.fit_platt(scores, truth, config.min_positives)
    chosen.append((platt, calibration.choose_threshold(platt(scores), truth, config)))
  return chosen


def train_moderator(bench: Bench, chosen: Sequence[tuple[Platt, Threshold]]) -> Moderator:
  """The classifier fitted to all texts, with calibration and thresholds from cross-validation."""
  items = {name: heads_of(bench, some) for name, some in bench.examples.items()}
  params = fit_items(bench, "final", items, bench.config.data.weights, [])
  config = bench.config
  design = Design(
    bench.network.config, config.trunk.pooling, config.fit.sequence_length, CATEGORIES
  )
  judged = {
    name: Rule(platt, threshold, config.actions[name])
    for name, (platt, threshold) in zip(CATEGORIES, chosen)
  }
  batch = max(config.fit.batch_size // config.fit.micro_batches, 1)
  return Moderator(design, params, bench.tokenizer, judged, bench.mesh, batch)


def evaluate(bench: Bench, logits: np.ndarray) -> dict[str, Any]:
  """What the cross-validated logits [n, C] are worth, category by category, as JSON.

  Precision, recall and false-positive rate are at thresholds that were chosen, like the
  calibration, on the texts of the other folds.
  """
  config = bench.config.evaluation
  labels, known = label_arrays(bench.evaluated)
  fold = assign_folds(bench)[bench.config.data.evaluated]
  flagged = np.zeros(logits.shape)
  for number in range(config.folds):
    own = fold == number
    rules = choose(bench, logits[~own], labels[~own], known[~own])
    for c, (platt, threshold) in enumerate(rules):
      flagged[own, c] = platt(logits[own, c]) >= threshold.value
  categories = {}
  for c, name in enumerate(CATEGORIES):
    scores, truth = measures.known_only(logits[:, c], labels[:, c], known[:, c])
    decided, _ = measures.known_only(flagged[:, c], labels[:, c], known[:, c])
    low, high = measures.bootstrap(
      scores, truth, samples=config.bootstrap, level=config.level, seed=bench.config.seed
    )
    categories[name] = {
      "known": len(truth),
      "positives": int(truth.sum()),
      "prevalence": float(truth.mean()) if len(truth) else float("nan"),
      "auprc": measures.average_precision(scores, truth),
      "auprc_interval": [low, high],
      **measures.at_threshold(decided, truth, 0.5),
    }
  found = {
    "trained_on": {name: len(some) for name, some in bench.examples.items()},
    "evaluated_on": bench.config.data.evaluated,
    "folds": config.folds,
    "level": config.level,
    "trunk": trunk_name(bench),
    "mean_auprc": float(np.nanmean([part["auprc"] for part in categories.values()])),
    "categories": categories,
  }
  return measures.for_json(found)


def trunk_name(bench: Bench) -> str:
  """What the classifier stands on, in words."""
  sizes, path = bench.network.config, bench.config.trunk.checkpoint
  begun = "random parameters" if path is None else path.rstrip("/").rpartition("/")[2]
  return f"{begun}, width {sizes.d_model}, blocks {sizes.n_layers}, of them frozen {bench.stem}"
