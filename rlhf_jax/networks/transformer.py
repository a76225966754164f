"""The decoder that every network of the package stands on: the Llama family, in flax.linen.

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, the "rotate half" layout that
Hugging Face checkpoints use), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020).

The module maps tokens to hidden states; heads are in `heads.py`. It never names a device: sharding
is in tables over the paths of parameters and the names of activations (`parallel/rules.py`). The
key-value cache is an argument and a result, so decoding is a pure function.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.networks import attention, blocked, panels
from rlhf_jax.networks.attention import attention_mask, rotary, rotate
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.parallel.rules import constrain

SPAN_ARGUMENT = 7  # of a block's call


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


def _in_rows(x: jax.Array) -> jax.Array:
  """A cache's keys or values with a batch axis, the fourth from the end."""
  return x[None] if x.ndim == 3 else x


def _as_cached(x: jax.Array, ndim: int) -> jax.Array:
  """Keys or values [B, G, T, H] as they stand in a cache of so many axes; one row's has 3."""
  return x[0] if ndim == 3 else x


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang & Sennrich 2019, eq. 4)."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (y * scale[None, None]).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, layer_cache, index, mask, angles, picked=None, span=None):
    c, pick = self.config, functools.partial(_pick, picked=picked, span=span)
    heads = {"query": c.n_heads, "key": c.n_kv_heads, "value": c.n_kv_heads}
    layers = [_linear(c, (n, c.head_dim), name, alone=False) for name, n in heads.items()]
    query, key, value = panels.together(layers, (pick(x), x, x))
    query = rotate(query, *map(pick, angles))
    key, value = rotate(key, *angles).swapaxes(1, 2), value.swapaxes(1, 2)
    before = ()
    if layer_cache is not None:
      *before, (keys, values) = layer_cache
      write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=-2)
      key = write(keys, _as_cached(key, keys.ndim))
      value = write(values, _as_cached(value, values.ndim))
      # The barrier keeps XLA from fusing the update into its readers, which would need the old
      # cache as well and so copy every layer's cache on every decoded token.
      key, value = jax.lax.optimization_barrier((key, value))
    whole_rows = layer_cache is None and picked is None and x.shape[1] > blocked.BLOCK
    if whole_rows and c.compute.in_blocks:
      mixed = blocked.attend(query, key, value, pick(mask), span[0] if span else 0)
    else:
      mixed = attention.attend(query, key, value, pick(mask), before)
    mixed = constrain(mixed, "heads")
    out = _linear(c, c.d_model, "out", c.n_layers, axis=(-2, -1))(mixed)
    return out, (None if layer_cache is None else (key, value))


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    # As one matrix of tokens: XLA's CPU backward pass is a seventh faster than on [B, T, D].
    tokens = x.reshape(-1, c.d_model)
    layers = [_linear(c, c.d_ff, name, alone=False) for name in ("gate", "up")]
    gate, up = panels.together(layers, (tokens, tokens))
    down = _linear(c, c.d_model, "down", c.n_layers)
    return down(nn.silu(gate) * up).reshape(x.shape)


class Block(nn.Module):
  """One pre-norm layer: attention, then the MLP, each added to the stream."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, layer_cache, index, mask, angles, picked=None, span=None):
    norm = lambda name: RMSNorm(self.config.norm_eps, name=name)
    mixed, layer_cache = Attention(self.config, name="attn")(
      norm("attn_norm")(x), layer_cache, index, mask, angles, picked, span
    )
    x = constrain(_pick(x, picked, span) + mixed, "stream")
    x = x + MLP(self.config, name="mlp")(norm("mlp_norm")(x))
    return constrain(x, "stream"), layer_cache


class Transformer(nn.Module):
  """Tokens to hidden states after the final norm; a causal decoder over segments."""

  config: ModelConfig

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab_size, c.d_model, dtype=c.compute.dtype, embedding_init=_normal())
    # Under a scan nothing but the scan could merge the two computations of a block.
    block, scans = Block, c.compute.scan_layers
    if c.compute.remat:
      block = nn.remat(Block, prevent_cse=not scans, static_argnums=() if scans else SPAN_ARGUMENT)
    if scans:
      scanned = nn.scan(
        block,
        variable_axes={"params": 0, panels.COLLECTION: 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=c.n_layers,
      )
      self.blocks = scanned(c)
    else:
      self.blocks = [block(c, name=f"block_{i}") for i in range(c.n_layers)]
    self.final_norm = RMSNorm(c.norm_eps)
    self.vocabulary = panels.OfColumns()

  def __call__(
    self,
    inputs,
    positions,
    segments,
    cache: KVCache | None = None,
    first_block=0,
    branches=None,
    columns: jax.Array | tuple[int, int] | None = None,
  ):
    """Runs T tokens of B rows, after those in `cache` if one is given.

    Args:
      inputs: [B, T] int32 ids; or, from a later `first_block` on, what `stem` gave, [B, T, D].
      positions: [B, T] int32, place inside the document.
      segments: [B, T] int32, 0 on padding.
      cache: the tokens before these; needs room for T more.
      first_block: blocks before this one have been run already.
      branches: [B, T] int32, parts of a segment that do not see each other (`types.py`); None: one.
        Not with a cache.
      columns: those whose hidden states are wanted, [B, C] or (first, end); None: all. The last
        block has queries and feed-forward for these alone.

    Returns:
      Hidden states [B, T, D], or [B, C, D] of the columns, in the compute dtype, and the cache with
      these tokens in it (None where none was given).
    """
    if cache is not None:
      written = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.index, axis=1)
      cache = cache.replace(segments=written)
    caches = () if cache is None else (*cache.before, cache)
    keys = jnp.concatenate([c.segments for c in caches], axis=1) if caches else segments
    start = sum(c.segments.shape[1] for c in cache.before) + cache.index if caches else 0
    mask = attention_mask(segments, keys, start, branches)
    angles = rotary(positions, self.config.head_dim, self.config.rope_base)
    x = inputs if first_block else self._embed(inputs)
    blocks = (first_block, self.config.n_layers)
    x, keys_values = self._layers(x, caches, mask, angles, blocks, columns)
    if cache is not None:
      keys, values = keys_values
      cache = cache.replace(keys=keys, values=values, index=cache.index + segments.shape[1])
    return self.final_norm(x), cache

  def stem(self, tokens, positions, segments, blocks: int) -> jax.Array:
    """The stream [B, T, D] after the first `blocks` blocks, to share between networks."""
    angles = rotary(positions, self.config.head_dim, self.config.rope_base)
    mask = attention_mask(segments, segments, 0)
    return self._layers(self._embed(tokens), (), mask, angles, (0, blocks), None)[0]

  def _layers(self, x, caches, mask, angles, blocks, columns):
    """The blocks from one to another; returns the stream, and keys and values of the last cache."""
    index = caches[-1].index if caches else None
    of_caches = lambda pick: tuple((pick(c.keys), pick(c.values)) for c in caches) or None
    picked, span = (None, columns) if isinstance(columns, tuple) else (columns, None)
    if self.config.compute.scan_layers:
      x, updated = self.blocks(x, of_caches(lambda layers: layers), index, mask, angles)
      return _pick(x, picked, span), updated
    updated = []
    for i in range(*blocks):
      layer_cache = of_caches(lambda layers, i=i: layers[i])
      last = (picked, span) if i == blocks[1] - 1 else (None, None)
      x, layer_cache = self.blocks[i](x, layer_cache, index, mask, angles, *last)
      updated.append(layer_cache)
    return x, tuple(zip(*updated)) if caches else None

  def attend_to_vocabulary(self, hidden):
    """Logits by the transposed embedding, for tied heads. [..., D] to [..., V]."""
    dimensions = (((hidden.ndim - 1,), (0,)), ((), ()))
    return self.vocabulary(hidden, self._table().T, dimensions)

  def _embed(self, tokens):
    """The stream [B, T, D] before the first block."""
    return constrain(jnp.take(self._table(), tokens, axis=0), "stream")

  def _table(self):
    """The embedding [V, D] in the compute dtype, its rows whole."""
    return constrain(self.embed.embedding.astype(self.config.compute.dtype), "table")


def _pick(x: jax.Array, picked: jax.Array | None, span: tuple[int, int] | None) -> jax.Array:
  """The columns of x [B, T, ...] at `picked` [B, C], or of a span, or all."""
  if span is not None:
    return x[:, slice(*span)]
  if picked is not None:
    return jnp.take_along_axis(x, picked.reshape(*picked.shape, *(1,) * (x.ndim - 2)), axis=1)
  return x


def _linear(
  config, features, name: str, n_layers: int | None = None, axis=-1, alone: bool = True
) -> nn.DenseGeneral:
  """A linear map of the last axes, without bias; with `n_layers` it writes to the stream.

  `alone`: it has panels of its own, where decoding has any; else see `panels.together`.
  """
  return nn.DenseGeneral(
    features,
    axis,
    use_bias=False,
    dtype=config.compute.dtype,
    kernel_init=_normal(n_layers),
    dot_general_cls=panels.OfRows if alone else None,
    name=name,
  )


def _normal(n_layers: int | None = None):
  """N(0, 0.02); layers that write to the stream are shrunk by sqrt(2 L) (GPT-2, section 2.3)."""
  return nn.initializers.normal(0.02 if n_layers is None else 0.02 / (2 * n_layers) ** 0.5)
