"""Products by panels are the plain ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.networks import gradients, heads, panels
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules

B, P = 8, 5
NETWORKS = {
  "plain": {},
  "tied": {"tie_embeddings": True},
  "scanned": {"compute__scan_layers": True},
  "several panels": {"d_ff": 150, "vocab_size": 200},
}


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 64, 65, 200])
def test_panels_hold_every_column_of_a_kernel(columns, width, monkeypatch):
  monkeypatch.setattr(panels, "WIDTH", width)
  chance = np.random.default_rng(0)
  x, kernel = chance.normal(size=(3, 7)), chance.normal(size=(7, columns))
  made = panels.cut(jnp.asarray(kernel))
  assert made.shape == (1, -(-columns // width), 7, width)
  np.testing.assert_allclose(
    panels.multiply(jnp.asarray(x), made)[:, 0, :columns], x @ kernel, rtol=1e-5, atol=1e-6
  )


def test_panels_are_as_wide_as_suits_the_processor():
  assert panels.fastest("model name: A\nflags: fpu sse2 avx avx2 avx512f avx512vl\n") == (64, 16)
  assert panels.fastest("model name: B\nflags: fpu sse2 avx avx2\n") == (16, 32)
  assert panels.fastest("") == (16, 32)  # a system that does not say


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_the_same_logits_from_its_panels_alone(name):
  policy = heads.Policy(tiny.changed(tiny.MODEL, **NETWORKS[name]))
  params = tiny.params(policy, 0)
  tokens = tiny.random_tokens((3, 9), 0)
  inputs = tokens, *heads.layout(jnp.ones_like(tokens))
  expected = policy.apply({"params": params}, *inputs)
  made = jax.jit(functools.partial(panels.of, policy))(params)
  # Kernels of NaN show that none of them is read; norms and the embedding are no products.
  gone = lambda path, x: x * jnp.nan if rules.path_name(path).endswith("kernel") else x
  gone = jax.tree_util.tree_map_with_path(gone, params)
  assert np.all(np.isnan(policy.apply({"params": gone}, *inputs)))
  got = policy.apply({"params": gone} | made, *inputs)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_making_them_leaves_the_parameters_as_they_are():
  created = tiny.POLICY.init(jax.random.key(0), *(jnp.zeros((1, 2), jnp.int32),) * 3)
  assert set(created) == {"params"}
  made = panels.of(tiny.POLICY, created["params"])
  kernels = [x for p, x in jax.tree_util.tree_leaves_with_path(created) if "kernel" in str(p)]
  total = lambda arrays: sum(float(jnp.sum(jnp.abs(x))) for x in arrays)
  np.testing.assert_allclose(total(jax.tree.leaves(made)), total(kernels), rtol=1e-5)


@functools.cache
def sampled(choice, axes=(1, 1, 1), **changes):
  policy = heads.Policy(tiny.changed(tiny.MODEL, compute__panels=choice, **changes))
  sampling = tiny.changed(tiny.SAMPLING, max_new_tokens=6, cache_sizes=2, compact_to=(0.5, 0.25))
  mesh = tiny.mesh(axes)
  stops = Stops(tuple(range(1, 9)))
  generate = decode.compiled(policy, mesh, B, config=sampling, stops=stops, pad_id=tiny.PAD)
  params = rules.place(tiny.params(policy, 0), mesh)
  prompts = mesh_lib.put_batch(mesh, tiny.mixed_prompts(B, P, 0))
  return jax.device_get(generate(params, prompts, jax.random.key(0)))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
  ("choice", "axes"),
  [
    ("always", (1, 1, 1)),
    ("always", (2, 1, 1)),
    ("always", (1, 2, 2)),
    ("auto", (1, 1, 2)),
    ("auto", (2, 1, 1)),  # in one group
  ],
)
def test_decoding_by_panels_draws_the_same_tokens(choice, axes, name):
  expected = sampled("never", **NETWORKS[name])
  got = sampled(choice, axes, **NETWORKS[name])
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)
  assert 0 < expected.finished.sum() < B


@pytest.mark.parametrize(
  ("choice", "axes", "rows", "expected"),
  [
    ("auto", (1, 1, 1), 1, False),
    ("auto", (1, 1, 1), panels.MOST_ROWS, True),
    ("auto", (1, 1, 1), panels.MOST_ROWS + 1, False),
    ("auto", (2, 1, 1), 2 * panels.MOST_ROWS, True),
    ("auto", (1, 2, 1), 8, False),
    ("auto", (1, 1, 2), 1, True),
    ("auto", (1, 1, 2), panels.MOST_ROWS, True),
    ("auto", (1, 1, 2), panels.MOST_ROWS + 1, False),
    ("always", (1, 1, 2), 99, True),
    ("never", (1, 1, 1), 8, False),
  ],
)
def test_a_cpu_uses_them_for_few_rows_where_it_need_not_fetch_parameters(
  choice, axes, rows, expected
):
  compute, found = tiny.changed(tiny.MODEL.compute, panels=choice), []
  mesh_lib.jit(lambda: found.append(compute.in_panels(rows)), tiny.mesh(axes))()
  assert found == [expected]


def test_only_few_rows_are_compiled_with_the_options_of_panels():
  options = lambda choice, rows: tiny.changed(tiny.MODEL.compute, panels=choice).compiler_options(
    rows, tiny.mesh((2, 1, 1))
  )
  most = 2 * panels.MOST_ROWS
  assert options("auto", most) == options("always", 99) == panels.compiler_options()
  assert options("auto", 2) == options("auto", most + 2) == options("never", most) == ()


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
  monkeypatch.setattr(panels, "FUSED", (("xla_cpu_no_such_option", "1"),))
  assert panels.compiler_options.__wrapped__() == ()


@pytest.mark.parametrize(
  ("axes", "rows", "changes", "expected"),
  [
    ((2, 1, 1), panels.GROUP_ROWS, {}, True),
    ((2, 1, 1), panels.GROUP_ROWS + 1, {}, False),
    ((2, 1, 1), 1, {}, False),
    ((1, 1, 1), 8, {}, False),
    ((1, 1, 2), 8, {}, False),  # a group already
    ((1, 2, 1), 8, {}, False),
    ((2, 1, 1), 8, {"vocab_size": 201}, False),  # does not divide
    ((2, 1, 1), 8, {"n_heads": 3, "n_kv_heads": 3}, False),
    ((2, 1, 1), 8, {"compute__panels": "never"}, False),
    ((2, 1, 1), 8, {"compute__panels": "always"}, False),
  ],
)
def test_devices_become_one_group_for_very_few_rows(axes, rows, changes, expected):
  model = tiny.changed(tiny.MODEL, **changes)
  assert model.in_one_group(rows, tiny.mesh(axes)) == expected


def test_each_device_of_a_group_has_its_part_of_the_panels():
  policy = heads.Policy(tiny.changed(tiny.MODEL, d_ff=150))

  def made(params):
    with rules.one_group():
      return panels.of(policy, params)

  mesh = tiny.mesh((2, 1, 1))
  found = mesh_lib.jit(mesh_lib.bind(made), mesh)(tiny.params(policy, 0))
  for path, x in jax.tree_util.tree_leaves_with_path(found):
    shares, inner = x.shape[0], x.shape[2]
    of_rows = any(name in rules.path_name(path) for name in ("out", "down"))
    expected = (1, x.shape[1], inner // 2 if of_rows else inner, x.shape[3])
    assert shares == (1 if of_rows else 2)
    assert {shard.data.shape for shard in x.addressable_shards} == {expected}


def test_a_group_answers_one_prompt_several_times():
  mesh, policy = tiny.mesh((2, 1, 1)), tiny.POLICY
  sampling = tiny.changed(tiny.SAMPLING, max_new_tokens=6, compact_to=(0.5,))
  how = {"config": sampling, "stops": Stops(tuple(range(1, 9))), "pad_id": tiny.PAD, "samples": 3}
  prompt, key = tiny.mixed_prompts(1, P, 0), jax.random.key(0)
  params = tiny.params(policy, 0)
  assert policy.config.in_one_group(3, mesh)
  got = decode.compiled(policy, mesh, 1, **how)(
    mesh_lib.put_replicated(mesh, params), mesh_lib.put_replicated(mesh, prompt), key
  )
  expected = jax.jit(functools.partial(decode.generate, policy, **how))(params, prompt, key)
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_a_group_exchanges_no_more_than_it_must():
  """In a loop: two sums a layer, the logits once, and what was drawn once."""
  mesh, config = tiny.mesh((2, 1, 1)), tiny.MODEL
  sampling = tiny.changed(tiny.SAMPLING, max_new_tokens=6, cache_sizes=1, compact_to=(0.5,))
  how = {"config": sampling, "stops": Stops(tuple(range(1, 9))), "pad_id": tiny.PAD}
  shapes = jax.eval_shape(lambda: (tiny.params(tiny.POLICY, 0), tiny.mixed_prompts(B, P, 0)))
  place = lambda tree, spec: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
  )
  program = decode.compiled(tiny.POLICY, mesh, B, **how).lower(
    place(shapes[0], PartitionSpec()), place(shapes[1], mesh_lib.BATCH), jax.random.key(0)
  )
  loops, before = {}, []  # exchanges of each computation that says to be a loop's body; of no loop
  for line in program.compile().as_text().splitlines():
    kind = re.search(r" (all-reduce|all-gather|all-to-all|collective-permute)(-start)?\(", line)
    if kind and "while/body" in line:
      where = line.split('op_name="')[1].split("while/body")[0]
      loops.setdefault(where, []).append(kind[1])
    elif kind:
      before.append(kind[1])
  # Each layer's keys and values, the first logits; the prompts' ends, the first tokens.
  assert sorted(before) == ["all-gather"] * 2 + ["all-to-all"] * (2 * config.n_layers + 1)
  assert len(loops) == 2  # of eight rows, and of four
  for found in loops.values():
    assert found.count("all-reduce") == 2 * config.n_layers
    assert found.count("all-to-all") == found.count("all-gather") == 1
    assert found.count("collective-permute") == 0


@pytest.mark.parametrize(
  ("x", "kernel", "axes"),
  [((6, 4), (4, 5), 1), ((2, 3, 4), (4, 5, 2), 1), ((2, 3, 4, 5), (4, 5, 6), 2)],
)
def test_a_product_has_the_gradients_of_dot_general(x, kernel, axes):
  draw = np.random.default_rng(0)
  x, kernel = (draw.standard_normal(shape).astype(np.float32) for shape in (x, kernel))
  last = tuple(range(x.ndim - axes, x.ndim))
  numbers = ((last, tuple(range(axes))), ((), ()))
  ours = jax.vjp(lambda *both: gradients.product(*both, numbers), x, kernel)
  plain = jax.vjp(lambda *both: jax.lax.dot_general(*both, numbers), x, kernel)
  np.testing.assert_array_equal(ours[0], plain[0])
  d = draw.standard_normal(plain[0].shape).astype(np.float32)
  for found, expected in zip(ours[1](d), plain[1](d), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
