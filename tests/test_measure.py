"""The figures of an evaluation, against hand computation."""

import json
import math

import jax
import numpy as np
import pytest
import runs
import tiny

from rlhf_jax import experiment, phases, rollout
from rlhf_jax.evaluation import measure
from rlhf_jax.generation.respond import Reply
from rlhf_jax.labelers.gold import Gold
from rlhf_jax.types import Rollout


def described(gold, category="a", **values):
  base = {"score": 0.0, "kl": 0.0, "length": 1, "finished": True, "parts": {"honest": gold / 2}}
  return {"gold": gold, "category": category, **base, **values}


@pytest.mark.conformance("A62")
def test_figures_are_means_with_standard_errors():
  found = measure.figures(
    [
      described(1.0, kl=2.0, finished=True),
      described(0.0, kl=5.0, finished=False),
      described(0.5, kl=2.0, finished=True),
    ]
  )
  assert found["n"] == 3 and found["gold"] == 0.5 and found["kl"] == 3.0
  assert found["finished"] == pytest.approx(2 / 3)
  # deviations 1/2, -1/2, 0: variance 1/2 over n - 1 = 2, that is 1/4; error sqrt(1/4 / 3)
  assert found["gold_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
  # deviations -1, 2, -1: variance 6 / 2 = 3; error 1
  assert found["kl_stderr"] == pytest.approx(1.0)
  assert found["parts"] == {"honest": pytest.approx(0.25)}
  assert measure.figures([described(0.3)])["gold_stderr"] == 0.0


@pytest.mark.conformance("A62", "A40", "B9")
def test_kl_is_summed_over_the_tokens_of_a_response_alone():
  seen = Rollout(
    prompts=None,
    prompt_mask=None,
    responses=None,
    mask=np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
    logprobs=np.array([[-1.0, -2.0, np.nan], [-0.5, -0.5, -0.5]]),
    ref_logprobs=np.array([[-1.5, -1.0, 99.0], [-1.0, -1.0, -1.0]]),
    values=None,
    scores=np.array([0.25, -4.0]),
    finished=None,
  )
  rows = measure.rows_of(seen, [Reply("a", 2, True), Reply("b", 3, False)])
  assert [row["kl"] for row in rows] == [pytest.approx(-0.5), pytest.approx(1.5)]
  assert [row["score"] for row in rows] == [0.25, -4.0]
  assert [(row["response"], row["length"], row["finished"]) for row in rows] == [
    ("a", 2, True),
    ("b", 3, False),
  ]


def test_examples_are_dealt_out_to_the_categories_in_turn():
  answers = [described(i, c) for i, c in enumerate("aaabbc")]
  taken = measure.spread(answers, ["a", "b", "c"], 5)
  assert [(d["category"], d["gold"]) for d in taken] == [
    ("a", 0),
    ("b", 3),
    ("c", 5),
    ("a", 1),
    ("b", 4),
  ]
  assert measure.spread(answers, ["a", "b", "c"], 0) == []
  assert len(measure.spread(answers, ["a", "b", "c"], 99)) == 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  config = runs.tiny(tmp_path_factory.mktemp("data"), evaluation__prompts=20)
  return experiment.start(config, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def networks(run):
  """Policy, reference and reward model with logits of several nats."""
  return tuple(
    tiny.params(network, seed) for seed, network in enumerate((run.policy, run.policy, run.scalar))
  )


WORDS = Gold(
  "words",
  lambda conversation, answers: [{"total": float(len(a.split())), "half": 0.5} for a in answers],
  lambda conversation: "long" if len(conversation.messages) > 1 else "short",
  maximum=None,
)


def test_measuring_agrees_with_a_rollout_taken_apart(run, networks):
  policy, reference, model = networks
  judges = rollout.Judges(reference, model)
  found = measure.measure(run, policy, judges, WORDS)
  responder, sample = phases.sampler(run, 0)
  prompts = [p.conversation for p in run.data.prompts("heldout") if responder.fits(p.conversation)]
  prompts = prompts[:20]
  totals, scores, kls = [], [], []
  for i, batch in enumerate(responder.prompt_batches(prompts)):
    seen = sample(policy, model, judges, batch, jax.random.fold_in(run.key("evaluation"), i))
    seen = jax.device_get(seen)
    for row in range(min(len(prompts) - len(totals), len(seen.scores))):
      live = seen.mask[row] > 0
      text = run.tokenizer.decode(seen.responses[row][live].tolist())
      totals.append(len(text.split()))
      scores.append(seen.scores[row])
      kls.append(np.sum((seen.logprobs - seen.ref_logprobs)[row][live]))
  overall = found["overall"]
  assert overall["n"] == len(prompts) == sum(c["n"] for c in found["categories"].values())
  assert overall["gold"] == pytest.approx(np.mean(totals))
  assert overall["score"] == pytest.approx(np.mean(scores), rel=1e-5)
  assert overall["kl"] == pytest.approx(np.mean(kls), rel=1e-5)
  assert overall["kl_stderr"] == pytest.approx(np.std(kls, ddof=1) / np.sqrt(len(kls)), rel=1e-5)
  assert overall["parts"] == {"half": 0.5}
  assert len(found["dialogues"]) == run.config.evaluation.examples
  json.dumps(found)  # it is kept as JSON


@pytest.mark.conformance("A28", "B2")
def test_the_reference_itself_is_at_no_distance_and_gets_the_same_answers_twice(run, networks):
  _, reference, model = networks
  judges = rollout.Judges(reference, model)
  first, second = (measure.measure(run, reference, judges, WORDS) for _ in range(2))
  assert abs(first["overall"]["kl"]) < 1e-4 and first == second


def test_the_reward_model_judges_and_does_not_change_the_answers(run, networks):
  policy, reference, model = networks
  shifted = jax.tree.map(lambda leaf: leaf, model)
  shifted["score"]["bias"] = shifted["score"]["bias"] + 2.0
  low, high = (
    measure.measure(run, policy, rollout.Judges(reference, m), WORDS)["overall"]
    for m in (model, shifted)
  )
  assert high["score"] - low["score"] == pytest.approx(2.0, abs=1e-4)
  assert high["gold"] == low["gold"] and high["kl"] == low["kl"]
