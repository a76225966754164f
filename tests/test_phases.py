"""The stages at work: what they warn of, and where the reward model's zero is."""

import jax
import numpy as np
import pytest
import runs
import tiny

from rlhf_jax import experiment, feeds, phases, reward
from rlhf_jax.data.records import Demonstration


@pytest.mark.conformance("B32")
@pytest.mark.parametrize(
  ("kl", "stderr", "warns"),
  [
    (-0.5, 0.1, True),
    (-0.2, 0.1, False),
    (-1e-7, 0.0, False),
    (0.0, 0.0, False),
    (3.0, 0.1, False),
  ],
)
def test_a_mean_kl_clearly_below_zero_is_warned_of(monkeypatch, kl, stderr, warns):
  said = []
  monkeypatch.setattr(phases.logging, "warning", lambda text, *values: said.append(text % values))
  phases.warn_negative_kl(7, {"objective/kl": kl, "objective/kl_stderr": stderr})
  assert bool(said) == warns
  assert all("step 7" in text and "-0.500" in text for text in said)


@pytest.mark.conformance("A20")
def test_the_zero_of_a_reward_model_is_the_mean_score_of_demonstrations(tmp_path):
  run = experiment.start(runs.tiny(tmp_path / "data", reward__max_heldout=50), tmp_path / "run")
  params = tiny.params(run.scalar, 0)
  config = run.config.reward
  some = feeds.draw(run.data.records(Demonstration, "train"), 50, run.seed("reward", "centre"))
  apart = feeds.demonstration_rows(run, config.sequence_length, some, pack=False)
  score = jax.jit(lambda tokens, mask: reward.score_sequences(run.scalar, params, tokens, mask))
  scores = [float(score(row.tokens[None], (row.segments > 0)[None])[0]) for row in apart]
  assert len(scores) == 50 and np.std(scores) > 0.1
  mean = phases.demonstration_score(run, params, config)
  np.testing.assert_allclose(mean, np.mean(scores), atol=1e-4)
  again = phases.demonstration_score(run, reward.center(params, mean), config)
  assert abs(again) < 1e-3
