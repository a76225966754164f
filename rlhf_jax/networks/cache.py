"""The key-value cache: what attention keeps of the tokens read so far, as a pytree.

It is an argument and a result of the network, so decoding is a pure function.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.parallel.rules import constrain


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens read so far; columns not yet written have segment 0.

  With `scan_layers` the per-layer tuples are arrays with a leading L axis instead. Without it a
  single row has no leading axis: XLA's CPU compiler would drop that of 1 before every product, and
  for it copy every layer's cache on every decoded token.
  """

  keys: Any  # L x [B, G, S, H], of one row [G, S, H]
  values: Any  # L x [B, G, S, H], of one row [G, S, H]
  segments: jax.Array  # [B, S] int32
  index: jax.Array  # [] int32, the column that the next token goes to
  before: tuple["KVCache", ...] = ()  # of the columns before these; they are read and not written

  @classmethod
  def empty(cls, config: ModelConfig, batch: int, length: int) -> "KVCache":
    """A cache with room for `length` tokens in each of `batch` rows."""
    shape = (batch, config.n_kv_heads, length, config.head_dim)
    if config.compute.scan_layers:
      layers = lambda: jnp.zeros((config.n_layers, *shape), config.compute.dtype)
    else:
      shape = shape[1:] if batch == 1 else shape
      layers = lambda: tuple(jnp.zeros(shape, config.compute.dtype) for _ in range(config.n_layers))
    return cls(layers(), layers(), jnp.zeros((batch, length), jnp.int32), jnp.int32(0))

  def grow(self, length: int) -> "KVCache":
    """With room for `length` tokens in each row; what is there stays."""
    more = length - self.segments.shape[1]
    pad = lambda x, axis: jnp.pad(
      x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)]
    )
    of_layers = lambda layers: jax.tree.map(lambda x: pad(x, -2), layers)
    keys, values = of_layers(self.keys), of_layers(self.values)
    return self.replace(keys=keys, values=values, segments=pad(self.segments, 1))

  def repeat(self, times: int) -> "KVCache":
    """Each row `times` times in a row, for several continuations of one prompt."""
    if times == 1:
      return self
    return self.select(lambda x, axis: jnp.repeat(x, times, axis=axis))

  def select(self, rows: Callable[[jax.Array, int], jax.Array]) -> "KVCache":
    """Other rows: what `rows(array, batch axis)` makes of each array."""
    # The batch axis is the fourth from the end, with and without a leading L.
    alone = lambda x: x[0] if x.ndim == 4 and x.shape[0] == 1 else x
    of_layers = lambda layers: jax.tree.map(lambda x: alone(rows(_in_rows(x), -4)), layers)
    keys, values = of_layers(self.keys), of_layers(self.values)
    return self.replace(keys=keys, values=values, segments=rows(self.segments, 0))

  def constrain(self) -> "KVCache":
    """Laid out by the rules, rows and heads."""
    return self.select(lambda x, axis: constrain(x, "cached" if axis else "rows", axis))

  def put(self, rows: jax.Array, other: "KVCache", segments: jax.Array, end: int) -> "KVCache":
    """With the W columns of the n rows of `other` in those before `end` of `rows` [n].

    Rows out of range are left out. `segments` [n, S] say what the rows hold from now on.
    """
    first = end - other.segments.shape[1]

    def into(old, new):
      put = _in_rows(old).at[..., rows, :, first:end, :].set(_in_rows(new), mode="drop")
      return put.reshape(old.shape)

    return self.replace(
      keys=jax.tree.map(into, self.keys, other.keys),
      values=jax.tree.map(into, self.values, other.values),
      segments=self.segments.at[rows].set(segments, mode="drop"),
    )


def write(cached: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
  """Keys or values of a layer's cache with those of T tokens, [B, G, T, H], from a column on."""
  new = new[0] if cached.ndim == 3 else new
  return jax.lax.dynamic_update_slice_in_dim(cached, new, index, axis=-2)


def _in_rows(x: jax.Array) -> jax.Array:
  """A cache's keys or values with a batch axis, the fourth from the end."""
  return x[None] if x.ndim == 3 else x
