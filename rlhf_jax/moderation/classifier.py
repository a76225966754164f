"""The moderation model: eight binary classifiers on one trunk, learnt from the labels there are.

Markov et al. 2022, section 4: a decoder with a head for each category, trained with binary
cross-entropy. A category is learnt from the texts whose label for it is known; an unknown label is
in no sum and has no gradient.

A text is read at the mean over its tokens, by default. A reward model reads its last token, since
an answer is good or bad as a whole; what makes a text undesired may stand anywhere in it, and the
mean gives every token a gradient from the first step on, where labels are a thousand and not a
million.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import masked
from rlhf_jax.config import Fraction, PositiveInt
from rlhf_jax.networks import heads
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """One fit of the classifier."""

  num_epochs: PositiveInt  # times that it sees the texts it is evaluated on the like of
  batch_size: PositiveInt  # rows a step
  micro_batches: PositiveInt  # parts that the batch goes through the network in, to save memory
  sequence_length: PositiveInt  # tokens a row; texts are packed, and the start of a longer one read
  max_texts: PositiveInt  # M, texts a row
  frozen: tuple[str, ...]  # regexes over parameter paths that stay as they are
  positive_weight_power: Fraction  # 0: every label weighs 1; 1: positives weigh what negatives do
  eval_every: PositiveInt  # steps between held-out figures and checkpoints
  optim: optim.OptimConfig

  def __post_init__(self):
    accumulate.check("fit", self.batch_size, self.micro_batches)


@flax.struct.dataclass
class LabelBatch:
  """Rows of up to M texts, one segment each, with the labels that are known."""

  inputs: jax.Array  # [B, T] int32 ids; or the stream [B, T, D] after the frozen blocks
  segments: jax.Array  # [B, T] int32, 0 on padding, 1.. the text inside the row
  positions: jax.Array  # [B, T] int32, place inside the text
  labels: jax.Array  # [B, M, C] float32, 1 where the text belongs to the category
  known: jax.Array  # [B, M, C] float32, 0 where nobody said, and on slots that hold no text


@flax.struct.dataclass
class FitState:
  """What a step hands to the next."""

  step: jax.Array  # [] int32
  params: Params  # the trainable part of the network
  opt_state: optax.OptState


def init(params: Params, optimizer: optax.GradientTransformation) -> FitState:
  """The state before the first step; `params` is the trainable part (see `optim.split`)."""
  return FitState(jnp.int32(0), params, optimizer.init(params))


def from_trunk(
  network: heads.LabelNetwork, trunk: Params, base_rates: np.ndarray, key: jax.Array
) -> Params:
  """A classifier on a copy of `trunk` whose fresh head says the base rates [C] of everything.

  From a bias of 0 the first steps would only learn that positives are few (Lin et al. 2017,
  section 4.1).
  """
  kernel = jax.random.normal(key, (network.config.d_model, network.labels)) * 0.02
  bias = jnp.asarray(np.log(base_rates / (1 - base_rates)), jnp.float32)
  return {"trunk": jax.tree.map(jnp.copy, trunk), "score": {"kernel": kernel, "bias": bias}}


def base_rates(labels: np.ndarray, known: np.ndarray) -> np.ndarray:
  """The share of positives among known labels [n, C], [C], as if one more of each were seen."""
  positives = np.sum(labels * known, axis=0)
  return (positives + 1) / (np.sum(known, axis=0) + 2)


def positive_weights(labels: np.ndarray, known: np.ndarray, power: float) -> np.ndarray:
  """How much a positive weighs in each category [C]: (negatives / positives)^power, by base rate.

  Weights move all probabilities up, which calibration takes back.
  """
  rates = base_rates(labels, known)
  return np.asarray(((1 - rates) / rates) ** power, np.float32)


def logits(
  network: heads.LabelNetwork, params: Params, batch: LabelBatch, first_block: int = 0
) -> jax.Array:
  """Logits [B, M, C] of the texts of a batch; see `heads.LabelNetwork`."""
  inputs = batch.inputs, batch.positions, batch.segments
  return network.apply({"params": params}, *inputs, first_block, batch.labels.shape[1])


def entropies(found: jax.Array, labels: jax.Array, positive_weights: jax.Array) -> jax.Array:
  """-w y log sigmoid(z) - (1 - y) log(1 - sigmoid(z)) of logits z, elementwise; w is [C]."""
  weights = jnp.broadcast_to(positive_weights, found.shape)
  positive, negative = -jax.nn.log_sigmoid(found), -jax.nn.log_sigmoid(-found)
  return jnp.where(labels > 0, weights * positive, negative)


def loss(
  network: heads.LabelNetwork,
  params: Params,
  batch: LabelBatch,
  positive_weights: jax.Array,
  first_block: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Binary cross-entropy, averaged over the known labels of the batch, whatever their category.

  So a category that few texts are labelled for weighs as its labels do. Returns the loss and the
  logits [B, M, C].
  """
  found = logits(network, params, batch, first_block)
  each = entropies(found, batch.labels, positive_weights)
  return masked.mean(each, batch.known), found


def step(
  state: FitState,
  batch: LabelBatch,
  frozen: Params,
  positive_weights: jax.Array,
  *,
  network: heads.LabelNetwork,
  optimizer: optax.GradientTransformation,
  micro_batches: int,
  first_block: int,
) -> tuple[FitState, Metrics]:
  """One optimiser step."""

  def objective(params: Params, part: LabelBatch):
    whole = optim.merge(params, frozen)
    value, found = loss(network, whole, part, positive_weights, first_block)
    sums = count(found, part)
    return value, (sums["known"], sums)

  value, sums, grads = accumulate.value_and_grad(objective, state.params, batch, micro_batches)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {
    "moderation/loss": value,
    "moderation/accuracy": sums["correct"] / jnp.maximum(sums["known"], 1.0),
    "moderation/labels": sums["known"],
    "moderation/positives": sums["positives"],
    "moderation/grad_norm": optax.tree.norm(grads),
  }
  return FitState(state.step + 1, params, opt_state), metrics


def count(found: jax.Array, batch: LabelBatch) -> Metrics:
  """Known labels, positives among them, and how many a logit of the right sign gets right."""
  right = ((found > 0) == (batch.labels > 0)).astype(jnp.float32)
  return {
    "known": jnp.sum(batch.known),
    "positives": masked.total(batch.labels, batch.known),
    "correct": masked.total(right, batch.known),
  }


def evaluate(
  network: heads.LabelNetwork, params: Params, batch: LabelBatch, first_block: int = 0
) -> Metrics:
  """Sums over one held-out batch, to be added over batches; see `summarize`. Unweighted."""
  found = logits(network, params, batch, first_block)
  each = entropies(found, batch.labels, jnp.ones(found.shape[-1]))
  return count(found, batch) | {"loss": masked.total(each, batch.known)}


def summarize(sums: Metrics) -> dict[str, float]:
  """Held-out figures from added-up `evaluate` sums; nats a known label."""
  known = max(float(sums["known"]), 1.0)
  return {"loss": float(sums["loss"]) / known, "accuracy": float(sums["correct"]) / known}
