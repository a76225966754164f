"""Decoding as one compiled function: prefill, then a while_loop with a key-value cache.

With several `config.cache_sizes` the cache is in parts, and loop follows loop, each reading one
part more. Where `config.compact_to` names smaller batches, rows that have ended are left behind
(`compact.py`), and there are as many loops for each of these. The tokens drawn are the same.
"""

import functools
import math
from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.generation import compact, sampling
from rlhf_jax.networks import heads, panels
from rlhf_jax.networks.cache import KVCache
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import Params, PromptBatch

# Columns from one look at whether all rows have ended to the next, where devices meet to look.
LOOK_EVERY = 4


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
  needed: jax.Array  # [] int32, the rows that the loop needed when last looked at; 0 ends it
  rows: jax.Array  # [shards, b / shards] int32, which of a device's rows each of the loop's is
  prompt_lengths: jax.Array  # [b] int32
  caches: tuple[KVCache, ...]  # of the prompt and the first response columns, then of the others
  completion: Completion  # of b rows


@flax.struct.dataclass
class Prefilled:
  """B prompts that have been read."""

  hidden: jax.Array  # [B, D] in the compute dtype, of their last tokens
  cache: KVCache  # of their P columns

  def constrain(self) -> "Prefilled":
    """Laid out by the rules, hidden states and segments in one exchange.

    For segments alone, which are there at once, devices would meet before they have read anything.
    """
    D, hidden, segments = self.hidden.shape[1], self.hidden, self.cache.segments
    both = jnp.concatenate([hidden.astype(jnp.float32), segments.astype(jnp.float32)], axis=1)
    both = rules.constrain(both, "rows")
    segments = both[:, D:].astype(segments.dtype)
    return Prefilled(
      both[:, :D].astype(hidden.dtype), self.cache.constrain().replace(segments=segments)
    )


def generate(
  policy: heads.Policy, params: Params, prompts: PromptBatch, key: jax.Array, **settings
) -> Completion:
  """Samples responses to prompts; pure and jittable, no token returns to Python.

  Each prompt is read once. `settings` are those of `complete`.
  """
  policy, params = heads.unrolled(policy, params)
  return complete(policy, params, prefill(policy, params, prompts), key, **settings)


def prefill(policy: heads.Policy, params: Params, prompts: PromptBatch) -> Prefilled:
  """Reads the prompts, all columns at once."""
  chex.assert_equal_shape([prompts.tokens, prompts.mask])
  B, P = prompts.tokens.shape
  positions, segments = heads.layout(prompts.mask)
  blank, last = KVCache.empty(policy.config, B, P), (P - 1, P)
  inputs = prompts.tokens, positions, segments, blank
  hidden, cache = policy.apply({"params": params}, *inputs, method="hidden", columns=last)
  return Prefilled(hidden[:, 0], cache).constrain()


def complete(
  policy: heads.Policy,
  params: Params,
  prefilled: Prefilled,
  key: jax.Array,
  *,
  config: sampling.SamplingConfig,
  stops: sampling.Stops,
  pad_id: int,
  samples: int = 1,
) -> Completion:
  """Samples `samples` responses to each prompt.

  Response k to prompt b is row b * samples + k. The loop ends early when every row has been ended
  by one of `stops`, up to `LOOK_EVERY` - 1 columns later. Step t draws with fold_in(key, t), so
  rows do not depend on when their neighbours end, nor on the mesh.
  """
  prefilled = prefilled.constrain()
  R, rows = config.max_new_tokens, len(prefilled.hidden) * samples
  shards = rules.row_shards(rows)
  sizes = compact.sizes(rows, config.compact_to, shards)
  variables = _by_rows(policy, params, sizes)
  uniforms, columns = _chance(key, R, rows), cache_columns(R, config.cache_sizes)
  each = functools.partial(jnp.repeat, repeats=samples, axis=0)

  def extend(state: DecodeState, hidden: jax.Array) -> DecodeState:
    """Draws column `state.step` from the hidden state [b, D] of the column before."""
    drawn = compact.take(uniforms[state.step], state.rows)
    logits = policy.apply(variables(hidden.shape[0]), hidden, method="logits")
    tokens, logprobs = sampling.sample(logits, drawn, config)
    completion = _append(state.completion, state.step, tokens, logprobs, stops, pad_id)
    completion = rules.constrain(completion, "rows")
    needed = _look(state, completion.finished, shards)
    return state.replace(step=state.step + 1, needed=needed, completion=completion)

  def body(part: int, state: DecodeState) -> DecodeState:
    """A step whose column is in cache `part`; those after it hold nothing yet."""
    *before, cache = state.caches[: part + 1]
    last = jax.lax.dynamic_slice_in_dim(state.completion.tokens, state.step - 1, 1, axis=1)
    position = (state.prompt_lengths + state.step - 1)[:, None]
    inputs = last, position, jnp.ones_like(position), cache.replace(before=tuple(before))
    hidden, cache = policy.apply(variables(len(last)), *inputs, method="hidden")
    caches = *before, cache.replace(before=()), *state.caches[part + 1 :]
    return extend(state.replace(caches=caches), hidden[:, 0])

  blank = _blank(rows, R, pad_id)
  start = DecodeState(
    step=jnp.int32(0),
    needed=jnp.int32(rows),
    rows=compact.every_row(rows, shards),
    prompt_lengths=each(jnp.sum(prefilled.cache.segments, axis=1)),
    caches=_in_parts(policy, prefilled.cache, columns, samples),
    completion=blank,
  )
  state = extend(start, each(prefilled.hidden))
  return _finish(state, blank, body, columns, sizes[1:])


def compiled(
  policy: heads.Policy, mesh: Mesh, prompts: int, *, samples: int = 1, **settings
) -> Callable[[Params, PromptBatch, jax.Array], Completion]:
  """`generate` with these settings, compiled for a mesh and batches of so many prompts."""
  rows, config = prompts * samples, policy.config
  in_group = config.in_one_group(rows, mesh)
  with rules.one_group(in_group):
    options = config.compute.compiler_options(rows, mesh)
  function = generate_in_one_group if in_group else generate
  bound = mesh_lib.bind(function, policy, samples=samples, **settings)
  return mesh_lib.jit(bound, mesh, compiler_options=options)


def generate_in_one_group(
  policy: heads.Policy, params: Params, prompts: PromptBatch, key: jax.Array, **settings
) -> Completion:
  """`generate` by devices that have all parameters.

  Each reads its part of the prompts, then multiplies all rows with its part of the kernels.
  """
  policy, params = heads.unrolled(policy, params)
  prefilled = prefill(policy, params, prompts)
  with rules.one_group():
    completion = complete(policy, params, prefilled, key, **settings)
  return rules.constrain(completion, "rows")


def _by_rows(policy: heads.Policy, params: Params, sizes: tuple[int, ...]) -> Callable[[int], dict]:
  """What a step of so many rows, one of `sizes`, applies the policy to.

  Panels are made once, before all steps, and only where a size asks for them.
  """
  whole, few = {"params": params}, policy.config.compute.in_panels
  in_panels = whole | (panels.of(policy, params) if any(map(few, sizes)) else {})
  return lambda rows: in_panels if few(rows) else whole


def _chance(key: jax.Array, R: int, rows: int) -> jax.Array:
  """Uniforms [R, rows, 2], all at once: threefry is many small operations, too many for a step."""
  one = lambda step: jax.random.uniform(jax.random.fold_in(key, step), (rows, 2))
  return jax.vmap(one)(jnp.arange(R))


def cache_columns(R: int, sizes: int) -> tuple[int, ...]:
  """Response columns that the first caches have room for, one, two and so on; the last, all R."""
  return tuple(sorted({math.ceil(R * number / sizes) for number in range(1, sizes + 1)}))


def _in_parts(
  policy: heads.Policy, cache: KVCache, columns: tuple[int, ...], samples: int
) -> tuple[KVCache, ...]:
  """A cache of prompts, for responses: with room for their first columns, then of the others."""
  length, rows = cache.segments.shape[1] + columns[0], len(cache.segments) * samples
  widths = [larger - held for held, larger in zip(columns, columns[1:])]
  later = [KVCache.empty(policy.config, rows, width) for width in widths]
  return cache.grow(length).repeat(samples), *later


def _finish(
  state: DecodeState,
  done: Completion,
  body: Callable[[int, DecodeState], DecodeState],
  columns: tuple[int, ...],
  sizes: tuple[int, ...],
) -> Completion:
  """`done` with the rows of `state` written to their ends, in batches that shrink to `sizes`."""
  R, shards = done.tokens.shape[1], state.rows.shape[0]

  def run(state: DecodeState, done: Completion, fewest: int) -> tuple[DecodeState, Completion]:
    """To the end, or until no more than `fewest` rows are needed."""
    for part, held in enumerate(columns):
      # Step t writes the column of the token before it, t - 1.
      end = min(held + 1, R)
      more = lambda state, end=end: (state.step < end) & (state.needed > fewest)
      state = jax.lax.while_loop(more, functools.partial(body, part), state)
    put = lambda x, new: compact.put(x, state.rows, new)
    return state, jax.tree.map(put, done, state.completion)

  def go_on(
    state: DecodeState, done: Completion, size: int, fewest: int
  ) -> tuple[DecodeState, Completion]:
    """In a batch of `size` rows, if any row is still needed."""
    smaller = functools.partial(_shrink, size=size, shards=shards)
    rest = lambda: run(smaller(state), done, fewest)
    nothing = lambda: (_ended(state, jax.eval_shape(smaller, state)), done)
    return jax.lax.cond((state.step < R) & (state.needed > 0), rest, nothing)

  # Batch after batch, not each inside the one before: so the caches of two are held, not of all.
  state, done = run(state, done, max(sizes, default=0))
  for size, fewest in zip(sizes, (*sizes[1:], 0)):
    state, done = go_on(state, done, size, fewest)
  return done


def _ended(state: DecodeState, like: DecodeState) -> DecodeState:
  """A batch of `like`'s shapes in which nothing is left to do; it holds zeros."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  return zeros.replace(step=state.step)


def _shrink(state: DecodeState, size: int, shards: int) -> DecodeState:
  """The state with `size` rows, those that are open among them."""
  kept = rules.constrain(compact.still_open(state.completion.finished, size, shards), "rows")
  take = lambda x: rules.constrain(compact.take(x, kept), "rows")
  own = rules.constrain(jnp.take_along_axis(state.rows, kept, axis=1), "rows")
  return state.replace(
    rows=own,
    prompt_lengths=take(state.prompt_lengths),
    caches=tuple(
      cache.select(lambda x, axis: compact.take(x, kept, axis)) for cache in state.caches
    ),
    completion=jax.tree.map(take, state.completion),
  )


def _blank(rows: int, R: int, pad_id: int) -> Completion:
  """Responses of which nothing is drawn."""
  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  tokens = jnp.full((rows, R), pad_id, jnp.int32)
  return Completion(tokens, mask=zeros(rows, R), logprobs=zeros(rows, R), finished=zeros(rows))


def _look(state: DecodeState, finished: jax.Array, shards: int) -> jax.Array:
  """The rows that the loop needs: by now if it is time to look, else when last looked at."""
  every = 1 if shards == 1 else LOOK_EVERY
  look = lambda: compact.needed(finished, shards)
  return jax.lax.cond(state.step % every == 0, look, lambda: state.needed)


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
