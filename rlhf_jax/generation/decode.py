"""Decoding as one compiled function: prefill, then a while_loop with a key-value cache."""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.generation import sampling
from rlhf_jax.networks import heads
from rlhf_jax.networks.transformer import KVCache
from rlhf_jax.types import Params, PromptBatch

# Columns from one look at whether all rows have ended to the next: devices meet to look.
LOOK_EVERY = 8


@flax.struct.dataclass
class Completion:
  """B sampled responses. After the first stop token everything is pad, mask 0, logprob 0."""

  tokens: jax.Array  # [B, R] int32 ids
  mask: jax.Array  # [B, R] float32, 1 up to and including the stop token
  logprobs: jax.Array  # [B, R] float32 nats, of the distribution sampled from (`sampling.py`)
  finished: jax.Array  # [B] float32, 1 where a stop token was drawn


@flax.struct.dataclass
class DecodeState:
  """What one step of the loop hands to the next."""

  step: jax.Array  # [] int32, responses hold this many columns
  is_open: jax.Array  # [] bool, whether a row was unfinished when last looked at
  cache: KVCache  # of the prompt and all response columns but the last
  completion: Completion


def generate(
  policy: heads.Policy,
  params: Params,
  prompts: PromptBatch,
  key: jax.Array,
  *,
  config: sampling.SamplingConfig,
  stops: sampling.Stops,
  pad_id: int,
  samples: int = 1,
) -> Completion:
  """Samples `samples` responses to each prompt; pure and jittable, no token returns to Python.

  Response k to prompt b is row b * samples + k; each prompt is read once. The loop ends early when
  every row has been ended by one of `stops`, up to `LOOK_EVERY` - 1 columns later. Step t draws
  with fold_in(key, t), so rows do not depend on the mesh, nor on when their neighbours end.
  """
  chex.assert_equal_shape([prompts.tokens, prompts.mask])
  B, P = prompts.tokens.shape
  R, rows = config.max_new_tokens, B * samples
  positions, segments = heads.layout(prompts.mask)
  run = lambda *inputs: policy.apply({"params": params}, *inputs, method="hidden")
  head = lambda hidden: policy.apply({"params": params}, hidden, method="logits")
  hidden, cache = run(prompts.tokens, positions, segments, KVCache.empty(policy.config, B, P + R))
  last_hidden, cache = jnp.repeat(hidden[:, -1], samples, axis=0), cache.repeat(samples)
  prompt_lengths = jnp.repeat(jnp.sum(segments, axis=1), samples)

  def extend(state: DecodeState, hidden: jax.Array, cache: KVCache) -> DecodeState:
    """Draws column `state.step` from the hidden state [B, D] of the column before."""
    draw_key = jax.random.fold_in(key, state.step)
    tokens, logprobs = sampling.sample(head(hidden), draw_key, config)
    completion = _append(state.completion, state.step, tokens, logprobs, stops, pad_id)
    look = lambda: ~jnp.all(completion.finished > 0)
    is_open = jax.lax.cond(state.step % LOOK_EVERY == 0, look, lambda: state.is_open)
    return DecodeState(state.step + 1, is_open, cache, completion)

  def unfinished(state: DecodeState) -> jax.Array:
    return (state.step < R) & state.is_open

  def body(state: DecodeState) -> DecodeState:
    last = jax.lax.dynamic_slice_in_dim(state.completion.tokens, state.step - 1, 1, axis=1)
    position = (prompt_lengths + state.step - 1)[:, None]
    hidden, cache = run(last, position, jnp.ones_like(position), state.cache)
    return extend(state, hidden[:, 0], cache)

  blank = Completion(
    tokens=jnp.full((rows, R), pad_id, jnp.int32),
    mask=jnp.zeros((rows, R), jnp.float32),
    logprobs=jnp.zeros((rows, R), jnp.float32),
    finished=jnp.zeros((rows,), jnp.float32),
  )
  start = DecodeState(jnp.int32(0), jnp.bool_(True), cache, blank)
  state = extend(start, last_hidden, cache)
  return jax.lax.while_loop(unfinished, body, state).completion


def _append(completion, step, tokens, logprobs, stops, pad_id) -> Completion:
  """Writes column `step` of rows that are still open, and closes those that drew a stop token."""
  is_open = completion.finished == 0
  ends = stops.end(tokens, step)
  put = lambda array, column: array.at[:, step].set(column)
  return Completion(
    tokens=put(completion.tokens, jnp.where(is_open, tokens, pad_id)),
    mask=put(completion.mask, is_open.astype(jnp.float32)),
    logprobs=put(completion.logprobs, jnp.where(is_open, logprobs, 0.0)),
    finished=jnp.where(is_open, ends.astype(jnp.float32), completion.finished),
  )
