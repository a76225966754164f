"""What stages are fed: which records, and in which shares."""

import types

import pytest

from rlhf_jax import feeds
from rlhf_jax.data import batches


def test_drawing_all_keeps_the_order_and_drawing_some_repeats_none():
  records = [f"record {i}" for i in range(20)]
  assert feeds.draw(records, None, seed=0) == records
  some = feeds.draw(records, 5, seed=0)
  assert len(set(some)) == 5 and set(some) <= set(records)
  assert some == feeds.draw(records, 5, seed=0) != feeds.draw(records, 5, seed=1)
  assert sorted(feeds.draw(records, 99, seed=0)) == sorted(records)


@pytest.mark.parametrize("share", (0.1, 0.25))
def test_pretraining_text_makes_its_share_of_the_rows(monkeypatch, share):
  config = types.SimpleNamespace(
    sft=types.SimpleNamespace(pretraining_share=share, sequence_length=8)
  )
  texts = [batches.Source("books", [], 1.0), batches.Source("web", [], 3.0)]
  data = types.SimpleNamespace(mixture=lambda kind, split, make_rows: texts)
  run = types.SimpleNamespace(config=config, data=data)
  dialogues = [batches.Source("a", [], 0.6), batches.Source("b", [], 0.4)]
  found = feeds.pretraining_sources(run, dialogues)
  total = sum(source.weight for source in dialogues + found)
  assert sum(source.weight for source in found) / total == pytest.approx(share)
  assert found[1].weight / found[0].weight == pytest.approx(3.0)
