"""The stages at work: what they warn of."""

import pytest

from rlhf_jax import phases


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
