"""Attention in blocks gives what plain attention gives, forwards and backwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.networks import attention, blocked
from rlhf_jax.networks.transformer import Transformer
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel.mesh import MeshConfig

# B, T, N, G, H: one block, blocks and a rest, several heads a key-value head, one head for all.
SHAPES = [(3, 9, 4, 2, 4), (2, 130, 4, 4, 8), (2, 200, 6, 2, 4), (1, 70, 3, 1, 8)]


def inputs(shape, dtype=jnp.float32):
  """Query, key, value, mask of packed rows that end in padding, and a gradient of the output."""
  B, T, N, G, H = shape
  rng = np.random.default_rng(T)
  draw = lambda *size: jnp.asarray(rng.normal(size=size), dtype)
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
  segments[:, T - T // 5 :] = 0
  segments = jnp.asarray(segments, jnp.int32)
  mask = attention.attention_mask(segments, segments, 0)
  real = (segments > 0)[:, :, None, None]
  gradient = jnp.where(real, draw(B, T, N, H), 0.0).astype(dtype)
  return draw(B, T, N, H), draw(B, G, T, H), draw(B, G, T, H), mask, gradient


def both_ways(attend, query, key, value, mask, gradient):
  """Outputs of real tokens, and the gradients of all inputs."""
  out, back = jax.vjp(lambda *x: attend(*x, mask), query, key, value)
  real = jnp.any(mask, axis=-1)[:, :, None, None]
  return jnp.where(real, out, 0.0), back(gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", [1, 1 << 30], ids=["one by one", "all at once"])
def test_outputs_and_gradients_are_those_of_plain_attention(shape, tile, monkeypatch):
  monkeypatch.setattr(blocked, "TILE", tile)
  some = inputs(shape)
  found = jax.jit(functools.partial(both_ways, blocked.attend))(*some)
  expected = jax.jit(functools.partial(both_ways, attention.attend))(*some)
  tiny.assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(jax.tree.leaves(expected)[0]).max() > 0.1


@pytest.mark.parametrize("start", [1, 64, 100])
def test_the_last_queries_alone_give_what_they_give_among_all(start):
  query, key, value, mask, gradient = inputs(SHAPES[1])
  some = query[:, start:], key, value, mask[:, start:], gradient[:, start:]
  in_blocks = lambda *x: blocked.attend(*x, start)
  found = jax.jit(functools.partial(both_ways, in_blocks))(*some)
  expected = jax.jit(functools.partial(both_ways, attention.attend))(*some)
  tiny.assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_as_its_rounding():
  shape = SHAPES[2]
  run = lambda attend: jax.jit(functools.partial(both_ways, attend))
  precise = run(attention.attend)(*inputs(shape))
  rounded = inputs(shape, jnp.bfloat16)
  for attend in (attention.attend, blocked.attend):
    found = run(attend)(*rounded)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(precise)):
      np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_on_a_mesh_each_device_attends_to_its_own_rows_and_heads(axes):
  # Neither two rows nor two heads split over eight devices; on (2, 2, 2) all do but the two rows.
  for shape in [(8, 70, 4, 2, 4), (2, 70, 4, 2, 4)]:
    some = inputs(shape)
    expected = jax.jit(functools.partial(both_ways, blocked.attend))(*some)
    mesh = mesh_lib.make(MeshConfig(*axes))
    found = mesh_lib.jit(functools.partial(both_ways, blocked.attend), mesh)(*some)
    tiny.assert_trees_close(found, expected, rtol=1e-6, atol=1e-6)


def test_no_square_of_all_queries_and_keys_is_kept_for_the_backward_pass():
  B, T, N, G, H = 16, 512, 4, 4, 8
  some = inputs((B, T, N, G, H))
  temporary = lambda attend: (
    jax.jit(functools.partial(both_ways, attend))
    .lower(*some)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
  )
  square = 4 * B * N * T * T
  assert temporary(attention.attend) > square
  assert temporary(blocked.attend) < square / 2


def test_a_network_attends_as_its_config_says():
  def traced(how, length=blocked.BLOCK + 1):
    compute = dataclasses.replace(tiny.MODEL.compute, attention=how)
    network = Transformer(dataclasses.replace(tiny.MODEL, compute=compute))
    ones = jnp.ones((1, length), jnp.int32)
    params = tiny.params(tiny.SCALAR, 0)["trunk"]
    return str(jax.make_jaxpr(lambda p: network.apply({"params": p}, ones, ones, ones)[0])(params))

  assert "name=attend" not in traced("plain") and "name=attend" in traced("blocked")
  assert traced("auto") == traced("blocked")  # the tests run on a CPU
  assert "name=attend" not in traced("blocked", blocked.BLOCK)  # one block gains nothing


def test_blocks_are_few_and_cover_a_row():
  for length in (1, 63, 64, 65, 512, 513, 4_000):
    blocks = blocked._blocks(length)
    assert [i for b in blocks for i in range(b.start, b.stop)] == list(range(length))
    assert len(blocks) <= blocked.MOST_BLOCKS
