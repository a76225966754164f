"""Supervised fine-tuning on dialogues: next-token loss on what the assistant says.

The first stage of the recipe (Ouyang et al. 2022, section 3.5). Trainers' demonstrations and
rewritten instruction data arrive mixed and packed as a `TokenBatch`; the mask says which tokens are
the assistant's. The checkpoint is chosen on held-out loss or, where a reward model exists already,
on its score of sampled answers, which InstructGPT saw rise long after the loss had stopped falling.
"""

import dataclasses
from typing import Annotated, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import masked
from rlhf_jax.config import PositiveInt, Range
from rlhf_jax.networks import heads, token_loss
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import Metrics, Params, TokenBatch


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """One stage of supervised fine-tuning."""

  num_steps: PositiveInt
  batch_size: PositiveInt  # rows of sequence_length tokens a step
  micro_batches: PositiveInt  # parts that the batch goes through the network in, to save memory
  sequence_length: PositiveInt  # tokens
  supervise: Literal["all", "last"]  # assistant messages that carry loss
  # Share of the rows that hold pretraining text (Ouyang et al. 2022, appendix C.3: 0.1).
  pretraining_share: Annotated[float, Range(low=0.0, high=1.0, closed="low")]
  max_heldout: PositiveInt | None  # dialogues, and prompts, to measure on; None: all
  judge: str | None  # folder of a reward model whose score chooses the checkpoint; None: the loss
  eval_every: PositiveInt  # steps between held-out losses, each with a checkpoint
  frozen: tuple[str, ...]  # regexes over parameter paths that stay as they are
  optim: optim.OptimConfig

  def __post_init__(self):
    accumulate.check("sft", self.batch_size, self.micro_batches)


@flax.struct.dataclass
class SFTState:
  """What a step hands to the next."""

  step: jax.Array  # [] int32
  params: Params  # the trainable part of the policy
  opt_state: optax.OptState


def init(params: Params, optimizer: optax.GradientTransformation) -> SFTState:
  """The state before the first step; `params` is the trainable part (see `optim.split`)."""
  return SFTState(jnp.int32(0), params, optimizer.init(params))


def loss(policy: heads.Policy, params: Params, batch: TokenBatch) -> tuple[jax.Array, Metrics]:
  """Mean negative log-likelihood in nats over all supervised tokens of the batch.

  A token is a target where its `loss_mask` is set and the token before it belongs to the same
  document. The mean is over tokens, not over rows: long answers weigh as many tokens as they have.
  """
  inputs = (batch.tokens, batch.positions, batch.segments)
  hidden, _ = policy.apply({"params": params}, *inputs, method="hidden")
  same_document = batch.segments[:, 1:] == batch.segments[:, :-1]
  mask = batch.loss_mask[:, 1:] * same_document
  missed = lambda logprobs, mask: jnp.where(mask > 0, -mask * logprobs, 0.0)
  total, of = token_loss.total(
    missed, policy, params, hidden[:, :-1], batch.tokens[:, 1:], 1.0, mask
  )
  metrics = {"accuracy": masked.mean(of.likeliest, mask), "tokens": jnp.sum(mask)}
  return total / jnp.maximum(jnp.sum(mask), 1.0), metrics


def step(
  state: SFTState,
  batch: TokenBatch,
  frozen: Params,
  *,
  policy: heads.Policy,
  optimizer: optax.GradientTransformation,
  micro_batches: int,
) -> tuple[SFTState, Metrics]:
  """One optimiser step."""

  def objective(params: Params, part: TokenBatch):
    value, figures = loss(policy, optim.merge(params, frozen), part)
    tokens = figures["tokens"]
    return value, (tokens, {"correct": figures["accuracy"] * tokens, "tokens": tokens})

  value, sums, grads = accumulate.value_and_grad(objective, state.params, batch, micro_batches)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {
    "sft/loss": value,
    "sft/accuracy": sums["correct"] / jnp.maximum(sums["tokens"], 1.0),
    "sft/tokens": sums["tokens"],
    "sft/grad_norm": optax.tree.norm(grads),
  }
  return SFTState(state.step + 1, params, opt_state), metrics


def evaluate(policy: heads.Policy, params: Params, batch: TokenBatch) -> Metrics:
  """Sums over one held-out batch; divide by `tokens` after adding up batches."""
  value, metrics = loss(policy, params, batch)
  tokens = metrics["tokens"]
  return {"nll": value * tokens, "correct": metrics["accuracy"] * tokens, "tokens": tokens}
