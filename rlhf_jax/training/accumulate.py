"""The gradient of a batch whose activations do not fit at once: micro-batch by micro-batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.parallel import rules
from rlhf_jax.types import Metrics, Params, UserError

# `(params, batch) -> (mean, (weight, sums))`: the mean loss over `weight` items (tokens, prompts),
# and figures that add up over the parts of a batch.
Loss = Callable[[Params, Any], tuple[jax.Array, tuple[jax.Array, Metrics]]]


def value_and_grad(
  loss: Loss, params: Params, batch: Any, micro_batches: int
) -> tuple[jax.Array, Metrics, Params]:
  """Mean loss, sums and gradient of a batch, as if it had been taken at once.

  Micro-batches hold different numbers of items, so their means do not average to the mean; what is
  added up is mean x weight, and the sum of weights divides at the end. Each part of a mesh's `data`
  adds up its own rows, and gradients go from one to another once for all micro-batches.
  """

  def total(params: Params, part: Any) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    mean, (weight, sums) = loss(params, part)
    return mean * weight, (weight, sums)

  run = jax.value_and_grad(total, has_aux=True)

  def over_parts(params: Params, batch: Any):
    parts = split(batch, micro_batches)
    shapes = jax.eval_shape(run, params, jax.tree.map(lambda x: x[0], parts))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    add = lambda seen, part: (jax.tree.map(jnp.add, seen, run(params, part)), None)
    return jax.lax.scan(add, nothing, parts)[0]

  if micro_batches == 1:
    found = run(params, batch)
  else:
    rows = len(jax.tree.leaves(batch)[0]) // micro_batches
    found = rules.sum_over_data(over_parts, rows)(params, batch)
  (value, (weight, sums)), grads = found
  scale = 1.0 / jnp.maximum(weight, 1.0)
  return value * scale, sums, jax.tree.map(lambda g: g * scale, grads)


def in_parts(function: Callable, batch: Any, parts: int) -> Any:
  """`function(batch)`, rows to rows, on one part of the rows after the other."""
  if parts == 1:
    return function(batch)
  done = jax.lax.map(function, split(batch, parts))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), done)


def split(batch: Any, parts: int) -> Any:
  """[B, ...] to [parts, B / parts, ...]: part i holds rows i, i + parts, ...

  So each device goes on with rows that it has.
  """
  return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def check(name: str, rows: int, micro_batches: int) -> None:
  """Raises a UserError unless the rows of a step split; `name` is the config section."""
  if rows % micro_batches:
    raise UserError(
      f"config {name}: {rows} rows at a time do not divide into micro_batches {micro_batches}; use "
      f"a divisor of {rows}."
    )
