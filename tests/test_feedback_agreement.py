"""Agreement against published figures, and edit distances against a table by hand."""

import math
import random

import feedback_cases as cases
import pytest

from rlhf_jax.feedback import agreement, edits
from rlhf_jax.feedback.agreement import Share, krippendorff_alpha, pairwise
from rlhf_jax.feedback.labels import Answer, Comparison
from rlhf_jax.feedback.store import Store
from rlhf_jax.types import UserError

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability": four observers, twelve units.
OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def units(table, value=int):
  """The values of each column; a point is a missing one."""
  columns = zip(*(line.split() for line in table.strip().splitlines()))
  return [[value(cell) for cell in column if cell != "."] for column in columns]


@pytest.mark.parametrize(
  ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_krippendorffs_table_is_the_published_one(level, alpha):
  assert krippendorff_alpha(units(OBSERVERS), level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_two_observers_is_the_published_one():
  binary = "0 1 0 0 0 0 0 0 1 0\n1 1 1 0 0 1 0 0 0 0"
  names = "a a b b d c c c e d d a\nb a b b b c c c e d d d"
  assert krippendorff_alpha(units(binary), "nominal") == pytest.approx(0.095, abs=5e-4)
  assert krippendorff_alpha(units(names, str), "nominal") == pytest.approx(0.692, abs=5e-4)


def test_alpha_is_one_for_perfect_agreement_and_near_zero_for_chance():
  assert krippendorff_alpha([[1, 1], [2, 2, 2], [3]], "ordinal") == 1.0
  rng = random.Random(0)
  guesses = [[rng.randrange(5) for _ in range(3)] for _ in range(4000)]
  for level in ("nominal", "ordinal", "interval"):
    assert abs(krippendorff_alpha(guesses, level)) < 0.03


def test_alpha_of_nothing_to_compare_is_nan():
  for nothing in ([], [[1]], [[1, 1], [1, 1]]):
    assert math.isnan(krippendorff_alpha(nothing, "nominal"))
  with pytest.raises(UserError, match="nominal, ordinal or interval"):
    krippendorff_alpha([[1, 2]], "cardinal")


def test_pairs_of_two_rankings_by_hand():
  # AB AC BC: > > > against > = <, so the first agrees, the tie and the third do not.
  assert pairwise((0, 1, 2), (0, 1, 0)) == (Share(1, 3), Share(1, 2))
  assert pairwise((0, 0), (0, 0)) == (Share(1, 1), Share(0, 0))
  assert pairwise((0, 1), (1, 0)) == (Share(0, 1), Share(0, 1))


def ranked(author, task, ranks, **changes):
  flags = changes.pop("flags", ())
  qualities = changes.pop("qualities", (None, None))
  answers = tuple(
    Answer(text, "sft", rank, quality, flags) for text, rank, quality in zip("AB", ranks, qualities)
  )
  values = {"conversation": cases.HELLO, "answers": answers, "author": author, "task": task}
  return Comparison(**values | changes)


def test_the_report_counts_agreement_gold_and_speed(tmp_path):
  with Store.open(str(tmp_path / "a.db"), create=True) as store:
    one, two = store.add_all(
      [cases.compare_task(gold=(0, 1), overlap=3), cases.compare_task(overlap=3)]
    )
    wrong = ranked("cyd", one, (1, 0), seconds=9.0)
    store.add_all(
      [
        ranked("ann", one, (0, 1), seconds=10, qualities=(7, 1), flags=("opinion",)),
        ranked("bob", one, (0, 1), seconds=4, qualities=(7, 1), flags=("opinion",)),
        wrong,
        ranked("ann", two, (0, 0), seconds=20),
        ranked("bob", two, (1, 0), seconds=6, qualities=(2, 2)),
        ranked("ann", None, (0, 1), source="chat"),  # is of no task
      ]
    )
    found = agreement.report(store)
    # Task one: ann = bob, cyd with neither; task two: a tie against a preference.
    assert (found.pairwise, found.decided) == (Share(1, 4), Share(1, 3))
    ann, bob, cyd = (found.labelers[name] for name in ("ann", "bob", "cyd"))
    assert (ann.comparisons, ann.with_others, ann.with_gold) == (2, Share(1, 3), Share(1, 1))
    assert (ann.median_seconds, bob.median_seconds) == (15, 5)
    assert cyd.with_gold == Share(0, 1)
    assert found.quality_alpha == 1.0
    by_hand = krippendorff_alpha([[1, 1, -1], [0, -1]], "ordinal")
    assert found.preference_alpha == pytest.approx(by_hand)
    # A correction counts, what it corrects does not.
    store.add(ranked("cyd", one, (0, 1), supersedes=wrong.id))
    assert agreement.report(store).pairwise == Share(3, 4)


@pytest.mark.parametrize(
  ("a", "b", "distance"),
  [
    *(("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0)),
    *(("kitten", "sitting", 3), ("intention", "execution", 5), ("flaw", "lawn", 2)),
    *(("a", "b", 1), ("ab", "ba", 2), ("é🦊", "e🦊", 1), ("Saturday", "Sunday", 3)),
  ],
)
def test_edit_distances_by_hand(a, b, distance):
  assert edits.levenshtein(a, b) == edits.levenshtein(b, a) == distance


def test_edit_distance_equals_the_table_of_distances():
  def by_table(a, b):
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
      row = [i]
      for j, y in enumerate(b, start=1):
        row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
      last = row
    return last[-1]

  rng = random.Random(1)
  for _ in range(300):
    a, b = ("".join(rng.choices("abc", k=rng.randrange(90))) for _ in range(2))
    assert edits.levenshtein(a, b) == by_table(a, b)


def test_edit_fraction_is_of_the_longer_text():
  assert edits.edit_fraction("La.", "La la.") == 3 / 6
  assert edits.edit_fraction("", "") == 0.0
  assert edits.edit_fraction("ab", "cd") == 1.0
