"""Kernels cut into panels of columns: how a CPU multiplies a few rows with a large matrix fastest.

A product of 8 rows reads every kernel once and computes little with what it reads. A CPU goes over
such a kernel in strips of columns, a few vectors wide, and the rows of a strip lie far apart in
memory; panels of a strip's width it reads from the first byte to the last. So decoding copies the
kernels into panels before its loop, and its steps multiply with these. The kernels stay what they
are, for whoever reads many rows: prompts, scoring and training.

Panels are variables of a collection of their own, beside the parameters:

  few = {"params": params} | panels.of(policy, params)
  policy.apply(few, ...)  # the same numbers, but for the order of sums

S devices that share a kernel's columns cut each its own, [S, P, K, WIDTH] in all; those that share
its rows have panels of theirs, [1, P, K, WIDTH] in all, split along K.
"""

import functools
import math
import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from rlhf_jax.networks.gradients import product
from rlhf_jax.parallel.rules import own_part
from rlhf_jax.types import Params

CPU = pathlib.Path("/proc/cpuinfo")


def fastest(cpu: str) -> tuple[int, int]:
  """(columns of a panel, rows up to which they pay) on a CPU of this description, as measured.

  With AVX-512 64 columns were faster than 32 and 128, and no panels for 32 rows than panels. With
  AVX2 16 were faster than 8, 24, 32, 64 and 128, and than none for 32 rows, but not for 64.
  """
  return (64, 16) if "avx512f" in cpu.split() else (16, 32)


WIDTH, MOST_ROWS = fastest(CPU.read_text() if CPU.exists() else "")  # rows: of a device
# Rows up to which devices that have all parameters share them rather than the rows. Of two devices
# 16 rows were up to a fifth faster, 32 were not.
GROUP_ROWS = 16
COLLECTION = "panels"
# XLA's options with which a product repeats its rows as it reads them, and no copies are written.
FUSED = (
  (
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE",
  ),
)


class Product(nn.Module):
  """The product of a flax layer (its `dot_general_cls`): by panels where there are any."""

  of_columns: bool  # what of a kernel that devices share each of them has: columns, or rows

  @nn.compact
  def __call__(self, x, kernel, dimension_numbers, precision=None):
    """As `lax.dot_general`, of the last axes of x with the first of the kernel."""
    (axes, _), _ = dimension_numbers
    rows, inner = x.shape[: -len(axes)], math.prod(kernel.shape[: len(axes)])
    columns = kernel.shape[len(axes) :]
    if self.is_mutable_collection(COLLECTION) and not self.is_initializing():
      own = own_part(cut, 1, 0) if self.of_columns else own_part(cut, 0, 2)
      self.put_variable(COLLECTION, "kernel", own(kernel.reshape(inner, -1)))
    if not self.has_variable(COLLECTION, "kernel"):
      return product(x, kernel, dimension_numbers, precision)
    panels = self.get_variable(COLLECTION, "kernel")
    out = multiply(x.reshape(-1, inner), panels, precision)
    return out[..., : math.prod(columns) // panels.shape[0]].reshape(*rows, *columns)


OfColumns = functools.partial(Product, of_columns=True)
OfRows = functools.partial(Product, of_columns=False)


def together(layers: Sequence[nn.DenseGeneral], inputs: Sequence[jax.Array]) -> list[jax.Array]:
  """Each layer of its input [..., D]: as one product where there are panels and one input for all.

  The layers are of one module and have no bias, nor a `Product` of their own; devices that share
  them have columns of each. A product by panels costs something however small it is.
  """
  parent, x, dtype = layers[0].parent, inputs[0], layers[0].dtype
  if parent.is_mutable_collection(COLLECTION) and not parent.is_initializing():
    kernels = [layer.variables["params"]["kernel"].astype(dtype) for layer in layers]
    kernels = [kernel.reshape(kernel.shape[0], -1) for kernel in kernels]
    made = [own_part(cut, 1, 0)(kernel) for kernel in kernels]
    parent.put_variable(COLLECTION, "kernels", jnp.concatenate(made, axis=1))
  if not parent.has_variable(COLLECTION, "kernels") or any(other is not x for other in inputs):
    return [layer(own) for layer, own in zip(layers, inputs, strict=True)]
  panels = parent.get_variable(COLLECTION, "kernels")
  out = multiply(x.astype(dtype).reshape(-1, x.shape[-1]), panels)
  found, start = [], 0
  for layer in layers:
    features = np.atleast_1d(layer.features)
    columns = math.prod(features) // panels.shape[0]
    found.append(out[..., start : start + columns].reshape(*x.shape[:-1], *features))
    start += -(-columns // WIDTH) * WIDTH
  return found


def of(network: nn.Module, params: Params) -> dict:
  """The panels of all kernels of a network, {"panels": tree}; pure and jittable."""
  blank = jnp.zeros((1, 1), jnp.int32)
  _, made = network.apply({"params": params}, blank, blank, blank, mutable=[COLLECTION])
  return made


def cut(kernel: jax.Array) -> jax.Array:
  """[K, N] as panels [1, N / WIDTH, K, WIDTH]; the last is filled up with zeros."""
  inner, columns = kernel.shape
  count = -(-columns // WIDTH)
  kernel = jnp.pad(kernel, ((0, 0), (0, count * WIDTH - columns)))
  panels = kernel.reshape(inner, 1, count, WIDTH).transpose(1, 2, 0, 3)
  # Left to itself XLA takes the kernel's own order for theirs, and copies it twice.
  return with_layout_constraint(panels, Layout((0, 1, 2, 3)))


def multiply(x: jax.Array, panels: jax.Array, precision=None) -> jax.Array:
  """x [M, K] times panels [S, P, K, WIDTH], [M, S, P * WIDTH]."""
  shares, count, inner, _ = panels.shape
  # With the rows repeated it is a batch of products, and no panel is moved to make one of it.
  repeated = jnp.broadcast_to(x, (shares * count, *x.shape))
  panels = panels.reshape(shares * count, inner, -1)
  out = jax.lax.dot_general(repeated, panels, (((2,), (1,)), ((0,), (0,))), precision)
  out = out.reshape(shares, count, x.shape[0], -1).transpose(2, 0, 1, 3)
  return out.reshape(x.shape[0], shares, -1)


@functools.cache
def compiler_options() -> tuple[tuple[str, str], ...]:
  """XLA's options, in pairs, for a function that multiplies with panels.

  For no other: products of many rows take in more than a repetition by them, and become slower.
  """
  if jax.default_backend() != "cpu":
    return ()
  try:
    jax.jit(lambda: 0, compiler_options=dict(FUSED)).lower().compile()
  except jax.errors.JaxRuntimeError:  # another version, which does not know them
    return ()
  return FUSED
