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

# B, T, N, G, H: one block, blocks and a rest, several heads a key-value head, one head for all. The
# last three are cut into pairs, the very last after it was filled up.
SHAPES = [
  (3, 9, 4, 2, 4),
  (1, 70, 3, 1, 8),
  (2, 130, 4, 4, 8),
  (2, 144, 4, 4, 8),
  (2, 200, 6, 2, 4),
  (1, 515, 4, 2, 4),
]


def inputs(shape, dtype=jnp.float32):
  """Query, key, value, mask of packed rows that end in padding, and a gradient of the output."""
  *arrays, segments, gradient = tiny.attention_inputs(shape, dtype)
  return *arrays, attention.attention_mask(segments, segments, 0), gradient


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
@pytest.mark.parametrize("length", [blocked.SHORT, 2 * blocked.SHORT, blocked.LONG + 1])
def test_the_last_queries_alone_give_what_they_give_among_all(length, start):
  query, key, value, mask, gradient = inputs((2, length, 4, 4, 8))
  some = query[:, start:], key, value, mask[:, start:], gradient[:, start:]
  in_blocks = lambda *x: blocked.attend(*x, start)
  found = jax.jit(functools.partial(both_ways, in_blocks))(*some)
  expected = jax.jit(functools.partial(both_ways, attention.attend))(*some)
  tiny.assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_as_its_rounding():
  shape = SHAPES[4]
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
  # Rows of 144 are cut into pairs.
  for shape in [(8, 70, 4, 2, 4), (2, 70, 4, 2, 4), (8, 144, 4, 2, 4)]:
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

  assert "name=_attend" not in traced("plain") and "name=_attend" in traced("blocked")
  assert traced("auto") == traced("blocked")  # the tests run on a CPU
  assert "name=_attend" not in traced("blocked", blocked.BLOCK)  # one block gains nothing


def packed(*lengths):
  """Inputs of one row that holds documents of these lengths."""
  query, key, value, _, gradient = inputs((1, sum(lengths), 4, 2, 4))
  segments = jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None], jnp.int32)
  return query, key, value, attention.attention_mask(segments, segments, 0), gradient


@pytest.mark.parametrize("unseen", [0, 1], ids=["an earlier document", "the rest of the document"])
def test_keys_that_no_query_of_a_block_sees_are_not_read(unseen):
  # What is read spoils the sums, even if its weight is 0. Block by block, of 64: the first document
  # has 2, of the second the first one is asked for here.
  query, key, value, mask, gradient = packed(128, 128)
  asked = slice(128, 192)
  columns = slice(0, 128) if unseen == 0 else slice(192, 256)
  spoilt = [x.at[:, :, columns].set(jnp.nan) for x in (key, value)]
  only = jnp.zeros_like(gradient).at[:, asked].set(1.0)

  def run(key, value):
    out, back = jax.vjp(lambda *x: blocked.attend(*x, mask), query, key, value)
    of_query, of_key, of_value = back(only)
    return out[:, asked], of_query[:, asked], of_key[:, :, asked], of_value[:, :, asked]

  found, expected = jax.jit(run)(*spoilt), jax.jit(run)(key, value)
  if unseen == 0:
    tiny.assert_trees_close(found, expected, rtol=1e-6, atol=1e-6)
  else:  # the later block's queries read the earlier one's keys, so its gradients are spoilt
    tiny.assert_trees_close(found[:2], expected[:2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(256,), (128, 128), (64, 64, 64, 64), (100, 156), (1,) * 256])
def test_pairs_of_blocks_are_those_in_which_a_query_sees_a_key(lengths):
  mask = packed(*lengths)[3]
  count = lambda number, pair: number.at[pair.rows.start // 64, pair.keys.start // 64].add(1)
  each_pair = blocked._seen_pairs(mask, 64, 64)
  visits = jax.jit(lambda: each_pair(0, count, jnp.zeros((4, 4), jnp.int32)))()
  expected = [
    [mask[0, i : i + 64, j : j + 64].any() for j in range(0, 256, 64)] for i in range(0, 256, 64)
  ]
  np.testing.assert_array_equal(visits, np.asarray(expected, np.int32))


def test_blocks_are_of_one_size_and_leave_little_over():
  assert {n: blocked._block_of(n) for n in (144, 160, 192, 200, 256, 1_024, 5_124)} == {
    144: 48, 160: 40, 192: 64, 200: 40, 256: 64, 1_024: 64, 5_124: 48
  }  # fmt: skip
  assert all(-n % blocked._block_of(n) < 40 for n in range(129, 6_000))
