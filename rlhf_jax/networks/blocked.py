"""Softmax attention in blocks of queries that fit in a CPU cache, with its own backward pass.

Nothing of size [T, T] is kept for the backward pass: it computes the weights again from the
log-normaliser of each query (Dao et al. 2022, algorithm 4). A block of queries reads no key after
its last one, so of a causal square little more than half is computed. One row and key-value head
after the other goes through, or several where they are small. On an accelerator, which wants many
at once, `attention.attend` is the faster one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from rlhf_jax.networks.attention import MASKED
from rlhf_jax.parallel import rules

BLOCK = 64  # queries of a block
MOST_BLOCKS = 8  # of a row; longer rows have longer blocks, as each is compiled
TILE = 1 << 16  # scores that are computed at once: as many as stay in a core's cache
# Heads that a backward pass takes together at least: so many small ones are worth it, but of a few
# large ones each by itself was faster.
TOGETHER = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, start: int = 0
) -> jax.Array:
  """What `attention.attend` returns, for a causal mask: query t sees no key after start + t.

  query [B, C, N, H]; key, value [B, G, T, H]; mask [B, C, T]. Returns [B, C, N, H].
  """
  return _forward(query, key, value, mask, start)[0]


def _forward(query, key, value, mask, start):
  query = _by_head(query * query.shape[-1] ** -0.5, key.shape[1])
  read = functools.partial(_read, start)
  out, normaliser = _each_head(read, 1, mask, query, key, value)
  out = _by_column(out)
  return out, (query, key, value, mask, out, normaliser)


def _backward(start, kept, gradient):
  query, key, value, mask, out, normaliser = kept
  G, H = query.shape[1], query.shape[-1]
  inner = jnp.sum(out.astype(jnp.float32) * gradient, axis=-1, keepdims=True)
  inputs = query, key, value, normaliser, _by_head(inner, G)[..., 0], _by_head(gradient, G)
  read = functools.partial(_read_backwards, start)
  of_query, of_key, of_value = _each_head(read, TOGETHER, mask.swapaxes(1, 2), *inputs)
  return _by_column(of_query) * H**-0.5, of_key, of_value, None


attend.defvjp(_forward, _backward)


def _read(start, query, key, value, mask):
  """Output [M, C, H] and log-normalisers [M, C] of the M query heads of one key-value head.

  query [M, C, H], scaled; key, value [T, H]; mask [C, T].
  """
  outs, normalisers = [], []
  for rows in _blocks(query.shape[1]):
    seen = slice(0, start + rows.stop)
    scores = _product("mth,sh->mts", query[:, rows], key[seen])
    scores = jnp.where(mask[None, rows, seen], scores, MASKED)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("mts,sh->mth", weights.astype(value.dtype), value[seen]) / total
    outs.append(out.astype(value.dtype))
    normalisers.append((peak + jnp.log(total))[..., 0])
  return jnp.concatenate(outs, axis=1), jnp.concatenate(normalisers, axis=1)


def _read_backwards(start, query, key, value, normaliser, inner, gradient, mask):
  """Gradients of query [M, C, H], key and value [T, H], from that of the output; mask [T, C].

  With weights P, scores S and output O: dV = P' dO, dS = P (dO V' - sum(dO O)), dQ = dS K,
  dK = dS' Q, where `inner` [M, C] is sum(dO O) and Q is scaled, so that dQ still has to be. What is
  computed is P' and dS', so that no product has to turn its larger factor over; the queries q of a
  block are those of all M heads, side by side.
  """
  M, C, H = query.shape
  dtype, of_query = value.dtype, []
  apart = lambda x: x.reshape(len(x), M, -1)  # [s, q] to [s, M, t], as the mask is of t alone
  of_key, of_value = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
  for rows in _blocks(C):
    seen = slice(0, start + rows.stop)
    some, moved = (x[:, rows].reshape(-1, H) for x in (query, gradient))
    scores = apart(_product("sh,qh->sq", key[seen], some)) - normaliser[None, :, rows]
    weights = jnp.exp(jnp.where(mask[seen, None, rows], scores, -jnp.inf))
    by_weight = apart(_product("sh,qh->sq", value[seen], moved))
    by_score = weights * (by_weight - inner[None, :, rows])
    weights, by_score = (x.reshape(seen.stop, -1).astype(dtype) for x in (weights, by_score))
    turned = _product("sh,sq->hq", key[seen], by_score).astype(dtype)
    of_query.append(turned.T.reshape(M, -1, H))
    of_key = of_key.at[seen].add(_product("sq,qh->sh", by_score, some))
    of_value = of_value.at[seen].add(_product("sq,qh->sh", weights, moved))
  return jnp.concatenate(of_query, axis=1), of_key.astype(dtype), of_value.astype(dtype)


def _product(form: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """An einsum that adds up in float32."""
  return jnp.einsum(form, left, right, preferred_element_type=jnp.float32)


def _blocks(length: int) -> list[slice]:
  """The queries of a row, cut into blocks."""
  size = BLOCK * -(-length // (BLOCK * MOST_BLOCKS))
  return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _each_head(function, fewest, mask, *arrays):
  """`function(*arrays, mask)` of every row and head; arrays are [B, G, ...], a mask [B, ...].

  As many heads at once as a tile holds, or, where these are fewer than `fewest`, one.
  """

  def local(mask, *arrays):
    # Left to itself XLA takes a head's rows from where they are, and then copies all twice.
    arrays = [with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in arrays]
    rows, heads = arrays[0].shape[:2]
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    (_, M, C, _), T = flat[0].shape, flat[1].shape[1]  # of queries and keys
    fitting = TILE // (M * min(C, BLOCK) * T)
    most = min(fitting, rows * heads) if fitting >= fewest else 1
    one = lambda x: function(*x[1:], mask[x[0] // heads])
    # A divisor, so that there is no rest, which would be compiled as well.
    at_once = next(n for n in range(most, 0, -1) if rows * heads % n == 0)
    done = jax.lax.map(one, (jnp.arange(rows * heads), *flat), batch_size=at_once)
    return jax.tree.map(lambda x: x.reshape(rows, heads, *x.shape[1:]), done)

  return rules.own_rows_and_heads(local, *arrays[0].shape[:2])(mask, *arrays)


def _by_head(x: jax.Array, G: int) -> jax.Array:
  """[B, T, N, H] to [B, G, N / G, T, H]."""
  B, T, N, H = x.shape
  return x.swapaxes(1, 2).reshape(B, G, N // G, T, H)


def _by_column(x: jax.Array) -> jax.Array:
  """The inverse of `_by_head`."""
  B, G, M, T, H = x.shape
  return x.reshape(B, G * M, T, H).swapaxes(1, 2)
