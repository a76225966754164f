"""The numbers of PPO, checked before anything runs."""

import dataclasses
from typing import Annotated, Literal

from rlhf_jax import rollout
from rlhf_jax.config import Fraction, NonNegative, Positive, PositiveInt, Range
from rlhf_jax.parallel import rules
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class KLConfig:
  """The coefficient of the KL penalty, fixed or steered."""

  coef: NonNegative  # the first value; the only one where target is None
  target: Positive | None  # nats a response to steer to (Ziegler et al. 2019, section 2.2)
  horizon: Positive  # episodes over which the controller corrects; read where target is set


@dataclasses.dataclass(frozen=True)
class PTXConfig:
  """Pretraining text mixed into the update, "PPO-ptx" (Ouyang et al. 2022, section 3.5)."""

  coef: NonNegative  # InstructGPT's gamma; 0 is plain PPO
  ratio: NonNegative  # pretraining rows an episode
  sequence_length: PositiveInt  # tokens a row


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """One run of PPO."""

  num_steps: PositiveInt  # batches of rollouts
  epochs: PositiveInt  # passes over each batch
  minibatches: PositiveInt  # optimiser steps a pass
  micro_batches: PositiveInt  # parts that a minibatch goes through the networks in, to save memory
  gamma: Fraction  # discount
  lam: Fraction  # GAE's lambda
  cliprange: Positive  # of the probability ratio
  value_cliprange: Positive  # of the value, around the rollout's
  vf_coef: Positive  # weight of the value loss
  whiten_rewards: bool  # to variance 1, the mean kept
  missing_eos: Literal["keep", "replace", "subtract"]  # responses that never stop
  missing_eos_penalty: NonNegative
  ema_decay: Annotated[float, Range(low=0.0, high=1.0, closed="low")]  # a step; 0: the last weights
  kl: KLConfig
  ptx: PTXConfig
  rollout: rollout.RolloutConfig
  eval_every: PositiveInt  # steps between held-out figures and checkpoints
  frozen: tuple[str, ...]  # regexes over trunk paths that stay as they are, in both networks
  rules: tuple[rules.Row, ...]  # where "policy...", "critic...", "reference/..." live, or "reward/"
  offload: tuple[Literal["judges", "optimizers"], ...]  # are in host memory while they are idle
  policy_optim: optim.OptimConfig
  value_optim: optim.OptimConfig

  def __post_init__(self):
    if self.rollout.batch_size % self.minibatches:
      raise UserError(
        f"config ppo: rollout.batch_size {self.rollout.batch_size} is not divisible by minibatches "
        f"{self.minibatches}."
      )
    rules.table(self.rules)
    accumulate.check("ppo", self.rollout.batch_size // self.minibatches, self.micro_batches)
    accumulate.check("ppo.ptx", self.ptx_rows, self.micro_batches)
    if self.ptx.coef and not self.ptx_rows:
      raise UserError(
        f"config ppo.ptx: ratio {self.ptx.ratio:g} gives no row to any of the {self.updates} "
        f"optimiser steps of a batch; use at least {self.updates / self.rollout.batch_size:g}."
      )

  @property
  def updates(self) -> int:
    """Optimiser steps a batch of rollouts."""
    return self.epochs * self.minibatches

  @property
  def ptx_rows(self) -> int:
    """Rows of pretraining text an optimiser step."""
    return round(self.ptx.ratio * self.rollout.batch_size / self.updates) if self.ptx.coef else 0
