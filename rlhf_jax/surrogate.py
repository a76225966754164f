"""PPO's two clipped losses, on [B, R] arrays of a minibatch; both average over response tokens."""

import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.types import Metrics


def policy_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  cliprange: float,
) -> tuple[jax.Array, Metrics]:
  """The clipped surrogate (Schulman et al. 2017, eq. 7), averaged over response tokens. [B, R]

  `approxkl` is 0.5 E[(log ratio)^2], the estimator k2; `clipfrac` the share of tokens at which the
  clipped branch is the larger one.
  """
  log_ratio = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
  ratio = jnp.exp(log_ratio)
  plain, clipped = _surrogates(ratio, advantages, cliprange)
  metrics = {
    "policy/approxkl": 0.5 * masked.mean(jnp.square(log_ratio), mask),
    "policy/clipfrac": masked.mean((clipped > plain).astype(jnp.float32), mask),
    "policy/ratio": masked.mean(ratio, mask),
    "policy/ratio_var": masked.variance(ratio, mask),
  }
  return masked.mean(jnp.maximum(plain, clipped), mask), metrics


def policy_losses(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  cliprange: float,
) -> jax.Array:
  """What each token adds to `policy_loss` times their number: 0 where the mask is 0. [B, R]"""
  ratio = jnp.exp(jnp.where(mask > 0, logprobs - old_logprobs, 0.0))
  return jnp.where(mask > 0, jnp.maximum(*_surrogates(ratio, advantages, cliprange)), 0.0)


def _surrogates(ratio, advantages, cliprange):
  """The plain and the clipped loss of each token."""
  clipped = jnp.clip(ratio, 1.0 - cliprange, 1.0 + cliprange)
  return -advantages * ratio, -advantages * clipped


def value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  cliprange: float,
) -> tuple[jax.Array, Metrics]:
  """0.5 max((V - ret)^2, (clip(V, V_old +- cliprange) - ret)^2) over response tokens. [B, R]

  V_old is the rollout's value, whatever the epoch (lm-human-preferences).
  """
  keep = lambda x: jnp.where(mask > 0, x, 0.0)
  values, old_values, returns = keep(values), keep(old_values), keep(returns)
  near_old = jnp.clip(values, old_values - cliprange, old_values + cliprange)
  plain, clipped = jnp.square(values - returns), jnp.square(near_old - returns)
  metrics = {
    "val/clipfrac": masked.mean((clipped > plain).astype(jnp.float32), mask),
    "val/error": masked.mean(plain, mask),
  }
  return 0.5 * masked.mean(jnp.maximum(plain, clipped), mask), metrics
