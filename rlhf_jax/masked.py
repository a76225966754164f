"""Statistics over the entries that a mask keeps.

`where` comes before arithmetic, so a NaN under the mask reaches neither the value nor the gradient.
An empty mask gives 0, not NaN: an empty response carries no weight.
"""

import jax
import jax.numpy as jnp


def total(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum of x where mask > 0; the two broadcast."""
  return jnp.sum(jnp.where(mask > 0, x, 0.0))


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of x over all entries where mask > 0, whichever row they are in."""
  return total(x, mask) / jnp.maximum(jnp.sum(mask > 0), 1)


def variance(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Biased variance (divided by n) of x over the entries where mask > 0."""
  x = jnp.where(mask > 0, x, 0.0)  # the square's gradient at a NaN is NaN, even times 0
  return mean(jnp.square(x - mean(x, mask)), mask)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool) -> jax.Array:
  """Scales the kept entries to variance 1 and, with `shift_mean`, to mean 0; the rest become 0.

  The variance is biased and 1e-8 stands inside the root, as in lm-human-preferences; PyTorch ports
  that use the unbiased variance differ (Huang et al. 2023, "The N implementation details").
  """
  x = jnp.where(mask > 0, x, 0.0)
  center = mean(x, mask)
  whitened = (x - center) * jax.lax.rsqrt(variance(x, mask) + 1e-8)
  return jnp.where(mask > 0, whitened if shift_mean else whitened + center, 0.0)
