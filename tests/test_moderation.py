"""The classifier's loss and gradients, what it learns, and the moderator that a server loads."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import moderation
from rlhf_jax.data import batches
from rlhf_jax.data import moderation as data_lib
from rlhf_jax.data.builders import FilesConfig
from rlhf_jax.data.moderation import CATEGORIES, ModerationExample, TweetsConfig
from rlhf_jax.moderation import classifier, moderator, rows, verdicts
from rlhf_jax.moderation.calibration import Platt, Threshold
from rlhf_jax.moderation.verdicts import Actions
from rlhf_jax.networks import heads
from rlhf_jax.text.tokenizer import train_bpe
from rlhf_jax.training import optim
from rlhf_jax.types import UserError

C = len(CATEGORIES)
NETWORK = heads.LabelNetwork(tiny.MODEL, C, "mean")
ONES = jnp.ones(C)


@pytest.fixture(scope="module")
def params():
  return tiny.params(NETWORK, 0)


def random_items(count, seed, longest=9):
  """Texts of 1 .. `longest` tokens with random labels, about half of them known."""
  rng = np.random.default_rng(seed)
  draw = lambda: (rng.random(C) < 0.5).astype(np.float32)
  texts = [tiny.random_tokens(1 + i % longest, seed + i) for i in range(count)]
  return [rows.Item(text, draw(), draw()) for text in texts]


def batch_of(items, max_tokens=16, max_texts=3):
  some, plan = rows.label_rows(items, max_tokens, max_texts, 0)
  return batches.stack([some[i] for i in range(len(some))]), plan


forward = jax.jit(lambda params, batch: classifier.logits(NETWORK, params, batch))
loss_and_grad = jax.jit(
  jax.value_and_grad(
    lambda params, batch, weights: classifier.loss(NETWORK, params, batch, weights)[0]
  )
)


# Loss.


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_loss_is_a_loop_over_the_known_labels(params, power):
  items = random_items(7, 0)
  batch, plan = batch_of(items)
  arrays = np.stack([i.labels for i in items]), np.stack([i.known for i in items])
  weights = classifier.positive_weights(*arrays, power)
  found = np.asarray(forward(params, batch), np.float64)
  total, count = 0.0, 0
  for row, slots in enumerate(plan):
    for slot, i in enumerate(slots):
      for c in range(C):
        if items[i].known[c]:
          p = 1 / (1 + np.exp(-found[row, slot, c]))
          total -= weights[c] * np.log(p) if items[i].labels[c] else np.log(1 - p)
          count += 1
  np.testing.assert_allclose(loss_and_grad(params, batch, weights)[0], total / count, rtol=1e-5)
  assert (power == 0) == bool(np.all(weights == 1))


@pytest.mark.conformance("A65")
def test_an_unknown_label_has_no_gradient_whatever_stands_in_its_place(params):
  batch, _ = batch_of(random_items(7, 1))
  value, grads = loss_and_grad(params, batch, ONES)
  unknown = dataclasses.replace(batch, labels=np.where(batch.known > 0, batch.labels, np.nan))
  for other in (unknown, batch.replace(labels=np.where(batch.known, batch.labels, 1.0))):
    again, grads_again = loss_and_grad(params, other, ONES)
    assert again == value
    assert tiny.digest(grads_again) == tiny.digest(grads)


@pytest.mark.conformance("A65")
def test_a_category_that_nobody_labelled_leaves_its_head_without_gradient(params):
  batch, _ = batch_of(random_items(7, 2))
  known = batch.known.copy()
  known[..., 3] = 0.0
  _, grads = loss_and_grad(params, batch.replace(known=known), ONES)
  per_category = np.abs(np.asarray(grads["score"]["kernel"])).sum(axis=0)
  assert per_category[3] == 0 and np.all(np.delete(per_category, 3) > 0)
  _, nothing = loss_and_grad(params, batch.replace(known=np.zeros_like(known)), ONES)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_micro_batches_with_different_numbers_of_labels_give_the_whole_batchs_step(params):
  items = random_items(12, 3)
  batch, _ = batch_of(items, max_tokens=9, max_texts=2)
  batch = jax.tree.map(lambda x: x[:4], batch)
  optimizer = optim.make(tiny.OPTIM, 10)
  state = classifier.init(params, optimizer)
  step = jax.jit(
    lambda parts: classifier.step(
      *(state, batch, {}, ONES),
      network=NETWORK,
      optimizer=optimizer,
      micro_batches=parts,
      first_block=0,
    ),
    static_argnums=0,
  )
  (whole, figures), (parts, same) = step(1), step(2)
  tiny.assert_trees_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(same["moderation/loss"], figures["moderation/loss"], rtol=1e-5)


def test_a_fresh_head_says_the_base_rates(params):
  labels, known = np.zeros((2, 10, C), np.float32)
  known[:, 0], labels[:2, 0] = 1.0, 1.0
  rates = classifier.base_rates(labels, known)
  assert rates[0] == 3 / 12 and rates[1] == 0.5  # of what nobody labelled, nothing is known
  made = classifier.from_trunk(NETWORK, params["trunk"], rates, jax.random.key(0))
  p = jax.nn.sigmoid(made["score"]["bias"])
  np.testing.assert_allclose(p, rates, rtol=1e-6)
  held = [not np.shares_memory(a, b) for a, b in zip(*map(jax.tree.leaves, (made, params)))]
  assert all(held)


# What a text's score depends on.


@pytest.mark.conformance("A16", "B4")
@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
def test_neighbours_padding_and_order_change_no_logit(pooling):
  network = heads.LabelNetwork(tiny.MODEL, C, pooling)
  params = tiny.params(network, 1)
  apply = jax.jit(lambda batch: classifier.logits(network, params, batch))
  items = random_items(8, 4)
  batch, plan = batch_of(items)
  together = np.asarray(apply(batch))
  for row, slots in enumerate(plan):
    for slot, i in enumerate(slots):
      alone, _ = batch_of([items[i]], max_tokens=11, max_texts=1)
      np.testing.assert_allclose(apply(alone)[0, 0], together[row, slot], rtol=1e-4, atol=1e-5)
  hidden = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32)
  pooled = heads.pool(hidden, np.array([[1, 1, 2, 0]]), 3, pooling)[0]
  two = hidden[0, :2]
  expected = {"mean": two.mean(axis=0), "last": two[1], "max": two.max(axis=0)}[pooling]
  np.testing.assert_allclose(pooled, [expected, hidden[0, 2], np.zeros(3)], rtol=1e-6)


def test_cached_streams_of_frozen_blocks_give_the_same_logits(params):
  items = random_items(6, 5)
  batch, _ = batch_of(items)
  stream = NETWORK.apply(
    {"params": {"trunk": params["trunk"]}},
    *(batch.inputs, batch.positions, batch.segments, 1),
    method="stem",
  )
  later = classifier.logits(NETWORK, params, batch.replace(inputs=stream), first_block=1)
  np.testing.assert_allclose(later, forward(params, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 14, 15, 40])
def test_windows_hold_every_token_and_overlap_by_a_quarter(length):
  some = rows.windows(list(range(length)), 8)
  assert set(np.concatenate(some).tolist()) == set(range(length))
  assert all(len(window) <= 8 for window in some) and len(some[0]) == min(length, 8)
  for one, next_one in zip(some, some[1:]):
    assert next_one[0] == one[0] + 6 and next_one[-1] > one[-1]


# Learning.


def test_it_learns_which_words_belong_to_which_category_from_half_the_labels():
  # A text is of category c if it holds token 10 + c; half of the labels are unknown.
  rng = np.random.default_rng(0)
  items = []
  for _ in range(1_400):
    labels = (rng.random(C) < 0.3).astype(np.float32)
    fill = rng.integers(20, 40, 6)
    text = rng.permutation(np.concatenate([fill, 10 + np.flatnonzero(labels)])).astype(np.int32)
    items.append(rows.Item(text, labels, (rng.random(C) < 0.5).astype(np.float32)))
  some, _ = rows.label_rows(items[:1_300], 32, 4, 0)
  stream = batches.endless([batches.Source("texts", some, 1.0)], 16, seed=0)
  optimizer = optim.make(tiny.OPTIM, 250)
  fresh = heads.init(NETWORK, jax.random.key(0))
  state = classifier.init(fresh, optimizer)
  step = jax.jit(
    lambda state, batch: classifier.step(
      state, batch, {}, ONES, network=NETWORK, optimizer=optimizer, micro_batches=1, first_block=0
    )
  )
  for at in range(250):
    state, _ = step(state, stream.batch_at(at))
  everything = [dataclasses.replace(item, known=np.ones(C, np.float32)) for item in items[1_300:]]
  batch, _ = batch_of(everything, 32, 4)
  evaluate = jax.jit(lambda params: classifier.evaluate(NETWORK, params, batch))
  before, after = (classifier.summarize(evaluate(p)) for p in (fresh, state.params))
  assert after["accuracy"] > 0.95 and after["loss"] < 0.3 * before["loss"]


# Data.


def test_a_label_that_is_missing_or_null_is_unknown():
  example = data_lib.parse_sample({"prompt": "x", "S": 0, "V2": 1, "H": None}, "s")
  assert dict(example.labels) == {"sexual": 0, "violence/graphic": 1}
  labels, known = data_lib.label_arrays([example])
  assert known.sum() == 2 and labels[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
  ("labels", "message"),
  [({"rude": 1}, "unknown moderation categories"), ({"hate": 2}, "0 or 1"), ({}, "at least")],
)
def test_a_wrong_label_is_named(labels, message):
  with pytest.raises(UserError, match=message):
    ModerationExample("text", labels, "test")


def test_a_later_report_corrects_an_earlier_label_and_keeps_the_others():
  base = ModerationExample("Some text", {"hate": 1, "sexual": 0}, "samples")
  report = ModerationExample("some  TEXT", {"hate": 0}, "reports")
  (merged,) = data_lib.merge([base, report])
  assert dict(merged.labels) == {"hate": 0, "sexual": 0}


def test_reports_go_through_a_file_and_back_and_bad_lines_are_named_or_skipped(tmp_path):
  path = tmp_path / "reports.jsonl"
  some = [
    ModerationExample("a \u2028 b", {"hate": 0}, "x"),
    ModerationExample("c", {"sexual": 1}, "y"),
  ]
  path.write_text(data_lib.write_jsonl(some) + '{"text": "no labels"}\n', encoding="utf-8")
  read = lambda how: list(data_lib.read(FilesConfig((str(path),), how), data_lib.parse_report))
  assert read("skip") == some
  with pytest.raises(UserError, match="line 3: a report has the keys"):
    read("error")


def test_a_tweets_class_says_what_was_asked_and_no_more(tmp_path):
  path = tmp_path / "tweets.csv"
  path.write_text(',class,tweet\n0,0,"a, b"\n1,1,c\n2,2,d\n')
  found = data_lib.tweets(TweetsConfig((str(path),), None), 0)
  assert [(e.text, dict(e.labels)) for e in found] == [
    ("a, b", {"hate": 1}),
    ("c", {"hate": 0}),
    ("d", {"hate": 0, "harassment": 0}),
  ]
  assert len(data_lib.tweets(TweetsConfig((str(path),), 2), 0)) == 2


def test_the_released_samples_keep_their_known_labels_alone(data_folder):
  path = data_folder / "openai-moderation/samples.jsonl.gz"
  with gzip.open(path, "rt") as file:
    items = [json.loads(line) for line in file]
  config = FilesConfig((str(path),), "error")
  found = list(data_lib.read(config, data_lib.parse_sample))
  labels, known = data_lib.label_arrays(found)
  for c, letter in enumerate(data_lib.LETTERS):
    values = [item[letter] for item in items if item.get(letter) is not None]
    assert (known[:, c].sum(), labels[:, c].sum()) == (len(values), sum(values))


# Verdicts.


def test_a_verdict_takes_the_most_severe_action_of_its_side_and_openais_form():
  scores = [0.9, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
  actions = {name: Actions("warn", "warn") for name in CATEGORIES}
  actions["violence"] = Actions(input="none", output="block")
  thresholds = dict.fromkeys(CATEGORIES, 0.5)
  made = {side: verdicts.judge(scores, thresholds, actions, side) for side in ("input", "output")}
  assert (made["input"].action, made["output"].action) == ("warn", "block")
  assert made["output"].of("violence") == verdicts.CategoryVerdict(
    "violence", 0.5, 0.5, True, "block"
  )
  assert made["input"].of("hate").action == "none"
  body = moderation.openai_format([made["input"]], id="modr-1", model="m")
  (result,) = json.loads(json.dumps(body))["results"]
  assert result["flagged"] and set(result) == {"flagged", "categories", "category_scores"}
  names = (
    "sexual hate violence harassment self-harm sexual/minors hate/threatening violence/graphic"
  )
  assert list(result["categories"]) == list(result["category_scores"]) == names.split()
  assert [n for n, flag in result["categories"].items() if flag] == ["sexual", "violence"]


# The moderator.


@pytest.fixture(scope="module")
def made():
  """A moderator with random parameters, whose windows are of 32 tokens."""
  tokenizer = train_bpe(["the quick brown fox"], 300, ("<pad>", "<eos>"), eos="<eos>", pad="<pad>")
  sizes = dataclasses.replace(tiny.MODEL, vocab_size=300)
  design = moderator.Design(sizes, "mean", 32, CATEGORIES)
  judged = {
    name: moderator.Rule(
      Platt(0.5 + c, -0.1, 9, 9, "fitted"), Threshold(0.5, "test"), Actions("warn", "block")
    )
    for c, name in enumerate(CATEGORIES)
  }
  params = tiny.params(design.network, 7)
  return moderator.Moderator(design, params, tokenizer, judged, moderator.one_device(), 4)


TEXTS = ["fox", "", "the quick brown fox jumps", "x" * 100, "a b c", "lazy dogs " * 3, "é", "z"]


def test_a_loaded_moderator_gives_the_same_verdicts(made, tmp_path):
  moderator.save(tmp_path, made)
  loaded = moderation.load(tmp_path, batch_size=4)
  assert loaded(TEXTS, side="output") == made(TEXTS, side="output")
  assert not list(tmp_path.rglob("*.pkl")) and (tmp_path / "thresholds.json").exists()
  edited = json.loads((tmp_path / "thresholds.json").read_text())
  edited["hate"]["threshold"]["value"] = 0.0
  (tmp_path / "thresholds.json").write_text(json.dumps(edited))
  assert all(v.of("hate").flagged for v in moderation.load(tmp_path)(TEXTS))
  edited["hate"]["threshold"]["value"] = 1.5
  (tmp_path / "thresholds.json").write_text(json.dumps(edited))
  with pytest.raises(UserError, match="hate is 1.5, outside"):
    moderation.load(tmp_path)
  for wrong in ([], edited | {"haet": edited["hate"]}):
    (tmp_path / "thresholds.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="thresholds.json: needs the categories .*, has "):
      moderation.load(tmp_path)


def test_order_and_company_change_no_score(made):
  together = made.probabilities(TEXTS)
  np.testing.assert_allclose(made.probabilities(TEXTS[::-1])[::-1], together, rtol=1e-5)
  alone = np.concatenate([made.probabilities([text]) for text in TEXTS])
  np.testing.assert_allclose(alone, together, rtol=1e-5)


def test_a_long_text_is_scored_by_its_worst_window(made):
  ids = rows.encode(TEXTS[3], made.tokenizer)
  pieces = rows.windows(ids, 32)
  assert len(pieces) > 2
  each = [made.logits([made.tokenizer.decode(piece)])[0] for piece in pieces]
  np.testing.assert_allclose(made.logits([TEXTS[3]])[0], np.max(each, axis=0), rtol=1e-5)


def test_calibration_is_applied_category_by_category(made):
  logits = made.logits(TEXTS)
  slopes = 0.5 + np.arange(C)
  expected = 1 / (1 + np.exp(-(slopes[None] * logits - 0.1)))
  np.testing.assert_allclose(made.probabilities(TEXTS), expected, rtol=1e-6)


def test_a_length_bucket_compiles_once_for_few_and_once_for_many(made):
  fresh = dataclasses.replace(made)
  shapes = []
  jitted = made._apply

  def spy(params, tokens, *rest):
    shapes.append(tokens.shape)
    return jitted(params, tokens, *rest)

  object.__setattr__(fresh, "_apply", spy)
  for texts in (["a"], ["b c"], TEXTS, TEXTS[::-1], ["fox " * 6], ["fox " * 200]):
    fresh(texts)
  assert set(shapes) <= {(1, 16), (4, 16), (1, 32), (4, 32)}
  shapes.clear()
  fresh.compile()
  assert sorted(shapes) == [(1, 16), (1, 32), (4, 16), (4, 32)]


def test_a_single_text_and_a_folder_without_a_moderator_are_named(made, tmp_path):
  with pytest.raises(UserError, match="takes a list of texts"):
    made("some text")
  with pytest.raises(UserError, match="experiments/moderate.py first"):
    moderation.load(tmp_path)
  assert made([]) == []
