"""Rewards and advantages against hand tables, a double loop, and identities."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages, masked

kl_shaped_rewards = jax.jit(advantages.kl_shaped_rewards)
gae = jax.jit(advantages.gae, static_argnames=("gamma", "lam"))


def response(length, columns, seed):
  """Random log-probabilities, rewards and values [columns] of a response of `length` tokens."""
  rng = np.random.default_rng(seed)
  names = ("logprobs", "ref_logprobs", "rewards", "values")
  arrays = {name: rng.normal(size=columns).astype(np.float32) for name in names}
  return arrays | {"mask": (np.arange(columns) < length).astype(np.float32)}


def double_loop(rewards, values, length, gamma, lam):
  """A_t = sum_l (gamma lam)^l (R_{t+l} + gamma V_{t+l+1} - V_{t+l}), written out."""
  advantage = np.zeros(len(rewards))
  for t in range(length):
    for k in range(t, length):
      following = values[k + 1] if k + 1 < length else 0.0
      delta = rewards[k] + gamma * following - values[k]
      advantage[t] += (gamma * lam) ** (k - t) * delta
  return advantage


# Rewards.


@pytest.mark.conformance("A38")
@pytest.mark.parametrize("length", [1, 4, 9])
def test_rewards_of_a_response_sum_to_score_minus_kl_coef_times_k1(length):
  r = response(length, columns=9, seed=length)
  rewards = kl_shaped_rewards(r["logprobs"], r["ref_logprobs"], 1.7, r["mask"], kl_coef=0.3)
  k1 = sum(r["logprobs"][:length] - r["ref_logprobs"][:length])
  np.testing.assert_allclose(np.sum(rewards), 1.7 - 0.3 * k1, rtol=1e-5)


@pytest.mark.conformance("A39", "B6")
@pytest.mark.parametrize("length", [1, 4, 5])
def test_the_score_lands_once_on_the_last_token(length):
  r = response(length, columns=5, seed=0)
  rewards = kl_shaped_rewards(r["logprobs"], r["logprobs"], 2.0, r["mask"], kl_coef=0.3)
  np.testing.assert_array_equal(rewards, 2.0 * np.eye(5)[length - 1])


def test_rewards_equal_the_hand_table():
  # kl_coef 0.5; log-ratios 0.2, -0.4, 0.6; score 1 on the third of four columns.
  rewards = kl_shaped_rewards(
    jnp.array([-1.0, -2.0, -0.5, 9.0]),
    jnp.array([-1.2, -1.6, -1.1, 7.0]),
    jnp.float32(1.0),
    jnp.array([1.0, 1.0, 1.0, 0.0]),
    kl_coef=0.5,
  )
  np.testing.assert_allclose(rewards, [-0.1, 0.2, 0.7, 0.0], atol=1e-6)


@pytest.mark.conformance("A40", "B11")
@pytest.mark.parametrize("junk", [100.0, np.nan, -np.inf])
def test_rewards_are_0_on_padding_whatever_the_logprobs_there(junk):
  r = response(length=3, columns=6, seed=1)
  dirty = np.where(r["mask"] > 0, r["logprobs"], junk).astype(np.float32)
  clean = kl_shaped_rewards(r["logprobs"], r["ref_logprobs"], 1.0, r["mask"], kl_coef=0.1)
  rewards = kl_shaped_rewards(dirty, r["ref_logprobs"], 1.0, r["mask"], kl_coef=0.1)
  np.testing.assert_array_equal(rewards, clean)
  np.testing.assert_array_equal(rewards[3:], 0.0)


@pytest.mark.conformance("B14")
def test_the_kl_penalty_is_not_clamped():
  # 60 nats away from the reference costs 60, and the penalty still has its full slope there.
  penalty = lambda logprob: advantages.kl_shaped_rewards(
    logprob[None], jnp.array([-60.0]), jnp.float32(0.0), jnp.ones(1), kl_coef=0.1
  )[0]
  value, slope = jax.value_and_grad(penalty)(jnp.float32(0.0))
  np.testing.assert_allclose([value, slope], [-6.0, -0.1], rtol=1e-6)


@pytest.mark.conformance("B1")
def test_a_fractional_score_reaches_rewards_and_returns_unrounded():
  r = response(length=3, columns=4, seed=2)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # among them "scatter inputs have incompatible types"
    rewards = advantages.kl_shaped_rewards(
      jnp.asarray(r["logprobs"]),
      jnp.asarray(r["logprobs"]),
      jnp.float32(0.7),
      jnp.asarray(r["mask"]),
      kl_coef=jnp.float32(0.1),
    )
    zeros = jnp.zeros(4)
    _, returns = advantages.gae(rewards, zeros, jnp.asarray(r["mask"]), gamma=1.0, lam=1.0)
  assert rewards.dtype == jnp.float32
  np.testing.assert_allclose(rewards, [0.0, 0.0, 0.7, 0.0], rtol=1e-6)
  np.testing.assert_allclose(returns, [0.7, 0.7, 0.7, 0.0], rtol=1e-6)


@pytest.mark.conformance("B30")
def test_an_empty_response_gets_no_reward_and_no_advantage():
  r = response(length=0, columns=4, seed=3)
  rewards = kl_shaped_rewards(r["logprobs"], r["ref_logprobs"], 5.0, r["mask"], kl_coef=0.1)
  advantage, returns = gae(rewards, r["values"], r["mask"], gamma=1.0, lam=0.95)
  np.testing.assert_array_equal([rewards, advantage, returns], np.zeros((3, 4)))


@pytest.mark.conformance("A33", "B20", "B21")
@pytest.mark.parametrize("rule, expected", [("keep", 0.4), ("replace", -1.0), ("subtract", -0.6)])
def test_the_missing_eos_rule_changes_unfinished_responses_only(rule, expected):
  complete = functools.partial(advantages.complete_score, rule=rule, penalty=1.0)
  np.testing.assert_allclose(complete(jnp.float32(0.4), jnp.float32(0.0)), expected, rtol=1e-6)
  for score in (0.4, 0.0, -3.0):  # a score of 0 is a score
    assert complete(jnp.float32(score), jnp.float32(1.0)) == jnp.float32(score)


# Advantages.


@pytest.mark.conformance("A43", "B12")
def test_gae_equals_the_hand_worked_table_of_three_tokens():
  # gamma = lam = 1/2; R = 1, 0, 2; V = 0.5, 1, 1 before each token, and 0 after the last.
  #   delta_2 = 2 + 0/2   - 1   =  1       A_2 =  1
  #   delta_1 = 0 + 1/2   - 1   = -0.5     A_1 = -0.5 + A_2/4 = -0.25
  #   delta_0 = 1 + 1/2   - 0.5 =  1       A_0 =  1   + A_1/4 =  0.9375
  rewards, values = jnp.array([1.0, 0.0, 2.0, 9.0]), jnp.array([0.5, 1.0, 1.0, 9.0])
  advantage, returns = gae(rewards, values, jnp.array([1.0, 1, 1, 0]), gamma=0.5, lam=0.5)
  np.testing.assert_array_equal(advantage, [0.9375, -0.25, 1.0, 0.0])
  np.testing.assert_array_equal(returns, [1.4375, 0.75, 2.0, 0.0])


@pytest.mark.conformance("A43")
@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7)])
def test_gae_equals_a_double_loop(length, gamma, lam):
  r = response(length, columns=12, seed=length)
  advantage, returns = gae(r["rewards"], r["values"], r["mask"], gamma=gamma, lam=lam)
  expected = double_loop(r["rewards"], r["values"], length, gamma, lam)
  np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(returns, expected + r["values"] * r["mask"], rtol=1e-5, atol=1e-6)


def test_gae_with_lam_1_is_discounted_rewards_minus_values():
  r = response(length=9, columns=9, seed=5)
  advantage, returns = gae(r["rewards"], r["values"], r["mask"], gamma=0.9, lam=1.0)
  sums = [sum(0.9**k * x for k, x in enumerate(r["rewards"][t:])) for t in range(9)]
  np.testing.assert_allclose(returns, sums, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(advantage, sums - r["values"], rtol=1e-5, atol=1e-6)


def test_gae_with_lam_0_is_the_one_step_error():
  r = response(length=9, columns=9, seed=6)
  advantage, _ = gae(r["rewards"], r["values"], r["mask"], gamma=0.9, lam=0.0)
  deltas = r["rewards"] + 0.9 * np.append(r["values"][1:], 0.0) - r["values"]
  np.testing.assert_allclose(advantage, deltas, rtol=1e-5, atol=1e-6)


def test_values_that_equal_the_discounted_rewards_leave_no_advantage():
  rewards = np.array([0.5, -1.0, 2.0], np.float32)
  values = np.array([0.5 - 0.9 + 1.62, -1.0 + 1.8, 2.0], np.float32)  # gamma 0.9
  advantage, _ = gae(rewards, values, np.ones(3, np.float32), gamma=0.9, lam=0.6)
  np.testing.assert_allclose(advantage, 0.0, atol=1e-6)


@pytest.mark.conformance("A43", "B10", "B11")
@pytest.mark.parametrize("junk", [100.0, np.nan, np.inf])
def test_values_and_rewards_after_the_end_do_not_bootstrap(junk):
  r = response(length=4, columns=7, seed=7)
  dirty = {k: np.where(r["mask"] > 0, r[k], junk).astype(np.float32) for k in ("rewards", "values")}

  def objective(values, rewards):
    advantage, returns = advantages.gae(rewards, values, r["mask"], gamma=0.9, lam=0.8)
    return jnp.sum(advantage**2 + returns), (advantage, returns)

  evaluate = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
  got, expected = (evaluate(a["values"], a["rewards"]) for a in (dirty, r))
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  np.testing.assert_array_equal(got[0][1][0][4:], 0.0)


def test_columns_of_padding_change_nothing():
  short, long = response(length=4, columns=4, seed=8), response(length=4, columns=9, seed=9)
  for name in ("rewards", "values"):
    long[name][:4] = short[name]
  run = lambda r: gae(r["rewards"], r["values"], r["mask"], gamma=0.95, lam=0.9)
  for got, expected in zip(run(long), run(short)):
    np.testing.assert_allclose(got[:4], expected, rtol=1e-6)


@pytest.mark.conformance("A44")
def test_returns_are_those_of_the_advantages_before_whitening():
  # `ppo.experience` whitens after `gae` has returned; see also test_ppo.py.
  r = response(length=6, columns=6, seed=10)
  advantage, returns = gae(r["rewards"], r["values"], r["mask"], gamma=1.0, lam=0.95)
  whitened = masked.whiten(advantage, r["mask"], shift_mean=True)
  np.testing.assert_allclose(returns - r["values"], advantage, rtol=1e-4, atol=1e-5)
  assert np.max(np.abs(whitened - advantage)) > 0.1
