"""Whole iterations of PPO: episodes a second, and the seconds of its three phases.

  python benchmarks/ppo.py --model=tiny [--minibatches=4]

64 episodes of 32 + 64 tokens without EOS, 4 epochs, policy and critic trained, reference and reward
model of the same size, the numbers of TRL's PPOConfig. An iteration is what `phases.train_policy`
does for a step: generate, score, and one compiled update of all epochs and minibatches.
"""

import common

if __name__ == "__main__":
  common.prepare()

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import ppo, ppo_config, rollout
from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import SamplingConfig, Stops
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import PromptBatch

EOS = 2
PHASES = ("generation", "scoring", "update")


def main():
  given = common.arguments(
    __doc__,
    minibatches=(4, "optimiser steps an epoch"),
    episodes=(64, "rows of an iteration"),
    prompt=(32, "tokens"),
    response=(64, "tokens"),
    learning_rate=(1e-5, "of AdamW"),
    kl_coef=(0.05, "of the KL penalty"),
    seed=(0, "of prompts and sampling"),
    remat=(False, "blocks are computed again in the backward pass"),
    scan=(False, "one compiled layer"),
    micro_batches=(1, "parts that a minibatch goes through the networks in"),
    attention=common.ATTENTION,
    turns=common.TURNS,
  )
  networks = common.networks_of(given)
  config = numbers(given)
  iterate, state = iteration(networks, config, given.seed)
  marks = {}
  began = common.timed(lambda: marks.update(state=iterate(state)[0]))
  seconds = {phase: [] for phase in PHASES}
  scores = []

  def call():
    marks["state"], split, metrics = iterate(marks["state"])
    scores.append(float(metrics["objective/scores"]))
    for phase in PHASES:
      seconds[phase].append(split[phase])

  done = common.repeat(call, given.repeats)
  found = common.rates(done, given.episodes, "episodes/s")
  limits = common.limits()
  bounds = bound(networks.policy.config, given, config.epochs, limits)
  found["breakdown_seconds"] = {phase: common.spread(seconds[phase]) for phase in PHASES}
  found["bound_seconds"] = bounds
  found["share"] = found["rate"]["median"] * sum(bounds.values()) / given.episodes
  sys.stderr.write(
    f"{given.model} PPO: {found['rate']['median']:.2f} episodes/s, {found['share']:.0%} of the "
    f"bound; first iteration {began.seconds:.1f} s\n"
  )
  about = {"kind": "ppo", "peer": "rlhf_jax", "model": given.model, "dtype": given.dtype}
  about |= {"minibatches": given.minibatches, "episodes": given.episodes}
  about |= {"micro_batches": given.micro_batches, "attention": given.attention}
  about |= {"cold_seconds": began.seconds, "scores": scores, "limits": limits}
  common.report(given.out, about | found)


def numbers(given) -> ppo_config.PPOConfig:
  """TRL's numbers at the sizes of the workload."""
  sampling = SamplingConfig(
    given.response, temperature=1.0, top_k=0, top_p=1.0, stop=None, compact_to=(), cache_sizes=4
  )
  return ppo_config.PPOConfig(
    num_steps=1_000_000,
    epochs=4,
    minibatches=given.minibatches,
    micro_batches=given.micro_batches,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    value_cliprange=0.2,
    vf_coef=0.1,
    whiten_rewards=False,
    missing_eos="keep",
    missing_eos_penalty=0.0,
    ema_decay=0.0,
    kl=ppo_config.KLConfig(given.kl_coef, target=None, horizon=1.0),
    ptx=ppo_config.PTXConfig(0.0, 0.0, 1),
    rollout=rollout.RolloutConfig(given.episodes, 1, given.prompt, sampling),
    eval_every=1,
    frozen=(),
    rules=(),
    offload=(),
    policy_optim=common.adamw(given.learning_rate),
    value_optim=common.adamw(given.learning_rate),
  )


def iteration(networks, config, seed=0):
  """`state -> (state, seconds of each phase, metrics)`, and the first state."""
  B, P = config.rollout.batch_size, config.rollout.prompt_length
  mesh = common.mesh_of(common.devices_for(B // config.minibatches // config.micro_batches))
  learner = ppo.make_learner(networks.policy, networks.scalar, config, stem_blocks=0)
  own = functools.partial(jax.tree.map, jnp.copy)
  state = ppo.init(
    learner, own(networks.policy_params), own(networks.reward_params), jax.random.key(seed)
  )
  judges = rollout.Judges(networks.policy_params, networks.reward_params)
  state, judges = rules.place((state, judges), mesh)
  generate = decode.compiled(
    networks.policy,
    mesh,
    B,
    config=config.rollout.sampling,
    stops=Stops((common.NEVER,)),
    pad_id=0,
  )
  how = rollout.Scoring(networks.policy, networks.scalar, 1.0, EOS)
  score = mesh_lib.jit(functools.partial(rollout.score, how), mesh)
  update = rules.compile_step(functools.partial(ppo.update, learner=learner), state, mesh)
  draw, V = np.random.default_rng(seed), networks.policy.config.vocab_size

  def iterate(state):
    ids = draw.integers(common.FIRST_ID, V, (B, P), np.int32)
    prompts = mesh_lib.put_batch(mesh, PromptBatch(ids, np.ones((B, P), np.float32)))
    found = {}

    def generation():
      key = ppo.keys(state)[0]
      found["completion"] = jax.block_until_ready(generate(state.policy, prompts, key))

    def scoring():
      seen = score(judges, state.critic, prompts, found["completion"])
      found["seen"] = jax.block_until_ready(seen)

    def updating():
      found["state"], found["metrics"] = update(state, ({}, {}), found["seen"], None)
      jax.block_until_ready(found["metrics"])

    works = zip(PHASES, (generation, scoring, updating))
    split = {phase: common.timed(work).seconds for phase, work in works}
    return found["state"], split, found["metrics"]

  return iterate, state


def bound(config, given, epochs, limits) -> dict[str, float]:
  """Seconds of each phase if matrix products, or reads of weights, were all there is."""
  from generate import bound as generation_bound

  B, P, R = given.episodes, given.prompt, given.response
  with_head = common.forward_flops(config, B, P + R, R)
  without = common.forward_flops(config, B, P + R, 0)
  return {
    "generation": B * R / generation_bound(config, B, P, R, limits),
    "scoring": (with_head + 2 * without) / limits["flops"],
    "update": 3 * epochs * (with_head + without) / limits["flops"],
  }


if __name__ == "__main__":
  main()
