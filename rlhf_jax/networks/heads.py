"""Policy, value, reward and moderation networks: one trunk, three heads.

Each is used only through `init` and `apply`. A policy's parameters are {"trunk", "lm_head"} (no
"lm_head" where the embedding is tied), a scalar network's and a label network's {"trunk", "score"}.
The trunks have the same tree, so a reward model starts from a policy, and a critic from a reward
model, by copying it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.networks import panels
from rlhf_jax.networks.cache import KVCache
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.networks.transformer import Transformer
from rlhf_jax.types import Params


class Policy(nn.Module):
  """A language model. `apply` gives logits; `hidden` and `logits` are its two halves."""

  config: ModelConfig

  def setup(self):
    self.trunk = Transformer(self.config)
    if not self.config.tie_embeddings:
      self.lm_head = nn.Dense(
        self.config.vocab_size,
        use_bias=False,
        dtype=self.config.compute.dtype,
        kernel_init=nn.initializers.normal(0.02),
        dot_general_cls=panels.OfColumns,
      )

  def __call__(self, tokens, positions, segments):
    """Logits [B, T, V] float32; those at column t predict the token at t + 1."""
    return self.logits(self.hidden(tokens, positions, segments)[0])

  def hidden(
    self, inputs, positions, segments, cache: KVCache | None = None, first_block=0, columns=None
  ):
    """Hidden states [B, T, D] and the updated cache; see `Transformer.__call__`."""
    return self.trunk(inputs, positions, segments, cache, first_block, columns=columns)

  def stem(self, tokens, positions, segments, blocks: int) -> jax.Array:
    """The stream [B, T, D] after the first blocks; see `shared_stem`."""
    return self.trunk.stem(tokens, positions, segments, blocks)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] to [..., V], float32. Callers slice `hidden` first: V is the largest letter."""
    if self.config.tie_embeddings:
      return self.trunk.attend_to_vocabulary(hidden).astype(jnp.float32)
    return self.lm_head(hidden).astype(jnp.float32)

  def head_kernel(self) -> jax.Array:
    """The matrix [D, V] that `logits` multiplies with, float32."""
    if self.config.tie_embeddings:
      return self.trunk.embed.embedding.T
    return self.lm_head.variables["params"]["kernel"]


class ScalarNetwork(nn.Module):
  """A trunk with one number a token: the critic's value, or the reward model's score.

  The head starts from N(0, 1/(D+1)), bias 0 (lm-human-preferences; the square root is missing in
  Stiennon et al. 2020, appendix B.1).
  """

  config: ModelConfig

  def setup(self):
    self.trunk = Transformer(self.config)
    std = (self.config.d_model + 1) ** -0.5
    self.score = nn.Dense(1, dtype=jnp.float32, kernel_init=nn.initializers.normal(std))

  def __call__(
    self, inputs, positions, segments, first_block=0, branches=None, columns=None
  ) -> jax.Array:
    """One float32 per token, [B, T], or of some columns: what is known after reading the token."""
    hidden, _ = self.trunk(inputs, positions, segments, None, first_block, branches, columns)
    return self.score(hidden)[..., 0]


# Over all tokens of a text, at its last one, or the largest of each component over its tokens.
Pooling = Literal["mean", "last", "max"]


class LabelNetwork(nn.Module):
  """A trunk with `labels` numbers a text: the logits of a multi-label classifier."""

  config: ModelConfig
  labels: int  # C
  pooling: Pooling

  def setup(self):
    self.trunk = Transformer(self.config)
    init = nn.initializers.normal(0.02)
    self.score = nn.Dense(self.labels, dtype=jnp.float32, kernel_init=init)

  def __call__(self, inputs, positions, segments, first_block=0, slots: int = 1) -> jax.Array:
    """Logits [B, M, C] float32 of the M = `slots` texts of a row, segments 1 .. M."""
    hidden, _ = self.trunk(inputs, positions, segments, None, first_block)
    return self.score(pool(hidden.astype(jnp.float32), segments, slots, self.pooling))

  def stem(self, tokens, positions, segments, blocks: int) -> jax.Array:
    """The stream [B, T, D] after the first blocks; see `shared_stem`."""
    return self.trunk.stem(tokens, positions, segments, blocks)


def pool(hidden: jax.Array, segments: jax.Array, slots: int, pooling: Pooling) -> jax.Array:
  """hidden [B, T, D] as one vector a segment, [B, M, D]: 0 for a segment that has no token."""
  hidden = jnp.where(segments[..., None] > 0, hidden, 0.0)
  inside = segments[:, :, None] == jnp.arange(1, slots + 1)[None, None]
  if pooling == "max":
    of_row = functools.partial(jax.ops.segment_max, num_segments=slots + 1)
    largest = jax.vmap(of_row)(hidden, segments)[:, 1:]
    return jnp.where(jnp.any(inside, axis=1)[..., None], largest, 0.0)
  if pooling == "last":
    columns = jnp.arange(segments.shape[1])[None, :, None]
    last = jnp.max(jnp.where(inside, columns, -1), axis=1)
    inside = columns == last[:, None]
  weights = inside / jnp.maximum(jnp.sum(inside, axis=1, keepdims=True), 1)
  return jnp.einsum("btd,btm->bmd", hidden, weights.astype(hidden.dtype))


def init(network: nn.Module, key: jax.Array) -> Params:
  """Fresh parameters of a network, float32."""
  blank = jnp.zeros((1, 2), jnp.int32)
  return network.init(key, blank, blank, blank)["params"]


@functools.cache
def shapes(network: nn.Module) -> Params:
  """What `init` returns, without the numbers."""
  return jax.eval_shape(functools.partial(init, network), jax.random.key(0))


def scalar_from_trunk(network: ScalarNetwork, trunk: Params, key: jax.Array) -> Params:
  """A scalar network on a copy of `trunk`, with a fresh head: how a reward model starts."""
  D = network.config.d_model
  kernel = jax.random.normal(key, (D, 1)) * (D + 1) ** -0.5
  score = {"kernel": kernel, "bias": jnp.zeros((1,))}
  return {"trunk": jax.tree.map(jnp.copy, trunk), "score": score}


def unrolled(policy: Policy, params: Params) -> tuple[Policy, Params]:
  """The same policy and parameters with its layers one by one; as they are where they are so.

  For decoding: a scan over layers takes each one's cache out of that of all, and puts it back
  whole, at every token.
  """
  config = policy.config
  if not config.compute.scan_layers:
    return policy, params
  trunk = dict(params["trunk"])
  stacked = trunk.pop("blocks")
  blocks = {
    f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.n_layers)
  }
  compute = dataclasses.replace(config.compute, scan_layers=False)
  return Policy(dataclasses.replace(config, compute=compute)), params | {"trunk": trunk | blocks}


def shared_stem(config: ModelConfig, trunks: Sequence[Params], frozen: Params) -> int:
  """How many of the lowest blocks are the same in all `trunks` and are not going to be trained.

  Their output is the same for every network, so it can be computed once a sequence and kept
  (`Transformer.stem`), which changes no number. `frozen` is the part of a trunk that stays as it
  is. 0 where the embedding trains, or where layers are scanned and so have no names.
  """
  if config.compute.scan_layers:
    return 0
  first, *others = trunks

  def fixed(name: str) -> bool:
    names = jax.tree.structure(first[name]) == jax.tree.structure(frozen.get(name))
    same = lambda a, b: a is b or bool(jnp.array_equal(a, b))
    return names and all(jax.tree.all(jax.tree.map(same, first[name], o[name])) for o in others)

  names = ["embed", *(f"block_{i}" for i in range(config.n_layers))]
  return max(len(list(itertools.takewhile(fixed, names))) - 1, 0)


def layout(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Positions and segments [B, T] of rows that hold one document each, padded on either side.

  Positions count real tokens only, so padding on the left moves nothing.
  """
  real = (mask > 0).astype(jnp.int32)
  return jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0) * real, real


def layout_before(
  mask: jax.Array, response_length: int
) -> tuple[jax.Array, jax.Array, tuple[int, int]]:
  """As `layout`, and the columns that the last R tokens are predicted from: [P - 1, T - 1).

  What is known at column t - 1 is what the token at t is judged by.
  """
  start = mask.shape[1] - response_length - 1
  return *layout(mask), (start, start + response_length)


def last_column(mask: jax.Array) -> jax.Array:
  """The last column where mask [B, T] is set, [B] int32; padding may be on any side.

  Scores are read where the answer ends: after its end-of-message token, never at a pad and never
  at an end-of-message token of an earlier turn.
  """
  columns = jnp.arange(mask.shape[1], dtype=jnp.int32)
  return jnp.max(jnp.where(mask > 0, columns[None, :], 0), axis=1)
