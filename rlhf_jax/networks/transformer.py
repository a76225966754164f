"""The decoder that every network of the package stands on: the Llama family, in flax.linen.

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, the "rotate half" layout that
Hugging Face checkpoints use), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020).

The module maps tokens to hidden states; heads are in `heads.py`. It never names a device: sharding
is in tables over the paths of parameters and the names of activations (`parallel/rules.py`).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.networks import attention, blocked, fused, panels
from rlhf_jax.networks.attention import Seen, attention_mask, rotary, rotate
from rlhf_jax.networks.cache import KVCache, write
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.networks.gradients import product, swiglu
from rlhf_jax.parallel.rules import constrain

SPAN_ARGUMENT = 7  # of a block's call


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
  def __call__(self, x, layer_cache, index, seen, angles, picked=None, span=None):
    c, pick = self.config, functools.partial(_pick, picked=picked, span=span)
    heads = {"query": c.n_heads, "key": c.n_kv_heads, "value": c.n_kv_heads}
    layers = [_linear(c, (n, c.head_dim), name, alone=False) for name, n in heads.items()]
    query, key, value = panels.together(layers, (pick(x), x, x))
    query = rotate(query, *map(pick, angles))
    key, value = rotate(key, *angles).swapaxes(1, 2), value.swapaxes(1, 2)
    before = ()
    if layer_cache is not None:
      *before, (keys, values) = layer_cache
      key, value = write(keys, key, index), write(values, value, index)
      # The barrier keeps XLA from fusing the update into its readers, which would need the old
      # cache as well and so copy every layer's cache on every decoded token.
      key, value = jax.lax.optimization_barrier((key, value))
    whole_rows, start = layer_cache is None and picked is None, span[0] if span else 0
    how, mask = c.compute.attends if whole_rows else "plain", pick(seen.mask)
    if how == "fused":
      mixed = fused.attend(query, key, value, seen._replace(mask=mask), start)
    elif how == "blocked" and x.shape[1] > blocked.BLOCK:
      mixed = blocked.attend(query, key, value, mask, start)
    else:
      mixed = attention.attend(query, key, value, mask, before)
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
    return down(swiglu(gate, up)).reshape(x.shape)


class Block(nn.Module):
  """One pre-norm layer: attention, then the MLP, each added to the stream."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, layer_cache, index, seen, angles, picked=None, span=None):
    norm = lambda name: RMSNorm(self.config.norm_eps, name=name)
    mixed, layer_cache = Attention(self.config, name="attn")(
      norm("attn_norm")(x), layer_cache, index, seen, angles, picked, span
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
    by_segment = segments if cache is None and branches is None else None
    seen = Seen(attention_mask(segments, keys, start, branches), by_segment)
    angles = rotary(positions, self.config.head_dim, self.config.rope_base)
    x = inputs if first_block else self._embed(inputs)
    blocks = (first_block, self.config.n_layers)
    x, keys_values = self._layers(x, caches, seen, angles, blocks, columns)
    if cache is not None:
      keys, values = keys_values
      cache = cache.replace(keys=keys, values=values, index=cache.index + segments.shape[1])
    return self.final_norm(x), cache

  def stem(self, tokens, positions, segments, blocks: int) -> jax.Array:
    """The stream [B, T, D] after the first `blocks` blocks, to share between networks."""
    angles = rotary(positions, self.config.head_dim, self.config.rope_base)
    seen = Seen(attention_mask(segments, segments, 0), segments)
    return self._layers(self._embed(tokens), (), seen, angles, (0, blocks), None)[0]

  def _layers(self, x, caches, seen, angles, blocks, columns):
    """The blocks from one to another; returns the stream, and keys and values of the last cache."""
    index = caches[-1].index if caches else None
    of_caches = lambda pick: tuple((pick(c.keys), pick(c.values)) for c in caches) or None
    picked, span = (None, columns) if isinstance(columns, tuple) else (columns, None)
    if self.config.compute.scan_layers:
      x, updated = self.blocks(x, of_caches(lambda layers: layers), index, seen, angles)
      return _pick(x, picked, span), updated
    updated = []
    for i in range(*blocks):
      layer_cache = of_caches(lambda layers, i=i: layers[i])
      last = (picked, span) if i == blocks[1] - 1 else (None, None)
      x, layer_cache = self.blocks[i](x, layer_cache, index, seen, angles, *last)
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
    dot_general=None if alone else product,
    dot_general_cls=panels.OfRows if alone else None,
    name=name,
  )


def _normal(n_layers: int | None = None):
  """N(0, 0.02); layers that write to the stream are shrunk by sqrt(2 L) (GPT-2, section 2.3)."""
  return nn.initializers.normal(0.02 if n_layers is None else 0.02 / (2 * n_layers) ** 0.5)
