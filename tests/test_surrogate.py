"""PPO's losses against hand tables, their gradients in closed form, and what clipping stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages as advantages_lib
from rlhf_jax import masked, surrogate
from rlhf_jax.networks import likelihood

RNG = np.random.default_rng(0)
B, R = 3, 5
MASK = (np.arange(R)[None, :] < np.array([[5], [2], [3]])).astype(np.float32)
OLD, ADVANTAGES, VALUES, RETURNS = RNG.normal(size=(4, B, R)).astype(np.float32)


def policy_loss(logprobs, advantages=ADVANTAGES, mask=MASK, old=OLD):
  return surrogate.policy_loss(logprobs, old, advantages, mask, cliprange=0.2)


def value_loss(values, old=VALUES, returns=RETURNS, mask=MASK):
  return surrogate.value_loss(values, old, returns, mask, cliprange=0.2)


def slope_at(ratio, advantage):
  """d loss / d ratio of one token; the loss is in log ratio."""
  one = jnp.ones((1, 1))
  loss = lambda logprob: policy_loss(logprob, advantage * one, one, 0.0 * one)[0]
  return float(jax.grad(loss)(jnp.log(ratio) * one)[0, 0] / ratio)


@pytest.mark.conformance("A50")
@pytest.mark.parametrize(
  "ratio, advantage, slope",
  [
    (0.7, -2.0, 0.0),  # already less likely by more than the clip range: no further push
    (1.5, -2.0, 2.0),  # more likely although bad: pushed back, however far it is
    (1.5, 2.0, 0.0),  # already more likely by more than the clip range: no further push
    (0.7, 2.0, -2.0),  # less likely although good: pulled back
    (0.9, -2.0, 2.0),  # inside the range the surrogate is linear
    (1.1, 2.0, -2.0),
  ],
)
def test_clipping_stops_only_the_gradient_that_leads_further_away(ratio, advantage, slope):
  np.testing.assert_allclose(slope_at(ratio, advantage), slope, rtol=1e-5)


def test_policy_loss_and_its_metrics_equal_the_hand_table():
  # Ratios 1.5, 0.5, 1.1, (9); advantages 2, -2, -1, (9). Per token max(-A r, -A clip(r)):
  # max(-3, -2.4) = -2.4; max(1, 1.6) = 1.6; max(1.1, 1.1) = 1.1. Two of three are clipped.
  ratio = jnp.array([[1.5, 0.5, 1.1, 9.0]])
  advantages, mask = jnp.array([[2.0, -2.0, -1.0, 9.0]]), jnp.array([[1.0, 1.0, 1.0, 0.0]])
  loss, metrics = policy_loss(jnp.log(ratio), advantages, mask, jnp.zeros((1, 4)))
  logs = np.log([1.5, 0.5, 1.1])
  np.testing.assert_allclose(loss, 0.1, rtol=1e-5)
  np.testing.assert_allclose(metrics["policy/clipfrac"], 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(metrics["policy/approxkl"], 0.5 * np.mean(logs**2), rtol=1e-5)
  np.testing.assert_allclose(metrics["policy/ratio"], 3.1 / 3, rtol=1e-5)
  np.testing.assert_allclose(metrics["policy/ratio_var"], np.var([1.5, 0.5, 1.1]), rtol=1e-4)


@pytest.mark.conformance("A48")
def test_at_ratio_1_the_gradient_is_minus_masked_advantages_over_tokens():
  loss, gradient = jax.value_and_grad(lambda x: policy_loss(x)[0])(OLD)
  np.testing.assert_allclose(gradient, -ADVANTAGES * MASK / MASK.sum(), rtol=1e-5, atol=1e-8)
  np.testing.assert_allclose(loss, -np.sum(ADVANTAGES * MASK) / MASK.sum(), rtol=1e-5)


@pytest.mark.conformance("A49")
@pytest.mark.parametrize(
  "value, expected, slope",
  [
    # The rollout's value is 1, so clipping is to [0.8, 1.2]; the return is 2.
    (1.1, 0.5 * 0.81, -0.9),  # inside the range: the plain error
    (1.5, 0.5 * 0.64, 0.0),  # beyond it towards the return: the clipped error, no more push
    (0.5, 0.5 * 2.25, -1.5),  # beyond it the wrong way: the plain error, pulled back
  ],
)
def test_values_are_clipped_around_the_rollout_value(value, expected, slope):
  one = jnp.ones((1, 1))
  loss = lambda v: value_loss(v * one, 1.0 * one, 2.0 * one, one)[0]
  got, gradient = jax.value_and_grad(loss)(jnp.float32(value))
  np.testing.assert_allclose([got, gradient], [expected, slope], rtol=1e-5)


def test_value_loss_is_half_the_mean_squared_error_inside_the_range():
  near = VALUES + RNG.uniform(-0.19, 0.19, (B, R)).astype(np.float32)
  loss, metrics = value_loss(near)
  expected = np.mean((near - RETURNS)[MASK > 0] ** 2)
  np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["val/error"], expected, rtol=1e-5)
  assert metrics["val/clipfrac"] == 0.0


def test_value_clip_fraction_counts_the_kept_tokens_that_are_clipped():
  one = jnp.ones((1, 4))
  values = jnp.array([[1.1, 1.5, 0.5, 1.5]])  # as in the hand cases above, the last one masked
  _, metrics = value_loss(values, one, 2.0 * one, jnp.array([[1.0, 1.0, 1.0, 0.0]]))
  np.testing.assert_allclose(metrics["val/clipfrac"], 1 / 3, rtol=1e-6)


def dirty(array, junk):
  return np.where(MASK > 0, array, junk).astype(np.float32)


@pytest.mark.conformance("A48", "B11", "B10")
@pytest.mark.parametrize("junk", [100.0, np.nan, np.inf])
def test_what_lies_under_the_mask_reaches_neither_loss_nor_gradient(junk):
  new = OLD + 0.3
  losses = (
    lambda x, a, b: policy_loss(x, advantages=a, old=b)[0],
    lambda x, a, b: value_loss(x, old=a, returns=b)[0],
  )
  for loss, inputs in zip(losses, ((new, ADVANTAGES, OLD), (VALUES + 0.3, VALUES, RETURNS))):
    evaluate = jax.value_and_grad(loss)
    clean = evaluate(*inputs)
    for i in range(3):
      soiled = [dirty(x, junk) if i == j else x for j, x in enumerate(inputs)]
      jax.tree.map(np.testing.assert_array_equal, evaluate(*soiled), clean)


def test_metrics_do_not_see_what_lies_under_the_mask():
  clean, soiled = policy_loss(OLD + 0.1)[1], policy_loss(dirty(OLD + 0.1, np.nan))[1]
  jax.tree.map(np.testing.assert_array_equal, soiled, clean)
  clean, soiled = value_loss(VALUES + 0.3)[1], value_loss(dirty(VALUES + 0.3, np.nan))[1]
  jax.tree.map(np.testing.assert_array_equal, soiled, clean)


@pytest.mark.conformance("B30")
def test_a_minibatch_without_tokens_has_zero_losses_and_gradients():
  empty = np.zeros_like(MASK)
  for loss in (lambda x: policy_loss(x, mask=empty)[0], lambda x: value_loss(x, mask=empty)[0]):
    value, gradient = jax.value_and_grad(loss)(OLD + 1.0)
    assert value == 0.0
    assert np.all(np.asarray(gradient) == 0.0)


@pytest.mark.conformance("B30")
def test_an_empty_response_beside_others_carries_no_weight():
  blank = lambda x: np.concatenate([x, np.full((1, R), 7.0, np.float32)])
  mask = np.concatenate([MASK, np.zeros((1, R), np.float32)])
  new = OLD + 0.1
  with_blank = surrogate.policy_loss(blank(new), blank(OLD), blank(ADVANTAGES), mask, cliprange=0.2)
  np.testing.assert_allclose(with_blank[0], policy_loss(new)[0], rtol=1e-6)


# The KL penalty, on a vocabulary so small that every expectation is an exact finite sum. Eight
# rows hold each token as often as the policy (1, 2, 5)/8 draws it.

LOGITS = jnp.log(jnp.array([1.0, 2.0, 5.0]))
REFERENCE = jnp.array([0.3, -0.2, 0.4])
DRAWN = jnp.array([0, 1, 1, 2, 2, 2, 2, 2])


def logprobs_of(logits):
  return likelihood.token_logprobs(jnp.broadcast_to(logits, (8, 3)), DRAWN, temperature=1.0)


def exact_kl(logits):
  p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
  return jnp.sum(jnp.exp(p) * (p - q))


@pytest.mark.conformance("A59", "B13")
def test_k1_as_a_loss_has_zero_mean_gradient_k2_is_exact_and_k3_is_biased():
  reference = logprobs_of(REFERENCE)
  k1 = lambda logits: jnp.mean(logprobs_of(logits) - reference)
  k2 = lambda logits: jnp.mean(0.5 * jnp.square(logprobs_of(logits) - reference))
  k3 = lambda logits: jnp.mean(jnp.expm1(reference - logprobs_of(logits)) + logprobs_of(logits))
  exact = jax.grad(exact_kl)(LOGITS)
  np.testing.assert_allclose(k1(LOGITS), exact_kl(LOGITS), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(k1)(LOGITS), 0.0, atol=1e-6)
  np.testing.assert_allclose(jax.grad(k2)(LOGITS), exact, rtol=1e-4, atol=1e-6)
  assert np.max(np.abs(jax.grad(k3)(LOGITS) - exact)) > 0.05


@pytest.mark.conformance("A59", "B13")
def test_k1_in_the_reward_gives_kl_coef_times_the_gradient_of_the_exact_kl():
  old, ones = logprobs_of(LOGITS)[:, None], jnp.ones((8, 1))
  shape = lambda *row: advantages_lib.kl_shaped_rewards(*row, kl_coef=0.3)
  reference, zeros = logprobs_of(REFERENCE)[:, None], jnp.zeros(8)
  rewards = jax.vmap(shape)(old, reference, zeros, ones)
  estimate = lambda *row: advantages_lib.gae(*row, gamma=1.0, lam=0.95)
  advantage, _ = jax.vmap(estimate)(rewards, jnp.zeros((8, 1)), ones)
  loss = lambda logits: policy_loss(logprobs_of(logits)[:, None], advantage, ones, old)[0]
  expected = 0.3 * jax.grad(exact_kl)(LOGITS)
  np.testing.assert_allclose(jax.grad(loss)(LOGITS), expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(-masked.mean(rewards, ones), 0.3 * exact_kl(LOGITS), rtol=1e-5)
