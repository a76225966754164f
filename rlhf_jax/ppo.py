"""PPO against a reward model, with a KL penalty to the SFT policy.

Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022, eq. 2:

  objective = E[r(x, y) - kl_coef log(pi(y|x) / pi_SFT(y|x))] + ptx_coef E_pretrain[log pi(x)]

One `update` is one compiled, donated program: rewards, advantages, then every epoch and minibatch
under a scan. The critic is a separate network that starts as the reward model. A state's `step`
counts batches of rollouts; the optimisers count minibatches.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import advantages as advantages_lib
from rlhf_jax import masked, rollout, sft, surrogate
from rlhf_jax.networks import heads, likelihood, token_loss
from rlhf_jax.parallel import rules
from rlhf_jax.ppo_config import PPOConfig
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import Metrics, Params, Rollout, TokenBatch


@flax.struct.dataclass
class PPOState:
  """All that changes from one batch of rollouts to the next."""

  step: jax.Array  # [] int32, batches of rollouts learnt from
  policy: Params  # the trainable part
  critic: Params  # the trainable part
  policy_opt: optax.OptState
  critic_opt: optax.OptState
  ema: Params | None  # moving average of `policy`, where the config has a decay
  kl_coef: jax.Array  # [] float32
  key: jax.Array  # [] PRNG key of the run; every use folds in `step`


@flax.struct.dataclass
class Experience:
  """A rollout with what is frozen over the inner epochs."""

  rollout: Rollout
  scores: jax.Array  # [B], after the rule for responses that never end
  advantages: jax.Array  # [B, R], whitened over the whole batch
  returns: jax.Array  # [B, R], from the advantages before whitening


@dataclasses.dataclass(frozen=True)
class Learner:
  """What is static in an update: the networks, their optimisers and the numbers."""

  policy: heads.Policy
  scalar: heads.ScalarNetwork
  policy_optimizer: optax.GradientTransformation
  value_optimizer: optax.GradientTransformation
  config: PPOConfig
  stem_blocks: int  # lowest blocks that all networks share; see `heads.shared_stem`


def make_learner(
  policy: heads.Policy, scalar: heads.ScalarNetwork, config: PPOConfig, stem_blocks: int
) -> Learner:
  """The learner of one run; the learning-rate schedules span all its minibatches."""
  total = config.num_steps * config.updates
  return Learner(
    policy,
    scalar,
    optim.make(config.policy_optim, total),
    optim.make(config.value_optim, total),
    config,
    stem_blocks,
  )


def init(learner: Learner, policy: Params, critic: Params, key: jax.Array) -> PPOState:
  """The state before the first batch; `policy` and `critic` are the trainable parts."""
  return PPOState(
    step=jnp.int32(0),
    policy=policy,
    critic=critic,
    policy_opt=learner.policy_optimizer.init(policy),
    critic_opt=learner.value_optimizer.init(critic),
    ema=jax.tree.map(jnp.copy, policy) if learner.config.ema_decay else None,
    kl_coef=jnp.float32(learner.config.kl.coef),
    key=key,
  )


def loss(
  learner: Learner, policy: Params, critic: Params, batch: Experience
) -> tuple[jax.Array, Metrics]:
  """Policy loss + vf_coef value loss, each averaged over the response tokens of the batch."""
  config, seen = learner.config, batch.rollout
  sequences = jnp.concatenate([seen.prompts, seen.responses], axis=1)
  mask = jnp.concatenate([seen.prompt_mask, seen.mask], axis=1)
  R = seen.responses.shape[1]
  if seen.stream is not None:
    sequences = seen.stream
  temperature, stem = config.rollout.sampling.temperature, learner.stem_blocks
  hidden = likelihood.before_responses(learner.policy, policy, sequences, mask, R, stem)
  known = seen.logprobs, batch.advantages, seen.mask
  losses = functools.partial(surrogate.policy_losses, cliprange=config.cliprange)
  pg_total, of = token_loss.total(
    losses, learner.policy, policy, hidden, seen.responses, temperature, *known
  )
  pg_loss = pg_total / jnp.maximum(jnp.sum(seen.mask), 1.0)
  _, pg_metrics = surrogate.policy_loss(of.logprobs, *known, cliprange=config.cliprange)
  values = rollout.response_values(learner.scalar, critic, sequences, mask, R, stem)
  vf_loss, vf_metrics = surrogate.value_loss(
    values, seen.values, batch.returns, seen.mask, cliprange=config.value_cliprange
  )
  metrics = pg_metrics | vf_metrics
  metrics |= {
    "policy/entropy": masked.mean(of.entropy, seen.mask),
    "loss/policy": pg_loss,
    "loss/value": vf_loss,
  }
  return pg_loss + config.vf_coef * vf_loss, metrics


def gradients(
  learner: Learner,
  trainable: tuple[Params, Params],
  frozen: tuple[Params, Params],
  minibatch: Experience,
  text: TokenBatch | None,
) -> tuple[tuple[Params, Params], Metrics]:
  """The gradients of policy and critic: of `loss` and of ptx_coef times the pretraining loss.

  Both are taken in micro-batches, weighted by tokens, as if each had been taken at once.
  """
  config: PPOConfig = learner.config

  def of_rollouts(trainable: tuple[Params, Params], part: Experience):
    policy, critic = (optim.merge(*parts) for parts in zip(trainable, frozen))
    value, figures = loss(learner, policy, critic, part)
    # As squares about 1 the spread adds up over parts, and next to nothing cancels.
    figures["policy/ratio_var"] += jnp.square(figures["policy/ratio"] - 1.0)
    tokens = jnp.sum(part.rollout.mask)
    return value, (tokens, {name: x * tokens for name, x in (figures | {"tokens": 1.0}).items()})

  def of_text(policy: Params, part: TokenBatch):
    value, figures = sft.loss(learner.policy, optim.merge(policy, frozen[0]), part)
    return value, (figures["tokens"], {})

  pieces = config.micro_batches
  _, sums, (of_policy, of_critic) = accumulate.value_and_grad(
    of_rollouts, trainable, minibatch, pieces
  )
  tokens = jnp.maximum(sums.pop("tokens"), 1.0)
  metrics = {name: x / tokens for name, x in sums.items()}
  metrics["policy/ratio_var"] -= jnp.square(metrics["policy/ratio"] - 1.0)
  if text is not None:
    value, _, extra = accumulate.value_and_grad(of_text, trainable[0], text, pieces)
    of_policy = jax.tree.map(lambda g, x: g + config.ptx.coef * x, of_policy, extra)
    metrics["loss/ptx"] = value
  metrics["policy/grad_norm"], metrics["val/grad_norm"] = map(
    optax.tree.norm, (of_policy, of_critic)
  )
  return (of_policy, of_critic), metrics


def keys(state: PPOState) -> tuple[jax.Array, jax.Array]:
  """The keys of this batch: one to sample with, one to shuffle with."""
  sample_key, shuffle_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  return sample_key, shuffle_key


def experience(config: PPOConfig, seen: Rollout, kl_coef: jax.Array) -> Experience:
  """Rewards, advantages and returns of a batch of rollouts, fixed before the first minibatch."""
  scores = advantages_lib.complete_score(
    seen.scores, seen.finished, rule=config.missing_eos, penalty=config.missing_eos_penalty
  )
  shape = lambda *response: advantages_lib.kl_shaped_rewards(*response, kl_coef=kl_coef)
  rewards = jax.vmap(shape)(seen.logprobs, seen.ref_logprobs, scores, seen.mask)
  if config.whiten_rewards:
    rewards = masked.whiten(rewards, seen.mask, shift_mean=False)
  estimate = lambda *response: advantages_lib.gae(*response, gamma=config.gamma, lam=config.lam)
  advantages, returns = jax.vmap(estimate)(rewards, seen.values, seen.mask)
  whitened = masked.whiten(advantages, seen.mask, shift_mean=True)
  return Experience(seen, scores, whitened, returns)


def minibatch_order(key: jax.Array, config: PPOConfig) -> jax.Array:
  """Rows of each optimiser step, [epochs * minibatches, B / minibatches].

  Every row comes once an epoch, and each epoch has an order of its own.
  """
  B = config.rollout.batch_size
  shuffle = lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), B)
  orders = jax.vmap(shuffle)(jnp.arange(config.epochs))
  return orders.reshape(config.updates, B // config.minibatches)


def next_kl_coef(config: PPOConfig, kl_coef: jax.Array, kl: jax.Array) -> jax.Array:
  """The adaptive controller (Ziegler et al. 2019, section 2.2), or kl_coef itself without a target.

  e = clip(KL / target - 1, -0.2, 0.2); kl_coef <- kl_coef (1 + e B / horizon), with KL in nats a
  response, of the rollouts, and B episodes.
  """
  if config.kl.target is None:
    return kl_coef
  error = jnp.clip(kl / config.kl.target - 1.0, -0.2, 0.2)
  return kl_coef * (1.0 + error * config.rollout.batch_size / config.kl.horizon)


def update(
  state: PPOState, frozen: tuple[Params, Params], seen: Rollout, text: TokenBatch | None, learner
) -> tuple[PPOState, Metrics]:
  """Learns from one batch of rollouts: all epochs and minibatches.

  Args:
    state: donated by the caller's jit.
    frozen: the parts of policy and critic that do not train.
    seen: the rollouts, sampled by `state.policy`.
    text: pretraining rows with a leading axis of epochs * minibatches, or None.
    learner: static.
  """
  config: PPOConfig = learner.config
  batch = experience(config, seen, state.kl_coef)
  order = minibatch_order(keys(state)[1], config)
  table = rules.table(config.rules)

  def optimise(carry, inputs):
    trainable, (policy_opt, critic_opt) = carry
    rows, pretraining = inputs
    minibatch = jax.tree.map(lambda x: x[rows], batch)
    grads, metrics = gradients(learner, trainable, frozen, minibatch, pretraining)
    optimizers = (learner.policy_optimizer, learner.value_optimizer)
    moved, opt_states = [], []
    for optimizer, grad, opt, params in zip(optimizers, grads, (policy_opt, critic_opt), trainable):
      updates, opt = optimizer.update(grad, opt, params)
      moved.append(optax.apply_updates(params, updates))
      opt_states.append(opt)
    policy, critic = moved
    kept = rules.keep({"policy": policy, "critic": critic}, table)
    return ((kept["policy"], kept["critic"]), tuple(opt_states)), metrics

  carry = ((state.policy, state.critic), (state.policy_opt, state.critic_opt))
  carry, metrics = jax.lax.scan(optimise, carry, (order, text))
  (policy, critic), (policy_opt, critic_opt) = carry
  metrics = jax.tree.map(jnp.mean, metrics) | rollout_metrics(batch, state.kl_coef)
  next_state = PPOState(
    step=state.step + 1,
    policy=policy,
    critic=critic,
    policy_opt=policy_opt,
    critic_opt=critic_opt,
    ema=optim.ema_update(state.ema, policy, config.ema_decay) if config.ema_decay else None,
    kl_coef=next_kl_coef(config, state.kl_coef, metrics["objective/kl"]),
    key=state.key,
  )
  return next_state, metrics


def rollout_metrics(batch: Experience, kl_coef: jax.Array) -> Metrics:
  """Figures of a batch of rollouts before the update, under the field's names."""
  seen = batch.rollout
  kl = jnp.sum(jnp.where(seen.mask > 0, seen.logprobs - seen.ref_logprobs, 0.0), axis=1)
  entropy = -jnp.sum(jnp.where(seen.mask > 0, seen.logprobs, 0.0), axis=1)
  residual = masked.variance(batch.returns - seen.values, seen.mask)
  spread = masked.variance(batch.returns, seen.mask)
  return {
    "objective/kl": jnp.mean(kl),
    "objective/kl_stderr": jnp.std(kl) / jnp.sqrt(kl.size),
    "objective/kl_coef": kl_coef,
    "objective/entropy": jnp.mean(entropy),
    "objective/scores": jnp.mean(seen.scores),
    "objective/scores_std": jnp.std(seen.scores),
    "objective/non_score_reward": jnp.mean(-kl_coef * kl),
    "objective/rlhf_reward": jnp.mean(batch.scores - kl_coef * kl),
    "val/mean": masked.mean(seen.values, seen.mask),
    "val/returns_mean": masked.mean(batch.returns, seen.mask),
    "val/explained_var": 1.0 - residual / jnp.maximum(spread, 1e-8),
    "episode/length": jnp.mean(jnp.sum(seen.mask, axis=1)),
    "episode/eos_rate": jnp.mean(seen.finished),
  }


def evaluate(seen: Rollout) -> Metrics:
  """Score and KL of rollouts on held-out prompts, with standard errors."""
  kl = jnp.sum(jnp.where(seen.mask > 0, seen.logprobs - seen.ref_logprobs, 0.0), axis=1)
  stderr = lambda x: jnp.std(x) / jnp.sqrt(x.size)
  return {
    "eval/scores": jnp.mean(seen.scores),
    "eval/scores_stderr": stderr(seen.scores),
    "eval/kl": jnp.mean(kl),
    "eval/kl_stderr": stderr(kl),
    "eval/length": jnp.mean(jnp.sum(seen.mask, axis=1)),
    "eval/eos_rate": jnp.mean(seen.finished),
  }
