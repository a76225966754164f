"""Operations whose gradient is written out, because a CPU takes longer over that of autodiff."""

import functools
import math

import jax


def product(x, kernel, dimension_numbers, precision=None):
  """As `lax.dot_general`, of the last axes of x with the first of the kernel.

  The kernel's gradient lies in memory as the kernel does. What autodiff makes is its transpose, and
  clipping and Adam then read one of their arrays across.
  """
  (axes, _), _ = dimension_numbers
  return _product(x, kernel, len(axes), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, kernel, axes, precision):
  contracted = range(x.ndim - axes, x.ndim), range(axes)
  return jax.lax.dot_general(x, kernel, (contracted, ((), ())), precision)


def _product_forward(x, kernel, axes, precision):
  return _product(x, kernel, axes, precision), (x, kernel)


def _product_backward(axes, precision, saved, d):
  # As matrices: where more than one axis is summed over XLA moves these together first.
  x, kernel = saved
  inner, columns = math.prod(kernel.shape[:axes]), math.prod(kernel.shape[axes:])
  rows, d, matrix = x.reshape(-1, inner), d.reshape(-1, columns), kernel.reshape(inner, columns)
  of_x = jax.lax.dot_general(d, matrix, (((1,), (1,)), ((), ())), precision)
  of_kernel = jax.lax.dot_general(rows, d, (((0,), (0,)), ((), ())), precision)
  return of_x.reshape(x.shape), of_kernel.reshape(kernel.shape)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, of which the backward pass keeps both inputs and no factor."""
  return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
  return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved, d):
  gate, up = saved
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  return d * up * (sigmoid + silu * (1 - sigmoid)), d * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
