"""The compiled programs of a run, on arrays that are shapes and nothing else."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax import ppo, reward, rollout, sft
from rlhf_jax.experiment import ExperimentConfig
from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.networks import heads
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.training import optim
from rlhf_jax.types import PromptBatch, RankingBatch, TokenBatch

KEY_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled function of a run, and what lies in memory while it works."""

  name: str
  compile: Callable[[], Any]  # to a `jax.stages.Compiled`; takes its time
  shapes: tuple  # its arguments, as shapes
  arguments: dict[str, int]  # bytes of its arguments on one device, by name
  beside: int  # bytes of what its phase keeps there and it does not take
  loops: int  # times that its loop of unknown length goes round at most


def of_run(config: ExperimentConfig, mesh: Mesh) -> list[Program]:
  """Every program of the hot path, in the order of the recipe."""
  return [supervised(config, mesh), ranked(config, mesh), *improved(config, mesh)]


def supervised(config: ExperimentConfig, mesh: Mesh) -> Program:
  """A step of supervised fine-tuning."""
  stage = config.sft
  policy = heads.Policy(config.model)
  trainable, frozen = optim.split(parameters(policy, mesh), stage.frozen)
  optimizer = optim.make(stage.optim, stage.num_steps)
  state = abstract(lambda params: sft.init(params, optimizer), mesh, trainable)
  step = functools.partial(
    sft.step, policy=policy, optimizer=optimizer, micro_batches=stage.micro_batches
  )
  step = rules.compile_step(step, state, mesh)
  batch = token_batch(mesh, (stage.batch_size, stage.sequence_length))
  return program("sft step", step, {"state": state, "batch": batch, "frozen": frozen})


def ranked(config: ExperimentConfig, mesh: Mesh) -> Program:
  """A step of the reward model."""
  stage = config.reward
  network = heads.ScalarNetwork(config.model)
  trainable, frozen = optim.split(parameters(network, mesh), stage.frozen)
  optimizer = optim.make(stage.optim, 1_000_000)  # the schedule's length changes no size
  state = abstract(lambda params: reward.init(params, optimizer), mesh, trainable)
  step = functools.partial(
    reward.step, network=network, optimizer=optimizer, micro_batches=stage.micro_batches
  )
  step = rules.compile_step(step, state, mesh)
  rows = on_batch(mesh, (stage.batch_size, stage.sequence_length), jnp.int32)
  answers = (stage.batch_size, stage.max_prompts, stage.max_responses)
  slots = on_batch(mesh, answers, jnp.int32)
  valid = on_batch(mesh, answers, jnp.float32)
  batch = RankingBatch(rows, rows, rows, rows, slots, slots, valid, slots)
  return program("reward step", step, {"state": state, "batch": batch, "frozen": frozen})


def improved(config: ExperimentConfig, mesh: Mesh) -> list[Program]:
  """Generation, scoring and update of PPO, with everything that PPO keeps in memory."""
  stage, sampling = config.ppo, config.ppo.rollout.sampling
  policy, scalar = heads.Policy(config.model), heads.ScalarNetwork(config.model)
  learner = ppo.make_learner(policy, scalar, stage, stem_blocks=0)
  of_policy, of_critic = parameters(policy, mesh), parameters(scalar, mesh)
  trainable, frozen = zip(*(optim.split(params, stage.frozen) for params in (of_policy, of_critic)))
  key, table = jax.eval_shape(lambda: jax.random.key(0)), rules.table(stage.rules)
  state = jax.eval_shape(functools.partial(ppo.init, learner), *trainable, key)
  judges = rollout.Judges(
    jax.eval_shape(functools.partial(rollout.in_compute_dtype, policy), of_policy),
    jax.eval_shape(functools.partial(rollout.in_compute_dtype, scalar), of_critic),
  )
  state, judges = (rules.abstract(tree, mesh, table) for tree in (state, judges))
  of_policy = optim.merge(state.policy, frozen[0])
  of_critic = optim.merge(state.critic, frozen[1])
  kept = {"state": state, "judges": judges, "frozen": frozen}
  away = {"judges": judges, "optimizers": (state.policy_opt, state.critic_opt)}
  away = {name: tree for name, tree in away.items() if name in stage.offload}

  prompts = on_batch(mesh, (stage.rollout.batch_size, stage.rollout.prompt_length), jnp.int32)
  prompts = PromptBatch(prompts, jax.tree.map(as_float, prompts))
  # The worst case: no row ends early, and the cache is large from the start.
  together = dataclasses.replace(sampling, compact_to=(), cache_sizes=1)
  place_key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=mesh_lib.replicated(mesh))
  arguments = {"policy": of_policy, "prompts": prompts, "key": place_key}
  generated = decode.compiled(
    policy, mesh, stage.rollout.batch_size, config=together, stops=Stops((0,)), pad_id=0
  )
  trips = sampling.max_new_tokens - 1
  rolled = program("ppo generate", generated, arguments, kept, ("policy",), away, trips)

  drawn = (stage.rollout.batch_size, sampling.max_new_tokens)
  ids, floats = on_batch(mesh, drawn, jnp.int32), on_batch(mesh, drawn, jnp.float32)
  finished = on_batch(mesh, drawn[:1], jnp.float32)
  completion = decode.Completion(ids, floats, floats, finished)
  how = rollout.Scoring(
    policy, scalar, sampling.temperature, eos_id=0, micro_batches=stage.rollout.micro_batches
  )
  score = functools.partial(rollout.score, how)
  arguments = {"judges": judges, "critic": of_critic, "prompts": prompts, "completion": completion}
  taken, idle = ("judges", "critic"), {name: x for name, x in away.items() if name != "judges"}
  scored = program("ppo score", mesh_lib.jit(score, mesh), arguments, kept, taken, idle)

  seen = jax.eval_shape(score, *arguments.values())
  seen = jax.tree.map(lambda x: on_batch(mesh, x.shape, x.dtype), seen)
  text = None
  if stage.ptx_rows:
    shape = (stage.updates, stage.ptx_rows, stage.ptx.sequence_length)
    text = token_batch(mesh, shape, axis=1)
  update = functools.partial(ppo.update, learner=learner)
  update = rules.compile_step(update, state, mesh, table)
  arguments = {"state": state, "frozen": frozen, "rollouts": seen, "text": text}
  idle = {name: x for name, x in away.items() if name != "optimizers"}
  updated = program("ppo update", update, arguments, kept, ("state", "frozen"), idle)
  return [rolled, scored, updated]


def program(
  name: str,
  function: Callable,
  arguments: dict[str, Any],
  kept: Any = None,
  taken: tuple[str, ...] = (),
  away: Any = None,
  loops: int = 1,
) -> Program:
  """A program by its arguments, of which those `taken` are among what its phase keeps anyway.

  What is `away` of that is in host memory meanwhile.
  """
  sizes = {name: bytes_of(tree) for name, tree in arguments.items()}
  beside = bytes_of(kept) - bytes_of(away) - sum(sizes[name] for name in taken)
  shapes = tuple(arguments.values())
  compile_it = lambda: function.lower(*shapes).compile()
  return Program(name, compile_it, shapes, sizes, beside, loops)


def parameters(network: Any, mesh: Mesh) -> Any:
  """The parameters of a network."""
  return rules.abstract(heads.shapes(network), mesh)


def abstract(function: Callable, mesh: Mesh, *arguments: Any) -> Any:
  """What `function` would return, laid out by the rules."""
  return rules.abstract(jax.eval_shape(function, *arguments), mesh)


def token_batch(mesh: Mesh, shape: tuple[int, ...], axis: int = 0) -> TokenBatch:
  """Rows of tokens; `axis` is the one that is split."""
  ids = on_batch(mesh, shape, jnp.int32, axis)
  return TokenBatch(ids, ids, ids, as_float(ids))


def on_batch(mesh: Mesh, shape: tuple[int, ...], dtype: Any, axis: int = 0) -> jax.ShapeDtypeStruct:
  """An array with one axis split over the batch axes of the mesh."""
  sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, *mesh_lib.BATCH))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def as_float(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """The same in float32."""
  return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)


def bytes_of(tree: Any) -> int:
  """Bytes of a tree's arrays on one device."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  itemsize = lambda x: KEY_BYTES if is_key(x) else jnp.dtype(x.dtype).itemsize
  piece = lambda x: x.sharding.shard_shape(x.shape)
  return sum(math.prod(piece(x)) * itemsize(x) for x in jax.tree.leaves(tree))
