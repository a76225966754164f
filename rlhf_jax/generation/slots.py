"""Continuous batching: answers come and go while one compiled step decodes all that are there.

S slots stand side by side in one key-value cache. `admit` reads new prompts into free slots and
draws their first tokens; `advance` draws a few more columns for every slot; a slot whose answer has
ended is free at once. Nothing is compiled anew while this goes on: prompts come in a few widths and
groups, and how an answer is drawn is data.

The cache of a slot is [P prompt columns | R response columns]. All slots write the same column at a
step, so it is written in place; the response columns are a ring, and as an answer has at most R
tokens, its own are never overwritten. Segments say which columns a slot may see, and rotary
positions are in the keys already, so where in the ring an answer began makes no difference.

A slot draws token t with fold_in(its key, t), as `stream.Streamer` does: the same key, prompt and
settings give the same answer, whoever else is being answered.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.generation import sampling
from rlhf_jax.generation.stream import bucket
from rlhf_jax.networks import heads, panels
from rlhf_jax.networks.cache import KVCache
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import Params, UserError

Variables = dict  # of a network, as flax has them: collections of arrays


@flax.struct.dataclass
class SlotState:
  """What S slots hand from one call to the next."""

  cache: KVCache  # of P + R columns; its index is the one written next
  keys: jax.Array  # [S] PRNG keys
  draws: sampling.Draws  # of S rows
  tokens: jax.Array  # [S] int32, the last drawn
  positions: jax.Array  # [S] int32, their place in the document
  drawn: jax.Array  # [S] int32, tokens of the answer so far


@flax.struct.dataclass
class Arrivals:
  """n prompts on their way into slots."""

  tokens: jax.Array  # [n, W] int32, left-padded
  mask: jax.Array  # [n, W] int32, 1 on real tokens
  slots: jax.Array  # [n] int32; S means nowhere
  keys: jax.Array  # [n] PRNG keys
  draws: sampling.Draws  # of n rows


@flax.struct.dataclass
class Drawn:
  """Tokens and their log-probabilities (nats) under the distribution drawn from."""

  tokens: jax.Array  # int32
  logprobs: jax.Array  # float32


@dataclasses.dataclass(frozen=True)
class Admission:
  """One prompt that goes into a slot."""

  slot: int
  prompt: Sequence[int]  # ids, at most P
  seed: int
  temperature: float  # 0 is greedy
  top_p: float  # 1 keeps all


@dataclasses.dataclass(frozen=True)
class SlotDecoder:
  """The compiled functions of S slots."""

  policy: heads.Policy
  mesh: Mesh
  slots: int  # S
  prompt_length: int  # P, the longest prompt
  max_new_tokens: int  # R, the longest answer
  columns: int  # that one `advance` draws
  group: int  # prompts that one `admit` reads at most
  pad_id: int

  def __post_init__(self):
    mesh_lib.check_batch(self.mesh, self.slots, "slots")

  @functools.cached_property
  def _admit(self) -> Callable:
    return self._compiled(mesh_lib.bind(admit, self.policy, P=self.prompt_length))

  @functools.cached_property
  def _advance(self) -> Callable:
    function = mesh_lib.bind(advance, self.policy, P=self.prompt_length, columns=self.columns)
    options = self.policy.config.compute.compiler_options(self.slots, self.mesh)
    return self._compiled(function, compiler_options=options)

  def variables(self, params: Params) -> Variables:
    """What the functions below read the network from: `params`, on the mesh, made ready."""

    def ready(params: Params) -> Variables:
      few = self.policy.config.compute.in_panels(self.slots)
      return panels.of(self.policy, params) if few else {}

    return {"params": params} | mesh_lib.jit(ready, self.mesh)(params)

  def _compiled(self, function: Callable, **options) -> Callable:
    """A function `(variables, state, ...) -> (state, drawn)`; the state is written in place."""
    layouts = (layout(jax.eval_shape(self._blank), self.mesh), mesh_lib.replicated(self.mesh))
    return mesh_lib.jit(function, self.mesh, donate_argnums=1, out_shardings=layouts, **options)

  def widths(self) -> list[int]:
    """The widths that prompts are padded to: powers of two, and P itself."""
    return sorted({min(bucket(n), self.prompt_length) for n in range(1, self.prompt_length + 1)})

  def counts(self) -> list[int]:
    """The numbers of prompts read at once, free rows filled up: one, a quarter of a group, all."""
    return sorted({1, -(-self.group // 4), self.group})

  def come_next(self, waiting: int) -> int:
    """How many of the prompts that wait, at least 1, the next `admit` best reads."""
    counts = self.counts()
    rows = next((count for count in counts if count >= waiting), self.group)
    # Two thirds of the rows free cost what a call more does.
    return min(waiting, rows) if 3 * waiting >= rows else max(c for c in counts if c < rows)

  def empty(self) -> SlotState:
    """Slots in which nobody is answered, on the mesh."""
    return self._empty()

  @functools.cached_property
  def _empty(self) -> Callable:
    layouts = layout(jax.eval_shape(self._blank), self.mesh)
    return mesh_lib.jit(self._blank, self.mesh, out_shardings=layouts)

  def _blank(self) -> SlotState:
    S, P = self.slots, self.prompt_length
    cache = KVCache.empty(self.policy.config, S, P + self.max_new_tokens)
    zeros = jnp.zeros((S,), jnp.int32)
    return SlotState(
      cache=cache.replace(index=jnp.int32(P)),
      keys=jax.random.split(jax.random.key(0), S),
      draws=sampling.Draws(jnp.ones((S,)), jnp.ones((S,))),
      tokens=zeros,
      positions=zeros,
      drawn=zeros,
    )

  def warm_up(self, variables: Variables) -> None:
    """Compiles all that `admit` and `advance` may need."""
    state = self.empty()
    for width in self.widths():
      for count in self.counts():
        filler = Admission(0, [self.pad_id] * width, 0, 1.0, 1.0)
        state, _ = self.admit(variables, state, [filler] * count)
    jax.block_until_ready(self.advance(variables, state))

  def admit(
    self, variables: Variables, state: SlotState, prompts: Sequence[Admission]
  ) -> tuple[SlotState, Drawn]:
    """Reads up to `group` prompts into their slots; returns the first token of each, [n].

    Raises:
      UserError: there are more than `group`, or a prompt is empty or longer than P.
    """
    lengths = [len(one.prompt) for one in prompts]
    fits = all(1 <= length <= self.prompt_length for length in lengths)
    if not 1 <= len(prompts) <= self.group or not fits:
      raise UserError(
        f"slots read 1 to {self.group} prompts at a time, of 1 to {self.prompt_length} tokens; got "
        f"{len(prompts)}, of {lengths} tokens."
      )
    rows = next(count for count in self.counts() if count >= len(prompts))
    width = min(bucket(max(lengths)), self.prompt_length)
    tokens, mask = np.full((rows, width), self.pad_id, np.int32), np.zeros((rows, width), np.int32)
    for i, one in enumerate(prompts):
      tokens[i, width - lengths[i] :], mask[i, width - lengths[i] :] = one.prompt, 1
    nowhere = Admission(self.slots, (), 0, 1.0, 1.0)
    filled = [*prompts, *[nowhere] * (rows - len(prompts))]
    column = lambda name, dtype: np.array([getattr(one, name) for one in filled], dtype)
    draws = sampling.Draws(column("temperature", np.float32), column("top_p", np.float32))
    keys = jax.vmap(jax.random.key)(column("seed", np.uint32))
    arrivals = Arrivals(tokens, mask, column("slot", np.int32), keys, draws)
    splits = rows % mesh_lib.batch_devices(self.mesh) == 0
    place = mesh_lib.put_batch if splits else mesh_lib.put_replicated
    state, first = self._admit(variables, state, place(self.mesh, arrivals))
    return state, jax.tree.map(lambda x: np.asarray(x)[: len(prompts)], first)

  def advance(self, variables: Variables, state: SlotState) -> tuple[SlotState, Drawn]:
    """Draws `columns` more tokens in every slot, [S, columns]; those of free slots mean nothing."""
    return self._advance(variables, state)


def layout(state: SlotState, mesh: Mesh) -> SlotState:
  """Where the arrays of a state lie: slots over the batch axes, heads over `tensor`."""

  def place(x) -> NamedSharding:
    if x.ndim < 3:
      return NamedSharding(mesh, PartitionSpec(*mesh_lib.BATCH[: x.ndim]))
    heads_axis = "tensor" if x.shape[-3] % mesh.shape["tensor"] == 0 else None
    slots = () if x.ndim == 3 else (*(None,) * (x.ndim - 4), *mesh_lib.BATCH)  # one has no axis
    return NamedSharding(mesh, PartitionSpec(*slots, heads_axis))

  return jax.tree.map(place, state)


def admit(
  policy: heads.Policy, variables: Variables, state: SlotState, arrivals: Arrivals, *, P: int
) -> tuple[SlotState, Drawn]:
  """Reads n prompts, puts them into their slots and draws their first tokens, [n]."""
  n, W = arrivals.tokens.shape
  positions, segments = heads.layout(arrivals.mask)
  blank = KVCache.empty(policy.config, n, W)
  hidden, read = policy.apply(
    {"params": variables["params"]},  # many rows
    arrivals.tokens,
    positions,
    segments,
    blank,
    columns=(W - 1, W),
    method="hidden",
  )
  first = jnp.zeros((n,), jnp.int32)
  uniforms = _chance(arrivals.keys, first)
  drawn = _draw(policy, variables, hidden[:, 0], uniforms, arrivals.draws)
  # Each device reads some of the prompts, and any of them may go into any slot.
  arrivals, read, segments, drawn = rules.replicate((arrivals, read, segments, drawn))
  here = arrivals.slots
  put = lambda old, new: old.at[here].set(new, mode="drop")
  row = jnp.zeros((n, state.cache.segments.shape[1]), jnp.int32).at[:, P - W : P].set(segments)
  return SlotState(
    cache=state.cache.put(here, read, row, end=P),  # what stood there before is out of sight
    keys=put(state.keys, arrivals.keys),
    draws=jax.tree.map(put, state.draws, arrivals.draws),
    tokens=put(state.tokens, drawn.tokens),
    positions=put(state.positions, jnp.sum(segments, axis=1)),
    drawn=put(state.drawn, first + 1),
  ), drawn


def advance(
  policy: heads.Policy, variables: Variables, state: SlotState, *, P: int, columns: int
) -> tuple[SlotState, Drawn]:
  """Draws the next `columns` tokens of every slot, [S, columns]."""
  end = state.cache.segments.shape[1]

  def step(state: SlotState, uniforms: jax.Array) -> tuple[SlotState, Drawn]:
    position = state.positions[:, None]
    hidden, cache = policy.apply(
      variables,
      state.tokens[:, None],
      position,
      jnp.ones_like(position),
      state.cache,
      method="hidden",
    )
    # Who has had all R tokens has left, and must not make the others pay for a nucleus.
    top_p = jnp.where(state.drawn < end - P, state.draws.top_p, 1.0)
    draws = state.draws.replace(top_p=top_p)
    drawn = _draw(policy, variables, hidden[:, 0], uniforms, draws)
    return state.replace(
      cache=cache.replace(index=jnp.where(cache.index == end, P, cache.index)),
      tokens=drawn.tokens,
      positions=state.positions + 1,
      drawn=state.drawn + 1,
    ), drawn

  # All chance at once, as in `decode.generate`.
  steps = state.drawn[None, :] + jnp.arange(columns)[:, None]
  uniforms = jax.vmap(_chance, in_axes=(None, 0))(state.keys, steps)
  state, drawn = jax.lax.scan(step, state, uniforms)
  return state, jax.tree.map(jnp.transpose, drawn)


def _chance(keys: jax.Array, steps: jax.Array) -> jax.Array:
  """Uniforms [n, 2] of the tokens that rows draw next, each at its own step, [n]."""
  one = lambda key, step: jax.random.uniform(jax.random.fold_in(key, step), (2,))
  return jax.vmap(one)(keys, steps)


def _draw(policy, variables, hidden, uniforms, draws: sampling.Draws) -> Drawn:
  """One token a row from hidden states [n, D]."""
  logits = policy.apply(variables, hidden, method="logits")
  return Drawn(*sampling.sample_each(logits, uniforms, draws))
