"""Labelers: ranks from scores, and the habits of simulated ones."""

import itertools
import math
import statistics
import subprocess
import sys

import pytest

from rlhf_jax.labelers.base import dense_ranks
from rlhf_jax.labelers.score import ScoreLabeler
from rlhf_jax.labelers.simulated import LabelerConfig, SimulatedLabeler, panel
from rlhf_jax.text.dialogue import Conversation
from rlhf_jax.types import UserError

CALM = {
  "seed": 3,
  "labelers": 1,
  "noise": 0.0,
  "disagreement": 0.0,
  "length_bias": 0.0,
  "tie_margin": 0.0,
  "flip_rate": 0.0,
}


def conversation(i=0):
  return Conversation.of(("user", f"Question {i}?"))


def labeler(score=lambda text: 0.0, name="ann", **habits):
  """A simulated labeler with the given gold score of a text."""
  score_fn = lambda _, responses: [score(text) for text in responses]
  return SimulatedLabeler(name, score_fn, LabelerConfig(**(CALM | habits)))


@pytest.mark.parametrize(
  "scores, margin, ranks",
  [
    ([2.0, 5.0, 2.0], 0.0, (1, 0, 1)),
    ([0.0, 1.0, 2.0, 3.0], 0.0, (3, 2, 1, 0)),
    ([0.0, 0.0], 0.0, (0, 0)),
    ([1.0, 0.75, 0.5, 0.25], 0.25, (0, 0, 1, 1)),  # 0.75 lies within the margin of 1, 0.5 not
    ([0.0, 0.4, 0.8], 0.5, (1, 0, 0)),
    ([-1.0, 3.0], math.inf, (0, 0)),
  ],
)
def test_ranks_are_dense_and_a_tie_reaches_one_margin_down_from_its_best(scores, margin, ranks):
  assert dense_ranks(scores, margin) == ranks


@pytest.mark.conformance("B29")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error_and_no_rank(bad):
  with pytest.raises(UserError, match="finite"):
    ScoreLabeler("rm", lambda _, responses: [bad, 1.0], 0.0).rank(conversation(), ["a", "b"])
  with pytest.raises(UserError, match="finite"):
    labeler(lambda text: bad).rank(conversation(), ["a", "b"])


def test_a_single_response_or_a_missing_score_is_a_user_error():
  with pytest.raises(UserError, match="at least 2 responses, got 1"):
    labeler().rank(conversation(), ["a"])
  with pytest.raises(UserError, match="1 scores for 2"):
    ScoreLabeler("rm", lambda _, responses: [1.0], 0.0).rank(conversation(), ["a", "b"])


def test_without_noise_the_ranks_are_the_order_of_the_scores_with_ties_where_scores_tie():
  gold = {"a": 0.3, "b": 1.0, "": 0.3, "d e f": 0.0}
  for order in itertools.permutations(gold):
    scores = [gold[text] for text in order]
    ranks = labeler(gold.get).rank(conversation(), order)
    assert ranks == ScoreLabeler("rm", lambda _, r: [gold[t] for t in r], 0.0).rank(
      conversation(), order
    )
    distinct = sorted(set(scores), reverse=True)
    assert ranks == tuple(distinct.index(score) for score in scores)


@pytest.mark.parametrize("gap", [0.2, 0.5, 1.0])
def test_noise_turns_pairs_round_as_often_as_two_normal_slips_do(gap):
  noise, count = 0.5, 3000
  ann = labeler({"good": gap, "bad": 0.0}.get, noise=noise)
  wrong = sum(ann.rank(conversation(i), ["good", "bad"])[0] == 1 for i in range(count))
  rate = statistics.NormalDist().cdf(-gap / (noise * math.sqrt(2.0)))
  assert abs(wrong / count - rate) < 4 * math.sqrt(rate * (1 - rate) / count)


def test_flip_rate_turns_that_share_of_labels_round():
  rate, count = 0.25, 3000
  ann = labeler({"good": 1.0, "bad": 0.0}.get, flip_rate=rate)
  wrong = sum(ann.rank(conversation(i), ["good", "bad"])[0] == 1 for i in range(count))
  assert abs(wrong / count - rate) < 4 * math.sqrt(rate * (1 - rate) / count)


def test_flipping_a_ranking_of_more_than_two_is_a_user_error():
  with pytest.raises(UserError, match="flip_rate 0.25"):
    labeler(flip_rate=0.25).rank(conversation(), ["a", "b", "c"])


def test_length_bias_moves_the_longer_answer_up_and_a_negative_one_moves_it_down():
  gold = {"short": 1.0, "long " * 9 + "long": 0.8}
  texts = list(gold)
  assert labeler(gold.get).rank(conversation(), texts) == (0, 1)
  # 9 more words are worth 0.18 at 0.02 a word, and 0.27 at 0.03
  assert labeler(gold.get, length_bias=0.02).rank(conversation(), texts) == (0, 1)
  assert labeler(gold.get, length_bias=0.03).rank(conversation(), texts) == (1, 0)
  same = dict.fromkeys(texts, 0.5)
  assert labeler(same.get, length_bias=0.01).rank(conversation(), texts) == (1, 0)
  assert labeler(same.get, length_bias=-0.01).rank(conversation(), texts) == (0, 1)


def test_utility_is_gold_and_length_plus_independent_standard_normals():
  ann = labeler(lambda text: 2.0, length_bias=0.5, noise=3.0)
  slips = [(ann.utilities(conversation(i), ["a b", "c"])[0] - 3.0) / 3.0 for i in range(4000)]
  assert abs(statistics.mean(slips)) < 4 / math.sqrt(4000)
  assert abs(statistics.stdev(slips) - 1.0) < 0.05
  pairs = [ann.utilities(conversation(i), ["a b", "c"]) for i in range(4000)]
  assert abs(statistics.correlation(*zip(*pairs))) < 0.07


def test_a_label_depends_on_neither_the_order_of_responses_nor_that_of_items():
  habits = {"noise": 0.3, "disagreement": 0.3, "tie_margin": 0.2}
  texts = ["a", "b c", "d", "e f g"]
  first = {i: labeler(**habits).rank(conversation(i), texts) for i in range(20)}
  ann = labeler(**habits)
  for i in reversed(range(20)):
    for order in itertools.permutations(range(4)):
      ranks = ann.rank(conversation(i), [texts[k] for k in order])
      assert ranks == tuple(first[i][k] for k in order)
  flipper = labeler({"a": 1.0, "d": 0.0}.get, flip_rate=0.5)
  for i in range(50):
    there, back = (flipper.rank(conversation(i), pair) for pair in (["a", "d"], ["d", "a"]))
    assert there == back[::-1]


def test_a_label_is_the_same_in_another_process():
  code = (
    "from rlhf_jax.labelers.simulated import *\n"
    "from rlhf_jax.text.dialogue import Conversation\n"
    f"config = LabelerConfig(**{CALM | {'noise': 1.0}})\n"
    "ann = SimulatedLabeler('ann', lambda c, r: [0.0] * len(r), config)\n"
    "import sys\n"
    "asked = Conversation.of(('user', 'Question 0?'))\n"
    "sys.stdout.write(repr(ann.utilities(asked, ['a', 'b c'])))"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout == repr(labeler(noise=1.0).utilities(conversation(), ["a", "b c"]))


def test_two_answers_that_read_the_same_tie_whatever_the_noise():
  noisy = labeler(noise=1.0, disagreement=1.0)
  assert all(noisy.rank(conversation(i), ["a", "a"]) == (0, 0) for i in range(50))


def test_seed_name_and_conversation_each_give_other_slips():
  ann = labeler(noise=1.0)
  others = [
    labeler(noise=1.0, seed=4).utilities(conversation(), ["a", "b"]),
    labeler(noise=1.0, name="ben").utilities(conversation(), ["a", "b"]),
    ann.utilities(conversation(1), ["a", "b"]),
    ann.utilities(Conversation.of(("system", "Question 0?"), ("user", "")), ["a", "b"]),
  ]
  assert ann.utilities(conversation(), ["a", "b"]) not in others


def test_a_taste_is_the_same_in_every_conversation_and_differs_between_labelers():
  config = LabelerConfig(**(CALM | {"disagreement": 1.0, "labelers": 5}))
  people = panel(lambda _, responses: [0.0] * len(responses), config)
  assert len({person.name for person in people}) == 5
  texts = [f"answer {i}" for i in range(40)]
  for person in people:
    assert person.rank(conversation(1), texts) == person.rank(conversation(2), texts)
  assert len({person.rank(conversation(), texts) for person in people}) == 5


def test_a_panel_without_disagreement_or_noise_agrees():
  config = LabelerConfig(**(CALM | {"labelers": 3}))
  people = panel(lambda _, responses: [float(len(r)) for r in responses], config)
  assert {person.rank(conversation(), ["a", "bcd", "ef"]) for person in people} == {(2, 0, 1)}


@pytest.mark.conformance("B30")
def test_an_empty_answer_is_ranked_like_any_other():
  assert labeler({"": 0.0, "a": 1.0}.get, noise=0.1).rank(conversation(), ["", "a"]) == (1, 0)
