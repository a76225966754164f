"""Supervised fine-tuning: which tokens carry loss, and that packing and parts change nothing."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import sft
from rlhf_jax.data.packing import Document, token_row
from rlhf_jax.training import optim
from rlhf_jax.types import TokenBatch

V = tiny.MODEL.vocab_size
# A "policy" whose parameters are its logits, so that gradients show where the loss looks: they
# stand for its hidden states, which the head hands on.
LOGITS = SimpleNamespace(
  config=tiny.MODEL,
  apply=lambda variables, *inputs, method: {
    "hidden": (variables["params"], None),
    "head_kernel": jnp.eye(V),
  }[method],
)


def token_batch(*rows, width=12):
  """Rows of documents; a document is (ids, loss_mask)."""
  documents = [[Document(np.array(ids), np.array(m, np.float32)) for ids, m in r] for r in rows]
  packed = [token_row(row, max_tokens=width, pad_id=tiny.PAD) for row in documents]
  return jax.tree.map(lambda *x: jnp.stack(x), *packed)


DOCUMENTS = [  # prompts without loss, answers and their EOS with it
  ([5, 6, 7, 8, tiny.EOS], [0, 0, 1, 1, 1]),
  ([9, 10, tiny.EOS], [0, 1, 1]),
  ([11, 12, 13, tiny.EOS], [0, 0, 1, 1]),
]
PACKED = token_batch(DOCUMENTS)
ALONE = token_batch(*([document] for document in DOCUMENTS))


@pytest.fixture(scope="module")
def params():
  return tiny.params(tiny.POLICY, 0)


@jax.jit
def loss_and_gradient(params, batch):
  objective = lambda params: sft.loss(tiny.POLICY, params, batch)
  return jax.value_and_grad(objective, has_aux=True)(params)


def random_logits(batch, seed=0):
  shape = (*batch.tokens.shape, V)
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def logits_loss(logits, batch):
  return sft.loss(LOGITS, logits, batch)[0]


def test_loss_is_the_mean_negative_log_likelihood_of_the_supervised_tokens():
  logits = np.asarray(random_logits(ALONE), np.float64)
  logs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  terms = []
  for b, (ids, mask) in enumerate(DOCUMENTS):
    terms += [-logs[b, t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]
  loss, metrics = sft.loss(LOGITS, random_logits(ALONE), ALONE)
  np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
  assert metrics["tokens"] == 7.0


@pytest.mark.conformance("A3", "A4", "B17")
def test_gradients_prove_that_only_supervised_tokens_and_their_eos_carry_loss():
  # In closed form: (softmax - one-hot of the target) / tokens in the column before each target.
  logits = random_logits(PACKED)
  gradient = np.asarray(jax.grad(logits_loss)(logits, PACKED))
  expected = np.zeros_like(gradient)
  supervised = np.flatnonzero(PACKED.loss_mask[0])
  for t in supervised:
    column = jax.nn.softmax(logits[0, t - 1]) - jax.nn.one_hot(PACKED.tokens[0, t], V)
    expected[0, t - 1] = column / len(supervised)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
  # Read back from the gradient, the targets are the answers and their EOS.
  columns = np.flatnonzero(np.any(gradient[0] != 0.0, axis=-1))
  assert gradient[0].argmin(axis=-1)[columns].tolist() == [7, 8, 1, 10, 1, 13, 1]


@pytest.mark.conformance("A4")
@pytest.mark.parametrize("junk", [100.0, 1e30])
def test_padded_tokens_contribute_exactly_nothing(junk):
  logits = random_logits(ALONE)
  padding = (np.asarray(ALONE.segments) == 0)[..., None]
  soiled = jnp.where(padding, junk, logits)
  run = jax.value_and_grad(logits_loss)
  (value, gradient), (expected, clean) = run(soiled, ALONE), run(logits, ALONE)
  assert value == expected
  np.testing.assert_array_equal(gradient, clean)
  assert np.all(np.where(padding, gradient, 0.0) == 0.0)


@pytest.mark.conformance("A4")
def test_ids_under_padding_and_rows_of_padding_change_nothing(params):
  (expected, _), clean = loss_and_gradient(params, ALONE)
  junk = ALONE.replace(tokens=jnp.where(ALONE.segments > 0, ALONE.tokens, 17))
  (value, _), gradient = loss_and_gradient(params, junk)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  tiny.assert_trees_close(gradient, clean, atol=1e-6)
  blank = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), ALONE)
  (value, _), gradient = loss_and_gradient(params, blank)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  tiny.assert_trees_close(gradient, clean, atol=1e-6)


@pytest.mark.conformance("B18")
def test_packed_documents_have_the_loss_and_gradient_they_have_apart(params):
  (packed, _), packed_gradient = loss_and_gradient(params, PACKED)
  (alone, _), gradient = loss_and_gradient(params, ALONE)
  np.testing.assert_allclose(packed, alone, rtol=1e-5)
  tiny.assert_trees_close(packed_gradient, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.conformance("B18")
def test_the_first_token_of_a_document_is_no_target_of_the_one_before():
  # Even where its loss_mask is set: nothing in its own document predicts it.
  marked = PACKED.replace(loss_mask=jnp.where(PACKED.segments > 0, 1.0, 0.0))
  _, metrics = sft.loss(LOGITS, random_logits(PACKED), marked)
  assert metrics["tokens"] == 12 - 3


@pytest.mark.conformance("B7")
def test_an_eos_with_the_id_of_padding_keeps_its_loss():
  ids = np.where(np.asarray(ALONE.tokens) == tiny.EOS, tiny.PAD, ALONE.tokens)
  same_id = ALONE.replace(tokens=jnp.asarray(ids))
  gradient = jax.grad(logits_loss)(random_logits(ALONE), same_id)
  _, metrics = sft.loss(LOGITS, random_logits(ALONE), same_id)
  assert metrics["tokens"] == 7.0
  assert gradient[1, 1, tiny.PAD] < 0.0  # the column before the EOS of the second document


@pytest.mark.conformance("A6", "B16")
def test_sums_over_parts_divided_by_all_tokens_are_the_loss_of_the_whole(params):
  evaluate = jax.jit(functools.partial(sft.evaluate, tiny.POLICY))
  parts = [evaluate(params, jax.tree.map(lambda x, i=i: x[i : i + 1], ALONE)) for i in range(3)]
  added = jax.tree.map(lambda *x: sum(x), *parts)
  (whole, metrics), _ = loss_and_gradient(params, ALONE)
  np.testing.assert_allclose(added["nll"] / added["tokens"], whole, rtol=1e-5)
  np.testing.assert_allclose(added["correct"] / added["tokens"], metrics["accuracy"], rtol=1e-5)
  means = np.mean([part["nll"] / part["tokens"] for part in parts])
  assert abs(means - whole) > 1e-3  # the mean of means is another number


@pytest.mark.conformance("B30")
def test_a_batch_without_targets_has_zero_loss_and_gradient(params):
  nothing = ALONE.replace(loss_mask=jnp.zeros_like(ALONE.loss_mask))
  (value, _), gradient = loss_and_gradient(params, nothing)
  assert value == 0.0
  assert all(np.all(np.asarray(leaf) == 0.0) for leaf in jax.tree.leaves(gradient))


def test_sft_memorises_eight_lines(params):
  width = 12
  tokens = tiny.random_tokens((8, width), 3)
  tokens[:, 0] = np.arange(8) + 2  # lines that begin differently
  tokens[:, -1] = tiny.EOS
  ones = np.ones((8, width))
  positions = np.tile(np.arange(width), (8, 1))
  batch = TokenBatch(tokens, ones.astype(np.int32), positions, ones.astype(np.float32))
  trainable, frozen = optim.split(params, (r"final_norm",))
  optimizer = optim.make(tiny.OPTIM, 150)
  step = jax.jit(
    functools.partial(sft.step, policy=tiny.POLICY, optimizer=optimizer, micro_batches=1)
  )
  state = sft.init(trainable, optimizer)
  for _ in range(150):
    state, metrics = step(state, batch, frozen)
  assert metrics["sft/loss"] < 0.05
  assert metrics["sft/accuracy"] == 1.0
  assert metrics["sft/tokens"] == 8 * (width - 1)
  assert int(state.step) == 150
