"""What the benchmarks share."""

import jax
import jax.numpy as jnp

from rlhf_jax.parallel import mesh as mesh_lib


def fill(shapes):
  """Arrays for a plan's shapes, laid out as these say: ids of 1, numbers of 0.01, one key."""

  def one(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return mesh_lib.put(jax.random.key(0), leaf.sharding)
    value = 1 if leaf.dtype == jnp.int32 else 0.01
    return mesh_lib.put(jnp.full(leaf.shape, value, leaf.dtype), leaf.sharding)

  return jax.block_until_ready(jax.tree.map(one, shapes))
