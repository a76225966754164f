"""How parameters move: learning-rate schedules, AdamW, frozen parts and averaged weights.

`make(config, num_steps)` is the one optimiser of the package; a *step* here is one optimiser step
(a minibatch), not one batch of rollouts. Frozen parameters have neither gradients nor optimiser
state: `split` the tree, differentiate with respect to the trainable part, `merge` inside the loss.

  trainable, frozen = optim.split(params, (r"^trunk/layer_[0-7]/", r"embedding$"))
  loss = lambda trainable: stage.loss(optim.merge(trainable, frozen), batch)
"""

import dataclasses
import functools
import re
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from rlhf_jax.config import Count, Fraction, NonNegative, Positive, Range
from rlhf_jax.types import Params, UserError

Momentum = Annotated[float, Range(low=0.0, high=1.0, closed="low")]

# Weight decay pulls the matrices of linear maps towards 0. A norm's scale, a bias and an embedding
# row are no such maps; an embedding row of a rare token would only ever decay.
NOT_DECAYED = (r"(^|/)(scale|bias)$", r"(^|/)embedding$")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW and its learning rate. Steps are optimiser steps."""

  learning_rate: Positive  # the peak
  schedule: Literal["constant", "linear", "cosine"]  # after the warm-up
  warmup_steps: Count  # 0: start at the peak
  warmup_from: Fraction  # the first step's rate, as a part of the peak
  final_fraction: Fraction  # the rate after the last step, as a part of the peak
  beta1: Momentum
  beta2: Momentum
  eps: Positive  # added to sqrt(v), outside the root
  weight_decay: NonNegative  # decoupled, times the learning rate
  clip_norm: Positive | None  # of the global gradient norm; None leaves gradients alone

  def __post_init__(self):
    if self.schedule == "constant" and self.final_fraction != 1.0:
      raise UserError(
        f"config optim: schedule 'constant' ends at its peak, but final_fraction is "
        f"{self.final_fraction:g}; set it to 1.0, or choose 'linear' or 'cosine'."
      )


def schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
  """The learning rate of optimiser step s = 0, 1, ..., num_steps - 1.

  For s < warmup_steps it climbs in a straight line from `warmup_from` of the peak. Then, with
  t = (s - warmup_steps) / (num_steps - warmup_steps), it is the peak times

    constant  1
    linear    1 - (1 - final_fraction) t
    cosine    final_fraction + (1 - final_fraction) (1 + cos(pi t)) / 2   (Loshchilov & Hutter 2017)

  so that `final_fraction` is reached at s = num_steps, one step after the last (Ziegler et al. and
  N+ count the same way: their last step still has 1/num_steps of the peak).

  Raises:
    UserError: the warm-up leaves no step of the run.
  """
  warmup = config.warmup_steps
  if num_steps <= warmup:
    raise UserError(
      f"config optim: warmup_steps {warmup} leaves none of the run's {num_steps} optimiser steps; "
      f"use at most {max(num_steps - 1, 0)}."
    )

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    climb = config.warmup_from + (1.0 - config.warmup_from) * step / max(warmup, 1)
    t = jnp.clip((step - warmup) / (num_steps - warmup), 0.0, 1.0)
    decay = {
      "constant": jnp.ones_like(t),
      "linear": 1.0 - (1.0 - config.final_fraction) * t,
      "cosine": config.final_fraction
      + (1.0 - config.final_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
    }[config.schedule]
    return config.learning_rate * jnp.where(step < warmup, climb, decay)

  return rate


@functools.cache  # one optimiser of the same numbers, so that steps with it are the same program
def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """Clip to `clip_norm`, then AdamW (Loshchilov & Hutter 2019, algorithm 2) on `schedule`.

  theta <- theta - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay theta), PyTorch's placing of eps;
  TensorFlow's eps is smaller by sqrt(1 - beta2^t), which matters in the first steps. Decay skips
  the paths of `NOT_DECAYED`.

  Raises:
    UserError: as `schedule`.
  """
  adamw = optax.adamw(
    schedule(config, num_steps),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )
  if config.clip_norm is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decay_mask(params: Params) -> Params:
  """True on the parameters that weight decay pulls: those that match no regex of NOT_DECAYED."""
  decayed = lambda path: not any(re.search(regex, path) for regex in NOT_DECAYED)
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict({path: decayed(path) for path in flat}, sep="/")


def split(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
  """Parts the nested dict `params` into (trainable, frozen): frozen is what any regex finds.

  Regexes are searched for in paths such as "trunk/layer_0/mlp/up/kernel".

  Raises:
    UserError: a regex that finds nothing, or nothing left to train.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for regex in frozen:
    if not any(re.search(regex, path) for path in flat):
      shown = ", ".join(list(flat)[:4])
      raise UserError(
        f"frozen: the regex {regex!r} matches none of the {len(flat)} parameters; paths look like "
        f"{shown}."
      )
  still = {path for path in flat if any(re.search(regex, path) for regex in frozen)}
  if len(still) == len(flat):
    raise UserError(f"frozen: {list(frozen)} freezes all {len(flat)} parameters; nothing to train.")
  part = lambda inside: traverse_util.unflatten_dict(
    {path: leaf for path, leaf in flat.items() if (path in still) == inside}, sep="/"
  )
  return part(False), part(True)


def merge(trainable: Params, frozen: Params) -> Params:
  """The inverse of `split`."""
  flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trainable)
  return traverse_util.unflatten_dict(flat)


def ema_update(ema: Params, params: Params, decay: float) -> Params:
  """ema <- decay ema + (1 - decay) params (InstructGPT, appendix C.4, decay 0.992).

  In the dtype of `ema`; keep that float32, since 1 - 0.992 vanishes beside 1 in bfloat16.
  """
  mix = lambda old, new: decay * old + (1.0 - decay) * new.astype(old.dtype)
  return jax.tree.map(mix, ema, params)
