"""Rows that have ended leave the decoding loop: the open ones move together into a smaller batch.

Lengths are skewed: when half the rows have ended, the loop still works for all of them. A row never
leaves its device, so nothing but counts is exchanged; a batch of B rows over several devices is
B / shards rows on each, and goes on in a smaller one when the fullest device allows it.

An index [shards, n] says which of its rows each device means.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def sizes(rows: int, shares: Sequence[float], shards: int) -> tuple[int, ...]:
  """The batches that the loop goes through, largest first: all rows, then these shares of them."""
  own = rows // shards
  smaller = {shards * math.ceil(share * own) for share in shares}
  return (rows, *sorted((size for size in smaller if size < rows), reverse=True))


def every_row(rows: int, shards: int) -> jax.Array:
  """The index of all."""
  return jnp.tile(jnp.arange(rows // shards, dtype=jnp.int32), (shards, 1))


def needed(finished: jax.Array, shards: int) -> jax.Array:
  """[] int32, the smallest batch that has room for the rows [B] that have not finished."""
  is_open = (finished == 0).reshape(shards, -1)
  return shards * jnp.max(jnp.sum(is_open, axis=1, dtype=jnp.int32))


def still_open(finished: jax.Array, size: int, shards: int) -> jax.Array:
  """The index of the open rows in their order, filled up with finished ones to `size` in all."""
  order = jnp.argsort(finished.reshape(shards, -1), axis=1, stable=True)
  return order[:, : size // shards].astype(jnp.int32)


def take(x: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
  """The rows of `x` along `axis` that `index` means."""
  shards, count = index.shape
  axis %= x.ndim
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  split = x.reshape(*before, shards, -1, *after)
  # Slices of whole rows: XLA's CPU compiler copies them faster than what `jnp.take` becomes.
  row = lambda rows, i: jax.lax.dynamic_index_in_dim(rows, i, axis, keepdims=False)
  own = jax.vmap(row, in_axes=(None, 0), out_axes=axis)
  taken = jax.vmap(own, in_axes=(axis, 0), out_axes=axis)(split, index)
  return taken.reshape(*before, shards * count, *after)


def put(x: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
  """`x` [B, ...] with the rows that `index` means replaced by `rows` [n, ...]."""
  shards, count = index.shape
  split = lambda array, own: array.reshape(shards, own, *array.shape[1:])
  replaced = jax.vmap(lambda old, i, new: old.at[i].set(new))(
    split(x, x.shape[0] // shards), index, split(rows, count)
  )
  return replaced.reshape(x.shape)
