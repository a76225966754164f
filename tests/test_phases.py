"""The stages at work: what is drawn for them, and what they warn of."""

import types

import pytest

from rlhf_jax import phases
from rlhf_jax.data import batches


def test_drawing_all_keeps_the_order_and_drawing_some_repeats_none():
  records = [f"record {i}" for i in range(20)]
  assert phases.draw(records, None, seed=0) == records
  some = phases.draw(records, 5, seed=0)
  assert len(set(some)) == 5 and set(some) <= set(records)
  assert some == phases.draw(records, 5, seed=0) != phases.draw(records, 5, seed=1)
  assert sorted(phases.draw(records, 99, seed=0)) == sorted(records)


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


@pytest.mark.parametrize("share", (0.1, 0.25))
def test_pretraining_text_makes_its_share_of_the_rows(monkeypatch, share):
  config = types.SimpleNamespace(
    sft=types.SimpleNamespace(pretraining_share=share, sequence_length=8)
  )
  texts = [batches.Source("books", [], 1.0), batches.Source("web", [], 3.0)]
  data = types.SimpleNamespace(mixture=lambda kind, split, make_rows: texts)
  run = types.SimpleNamespace(config=config, data=data)
  dialogues = [batches.Source("a", [], 0.6), batches.Source("b", [], 0.4)]
  found = phases.pretraining_sources(run, dialogues)
  total = sum(source.weight for source in dialogues + found)
  assert sum(source.weight for source in found) / total == pytest.approx(share)
  assert found[1].weight / found[0].weight == pytest.approx(3.0)
