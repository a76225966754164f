"""The reward model: InstructGPT's ranking loss over all pairs of a prompt's answers.

Ouyang et al. 2022, section 3.5, eq. 1:

  loss = -1/C(K,2) E[ log sigmoid(r(x, y_w) - r(x, y_l)) ]

All pairs of a prompt come from one forward pass over each answer and form one batch element;
shuffling pairs separately would show each answer K - 1 times an epoch and overfit. Ties make no
pair, and the mean is over the pairs that exist, so a prompt with K = 9 weighs as much as one with
K = 4. The answers of a prompt stand behind it in one row and share its pass (`RankingBatch`).
"""

import dataclasses
from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import masked
from rlhf_jax.config import PositiveInt
from rlhf_jax.networks import heads
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import Metrics, Params, RankingBatch

CALIBRATION_BINS = 10


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """One fit of the reward model."""

  num_epochs: PositiveInt  # more than one overfits (Ouyang et al. 2022, appendix C.2)
  max_train: PositiveInt | None  # comparisons to train on, drawn at random; None: all
  max_heldout: PositiveInt | None  # comparisons to measure on; None: all
  batch_size: PositiveInt  # rows a step
  micro_batches: PositiveInt  # parts that the batch goes through the network in, to save memory
  max_prompts: PositiveInt  # M, prompts a row; 1 makes batch_size a number of prompts
  max_responses: PositiveInt  # K, slots a prompt
  sequence_length: PositiveInt  # tokens a row; prompts are packed with all their answers
  eval_every: PositiveInt  # steps between held-out figures and checkpoints
  frozen: tuple[str, ...]  # regexes over parameter paths that stay as they are
  optim: optim.OptimConfig

  def __post_init__(self):
    accumulate.check("reward", self.batch_size, self.micro_batches)


@flax.struct.dataclass
class RewardState:
  """What a step hands to the next."""

  step: jax.Array  # [] int32
  params: Params  # the trainable part of the reward network
  opt_state: optax.OptState


def init(params: Params, optimizer: optax.GradientTransformation) -> RewardState:
  """The state before the first step; `params` is the trainable part (see `optim.split`)."""
  return RewardState(jnp.int32(0), params, optimizer.init(params))


def score_answers(network: heads.ScalarNetwork, params: Params, batch: RankingBatch) -> jax.Array:
  """Scores [B, M, K], each read at the last token of its answer; one forward pass over each."""
  at_ends = network.apply(
    {"params": params},
    batch.tokens,
    batch.positions,
    batch.segments,
    branches=batch.branches,
    columns=batch.ends.reshape(len(batch.ends), -1),
  )
  return at_ends.reshape(batch.ends.shape)


def score_sequences(
  network: heads.ScalarNetwork,
  params: Params,
  tokens: jax.Array,
  mask: jax.Array,
  first_block: int = 0,
) -> jax.Array:
  """Scores [B] of rows [B, T] that hold a prompt and an answer, padded on either side.

  With `first_block`, `tokens` is their stream [B, T, D] after the blocks before it.
  """
  positions, segments = heads.layout(mask)
  columns = heads.last_column(mask)[:, None]
  return network.apply(
    {"params": params}, tokens, positions, segments, first_block, columns=columns
  )[:, 0]


def pairs(ranks: jax.Array, valid: jax.Array) -> jax.Array:
  """[K, K] float32 for one prompt: 1 at (w, l) where answer w is ranked better than answer l."""
  both = (valid[:, None] > 0) & (valid[None, :] > 0)
  return (both & (ranks[:, None] < ranks[None, :])).astype(jnp.float32)


def ranking_loss(scores: jax.Array, ranks: jax.Array, valid: jax.Array) -> jax.Array:
  """The mean of -log sigmoid(r_w - r_l) over the pairs of one prompt; 0 without one. [K] to []."""
  chex.assert_equal_shape([scores, ranks, valid])
  scores = jnp.where(valid > 0, scores, 0.0)
  gaps = scores[:, None] - scores[None, :]
  return masked.mean(-jax.nn.log_sigmoid(gaps), pairs(ranks, valid))


def loss(
  network: heads.ScalarNetwork, params: Params, batch: RankingBatch
) -> tuple[jax.Array, jax.Array]:
  """Eq. 1, averaged over the prompts that have a pair. Returns the loss and scores [B, M, K]."""
  scores = score_answers(network, params, batch)
  losses = each_prompt(ranking_loss)(scores, batch.ranks, batch.valid)
  return masked.mean(losses, has_pair(batch)), scores


def each_prompt(function: Callable) -> Callable:
  """A function of one prompt's [K], for all the prompts [B, M, K] of a batch."""
  return jax.vmap(jax.vmap(function))


def has_pair(batch: RankingBatch) -> jax.Array:
  """The prompts [B, M] that teach something: those with a pair that is no tie."""
  return jnp.any(each_prompt(pairs)(batch.ranks, batch.valid) > 0, axis=(2, 3))


def step(
  state: RewardState,
  batch: RankingBatch,
  frozen: Params,
  *,
  network: heads.ScalarNetwork,
  optimizer: optax.GradientTransformation,
  micro_batches: int,
) -> tuple[RewardState, Metrics]:
  """One optimiser step."""

  def objective(params: Params, part: RankingBatch):
    value, scores = loss(network, optim.merge(params, frozen), part)
    sums = count_pairs(scores, part) | count_scores(scores, part)
    return value, (sums["prompts"], sums)

  value, sums, grads = accumulate.value_and_grad(objective, state.params, batch, micro_batches)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  mean = sums["scores"] / jnp.maximum(sums["answers"], 1.0)
  variance = sums["squares"] / jnp.maximum(sums["answers"], 1.0) - jnp.square(mean)
  metrics = {
    "reward/loss": value,
    "reward/accuracy": sums["correct"] / jnp.maximum(sums["pairs"], 1.0),
    "reward/prompts": sums["prompts"],
    "reward/score_mean": mean,
    "reward/score_std": jnp.sqrt(jnp.maximum(variance, 0.0)),
    "reward/grad_norm": optax.tree.norm(grads),
  }
  return RewardState(state.step + 1, params, opt_state), metrics


def count_pairs(scores: jax.Array, batch: RankingBatch) -> Metrics:
  """Pairs, those that the scores order rightly, and those that "the longer is better" gets right.

  A pair is right only if the better answer scores strictly higher: a constant model gets 0.
  """
  mask = each_prompt(pairs)(batch.ranks, batch.valid)
  above = lambda x: (x[..., :, None] > x[..., None, :]).astype(jnp.float32)
  return {
    "pairs": jnp.sum(mask),
    "correct": masked.total(above(scores), mask),
    "longer_correct": masked.total(above(batch.lengths), mask),
  }


def count_scores(scores: jax.Array, batch: RankingBatch) -> Metrics:
  """Prompts that teach something, answers, and the sums of their scores and squared scores."""
  return {
    "prompts": jnp.sum(has_pair(batch)).astype(jnp.float32),
    "answers": jnp.sum(batch.valid),
    "scores": masked.total(scores, batch.valid),
    "squares": masked.total(jnp.square(scores), batch.valid),
  }


def evaluate(network: heads.ScalarNetwork, params: Params, batch: RankingBatch) -> Metrics:
  """Sums over one held-out batch, to be added over batches; see `summarize`.

  The calibration sums bin pairs by the predicted probability sigmoid(|gap|) that the higher-scored
  answer is the better one, between 0.5 and 1 (Bai et al. 2022, figure 9).
  """
  value, scores = loss(network, params, batch)
  mask = each_prompt(pairs)(batch.ranks, batch.valid)
  gaps = scores[..., :, None] - scores[..., None, :]
  predicted = jax.nn.sigmoid(jnp.abs(gaps))
  bins = jnp.clip(jnp.floor((predicted - 0.5) * 2 * CALIBRATION_BINS), 0, CALIBRATION_BINS - 1)
  in_bin = jax.nn.one_hot(bins.astype(jnp.int32), CALIBRATION_BINS) * mask[..., None]
  over_pairs = lambda x: jnp.sum(in_bin * x[..., None], axis=(0, 1, 2, 3))
  prompts = jnp.sum(has_pair(batch))
  return count_pairs(scores, batch) | {
    "prompts": prompts,
    "loss": value * prompts,
    "bin_pairs": over_pairs(jnp.ones_like(gaps)),
    "bin_predicted": over_pairs(predicted),
    "bin_correct": over_pairs((gaps > 0).astype(jnp.float32)),
  }


def summarize(sums: Metrics) -> dict:
  """Held-out figures from added-up `evaluate` sums; plain floats and lists.

  `calibration` lists (mean predicted probability, share that was right, pairs) for each bin in use.
  """
  n = max(float(sums["pairs"]), 1.0)
  accuracy = float(sums["correct"]) / n
  filled = [
    (float(p) / float(c), float(r) / float(c), int(c))
    for c, p, r in zip(sums["bin_pairs"], sums["bin_predicted"], sums["bin_correct"])
    if c > 0
  ]
  return {
    "loss": float(sums["loss"]) / max(float(sums["prompts"]), 1.0),
    "accuracy": accuracy,
    "accuracy_stderr": (accuracy * (1 - accuracy) / n) ** 0.5,
    "longer_accuracy": float(sums["longer_correct"]) / n,
    "pairs": int(sums["pairs"]),
    "prompts": int(sums["prompts"]),
    "calibration": filled,
  }


def center(params: Params, mean_score: float) -> Params:
  """Shifts the bias so that the inputs with this mean score average 0 (demonstrations; IG 3.5)."""
  score = params["score"] | {"bias": params["score"]["bias"] - mean_score}
  return params | {"score": score}
