"""The loss that goes by columns is the plain one, with the plain one's gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.networks import cross_entropy, heads, likelihood
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules

B, T = 4, 11


def plain(policy, params, hidden, tokens, weights):
  of = likelihood.of_tokens(policy, params, hidden, tokens, temperature=1.0)
  return -jnp.sum(jnp.where(weights > 0, weights * of.logprobs, 0.0)), of.likeliest


@functools.cache
def case(tied=False, dtype="float32"):
  policy = heads.Policy(tiny.changed(tiny.MODEL, tie_embeddings=tied, compute__dtype=dtype))
  chance = np.random.default_rng(0)
  hidden = jnp.asarray(chance.normal(size=(B, T, tiny.MODEL.d_model)), dtype)
  weights = chance.uniform(size=(B, T)).astype(np.float32) * (chance.uniform(size=(B, T)) < 0.7)
  assert 0 < np.sum(weights == 0) < weights.size
  return policy, tiny.params(policy, 0), hidden, tiny.random_tokens((B, T), 1), jnp.asarray(weights)


def value_and_grads(loss, policy, params, hidden, tokens, weights):
  objective = lambda params, hidden: loss(policy, params, hidden, tokens, weights)
  return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, hidden)


def with_columns(policy, columns):
  return heads.Policy(tiny.changed(policy.config, compute__logit_columns=columns))


def assert_close(got, expected, **tolerance):
  close = functools.partial(np.testing.assert_allclose, **tolerance)
  jax.tree.map(lambda a, b: close(np.float32(a), np.float32(b)), got, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("columns", [1, 4, 11, 64, None])
def test_value_and_gradients_are_those_of_plain_log_probabilities(columns, tied):
  policy, *inputs = case(tied)
  expected = value_and_grads(plain, policy, *inputs)
  got = value_and_grads(cross_entropy.of_tokens, with_columns(policy, columns), *inputs)
  assert_close(got, expected, rtol=1e-5, atol=1e-6)
  assert np.any(np.asarray(got[1][1]) != 0.0)


def test_a_multiple_of_the_loss_has_that_multiple_of_its_gradient():
  policy, *inputs = case()
  half = lambda *inputs: (lambda value, aux: (0.5 * value, aux))(*cross_entropy.of_tokens(*inputs))
  (_, gradients), (_, halves) = (value_and_grads(f, policy, *inputs) for f in (plain, half))
  assert_close(halves, jax.tree.map(lambda x: 0.5 * x, gradients), rtol=1e-5, atol=1e-6)


def test_bfloat16_differs_from_plain_by_its_rounding_alone():
  policy, *inputs = case(dtype="bfloat16")
  (expected, _), plain_gradients = value_and_grads(plain, policy, *inputs)
  (got, _), gradients = value_and_grads(cross_entropy.of_tokens, with_columns(policy, 4), *inputs)
  np.testing.assert_allclose(got, expected, rtol=1e-2)
  assert gradients[1].dtype == jnp.bfloat16
  assert_close(gradients, plain_gradients, rtol=0.05, atol=0.02)


def test_a_token_without_weight_changes_nothing_whatever_it_is():
  policy, params, hidden, tokens, weights = case()
  policy = with_columns(policy, 4)
  other = jnp.where(weights > 0, tokens, (tokens + 1) % tiny.MODEL.vocab_size)
  expected = value_and_grads(cross_entropy.of_tokens, policy, params, hidden, tokens, weights)
  got = value_and_grads(cross_entropy.of_tokens, policy, params, hidden, other, weights)
  assert float(got[0][0]) == float(expected[0][0])
  assert_close(got[1], expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (8, 1, 1)])
def test_every_mesh_gives_the_numbers_of_one_device(axes):
  mesh = tiny.mesh(axes)
  policy, params, *arrays = case()
  split = mesh_lib.put_batch if B % mesh_lib.batch_devices(mesh) == 0 else mesh_lib.put_replicated
  policy = with_columns(policy, 4)
  run = functools.partial(value_and_grads, cross_entropy.of_tokens, policy)
  got = mesh_lib.jit(run, mesh)(rules.place(params, mesh), *split(mesh, tuple(arrays)))
  assert_close(got, run(params, *arrays), rtol=1e-5, atol=1e-6)
