"""A batch in parts has the loss, the gradient and the figures of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import reward, sft
from rlhf_jax.data import batches, packing
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import TokenBatch, UserError

B, T = 8, 10


def token_batch(seed=0):
  """Rows with 0, 1, 2, ... targets, so that micro-batches hold unequal numbers of them."""
  tokens = tiny.random_tokens((B, T), seed)
  mask = (np.arange(T)[None, :] > T - 1 - np.arange(B)[:, None]).astype(np.float32)
  places = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  return TokenBatch(tokens, np.ones((B, T), np.int32), places, mask)


def ranking_batch(seed=0):
  """Rows with one to three prompts, some of which are ties and teach nothing."""
  rng = np.random.default_rng(seed)
  ids = lambda most: rng.integers(2, tiny.MODEL.vocab_size, rng.integers(1, most)).astype(np.int32)
  rows = []
  for b in range(B):
    groups = []
    for _ in range(1 + b % 3):
      ranks = (0, 0, 0) if rng.random() < 0.3 else tuple(rng.permutation(3).tolist())
      groups.append(packing.Group(ids(4), tuple(ids(4) for _ in range(3)), ranks))
    rows.append(groups)
  sizes = dict(max_tokens=40, max_prompts=3, max_responses=3, pad_id=tiny.PAD)
  return batches.stack([packing.ranking_row(row, **sizes) for row in rows])


def squares(params, batch):
  """A loss that can be worked out by hand: the mean of (params - x)^2 where the mask is set."""
  x, mask = batch
  weight = jnp.sum(mask)
  mean = jnp.sum(mask * jnp.square(params - x)) / jnp.maximum(weight, 1.0)
  return mean, (weight, {"x": jnp.sum(mask * x)})


@pytest.mark.conformance("A6", "B16")
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_means_are_over_all_items_and_not_over_the_means_of_parts(micro_batches):
  # Items 1 and 3 in row 0, 2 in row 2, and nothing in row 1 or 3: the mean of (0 - x)^2 is 14/3.
  x = jnp.array([[1.0, 3.0], [9.0, 9.0], [2.0, 9.0], [9.0, 9.0]])
  mask = jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
  value, sums, grad = accumulate.value_and_grad(squares, jnp.float32(0.0), (x, mask), micro_batches)
  np.testing.assert_allclose([value, grad, sums["x"]], [14 / 3, -4.0, 6.0], rtol=1e-6)


def test_a_batch_without_items_has_no_gradient():
  empty = (jnp.ones((4, 2)), jnp.zeros((4, 2)))
  value, _, grad = accumulate.value_and_grad(squares, jnp.float32(1.0), empty, 2)
  assert value == 0.0 and grad == 0.0


STAGES = {
  "sft": (sft, token_batch, {"policy": tiny.POLICY}),
  "reward": (reward, ranking_batch, {"network": tiny.SCALAR}),
}


@pytest.mark.conformance("A6", "B16", "B28")
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(stage):
  module, make_batch, network = STAGES[stage]
  # Where a gradient is all but 0, Adam would blow its rounding up.
  optimizer = optim.make(tiny.changed(tiny.OPTIM, eps=1e-2), 10)
  state = module.init(tiny.params(*network.values(), 0), optimizer)

  def step(micro_batches):
    run = functools.partial(
      module.step, **network, optimizer=optimizer, micro_batches=micro_batches
    )
    return jax.jit(run)(state, make_batch(), {})

  whole = step(1)
  for micro_batches in (2, 4, 8):
    parts = step(micro_batches)
    tiny.assert_trees_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert int(parts[0].step) == 1
    counts = [int(leaf) for leaf in jax.tree.leaves(parts[0].opt_state) if leaf.ndim == 0]
    assert counts and set(counts) == {1}  # one step of the optimiser, of the schedule too


def test_micro_batches_hold_their_share_of_the_activations():
  whole = tiny.changed(tiny.MODEL, vocab_size=4_096, compute__logit_columns=1_000)
  policy = type(tiny.POLICY)(whole)
  params = jax.eval_shape(lambda: tiny.params(policy, 0))
  rows = jax.tree.map(lambda x: np.tile(x, (16, *(1,) * (x.ndim - 1))), token_batch())

  def peak(micro_batches):
    def loss(params, batch):
      value, figures = sft.loss(policy, params, batch)
      return value, (figures["tokens"], {})

    run = jax.jit(lambda p, b: accumulate.value_and_grad(loss, p, b, micro_batches)[2])
    return run.lower(params, rows).compile().memory_analysis().temp_size_in_bytes

  assert peak(8) < peak(1) / 4


def test_parts_that_do_not_divide_the_batch_are_refused():
  accumulate.check("sft", 8, 4)
  with pytest.raises(UserError, match="sft: 8 rows .* micro_batches 3; use a divisor of 8"):
    accumulate.check("sft", 8, 3)
