"""A loss that goes by columns is the plain one, with the plain one's gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import surrogate
from rlhf_jax.networks import heads, likelihood, token_loss
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules

B, T = 4, 11


def cross_entropy(logprobs, weights):
  return jnp.where(weights > 0, -weights * logprobs, 0.0)


def clipped_surrogate(logprobs, weights):
  """PPO's loss: ratios on both sides of the clipping range, advantages of both signs."""
  old, advantages = jnp.sin(17.0 * weights) * 0.3 - 5.5, jnp.cos(29.0 * weights)
  return surrogate.policy_losses(logprobs, old, advantages, weights, cliprange=0.2)


LOSSES = {"cross-entropy": cross_entropy, "clipped surrogate": clipped_surrogate}


def plain(policy, params, hidden, tokens, weights, losses=cross_entropy, temperature=1.0):
  of = likelihood.of_tokens(policy, params, hidden, tokens, temperature)
  return jnp.sum(losses(of.logprobs, weights)), of


def by_columns(policy, params, hidden, tokens, weights, losses=cross_entropy, temperature=1.0):
  return token_loss.total(losses, policy, params, hidden, tokens, temperature, weights)


@functools.cache
def case(tied=False, dtype="float32"):
  policy = heads.Policy(tiny.changed(tiny.MODEL, tie_embeddings=tied, compute__dtype=dtype))
  chance = np.random.default_rng(0)
  hidden = jnp.asarray(chance.normal(size=(B, T, tiny.MODEL.d_model)), dtype)
  weights = chance.uniform(size=(B, T)).astype(np.float32) * (chance.uniform(size=(B, T)) < 0.7)
  assert 0 < np.sum(weights == 0) < weights.size
  return policy, tiny.params(policy, 0), hidden, tiny.random_tokens((B, T), 1), jnp.asarray(weights)


def value_and_grads(loss, policy, params, hidden, tokens, weights, *how):
  objective = lambda params, hidden: loss(policy, params, hidden, tokens, weights, *how)
  return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, hidden)


def with_columns(policy, columns):
  return heads.Policy(tiny.changed(policy.config, compute__logit_columns=columns))


def assert_close(got, expected, **tolerance):
  close = functools.partial(np.testing.assert_allclose, **tolerance)
  jax.tree.map(lambda a, b: close(np.float32(a), np.float32(b)), got, expected)


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("tied, temperature", [(False, 1.0), (True, 0.7)])
@pytest.mark.parametrize("columns", [1, 4, 11, 64, None])
def test_value_and_gradients_are_those_of_plain_log_probabilities(
  columns, tied, temperature, losses
):
  policy, *inputs = case(tied)
  how = LOSSES[losses], temperature
  expected = value_and_grads(plain, policy, *inputs, *how)
  got = value_and_grads(by_columns, with_columns(policy, columns), *inputs, *how)
  assert_close(got, expected, rtol=1e-5, atol=1e-6)
  assert np.any(np.asarray(got[1][1]) != 0.0)


def test_a_multiple_of_the_loss_has_that_multiple_of_its_gradient():
  policy, *inputs = case()
  half = lambda *inputs: (lambda value, aux: (0.5 * value, aux))(*by_columns(*inputs))
  (_, gradients), (_, halves) = (value_and_grads(f, policy, *inputs) for f in (plain, half))
  assert_close(halves, jax.tree.map(lambda x: 0.5 * x, gradients), rtol=1e-5, atol=1e-6)


def test_bfloat16_differs_from_plain_by_its_rounding_alone():
  policy, *inputs = case(dtype="bfloat16")
  (expected, _), plain_gradients = value_and_grads(plain, policy, *inputs)
  (got, _), gradients = value_and_grads(by_columns, with_columns(policy, 4), *inputs)
  np.testing.assert_allclose(got, expected, rtol=1e-2)
  assert gradients[1].dtype == jnp.bfloat16
  assert_close(gradients, plain_gradients, rtol=0.05, atol=0.02)


def test_a_token_without_weight_changes_nothing_whatever_it_is():
  policy, params, hidden, tokens, weights = case()
  policy = with_columns(policy, 4)
  other = jnp.where(weights > 0, tokens, (tokens + 1) % tiny.MODEL.vocab_size)
  expected = value_and_grads(by_columns, policy, params, hidden, tokens, weights)
  got = value_and_grads(by_columns, policy, params, hidden, other, weights)
  assert float(got[0][0]) == float(expected[0][0])
  assert_close(got[1], expected[1], rtol=0, atol=0)


def test_tokens_that_ppo_has_clipped_have_no_gradient():
  policy, params, hidden, tokens, weights = case()
  logprobs = likelihood.of_tokens(policy, params, hidden, tokens, 1.0).logprobs
  slopes = jax.grad(lambda x: jnp.sum(clipped_surrogate(x, weights)))(logprobs)
  clipped = (weights > 0) & (slopes == 0)
  assert 0 < np.sum(clipped) < np.sum(weights > 0)
  how = weights, clipped_surrogate
  _, (_, of_hidden) = value_and_grads(by_columns, policy, params, hidden, tokens, *how)
  assert np.array_equal(np.any(np.asarray(of_hidden) != 0, axis=-1), np.asarray(slopes != 0))


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (8, 1, 1)])
def test_every_mesh_gives_the_numbers_of_one_device(axes):
  mesh = tiny.mesh(axes)
  policy, params, *arrays = case()
  split = mesh_lib.put_batch if B % mesh_lib.batch_devices(mesh) == 0 else mesh_lib.put_replicated
  policy = with_columns(policy, 4)
  run = functools.partial(value_and_grads, by_columns, policy)
  got = mesh_lib.jit(run, mesh)(rules.place(params, mesh), *split(mesh, tuple(arrays)))
  assert_close(got, run(params, *arrays), rtol=1e-5, atol=1e-6)
