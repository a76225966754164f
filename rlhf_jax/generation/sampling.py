"""What a "sampling distribution" is, once.

The distribution that a token is drawn from is, in this order: logits / temperature, all but the
`top_k` largest removed, all outside the nucleus of mass `top_p` removed, renormalised. The
log-probability reported for a token is that of *this* distribution. With top_k 0 and top_p 1 it
equals `likelihood.token_logprobs` at the same temperature, which is what PPO recomputes; PPO
therefore refuses truncated rollouts. Temperature 0 is greedy: the distribution is a point mass, its
log-probability 0.

What ends a response is said once too: EOS anywhere, other tokens from a column on (`Stops`).
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.config import Count, Fraction, NonNegative, PositiveInt, Range
from rlhf_jax.parallel.rules import constrain
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class StopConfig:
  """Tokens that end a response although they are no EOS (Ziegler et al. 2019, section 2.3)."""

  tokens: tuple[str, ...]  # the text of each
  at_or_after: Count  # the first response column where they do, from 0; before it, they do not

  def __post_init__(self):
    if not self.tokens:
      raise UserError("config stop.tokens: names no token; use stop=None to end at EOS alone.")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How responses are drawn."""

  max_new_tokens: PositiveInt  # R
  temperature: NonNegative  # 0 is greedy
  top_k: Count  # 0 keeps all
  top_p: Fraction  # 1 keeps all
  stop: StopConfig | None  # what ends a response beside EOS
  # Shares of the batch that decoding goes on in when no more rows than that are open; each size is
  # compiled apart. They change no token; () keeps all rows together.
  compact_to: tuple[Annotated[float, Range(low=0.0, high=1.0, closed="neither")], ...]
  # Parts of the key-value cache, each with a loop of its own: a token attends over all columns of
  # those that have been begun. They change no token.
  cache_sizes: PositiveInt

  def __post_init__(self):
    if self.stop is not None and self.stop.at_or_after >= self.max_new_tokens:
      raise UserError(
        f"config stop.at_or_after: {self.stop.at_or_after} is past the last column of responses of "
        f"{self.max_new_tokens} tokens; use at most {self.max_new_tokens - 1}."
      )
    if self.top_p == 0.0:
      raise UserError("config top_p: 0 leaves no token to draw; use temperature 0 for greedy.")

  @property
  def is_truncated(self) -> bool:
    """Whether tokens are cut, so that full-softmax log-probabilities would not match."""
    return self.temperature == 0 or self.top_k > 0 or self.top_p < 1.0


@dataclasses.dataclass(frozen=True)
class Stops:
  """The ids that end a response."""

  always: tuple[int, ...]  # wherever they stand
  late: tuple[int, ...] = ()  # from column `at_or_after` on
  at_or_after: int = 0

  def end(self, tokens: jax.Array | int, column: jax.Array | int) -> jax.Array | bool:
    """Whether each of `tokens`, drawn as response column `column`, is the last of its response."""
    among = lambda ids: functools.reduce(operator.or_, (tokens == i for i in ids), False)
    return among(self.always) | (among(self.late) & (column >= self.at_or_after))


def find_stops(config: SamplingConfig, tokenizer: Tokenizer) -> Stops:
  """EOS, and every token that reads like one of the texts that `config` adds to it.

  Raises:
    UserError: no token reads like one of them.
  """
  always = (tokenizer.eos_id,)
  if config.stop is None:
    return Stops(always)
  texts = [tokenizer.decode([i], skip_special=False) for i in range(tokenizer.vocab_size)]
  missing = [text for text in config.stop.tokens if text not in texts]
  if missing:
    raise UserError(
      f"config stop.tokens: no token of this vocabulary reads {missing[0]!r}; name texts that are "
      "one token each."
    )
  late = tuple(i for i, text in enumerate(texts) if text in config.stop.tokens)
  return Stops(always, late, config.stop.at_or_after)


def truncate(logits: jax.Array, config: SamplingConfig) -> jax.Array:
  """Logits [B, V] of the sampling distribution, temperature > 0; removed tokens are -inf."""
  logits = logits / config.temperature
  if 0 < config.top_k < logits.shape[-1]:
    smallest_kept = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
    logits = jnp.where(logits >= smallest_kept, logits, -jnp.inf)
  return nucleus(logits, config.top_p) if config.top_p < 1.0 else logits


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """Logits [B, V] with all outside the nucleus removed; `top_p` is a number or [B, 1]."""
  order = jnp.argsort(logits, axis=-1, descending=True)
  ordered = jnp.take_along_axis(logits, order, axis=-1)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # The smallest set whose mass reaches top_p: a token stays if those before it fall short.
  kept = jnp.where(mass_before < top_p, ordered, -jnp.inf)
  return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def _split_by_rows(sampler: Callable) -> Callable:
  """A sampler of logits [B, V] for which devices that share a vocabulary split the rows instead.

  They exchange the logits once, where each step of a draw from a split row would be an exchange,
  and what was drawn once.
  """

  @functools.wraps(sampler)
  def sample(logits: jax.Array, *how):
    tokens, logprobs = sampler(constrain(logits, "drawn from"), *how)
    both = jnp.stack([tokens, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=1)
    tokens, logprobs = constrain(both, "rows").T
    return tokens, jax.lax.bitcast_convert_type(logprobs, jnp.float32)

  return sample


@_split_by_rows
def sample(logits: jax.Array, uniforms: jax.Array, config: SamplingConfig):
  """Draws one token a row from logits [B, V]; returns ids [B] and their log-probabilities [B].

  Chance comes in as `uniforms` [B, 2], in [0, 1).
  """
  if config.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1)
    return tokens.astype(jnp.int32), jnp.zeros(tokens.shape, jnp.float32)
  return _sample(truncate(logits, config), uniforms)


@flax.struct.dataclass
class Draws:
  """How each row is drawn, as data: one compiled function serves all."""

  temperature: jax.Array  # [B] float32, 0 is greedy
  top_p: jax.Array  # [B] float32, 1 keeps all


@_split_by_rows
def sample_each(logits: jax.Array, uniforms: jax.Array, draws: Draws):
  """`sample`, where every row has a temperature and a nucleus of its own."""
  greedy, cuts = draws.temperature == 0, draws.top_p < 1.0
  scaled = logits / jnp.where(greedy, 1.0, draws.temperature)[:, None]
  cut = lambda: jnp.where(cuts[:, None], nucleus(scaled, draws.top_p[:, None]), scaled)
  tokens, logprobs = _sample(jax.lax.cond(jnp.any(cuts), cut, lambda: scaled), uniforms)
  likeliest = lambda: jnp.where(greedy, jnp.argmax(logits, axis=-1).astype(jnp.int32), tokens)
  tokens = jax.lax.cond(jnp.any(greedy), likeliest, lambda: tokens)
  return tokens, jnp.where(greedy, 0.0, logprobs)


def _sample(logits: jax.Array, uniforms: jax.Array):
  """Ids [B] drawn in proportion to exp(logits), and their log-probabilities [B]."""
  peak = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - peak)
  tokens = draw(weights, uniforms)
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens, chosen - peak[:, 0] - jnp.log(jnp.sum(weights, axis=-1))


def draw(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
  """Inverse-CDF sampling in two levels: first a block of the vocabulary, then within it.

  weights [B, V], at least 0 and unnormalised; uniforms [B, 2] in [0, 1). Returns int32 ids [B],
  exactly distributed as the weights. Two draws of about sqrt(V) terms cost far less than the V
  Gumbels of the usual categorical.
  """
  B, V = weights.shape
  block = max(1, math.isqrt(V))
  blocks = -(-V // block)
  grid = jnp.pad(weights, ((0, 0), (0, blocks * block - V))).reshape(B, blocks, block)
  outer = _invert(jnp.sum(grid, axis=2), uniforms[:, 0])
  inner = jnp.take_along_axis(grid, outer[:, None, None], axis=1)[:, 0]
  return (outer * block + _invert(inner, uniforms[:, 1])).astype(jnp.int32)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """First index of positive weight at which the running sum exceeds uniform x total.

  XLA adds long prefix sums up in a tree, so rounding can move the running sum where the weight is
  0; such places are passed over, and the total is the largest sum at any other. float32 uniforms
  are at most 1 - 2^-23, so the target lies below the total and the index exists.
  """
  running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
  target = uniform[:, None] * jnp.max(running, axis=-1, keepdims=True)
  return jnp.argmax(running > target, axis=-1)
