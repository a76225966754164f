"""One answer token by token, for whoever is reading along.

`decode.generate` is one compiled loop, which speaks when all is done. Here prefill and a step of
one token are compiled apart, with the key-value cache as argument and result, so that each token
can be shown when it is drawn. Both sample alike: step t draws with fold_in(key, t), and the same
key gives the same tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.generation import sampling
from rlhf_jax.networks import heads
from rlhf_jax.networks.cache import KVCache
from rlhf_jax.types import Params

SMALLEST_BUCKET = 32  # tokens
REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are no whole character (yet)


@flax.struct.dataclass
class StreamState:
  """What one token hands to the next."""

  step: jax.Array  # [] int32, tokens drawn so far
  token: jax.Array  # [1] int32, the last of them
  position: jax.Array  # [] int32, its place in the document
  cache: KVCache  # of all before it


@dataclasses.dataclass(frozen=True)
class Streamer:
  """A policy that answers one prompt at a time."""

  policy: heads.Policy
  sampling: sampling.SamplingConfig
  stops: sampling.Stops
  pad_id: int

  @functools.cached_property
  def _prefill(self) -> Callable:
    return jax.jit(functools.partial(prefill, self.policy, config=self.sampling))

  @functools.cached_property
  def _step(self) -> Callable:
    step = functools.partial(next_token, self.policy, config=self.sampling)
    return jax.jit(step, donate_argnums=1)  # the cache is written in place

  def ids(self, params: Params, prompt: Sequence[int], key: jax.Array) -> Iterator[int]:
    """The ids of an answer as they are drawn, up to and including a stop token.

    The prompt is padded on the left to a power of two, so that a dialogue compiles anew only when
    it has doubled.
    """
    width = bucket(len(prompt))
    tokens, mask = np.full((1, width), self.pad_id, np.int32), np.zeros((1, width), np.float32)
    tokens[0, width - len(prompt) :], mask[0, width - len(prompt) :] = prompt, 1.0
    state = self._prefill(params, tokens, mask, key)
    while True:
      token = int(state.token[0])
      yield token
      drawn = int(state.step)
      if drawn == self.sampling.max_new_tokens or self.stops.end(token, drawn - 1):
        return
      state = self._step(params, state, key)


def bucket(length: int) -> int:
  """The width that a prompt is padded to: a power of two, at least SMALLEST_BUCKET."""
  return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def prefill(
  policy: heads.Policy,
  params: Params,
  tokens: jax.Array,
  mask: jax.Array,
  key: jax.Array,
  *,
  config: sampling.SamplingConfig,
) -> StreamState:
  """Reads a left-padded prompt, tokens and mask [1, P], and draws the first token."""
  positions, segments = heads.layout(mask)
  cache = KVCache.empty(policy.config, 1, tokens.shape[1] + config.max_new_tokens)
  P = tokens.shape[1]
  hidden, cache = policy.apply(
    {"params": params}, tokens, positions, segments, cache, columns=(P - 1, P), method="hidden"
  )
  blank = StreamState(jnp.int32(0), jnp.zeros((1,), jnp.int32), positions[0, -1], cache)
  return _draw(policy, params, hidden, blank, key, config)


def next_token(
  policy: heads.Policy,
  params: Params,
  state: StreamState,
  key: jax.Array,
  *,
  config: sampling.SamplingConfig,
) -> StreamState:
  """Reads the last token and draws the one after it."""
  position = state.position[None, None]
  hidden, cache = policy.apply(
    {"params": params},
    state.token[:, None],
    position,
    jnp.ones_like(position),
    state.cache,
    method="hidden",
  )
  return _draw(policy, params, hidden, state.replace(cache=cache), key, config)


def _draw(policy, params, hidden, state: StreamState, key, config) -> StreamState:
  """Draws from the hidden states' last column, [1, T, D]."""
  logits = policy.apply({"params": params}, hidden[:, -1], method="logits")
  uniforms = jax.random.uniform(jax.random.fold_in(key, state.step), (1, 2))
  token, _ = sampling.sample(logits, uniforms, config)
  return state.replace(step=state.step + 1, token=token, position=state.position + 1)


def pieces(ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
  """The text of `ids` in pieces, each as soon as it is certain; joined, they are `decode(ids)`.

  A token of a byte-level tokenizer may hold a part of a character, which decodes to U+FFFD. Such an
  end is held back until the rest of the character has come, or no more can.
  """
  seen, shown = [], ""
  for token in ids:
    seen.append(token)
    text = decode(seen).rstrip(REPLACEMENT)
    if len(text) > len(shown):
      yield text[len(shown) :]
      shown = text
  rest = decode(seen).removeprefix(shown)
  if rest:
    yield rest
