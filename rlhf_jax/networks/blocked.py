"""Softmax attention in blocks that fit in a CPU cache, with its own backward pass.

Nothing of size [T, T] is kept: weights are computed for a block of queries and a span of keys after
the other, and once more for the backward pass from the log-normaliser of each query (Dao et al.
2022, algorithms 1 and 4). A long row is cut into pairs of blocks, and those in which no query sees
a key are left out when it runs: the later keys, and of packed rows the other documents, or the
other answers to a prompt. A short one, or one that no equal blocks fill, reads for each block of
queries all keys up to the last query. One row after the other goes through, several key-value heads
at once. On an accelerator, which wants many at once, `attention.attend` is the faster one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from rlhf_jax.networks.attention import MASKED
from rlhf_jax.parallel import rules

BLOCK = 64  # queries or keys of a block, at most
SHORT = 2 * BLOCK  # keys of a row that gains nothing by pairs, at most
LONG = 8 * BLOCK  # keys of a row from which on it is filled up to equal blocks
TILE = 1 << 16  # scores that are computed at once: as many as stay in a core's cache
# Heads that a backward pass takes together at least: so many small ones are worth it, but of a few
# large ones each by itself was faster.
TOGETHER = 8


class Span(NamedTuple):
  """Consecutive columns."""

  start: jax.Array | int
  size: int


class Pair(NamedTuple):
  """Some queries t of a row, some keys s, and who sees whom."""

  rows: Span
  keys: Span
  mask: jax.Array  # [t, s]
  turned: jax.Array  # [s, t]


def attend(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, start: int = 0
) -> jax.Array:
  """What `attention.attend` returns, for a causal mask: query t sees no key after start + t.

  query [B, C, N, H]; key, value [B, G, T, H]; mask [B, C, T]. Returns [B, C, N, H].
  """
  C, T = mask.shape[1:]
  if T < LONG:
    return _attend(query, key, value, mask, start)
  queries, keys = (1, -C % _block_of(C)), (2, -T % _block_of(T))
  filled = _fill(query, queries), _fill(key, keys), _fill(value, keys)
  return _attend(*filled, _fill(mask, queries, keys), start)[:, :C]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, start):
  """`attend` without a rest of a long row."""
  return _forward(query, key, value, mask, start)[0]


def _forward(query, key, value, mask, start):
  query = _by_head(query * query.shape[-1] ** -0.5, key.shape[1])
  out, normaliser = _each_head(_read, 1, start, mask, query, key, value)
  out = _by_column(out)
  return out, (query, key, value, mask, out, normaliser)


def _backward(start, kept, gradient):
  query, key, value, mask, out, normaliser = kept
  G, H = query.shape[1], query.shape[-1]
  inner = jnp.sum(out.astype(jnp.float32) * gradient, axis=-1, keepdims=True)
  inputs = query, key, value, normaliser, _by_head(inner, G)[..., 0], _by_head(gradient, G)
  of_query, of_key, of_value = _each_head(_read_backwards, TOGETHER, start, mask, *inputs)
  return _by_column(of_query) * H**-0.5, of_key, of_value, None


_attend.defvjp(_forward, _backward)


def _read(each_pair, query, key, value):
  """Output [g, M, C, H] and log-normalisers [g, M, C] of the M query heads of g key-value heads.

  query [g, M, C, H], scaled; key, value [g, T, H].
  """

  def read(sums, pair):
    some, peak, total, mixed = (_cut(x, pair.rows, 2) for x in (query, *sums))
    scores = _product("gqh,gsh->gqs", _flat(some), _cut(key, pair.keys, 1))
    scores = jnp.where(pair.mask, scores.reshape(*peak.shape, -1), MASKED)
    higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights, shrunk = jnp.exp(scores - higher[..., None]), jnp.exp(peak - higher)
    total = total * shrunk + jnp.sum(weights, axis=-1)
    more = _product("gqs,gsh->gqh", _flat(weights).astype(value.dtype), _cut(value, pair.keys, 1))
    mixed = mixed * shrunk[..., None] + more.reshape(mixed.shape)
    return [_put(x, new, pair.rows, 2) for x, new in zip(sums, (higher, total, mixed))]

  each = query.shape[:-1]
  nothing = [jnp.full(each, MASKED), jnp.zeros(each), jnp.zeros(query.shape)]
  peak, total, mixed = each_pair(read, nothing)
  total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)  # 0 for a block that sees no key
  return (mixed / total[..., None]).astype(value.dtype), peak + jnp.log(total)


def _read_backwards(each_pair, query, key, value, normaliser, inner, gradient):
  """Gradients of query [g, M, C, H], key and value [g, T, H], from that of the output.

  With weights P, scores S and output O: dV = P' dO, dS = P (dO V' - sum(dO O)), dQ = dS K,
  dK = dS' Q, where `inner` [g, M, C] is sum(dO O) and Q is scaled, so that dQ still has to be. What
  is computed is P' and dS', so that no product has to turn its larger factor over; the queries q of
  a block are those of all M heads, side by side.
  """
  of_queries, M, dtype = (query, gradient, normaliser, inner), query.shape[1], value.dtype
  apart = lambda x: x.reshape(*x.shape[:2], M, -1)  # [g, s, q] to [g, s, M, t]
  together = lambda x: x.reshape(*x.shape[:2], -1)

  def read(sums, pair):
    some, moved, lognorm, dot = (_flat(_cut(x, pair.rows, 2)) for x in of_queries)
    some_keys, some_values = (_cut(x, pair.keys, 1) for x in (key, value))
    scores = apart(_product("gsh,gqh->gsq", some_keys, some) - lognorm[:, None])
    weights = together(jnp.exp(jnp.where(pair.turned[:, None], scores, -jnp.inf)))
    by_score = weights * (_product("gsh,gqh->gsq", some_values, moved) - dot[:, None])
    weights, by_score = weights.astype(dtype), by_score.astype(dtype)
    more = (
      _product("gsh,gsq->ghq", some_keys, by_score).swapaxes(1, 2),
      _product("gsq,gqh->gsh", by_score, some),
      _product("gsq,gqh->gsh", weights, moved),
    )
    places = (pair.rows, 2), (pair.keys, 1), (pair.keys, 1)
    return [_add(x, new, *place) for x, new, place in zip(sums, more, places)]

  sums = each_pair(read, [jnp.zeros(x.shape) for x in (query, key, value)])
  return [x.astype(dtype) for x in sums]


def _each_head(function, fewest, start, mask, *arrays):
  """`function(each_pair, *arrays)` of every row and head; arrays are [B, G, ...], a mask [B, C, T].

  As many heads at once as a tile holds, or, where these are fewer than `fewest`, one.
  `each_pair(step, sums)` is what `step(sums, pair)` makes of `sums`, pair after pair.
  """
  (C, T), M = mask.shape[1:], arrays[0].shape[2]
  height, width = _block_of(C), _block_of(T)
  in_pairs = T > SHORT and C % height == 0 and T % width == 0
  scores = M * (height * width if in_pairs else min(C, BLOCK) * T)

  def local(mask, *arrays):
    # Left to itself XLA takes a head's rows from where they are, and then copies all twice.
    arrays = [with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in arrays]
    rows, heads = arrays[0].shape[:2]
    most = TILE // scores if TILE // scores >= fewest else 1
    at_once = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
    walk = _seen_pairs(mask, height, width) if in_pairs else _known_pairs(mask, start)
    one = lambda x: function(functools.partial(walk, x[0] * at_once // heads), *x[1:])
    flat = [x.reshape(-1, at_once, *x.shape[2:]) for x in arrays]
    done = jax.lax.map(one, (jnp.arange(len(flat[0])), *flat))
    return jax.tree.map(lambda x: x.reshape(rows, heads, *x.shape[2:]), done)

  return rules.own_rows_and_heads(local, *arrays[0].shape[:2])(mask, *arrays)


def _known_pairs(mask: jax.Array, start: int) -> Callable:
  """`each_pair` of a row: its blocks of queries, each with the keys up to its last query."""
  C, turned = mask.shape[1], mask.swapaxes(1, 2)

  def each_pair(row, step, sums):
    for rows in (Span(first, min(BLOCK, C - first)) for first in range(0, C, BLOCK)):
      keys = Span(0, start + rows.start + rows.size)
      sums = step(sums, _pair(mask, turned, row, rows, keys))
    return sums

  return each_pair


def _seen_pairs(mask: jax.Array, height: int, width: int) -> Callable:
  """`each_pair` of a row: its blocks of queries and of keys of which a query sees a key."""
  (B, C, T), turned = mask.shape, mask.swapaxes(1, 2)
  seen = jnp.any(mask.reshape(B, C // height, height, T // width, width), axis=(2, 4))
  seen = seen.reshape(B, -1)
  places = jax.vmap(lambda x: jnp.nonzero(x, size=x.size, fill_value=0)[0])(seen)
  number = jnp.sum(seen, axis=1)

  def each_pair(row, step, sums):
    def one(i, sums):
      down, across = jnp.divmod(places[row, i], T // width)
      rows, keys = Span(down * height, height), Span(across * width, width)
      return step(sums, _pair(mask, turned, row, rows, keys))

    return jax.lax.fori_loop(0, number[row], one, sums)

  return each_pair


def _pair(mask: jax.Array, turned: jax.Array, row: jax.Array, rows: Span, keys: Span) -> Pair:
  """A pair with its part of the masks [B, C, T] and [B, T, C]."""

  def block(x, down, across):
    starts, sizes = (row, down.start, across.start), (1, down.size, across.size)
    return jax.lax.dynamic_slice(x, starts, sizes)[0]

  return Pair(rows, keys, block(mask, rows, keys), block(turned, keys, rows))


def _block_of(length: int) -> int:
  """Columns of each block: those that leave the least over, or as many as may be."""
  return min(range(BLOCK, BLOCK // 2, -8), key=lambda size: -length % size)


def _fill(x: jax.Array, *rests: tuple[int, int]) -> jax.Array:
  """`x` with zeros after its end, for each (axis, number)."""
  more = dict(rests)
  return jnp.pad(x, [(0, more.get(axis, 0)) for axis in range(x.ndim)]) if any(more.values()) else x


def _product(form: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """An einsum that adds up in float32."""
  return jnp.einsum(form, left, right, preferred_element_type=jnp.float32)


def _cut(x: jax.Array, span: Span, axis: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, *span, axis)


def _put(x: jax.Array, new: jax.Array, span: Span, axis: int) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, new, span.start, axis)


def _add(x: jax.Array, more: jax.Array, span: Span, axis: int) -> jax.Array:
  some = _cut(x, span, axis)
  return _put(x, some + more.reshape(some.shape), span, axis)


def _flat(x: jax.Array) -> jax.Array:
  """[g, M, t, ...] to [g, M t, ...]."""
  return x.reshape(len(x), -1, *x.shape[3:])


def _by_head(x: jax.Array, G: int) -> jax.Array:
  """[B, T, N, H] to [B, G, N / G, T, H]."""
  B, T, N, H = x.shape
  return x.swapaxes(1, 2).reshape(B, G, N // G, T, H)


def _by_column(x: jax.Array) -> jax.Array:
  """The inverse of `_by_head`."""
  B, G, M, T, H = x.shape
  return x.reshape(B, G * M, T, H).swapaxes(1, 2)
