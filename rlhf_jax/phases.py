"""The stages at work: each goes from records and parameters to parameters, in a folder of its own.

What is computed is in `sft.py`, `reward.py` and `ppo.py`; here each gets its data, its optimiser
and its place on the mesh, and is run to its end by `fit`, or on from where it was killed.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from rlhf_jax import feeds, masked, ppo, reward, rollout, sft
from rlhf_jax.data import batches, rows
from rlhf_jax.data.records import Comparison, Demonstration
from rlhf_jax.experiment import Run
from rlhf_jax.fit import Stage, fit
from rlhf_jax.generation.respond import Responder
from rlhf_jax.networks import heads
from rlhf_jax.parallel import hosts, rules
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.ppo_config import PPOConfig
from rlhf_jax.training import checkpoint, optim
from rlhf_jax.types import Metrics, Params, TokenBatch

CENTERING_DEMONSTRATIONS = 256  # at most so many set the reward model's zero


def supervise(run: Run, directory: pathlib.Path) -> Params:
  """Supervised fine-tuning; returns the policy with the lowest held-out loss, or by its judge."""
  config = run.config.sft
  judge = None if config.judge is None else scored_by(run, config.judge)
  trainable, frozen = optim.split(run.initial_policy(), config.frozen)
  optimizer = optim.make(config.optim, config.num_steps)
  state = rules.place(sft.init(trainable, optimizer), run.mesh)
  abstract = rules.abstract(state, run.mesh)
  step = mesh_lib.bind(
    sft.step, policy=run.policy, optimizer=optimizer, micro_batches=config.micro_batches
  )
  step = rules.compile_step(step, state, run.mesh)
  make_rows = functools.partial(feeds.demonstration_rows, run, config.sequence_length, pack=True)
  sources = run.data.mixture(Demonstration, "train", make_rows)
  sources += feeds.pretraining_sources(run, sources)
  unseen = run.data.records(Demonstration, "heldout")
  heldout = make_rows(feeds.draw(unseen, config.max_heldout, run.seed("sft", "heldout")))
  measure = feeds.summed(run, mesh_lib.bind(sft.evaluate, run.policy), heldout, config.batch_size)

  def evaluate(state: sft.SFTState) -> dict[str, float]:
    policy = optim.merge(state.params, frozen)
    sums = measure(policy)
    loss, accuracy = sums["nll"] / sums["tokens"], sums["correct"] / sums["tokens"]
    figures = {"sft/heldout_loss": loss, "sft/heldout_accuracy": accuracy, "score": -loss}
    if judge is not None:
      figures["sft/heldout_score"] = figures["score"] = judge(policy)
    return figures

  stage = Stage(
    name="sft",
    directory=directory,
    num_steps=config.num_steps,
    eval_every=config.eval_every,
    unit="tokens",
    per_step=config.batch_size * config.sequence_length,
    shown=("sft/loss", "sft/accuracy"),
    checkpoints=run.config.checkpoints,
    profile=run.config.profile,
  )
  stream = feeds.batch_stream(run, sources, config.batch_size)
  _, checkpoints = fit(stage, lambda s, b: step(s, b, frozen), state, stream, evaluate)
  best = checkpoints.restore(abstract, checkpoints.best_step())
  return optim.merge(best.state.params, frozen)


def scored_by(run: Run, folder: str) -> Callable[[Params], float]:
  """`policy -> mean score` of its answers to held-out prompts, by the reward model in `folder`.

  Raises:
    UserError: there is no reward model of the run's shapes in `folder`.
  """
  model, _ = checkpoint.load_params(folder, run.abstract(run.scalar))
  responder, sample = sampler(run, 0)
  some = [p.conversation for p in run.data.prompts("heldout") if responder.fits(p.conversation)]
  some = some[: run.config.sft.max_heldout]

  def score(policy: Params) -> float:
    judges, scores = rollout.Judges(policy, model), []
    for i, prompts in enumerate(responder.prompt_batches(some)):
      key = jax.random.fold_in(run.key("sft", "judge"), i)
      scores += sample(policy, model, judges, prompts, key).scores.tolist()
    return float(np.mean(scores[: len(some)]))

  return score


def fit_reward(
  run: Run,
  directory: pathlib.Path,
  config: reward.RewardConfig,
  trunk: Params,
  train: Sequence[Comparison],
  heldout: Sequence[Comparison],
) -> tuple[Params, dict[str, Any]]:
  """Fits a reward model on `trunk` to comparisons; returns it centred, with held-out figures."""
  make_rows = functools.partial(
    rows.ranking_rows,
    template=run.template,
    tokenizer=run.tokenizer,
    max_tokens=config.sequence_length,
    max_prompts=config.max_prompts,
    max_responses=config.max_responses,
    on_too_long=run.config.text.on_too_long,
    packing_seed=run.config.seed,
  )
  train = feeds.draw(train, config.max_train, run.seed("reward", "train"))
  heldout = feeds.draw(heldout, config.max_heldout, run.seed("reward", "heldout"))
  source = batches.Source("comparisons", make_rows(train), 1.0)
  num_steps = config.num_epochs * max(len(source.rows) // config.batch_size, 1)
  params = heads.scalar_from_trunk(run.scalar, trunk, run.key("reward head"))
  trainable, frozen = optim.split(rules.place(params, run.mesh), config.frozen)
  optimizer = optim.make(config.optim, num_steps)
  state = rules.place(reward.init(trainable, optimizer), run.mesh)
  step = mesh_lib.bind(
    reward.step, network=run.scalar, optimizer=optimizer, micro_batches=config.micro_batches
  )
  step = rules.compile_step(step, state, run.mesh)
  evaluate_batch = mesh_lib.bind(reward.evaluate, run.scalar)
  measure = feeds.summed(run, evaluate_batch, make_rows(heldout), config.batch_size)

  figures = {}

  def evaluate(state: reward.RewardState) -> dict[str, float]:
    figures.update(reward.summarize(measure(optim.merge(state.params, frozen))))
    return {f"reward/heldout_{name}": figures[name] for name in ("loss", "accuracy")}

  stage = Stage(
    name="reward",
    directory=directory,
    num_steps=num_steps,
    eval_every=config.eval_every,
    unit="prompts",
    per_step=config.batch_size * len(train) / max(len(source.rows), 1),
    shown=("reward/loss", "reward/accuracy"),
    checkpoints=run.config.checkpoints,
    profile=run.config.profile,
  )
  stream = feeds.batch_stream(run, [source], config.batch_size)
  state, _ = fit(stage, lambda s, b: step(s, b, frozen), state, stream, evaluate)
  params = optim.merge(state.params, frozen)
  if not figures:  # the stage was killed after its last step
    evaluate(state)
  return reward.center(params, demonstration_score(run, params, config)), figures


def demonstration_score(run: Run, params: Params, config: reward.RewardConfig) -> float:
  """The mean score of trainers' demonstrations, which becomes the reward model's zero."""
  count = min(config.max_heldout or CENTERING_DEMONSTRATIONS, CENTERING_DEMONSTRATIONS)
  everything = run.data.records(Demonstration, "train")
  demonstrations = feeds.draw(everything, count, run.seed("reward", "centre"))
  packed = feeds.demonstration_rows(run, config.sequence_length, demonstrations, pack=True)
  measure = feeds.summed(run, mesh_lib.bind(at_ends, run.scalar), packed, config.batch_size)
  sums = measure(params)
  return sums["sum"] / sums["count"]


def at_ends(scalar: heads.ScalarNetwork, params: Params, batch: TokenBatch) -> Metrics:
  """The sum of the scores at the last tokens of a batch's texts, and their count."""
  values = scalar.apply({"params": params}, batch.tokens, batch.positions, batch.segments)
  following = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
  ends = (batch.segments > 0) & (batch.segments != following)
  return {"sum": masked.total(values, ends), "count": jnp.sum(ends)}


def train_policy(
  run: Run, directory: pathlib.Path, policy: Params, judges: rollout.Judges
) -> tuple[Params, Params]:
  """PPO from `policy`; the critic starts as a copy of the reward model.

  A caller that keeps no reference to `policy` and `judges` lets go of what training does not need:
  the state has copies of its own, and the judges are kept in the compute dtype.

  Returns the policy after the last step, and the moving average of it (the same without one).
  """
  config = run.config.ppo
  learner, state, frozen, judges = begin_ppo(run, directory.parent.name, policy, judges)
  del policy
  frozen_policy, frozen_critic = frozen
  table, update = rules.table(config.rules), mesh_lib.bind(ppo.update, learner=learner)
  update = rules.compile_step(update, state, run.mesh, table)
  _, sample = sampler(run, learner.stem_blocks)

  def step(state: ppo.PPOState, batch):
    prompts, text = batch
    current = optim.merge(state.policy, frozen_policy), optim.merge(state.critic, frozen_critic)
    seen = sample(*current, judges, prompts, ppo.keys(state)[0])
    state, metrics = update(mesh_lib.to_devices(state), frozen, seen, text)
    return at_rest(state, config), metrics

  heldout, _ = next(feeds.experience_stream(run, "heldout")(0))

  def evaluate(state: ppo.PPOState) -> dict[str, float]:
    critic, key = optim.merge(state.critic, frozen_critic), run.key("heldout rollouts")
    answer = lambda part: sample(optim.merge(part, frozen_policy), critic, judges, heldout, key)
    figures = ppo.evaluate(answer(state.policy))
    if config.ema_decay:
      of_ema = ppo.evaluate(answer(state.ema))
      figures |= {f"{name}_ema": value for name, value in of_ema.items()}
    return {name: float(value) for name, value in hosts.whole(figures).items()}

  stage = Stage(
    name="ppo",
    directory=directory,
    num_steps=config.num_steps,
    eval_every=config.eval_every,
    unit="episodes",
    per_step=config.rollout.batch_size,
    shown=("objective/scores", "objective/kl"),
    checkpoints=run.config.checkpoints,
    profile=run.config.profile,
    writers=(warn_negative_kl,),
  )
  state, _ = fit(stage, step, state, feeds.experience_stream(run, "train"), evaluate)
  average = state.ema if config.ema_decay else state.policy
  return optim.merge(state.policy, frozen_policy), optim.merge(average, frozen_policy)


def begin_ppo(
  run: Run, round_name: str, policy: Params, judges: rollout.Judges
) -> tuple[ppo.Learner, ppo.PPOState, tuple[Params, Params], rollout.Judges]:
  """The learner, its state, the frozen parts of policy and critic, and the judges as PPO keeps."""
  config = run.config.ppo
  copy = functools.partial(jax.tree.map, jnp.copy)  # the state is donated, what it came from is not
  policy_part, frozen_policy = optim.split(policy, config.frozen)
  critic_part, frozen_critic = optim.split(judges.reward, config.frozen)
  trunks = [params["trunk"] for params in (policy, judges.reward, judges.reference)]
  stem = heads.shared_stem(run.config.model, trunks, frozen_policy.get("trunk", {}))
  learner = ppo.make_learner(run.policy, run.scalar, config, stem)
  state = ppo.init(learner, copy(policy_part), copy(critic_part), run.key(round_name))
  small = rollout.Judges(
    rollout.in_compute_dtype(run.policy, judges.reference),
    rollout.in_compute_dtype(run.scalar, judges.reward),
  )
  table = rules.table(config.rules)
  small = rules.place(small, run.mesh, table)
  if "judges" in config.offload:
    small = mesh_lib.to_host(small)
  state = at_rest(rules.place(state, run.mesh, table), config)
  return learner, state, (frozen_policy, frozen_critic), small


def at_rest(state: ppo.PPOState, config: PPOConfig) -> ppo.PPOState:
  """The state between updates: what the optimisers keep is in host memory, if it is offloaded."""
  if "optimizers" not in config.offload:
    return state
  to_host = mesh_lib.to_host
  return state.replace(policy_opt=to_host(state.policy_opt), critic_opt=to_host(state.critic_opt))


def warn_negative_kl(step: int, metrics: dict[str, float]) -> None:
  """A writer that warns of a mean KL clearly below 0, which no KL is.

  Its cause is a response sampled from another distribution than the one that is scored; PPO then
  earns reward by moving between the two.
  """
  kl, stderr = metrics["objective/kl"], metrics["objective/kl_stderr"]
  if kl < -3.0 * stderr - 1e-3:
    logging.warning(
      "step %d: the mean KL is %.3f +- %.3f nats, below 0: the sampled responses do not come from "
      "the distribution that is scored.",
      step,
      kl,
      stderr,
    )


def sampler(run: Run, stem_blocks: int) -> tuple[Responder, Callable]:
  """How rollouts are made: the responder, and `(policy, critic, judges, prompts, key) -> Rollout`.

  The latter is two compiled functions in a row; judges may be in host memory.
  """
  config = run.config.ppo.rollout
  responder = run.responder(config.sampling, config.prompt_length, config.batch_size)
  how = rollout.Scoring(
    run.policy,
    run.scalar,
    config.sampling.temperature,
    run.tokenizer.eos_id,
    stem_blocks,
    config.micro_batches,
  )
  score = mesh_lib.jit(mesh_lib.bind(rollout.score, how), run.mesh)

  def sample(policy: Params, critic: Params, judges: rollout.Judges, prompts, key):
    completion = responder.generate(policy, prompts, key)
    return score(mesh_lib.to_devices(judges), critic, prompts, completion)

  return responder, sample
