"""Attention as functions: rotary positions, who sees whom, and the softmax."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.parallel import mesh as mesh_lib

MASKED = -1e30  # finite, so that a row of padding yields finite (unused) numbers and gradients


class Seen(NamedTuple):
  """Who sees whom, of T queries and S keys a row."""

  mask: jax.Array  # [B, T, S]
  # [B, S], where they say it all: a query sees its segment up to its own column. Else None.
  segments: jax.Array | None


def rotary(positions: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, T, H/2] of the rotary angles, float32 (Su et al. 2021, eq. 15)."""
  frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  return _once(jnp.cos(angles)), _once(jnp.sin(angles))


def _once(x: jax.Array) -> jax.Array:
  """`x`, computed once: XLA's CPU compiler would do it again in every layer, for every head.

  It merges all but products into their readers, so this is one, with the identity.
  """
  if mesh_lib.platform() != "cpu":
    return x
  return jnp.matmul(x, jnp.eye(x.shape[-1]), precision="highest")


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the halves of each head of x [B, T, N, H] by the angles [B, T, H/2]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


def attention_mask(
  segments: jax.Array,
  keys: jax.Array,
  start: jax.Array | int,
  branches: jax.Array | None = None,
) -> jax.Array:
  """Who sees whom, [B, T, S]: earlier columns, or its own, of the same segment; never padding.

  `segments` [B, T] are those of the queries, which stand from column `start` on among the `keys`
  [B, S]. With `branches` [B, T], of the segment only branch 0 and its own. A single query is the
  latest of its segment, wherever the cache has the others (`generation/slots.py`).
  """
  length = segments.shape[1]
  if length == 1:
    causal = jnp.ones((1, keys.shape[1]), bool)
  else:
    causal = jnp.arange(keys.shape[1])[None, :] <= start + jnp.arange(length)[:, None]
  same = segments[:, :, None] == keys[:, None, :]
  if branches is not None:
    of_key = branches[:, None, :]
    same &= (of_key == 0) | (of_key == branches[:, :, None])
  return causal[None, :, :] & same & (keys > 0)[:, None, :]


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  before: Sequence[tuple[jax.Array, jax.Array]] = (),
) -> jax.Array:
  """Softmax attention (Vaswani et al. 2017, eq. 1) with grouped key-value heads.

  query [B, T, N, H]; key, value [B, G, S, H], or [G, S, H] of one row; mask [B, T, S]. Returns
  [B, T, N, H]. The softmax is in float32 whatever the compute dtype. Pairs of keys and values
  `before` these, with columns of their own, are the first of the columns of the mask.
  """
  B, T, N, H = query.shape
  *lead, G, _, _ = key.shape
  keys, values = zip(*before, (key, value))
  grouped = query.reshape(B, T, G, N // G, H)
  if T == 1 and N == G and mesh_lib.platform() == "tpu":
    # A query of zeros beside one that is alone: of one row XLA's TPU compiler makes no product.
    grouped = jnp.pad(grouped, [(0, 0)] * 3 + [(0, 1), (0, 0)])
  M = grouped.shape[3]
  # The queries of a group as rows of one matrix: of more axes XLA makes slower products.
  rows = grouped.transpose(0, 2, 3, 1, 4) * (H**-0.5)
  rows = rows.reshape(*lead, G, M * T, H)
  score = functools.partial(jnp.einsum, "...gqh,...gsh->...gqs", preferred_element_type=jnp.float32)
  scores = jnp.concatenate([score(rows, key) for key in keys], axis=-1)
  scores = jnp.where(mask[:, None, None], scores.reshape(B, G, M, T, -1), MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(*lead, G, M * T, -1)
  ends = np.cumsum([key.shape[-2] for key in keys])[:-1]
  # Sums over several pairs are rounded once, as those over one are.
  exact = jnp.float32 if before else value.dtype
  mix = functools.partial(jnp.einsum, "...gqs,...gsh->...gqh", preferred_element_type=exact)
  parts = map(mix, jnp.split(weights, ends, axis=-1), values)
  mixed = functools.reduce(jnp.add, parts).astype(value.dtype)
  mixed = mixed.reshape(B, G, M, T, H)[:, :, : N // G]
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
