"""The true reward: the village's own, and a reward model in the place of people."""

import jax
import numpy as np
import pytest
import tiny

from rlhf_jax.data import village
from rlhf_jax.labelers import gold
from rlhf_jax.labelers.simulated import LabelerConfig, panel
from rlhf_jax.networks import heads
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.reward import score_sequences
from rlhf_jax.text import dialogue
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError

WORLD = village.build_world(village.STANDARD)
TOKENIZER = Tokenizer(
  village.build_tokenizer(WORLD), eos=dialogue.VILLAGE.end, pad="<pad>", bos=None
)
NETWORK = heads.ScalarNetwork(tiny.changed(tiny.MODEL, vocab_size=TOKENIZER.vocab_size))
MESH = mesh_lib.make(mesh_lib.MeshConfig(data=-1, fsdp=1, tensor=1))
SOME = [
  d.conversation for d, _ in zip(village.demonstrations(village.STANDARD, "train"), range(40))
]
PROMPT = SOME[0].prompt_before(len(SOME[0].messages) - 1)


def right(prompt):
  """A right answer."""
  return village.ideal(WORLD, village.understand(WORLD, prompt))[0]


def test_the_villages_total_is_that_of_its_gold_score_and_at_most_one():
  truth = gold.of_village(WORLD)
  assert truth.maximum == 1.0
  for whole in SOME:
    prompt, said = whole.prompt_before(len(whole.messages) - 1), whole.last.content
    ideal = right(prompt)
    answers = [said, ideal, "", "mill mill mill"]
    judged = truth.judge(prompt, answers)
    for answer, parts in zip(answers, judged):
      score = village.gold.score(WORLD, prompt, answer)
      assert parts["total"] == score.total
      assert parts["honest"] == score.honest and parts["correct"] == score.correct
    assert truth.totals(prompt, answers) == [parts["total"] for parts in judged]
    assert judged[1]["total"] == 1.0 and judged[2]["total"] == 0.0


def test_the_village_sorts_prompts_by_behaviour_and_counts_refusals():
  truth = gold.of_village(WORLD)
  prompts = [whole.prompt_before(len(whole.messages) - 1) for whole in SOME]
  assert {truth.category(prompt) for prompt in prompts} <= set(village.BEHAVIOURS)
  refusing = [p for p in prompts if truth.category(p) == "refuse"]
  others = [p for p in prompts if truth.category(p) == "answer"]
  judged = lambda p: truth.judge(p, [right(p)])[0]
  assert refusing and all(judged(p)["refused"] == 1.0 for p in refusing)
  assert others and all(judged(p)["refused"] == 0.0 for p in others)


def test_labelers_without_habits_rank_by_the_true_reward():
  calm = dict.fromkeys(("noise", "disagreement", "length_bias", "tie_margin", "flip_rate"), 0.0)
  truth = gold.of_village(WORLD)
  people = panel(truth.totals, LabelerConfig(seed=0, labelers=2, **calm))
  ideal = right(PROMPT)
  for person in people:
    assert person.rank(PROMPT, ["mill mill", ideal, ""]) == (1, 0, 1)


@pytest.fixture(scope="module")
def params():
  return tiny.params(NETWORK, 0)


@pytest.fixture(scope="module")
def scorer():
  return gold.Scorer(NETWORK, TOKENIZER, dialogue.VILLAGE, MESH, 64, max_responses=3)


ANSWERS = ("Alice lives in the mill.", "I do not know.", "", "Bob.", "In the inn.") * 3


def test_scores_are_those_of_the_reward_model_on_the_whole_dialogue(params, scorer):
  scores = scorer.score(params, PROMPT, ANSWERS)
  for answer, score in zip(ANSWERS[:5], scores):
    ids = [
      *dialogue.encode_prompt(PROMPT, dialogue.VILLAGE, TOKENIZER),
      *dialogue.encode_response(answer, dialogue.VILLAGE, TOKENIZER),
    ]
    tokens = np.array([ids], np.int32)
    mask = np.ones_like(tokens, np.float32)
    expected = jax.jit(score_sequences, static_argnums=0)(NETWORK, params, tokens, mask)
    np.testing.assert_allclose(score, expected[0], rtol=1e-4, atol=1e-5)


def test_a_score_does_not_depend_on_the_other_answers_or_their_number(params, scorer):
  together = scorer.score(params, PROMPT, ANSWERS)
  assert len(together) == len(ANSWERS) > 8  # more than one chunk
  for count in (1, 2, 3, 8, 9):
    apart = scorer.score(params, PROMPT, ANSWERS[:count])
    np.testing.assert_allclose(apart, together[:count], rtol=1e-4, atol=1e-5)
  backwards = scorer.score(params, PROMPT, ANSWERS[::-1])
  np.testing.assert_allclose(backwards[::-1], together, rtol=1e-4, atol=1e-5)
  assert scorer.score(params, PROMPT, []) == []


def test_a_reward_model_stands_in_for_people(params, scorer):
  truth = gold.of_reward_model("gold", scorer, params)
  assert truth.name == "gold" and truth.maximum is None
  assert truth.totals(PROMPT, ANSWERS[:3]) == scorer.score(params, PROMPT, ANSWERS[:3])
  assert truth.judge(PROMPT, ANSWERS[:1]) == [{"total": truth.totals(PROMPT, ANSWERS[:1])[0]}]
  first = Conversation.of(("user", "Where does Alice live?"))
  later = first.with_reply("In the mill.").with_message("user", "Who is she?")
  assert [truth.category(c) for c in (first, later)] == ["first turn", "later turn"]


def test_a_dialogue_that_does_not_fit_the_reward_model_is_an_error(params, scorer):
  with pytest.raises(UserError, match="max_tokens is"):
    scorer.score(params, Conversation.of(("user", "Where does Alice live? " * 20)), ANSWERS[:2])


def test_all_answers_share_one_compilation(params):
  fresh = gold.Scorer(NETWORK, TOKENIZER, dialogue.VILLAGE, MESH, 64, max_responses=3)
  for count in (1, 2, 7, 9):
    fresh.score(params, PROMPT, ANSWERS[:count])
  assert fresh._score.__wrapped__._cache_size() == 1
  assert jax.device_count() == 8  # slots are a multiple of what the batch is split over
