"""From scores to advantages: KL-shaped rewards and generalised advantage estimation.

Every function works on one response [R]; callers `vmap`. Masks are 1 up to and including the last
token of the response; what lies under a 0, be it 100 or NaN, changes nothing.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp


def complete_score(
  score: jax.Array,
  finished: jax.Array,
  *,
  rule: Literal["keep", "replace", "subtract"],
  penalty: float,
) -> jax.Array:
  """The score that enters the reward of a response that never ended. Scalars.

  "replace" gives such a response -penalty, whatever its score (lm-human-preferences; Huang et al.
  2024); "subtract" takes penalty off (TRL); "keep" leaves the score alone.
  """
  if rule == "replace":
    unfinished = jnp.full_like(score, -penalty)
  else:
    unfinished = score - penalty if rule == "subtract" else score
  return jnp.where(finished > 0, score, unfinished)


def kl_shaped_rewards(
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  score: jax.Array,
  mask: jax.Array,
  *,
  kl_coef: jax.Array,
) -> jax.Array:
  """Per-token rewards of one response (Ziegler et al. 2019, eq. 2).

    R_t = -kl_coef (log pi(a_t) - log pi_ref(a_t)) + 1[t is the last token] score

  logprobs, ref_logprobs, mask: [R]; score: []. Returns [R], 0 under the mask. The KL estimate is
  k1, the plain log-ratio, which is exact in expectation when it is part of the reward. The score
  lands on the last token of the response, its stop token where it has one.
  """
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  log_ratio = jnp.where(mask > 0, logprobs - ref_logprobs, 0.0)
  length = jnp.sum(mask > 0)
  is_last = (jnp.arange(mask.shape[0]) == length - 1).astype(logprobs.dtype)
  return -kl_coef * log_ratio + is_last * score


def gae(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (Schulman et al. 2016, eq. 16) for one response.

    delta_t = R_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

  rewards, values, mask: [R]; values[t] is V before token t. Beyond the last token V and A are 0:
  the episode has ended, nothing bootstraps. Returns advantages and returns A_t + V_t, both [R] and
  0 under the mask.
  """
  chex.assert_rank([rewards, values, mask], 1)
  chex.assert_equal_shape([rewards, values, mask])
  rewards = jnp.where(mask > 0, rewards, 0.0)
  values = jnp.where(mask > 0, values, 0.0)
  deltas = rewards + gamma * jnp.append(values[1:], 0.0) - values

  def backwards(advantage, delta):
    advantage = delta + gamma * lam * advantage
    return advantage, advantage

  _, advantages = jax.lax.scan(backwards, jnp.zeros((), rewards.dtype), deltas, reverse=True)
  return advantages, advantages + values
