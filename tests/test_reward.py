"""The reward model's loss against hand values, where scores are read, and what counts as right."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import reward
from rlhf_jax.data import batches, packing
from rlhf_jax.networks import heads
from rlhf_jax.training import optim

T = 9
TABLE = jnp.arange(tiny.MODEL.vocab_size, dtype=jnp.float32) / 4.0
# A "network" whose value is a table over tokens: the score of an answer is that of its last token.


def look_up(variables, tokens, *_, branches, columns):
  """A network that gives every id a score of its own."""
  return jnp.take_along_axis(variables["params"][tokens], columns, axis=1)


LOOKUP = SimpleNamespace(apply=look_up)


def ranking_batch(prompts, ranks, rows=7, width=9):
  """Prompts, each a list of answers (lists of ids), one to a row; `width` slots for answers."""
  groups = [
    packing.Group(np.zeros(0, np.int32), tuple(np.array(a, np.int32) for a in answers), tuple(r))
    for answers, r in zip(prompts, ranks)
  ]
  contents = [[group] for group in groups] + [[]] * (rows - len(groups))
  return packed(contents, max_tokens=width * T, max_prompts=1, max_responses=width)


def packed(contents, **sizes):
  """The groups of each row as a batch."""
  return batches.stack([packing.ranking_row(row, pad_id=tiny.PAD, **sizes) for row in contents])


@pytest.fixture(scope="module")
def params():
  return tiny.params(tiny.SCALAR, 0)


@jax.jit
def score(params, tokens, mask):
  return reward.score_sequences(tiny.SCALAR, params, tokens, mask)


lookup_loss = jax.jit(jax.value_and_grad(lambda table, b: reward.loss(LOOKUP, table, b)[0]))
lookup_evaluate = jax.jit(lambda batch: reward.evaluate(LOOKUP, TABLE, batch))


# The loss.


@pytest.mark.conformance("A10")
def test_four_answers_give_the_hand_value_of_six_pairs():
  # Scores 2, 1, 0, -1 in order: gaps 1, 2, 3, 1, 2, 1 and log(1 + e^-gap) = .313262, .126928,
  # .048587; (3 x .313262 + 2 x .126928 + .048587) / C(4, 2) = .207038.
  got = reward.ranking_loss(jnp.array([2.0, 1.0, 0.0, -1.0]), jnp.arange(4), jnp.ones(4))
  np.testing.assert_allclose(got, 0.207038, rtol=1e-5)


@pytest.mark.conformance("A10")
@pytest.mark.parametrize("gap", [-1.5, 0.0, 2.0])
def test_two_answers_give_the_pairwise_loss(gap):
  got = reward.ranking_loss(jnp.array([0.3, 0.3 + gap]), jnp.array([1, 0]), jnp.ones(2))
  np.testing.assert_allclose(got, np.log1p(np.exp(-gap)), rtol=1e-5)


@pytest.mark.conformance("A11")
def test_a_prompt_with_nine_answers_weighs_as_much_as_one_with_four():
  nine, four = [[i + 2] for i in range(9)], [[i + 20] for i in range(4)]
  loss = lambda prompts, ranks: lookup_loss(TABLE, ranking_batch(prompts, ranks))[0]
  alone = [loss([nine], [range(9)]), loss([four], [range(4)])]
  together = loss([nine, four], [range(9), range(4)])
  np.testing.assert_allclose(together, np.mean(alone), rtol=1e-6)
  # 36 and 6 pairs: weighing pairs alike would give another number.
  assert abs(together - (36 * alone[0] + 6 * alone[1]) / 42) > 0.01


@pytest.mark.conformance("A12")
def test_each_answer_goes_forward_once_and_all_in_one_call():
  shapes = []

  def apply(variables, tokens, *inputs, **options):
    shapes.append(tokens.shape)
    return look_up(variables, tokens, *inputs, **options)

  batch = ranking_batch([[[2], [3], [4], [5]]] * 3, [range(4)] * 3, rows=3, width=4)
  scores = jax.jit(lambda b: reward.loss(SimpleNamespace(apply=apply), TABLE, b)[1])(batch)
  assert shapes == [(3, 4 * T)]
  np.testing.assert_allclose(scores, [[[0.5, 0.75, 1.0, 1.25]]] * 3)
  assert (batch.tokens != tiny.PAD).sum() == 3 * 4  # not one more token than there are


def random_groups(count, seed):
  """Prompts of 1 to 6 tokens with 2 to 4 answers of 1 to 5 tokens."""
  rng = np.random.default_rng(seed)
  ids = lambda most: rng.integers(2, tiny.MODEL.vocab_size, rng.integers(1, most + 1))
  groups = []
  for _ in range(count):
    K = int(rng.integers(2, 5))
    answers = tuple(ids(5).astype(np.int32) for _ in range(K))
    groups.append(packing.Group(ids(6).astype(np.int32), answers, tuple(rng.permutation(K))))
  return groups


@pytest.mark.conformance("A12", "B18")
def test_answers_packed_behind_one_prompt_have_the_scores_and_gradients_of_dialogues_apart(params):
  groups = random_groups(6, seed=0)
  rows = [groups[:3], groups[3:4], [], groups[4:]]
  batch = packed(rows, max_tokens=80, max_prompts=3, max_responses=4)
  whole = [np.concatenate([g.prompt, a]).tolist() for g in groups for a in g.answers]
  tokens, mask = tiny.right_padded(whole, 12)
  valid = np.asarray(batch.valid) > 0

  def scores_packed(params):
    return reward.score_answers(tiny.SCALAR, params, batch)[valid]

  def scores_apart(params):
    return reward.score_sequences(tiny.SCALAR, params, tokens, mask)

  pull = np.random.default_rng(1).normal(size=len(whole))
  np.testing.assert_allclose(scores_packed(params), scores_apart(params), rtol=1e-4, atol=1e-5)
  slope = lambda scores: jax.grad(lambda p: jnp.vdot(scores(p), pull))(params)
  tiny.assert_trees_close(slope(scores_packed), slope(scores_apart), rtol=1e-3, atol=1e-4)


@pytest.mark.conformance("A13")
def test_ties_make_no_pair():
  pairs = reward.pairs(jnp.array([0, 1, 1, 0]), jnp.ones(4))
  np.testing.assert_array_equal(pairs, [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
  loss = lambda scores: reward.ranking_loss(scores, jnp.array([0, 0, 1]), jnp.ones(3))
  gradient = jax.grad(loss)(jnp.array([5.0, -5.0, 0.0]))
  # Two pairs against the third answer; between the tied ones nothing pulls.
  expected = [-jax.nn.sigmoid(-5.0) / 2, -jax.nn.sigmoid(5.0) / 2, 0.5]
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.conformance("A13", "B30")
def test_prompts_without_a_pair_have_no_weight_and_no_gradient():
  answers, tied = [[2], [9]], [[4], [5]]
  run = lambda prompts, ranks: lookup_loss(TABLE, ranking_batch(prompts, ranks))
  with_tie, without = run([answers, tied, []], [[0, 1], [0, 0], []]), run([answers], [[0, 1]])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), with_tie, without)
  value, gradient = run([tied, []], [[0, 0], []])
  assert value == 0.0 and np.all(np.asarray(gradient) == 0.0)


@pytest.mark.conformance("B11")
@pytest.mark.parametrize("junk", [100.0, np.nan, np.inf])
def test_empty_slots_reach_neither_loss_nor_gradient(junk):
  ranks, valid = jnp.array([1, 0, 0, 0]), jnp.array([1.0, 1.0, 0.0, 0.0])
  run = jax.value_and_grad(lambda scores: reward.ranking_loss(scores, ranks, valid))
  soiled, clean = (run(jnp.array([0.4, 1.0, filler, filler])) for filler in (junk, 0.0))
  jax.tree.map(np.testing.assert_array_equal, soiled, clean)


@pytest.mark.conformance("B23")
@pytest.mark.parametrize("gap, expected, slope", [(200.0, 0.0, 0.0), (-200.0, 200.0, -1.0)])
def test_gaps_of_200_are_finite_with_finite_gradients(gap, expected, slope):
  loss = lambda gap: reward.ranking_loss(jnp.stack([gap, 0.0]), jnp.arange(2), jnp.ones(2))
  value, gradient = jax.value_and_grad(loss)(jnp.float32(gap))
  np.testing.assert_allclose([value, gradient], [expected, slope], atol=1e-6)


# Where the score is read.


@pytest.mark.conformance("A15", "A16")
def test_appended_pads_leave_the_score_unchanged(params):
  rows = tiny.random_tokens((4, T), 0)
  mask = np.pad(np.ones((4, T), np.float32), ((0, 0), (0, 5)))
  for junk in (tiny.PAD, 7):
    padded = np.pad(rows, ((0, 0), (0, 5)), constant_values=junk)
    got = score(params, padded, mask)
    np.testing.assert_allclose(got, score(params, rows, np.ones((4, T), np.float32)), atol=1e-5)


@pytest.mark.conformance("A17", "A18", "B4", "B8")
def test_left_and_right_padding_give_the_same_score(params):
  rows = [list(row[:n]) for row, n in zip(tiny.random_tokens((4, T), 1), (9, 4, 6, 1))]
  left, right = tiny.left_padded(rows, 12), tiny.right_padded(rows, 12)
  np.testing.assert_allclose(
    score(params, left.tokens, left.mask), score(params, *right), rtol=1e-4, atol=1e-5
  )


@pytest.mark.conformance("A15", "B7", "B8")
@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS])
def test_an_eos_inside_the_prompt_or_used_as_padding_does_not_move_the_index(params, pad):
  # "user EOS assistant EOS", then padding; the value is read after the second EOS.
  row = np.array([[5, 6, tiny.EOS, 7, 8, tiny.EOS]])
  tokens = np.concatenate([row, np.full((1, 6), pad)], axis=1)
  mask = (np.arange(12)[None, :] < 6).astype(np.float32)
  layout = heads.layout(jnp.asarray(mask))
  values = jax.jit(tiny.SCALAR.apply)({"params": params}, tokens, *layout)
  np.testing.assert_allclose(score(params, tokens, mask), values[:, 5], rtol=1e-5)
  assert abs(values[0, 5] - values[0, 2]) > 1e-3


# Figures.


@pytest.mark.conformance("A19")
def test_a_constant_model_has_accuracy_0():
  batch = ranking_batch([[[2], [3], [4]]] * 2, [[0, 1, 2]] * 2, rows=2, width=3)
  counts = reward.count_pairs(jnp.zeros((2, 1, 3)), batch)
  assert (counts["pairs"], counts["correct"]) == (6.0, 0.0)


@pytest.mark.conformance("A19", "A23")
def test_accuracy_and_the_longer_answer_baseline_count_strictly_better_pairs():
  # Of the three pairs, scores get (0, 1) and (0, 2) right and tie on (1, 2); lengths get one.
  batch = ranking_batch([[[2, 2], [2], [2, 2, 2]]], [[0, 1, 2]], rows=1, width=3)
  sums = reward.count_pairs(jnp.array([[[1.0, 0.0, 0.0]]]), batch)
  assert (sums["pairs"], sums["correct"], sums["longer_correct"]) == (3.0, 2.0, 1.0)


@pytest.mark.conformance("A24")
def test_calibration_bins_predicted_probability_beside_the_share_that_was_right():
  # Gaps 2.25 (right), 2.25 (wrong) and 0.25 (right), as differences of the table's values.
  batch = ranking_batch([[[12], [3]], [[3], [12]], [[4], [3]]], [[0, 1]] * 3)
  summary = reward.summarize(lookup_evaluate(batch))
  sigmoid = lambda x: 1.0 / (1.0 + np.exp(-x))
  expected = [(sigmoid(0.25), 1.0, 1), (sigmoid(2.25), 0.5, 2)]
  np.testing.assert_allclose(summary["calibration"], expected, rtol=1e-5)
  np.testing.assert_allclose(summary["accuracy"], 2 / 3, rtol=1e-6)
  losses = np.log1p(np.exp([-2.25, 2.25, -0.25]))
  np.testing.assert_allclose(summary["loss"], losses.mean(), rtol=1e-5)
  assert (summary["pairs"], summary["prompts"]) == (3, 3)


@pytest.mark.conformance("B16")
def test_sums_over_batches_of_different_size_give_the_figures_of_the_whole():
  prompts = [[[i], [(7 * i) % 30]] for i in range(2, 9)]
  ranks = [[0, 1]] * 7
  evaluate = lambda part: lookup_evaluate(ranking_batch(prompts[part], ranks[part]))
  parts = [evaluate(slice(0, 1)), evaluate(slice(1, 7))]
  added = reward.summarize(jax.tree.map(lambda *x: sum(x), *parts))
  whole = reward.summarize(evaluate(slice(0, 7)))
  np.testing.assert_allclose(added["loss"], whole["loss"], rtol=1e-5)
  assert {k: added[k] for k in ("accuracy", "pairs")} == {
    k: whole[k] for k in ("accuracy", "pairs")
  }


@pytest.mark.conformance("A20")
def test_centring_brings_the_mean_score_to_0_and_keeps_the_order(params):
  tokens, mask = tiny.random_tokens((16, T), 2), np.ones((16, T), np.float32)
  before = np.asarray(score(params, tokens, mask))
  centred = reward.center(params, before.mean())
  after = np.asarray(score(centred, tokens, mask))
  assert abs(after.mean()) < 1e-3
  np.testing.assert_allclose(after, before - before.mean(), atol=1e-5)
  np.testing.assert_array_equal(np.argsort(after), np.argsort(before))


# Learning.


def hidden_rule_batch(seed, B=16, K=4):
  """Random answers of 4 to 8 tokens, ranked by how many of their ids are below 20."""
  rng = np.random.default_rng(seed)
  prompts = [
    [list(rng.integers(2, tiny.MODEL.vocab_size, rng.integers(4, 9))) for _ in range(K)]
    for _ in range(B)
  ]
  counts = np.array([[np.mean(np.array(a) < 20) for a in answers] for answers in prompts])
  ranks = [[int(np.sum(row > x)) for x in row] for row in counts]
  return ranking_batch(prompts, ranks, rows=B, width=K)


@pytest.fixture(scope="module")
def learning(params):
  """The compiled step, the first state and the frozen final norm."""
  optimizer = optim.make(tiny.OPTIM, 60)
  trainable, frozen = optim.split(params, (r"final_norm",))
  step = functools.partial(reward.step, network=tiny.SCALAR, optimizer=optimizer, micro_batches=1)
  return jax.jit(step), reward.init(trainable, optimizer), frozen


@pytest.mark.conformance("B22")
def test_the_reward_model_learns_a_hidden_rule(learning):
  step, state, frozen = learning
  for i in range(60):
    state, metrics = step(state, hidden_rule_batch(i), frozen)
  assert int(state.step) == 60
  evaluate = jax.jit(functools.partial(reward.evaluate, tiny.SCALAR))
  heldout = hidden_rule_batch(1000)
  figures = reward.summarize(evaluate(optim.merge(state.params, frozen), heldout))
  assert figures["accuracy"] > 0.85
  assert abs(figures["longer_accuracy"] - 0.45) < 0.15  # length gives nothing away


@pytest.mark.conformance("B22")
def test_the_same_state_and_batch_give_the_same_step_bit_by_bit(learning):
  step, state, frozen = learning
  first, again = (step(state, hidden_rule_batch(0), frozen) for _ in range(2))
  assert tiny.digest(first) == tiny.digest(again)
  assert np.isfinite(first[1]["reward/loss"]) and first[1]["reward/grad_norm"] > 0.0


def test_frozen_parameters_have_no_optimiser_state(learning):
  _, state, frozen = learning
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
  assert jax.tree.leaves(frozen) and not any("final_norm" in path for path in paths)
