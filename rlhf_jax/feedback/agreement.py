"""How far labelers agree with each other and with gold ranks, and how fast they are."""

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import numpy as np

from rlhf_jax.feedback.labels import FLAGS, Comparison, Task
from rlhf_jax.feedback.store import Store
from rlhf_jax.types import UserError

Level = Literal["nominal", "ordinal", "interval"]


@dataclasses.dataclass(frozen=True)
class Share:
  """How often something held; `of` is 0 where it was never asked."""

  held: int
  of: int

  @property
  def value(self) -> float:
    return self.held / self.of if self.of else float("nan")


@dataclasses.dataclass(frozen=True)
class LabelerReport:
  """One labeler, as a researcher looks at them."""

  comparisons: int
  with_others: Share  # pairs of answers on which they and another labeler say the same
  with_gold: Share  # pairs of answers on which they say what the gold ranks say
  median_seconds: float | None  # a comparison


@dataclasses.dataclass(frozen=True)
class Report:
  """All labelers together, on the tasks that several of them did."""

  pairwise: Share  # two labelers, two answers: the same one better, or both a tie
  decided: Share  # the same, where neither called it a tie
  preference_alpha: float  # Krippendorff, ordinal, over better / tie / worse of each pair
  quality_alpha: float  # Krippendorff, ordinal, over the Likert scale
  flag_alpha: dict[str, float]  # Krippendorff, nominal
  labelers: dict[str, LabelerReport]


def krippendorff_alpha(units: Iterable[Sequence[Hashable]], level: Level) -> float:
  """Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", C-E).

    alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck

  with o the coincidences of values c and k inside units, n_c their sums, and d the squared
  difference of the level. 1 is perfect agreement, 0 what chance gives.

  Args:
    units: for each thing that was judged, the values that it got, in any order; missing ones are
      left out, and a unit with less than two values says nothing.
    level: "nominal" for names; "ordinal" and "interval" for numbers.

  Returns:
    nan where there are no two values to pair, or all values are one.
  """
  units = [unit for unit in units if len(unit) > 1]
  values = sorted({value for unit in units for value in unit})
  place = {value: i for i, value in enumerate(values)}
  coincidences = np.zeros((len(values), len(values)))
  for unit in units:
    counts = np.zeros(len(values))
    for value in unit:
      counts[place[value]] += 1
    coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
  totals = coincidences.sum(0)
  difference = _differences(values, totals, level)
  expected = (np.outer(totals, totals) * difference).sum()
  if expected == 0:
    return float("nan")
  return float(1 - (totals.sum() - 1) * (coincidences * difference).sum() / expected)


def pair_signs(ranks: Sequence[int]) -> tuple[int, ...]:
  """For each pair of answers i < j: 1 where i is better, -1 where j is, 0 for a tie."""
  return tuple((a < b) - (a > b) for a, b in itertools.combinations(ranks, 2))


def pairwise(one: Sequence[int], other: Sequence[int]) -> tuple[Share, Share]:
  """On how many pairs of answers two rankings say the same: of all, of those both decide."""
  if len(one) != len(other):
    raise UserError(f"rankings of {len(one)} and {len(other)} answers cannot be compared.")
  signs = list(zip(pair_signs(one), pair_signs(other)))
  decided = [(a, b) for a, b in signs if a and b]
  same = lambda pairs: Share(sum(a == b for a, b in pairs), len(pairs))
  return same(signs), same(decided)


def report(store: Store) -> Report:
  """Agreement over all rankings of tasks; corrections count, what they corrected does not."""
  tasks = {task.id: task for task in store.records(Task, work="compare")}
  done = [record for record in store.records(Comparison) if record.task in tasks]
  by_task: dict[str, list[Comparison]] = collections.defaultdict(list)
  for record in done:
    by_task[record.task].append(record)
  everyone, decided, own = [], [], collections.defaultdict(list)
  for records in by_task.values():
    for one, other in itertools.combinations(records, 2):
      same, same_decided = pairwise(_ranks(one), _ranks(other))
      everyone.append(same)
      decided.append(same_decided)
      own[one.author].append(same)
      own[other.author].append(same)
  labelers = {
    name: _of_labeler([r for r in done if r.author == name], tasks, own[name])
    for name in sorted({record.author for record in done})
  }
  preferences, qualities, flags = _units(by_task.values())
  return Report(
    pairwise=_sum(everyone),
    decided=_sum(decided),
    preference_alpha=krippendorff_alpha(preferences, "ordinal"),
    quality_alpha=krippendorff_alpha(qualities, "ordinal"),
    flag_alpha={flag: krippendorff_alpha(flags[flag], "nominal") for flag in FLAGS},
    labelers=labelers,
  )


def _differences(values: list, totals: np.ndarray, level: Level) -> np.ndarray:
  """Squared differences [V, V] between the values, sorted, that occur `totals` [V] times."""
  if level == "nominal":
    return 1.0 - np.eye(len(values))
  if level == "interval":
    at = np.array(values, float)
    return (at[:, None] - at[None, :]) ** 2
  if level == "ordinal":
    # The sum of n_g from c to k, less half of both ends, is a difference of middles.
    middle = np.cumsum(totals) - totals / 2
    return (middle[:, None] - middle[None, :]) ** 2
  raise UserError(f"the level is nominal, ordinal or interval, got {level!r}.")


def _units(tasks: Iterable[list[Comparison]]) -> tuple[list, list, dict[str, list]]:
  """What was judged, with all judgments of it: pairs of answers, qualities, flags."""
  preferences, qualities, flags = [], [], {flag: [] for flag in FLAGS}
  for records in tasks:
    preferences += zip(*(pair_signs(_ranks(record)) for record in records))
    for answers in zip(*(record.answers for record in records)):
      qualities.append([a.quality for a in answers if a.quality is not None])
      for flag in FLAGS:
        flags[flag].append([flag in answer.flags for answer in answers])
  return preferences, qualities, flags


def _of_labeler(
  records: list[Comparison], tasks: dict[str, Task], with_others: list[Share]
) -> LabelerReport:
  gold = [
    pairwise(_ranks(record), tasks[record.task].gold)[0]
    for record in records
    if tasks[record.task].gold is not None
  ]
  seconds = [record.seconds for record in records if record.seconds is not None]
  return LabelerReport(
    comparisons=len(records),
    with_others=_sum(with_others),
    with_gold=_sum(gold),
    median_seconds=statistics.median(seconds) if seconds else None,
  )


def _ranks(record: Comparison) -> list[int]:
  return [answer.rank for answer in record.answers]


def _sum(shares: list[Share]) -> Share:
  return Share(sum(share.held for share in shares), sum(share.of for share in shares))
