"""Attention by kernels of accelerators gives what plain attention gives, forwards and backwards.

What runs here is XLA's form of the function that cuDNN's kernel computes, and splash attention in
jax's emulator of a TPU. `test_plan.py` compiles it for a TPU where the compiler is installed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.networks import attention, fused, pretrained
from rlhf_jax.networks.transformer import Transformer
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel.mesh import MeshConfig
from rlhf_jax.types import UserError

# B, T, N, G, H: lengths that are filled up for both kernels, and one that is not.
SHAPES = [(2, 33, 4, 2, 8), (1, 256, 4, 1, 16), (3, 390, 2, 2, 8)]


def mask_of(query, segments, start):
  return attention.attention_mask(segments, segments, 0)[:, start : start + query.shape[1]]


def plain(query, key, value, segments, start):
  return attention.attend(query, key, value, mask_of(query, segments, start))


def cudnn(query, key, value, segments, start):
  return fused.by_cudnn(query, key, value, mask_of(query, segments, start), start, "xla")


splash = functools.partial(fused.by_splash, interpret=True)
of_mask = functools.partial(fused.by_masked_splash, interpret=True)


def masked_splash(query, key, value, segments, start):
  return of_mask(query, key, value, mask_of(query, segments, start))


KERNELS = {"cudnn": cudnn, "splash": splash, "masked splash": masked_splash}


def both_ways(attend, start, end, query, key, value, segments, gradient):
  """Outputs of real tokens from `start` to `end`, and the gradients of all inputs."""
  query, gradient = query[:, start:end], gradient[:, start:end]
  out, back = jax.vjp(lambda *x: attend(*x, segments, start), query, key, value)
  real = (segments > 0)[:, start:end, None, None]
  return jnp.where(real, out, 0.0), back(gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("attend", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("span", [(0, None), (0, -1), (7, -1)], ids=str)
def test_outputs_and_gradients_are_those_of_plain_attention(attend, shape, span):
  some = tiny.attention_inputs(shape)
  found = jax.jit(functools.partial(both_ways, attend, *span))(*some)
  expected = jax.jit(functools.partial(both_ways, plain, *span))(*some)
  tiny.assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(jax.tree.leaves(expected)[0]).max() > 0.1


@pytest.mark.parametrize(
  ("length", "filled", "block"),
  [(33, 128, 128), (513, 640, 128), (600, 640, 128), (2047, 2048, 512), (5124, 5632, 512)],
)
def test_splash_fills_up_to_large_blocks_where_that_adds_an_eighth_at_most(length, filled, block):
  assert (fused._in_blocks(length), fused._block_of(filled)) == (filled, block)


@pytest.mark.parametrize("attend", KERNELS.values(), ids=KERNELS)
def test_each_device_attends_to_its_own_rows_and_heads(attend):
  some = tiny.attention_inputs((4, 130, 4, 2, 8))
  step = functools.partial(both_ways, attend, 0, None)
  mesh = mesh_lib.make(MeshConfig(2, 2, 2))
  compiled = mesh_lib.jit(step, mesh).lower(*some).compile()
  found, expected = compiled(*some), jax.jit(step)(*some)
  tiny.assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
  """What is traced is for where the tests run, or for a TPU, whose kernel is emulated."""
  if request.param == "tpu":
    monkeypatch.setattr(mesh_lib, "platform", lambda: "tpu")
    monkeypatch.setattr(fused, "by_splash", splash)
    monkeypatch.setattr(fused, "by_masked_splash", of_mask)


@pytest.mark.parametrize(
  ("columns", "branched", "changes"),
  [
    (None, False, {}),
    (None, True, {}),
    ("picked", True, {"remat": True}),
    ((20, 39), False, {"remat": True}),
    ((20, 39), False, {"scan_layers": True}),
  ],
  ids=str,
)
@pytest.mark.usefixtures("platform")
def test_a_network_attends_alike_however_it_is_computed(columns, branched, changes):
  B, T = 3, 40
  params = {"trunk": tiny.params(tiny.SCALAR, 0)["trunk"]}
  params = (pretrained.stack_layers(params) if "scan_layers" in changes else params)["trunk"]
  tokens, segments = tiny.random_tokens((B, T), 0), jnp.asarray(np.repeat([[1, 2]], T // 2, axis=1))
  rows = tokens, jnp.tile(jnp.arange(T // 2), (B, 2)), jnp.tile(segments, (B, 1))
  if columns == "picked":
    columns = jnp.array([[5, 30], [0, 39], [21, 20]])
  branches = jnp.tile(jnp.arange(T) // 5 % 4, (B, 1)) if branched else None

  def states(how):
    compute = {f"compute__{name}": value for name, value in changes.items()}
    network = Transformer(tiny.changed(tiny.MODEL, compute__attention=how, **compute))
    run = lambda params: network.apply(
      {"params": params}, *rows, branches=branches, columns=columns
    )[0]
    loss = lambda params: jnp.mean(jnp.sin(run(params)))
    return jax.jit(lambda params: (run(params), jax.grad(loss)(params)))(params)

  tiny.assert_trees_close(states("fused"), states("plain"), rtol=1e-4, atol=1e-6)


def test_float32_on_a_gpu_is_refused(monkeypatch):
  monkeypatch.setattr(mesh_lib, "platform", lambda: "gpu")
  query, key, value, segments, _ = tiny.attention_inputs(SHAPES[0])
  seen = attention.Seen(attention.attention_mask(segments, segments, 0), segments)
  with pytest.raises(UserError, match="needs dtype 'bfloat16', and it is 'float32'"):
    fused.attend(query, key, value, seen)
