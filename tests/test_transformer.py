"""The decoder against NumPy loops, and what may influence what, proved through gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.networks import attention, blocked, heads, pretrained
from rlhf_jax.networks.cache import KVCache
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.networks.gradients import swiglu
from rlhf_jax.networks.transformer import Transformer
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.types import UserError

NETWORK = Transformer(tiny.MODEL)
B, T = 3, 9


@pytest.fixture(scope="module")
def params():
  return tiny.params(tiny.SCALAR, 0)["trunk"]


@jax.jit
def run(params, tokens, positions, segments):
  return NETWORK.apply({"params": params}, tokens, positions, segments)[0]


@functools.partial(jax.jit, static_argnums=0)
def run_cached(network, params, tokens, positions, segments, cache):
  return network.apply({"params": params}, tokens, positions, segments, cache)


def plain(tokens):
  """Positions and segments of rows without padding."""
  return heads.layout(jnp.ones(tokens.shape))


def numpy_forward(params, tokens):
  """Hidden states [T, D] of one document, written from the papers with explicit loops."""
  c = tiny.MODEL
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, w: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_eps) * w["scale"]
  silu = lambda x: x / (1.0 + np.exp(-x))

  def turned(vector, position):
    half = c.head_dim // 2
    out = np.zeros_like(vector)
    for i in range(half):
      angle = position * c.rope_base ** (-2.0 * i / c.head_dim)
      a, b = vector[i], vector[i + half]
      out[i] = a * np.cos(angle) - b * np.sin(angle)
      out[i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out

  x = p["embed"]["embedding"][tokens]
  for layer in range(c.n_layers):
    block = p[f"block_{layer}"]
    y, mixed = norm(x, block["attn_norm"]), np.zeros((len(tokens), c.n_heads, c.head_dim))
    q, k, v = (np.einsum("td,dnh->tnh", y, block["attn"][n]["kernel"])
               for n in ("query", "key", "value"))  # fmt: skip
    for t in range(len(tokens)):
      for n in range(c.n_heads):
        group = n // (c.n_heads // c.n_kv_heads)
        query = turned(q[t, n], t) / np.sqrt(c.head_dim)
        weights = np.exp([query @ turned(k[s, group], s) for s in range(t + 1)])
        mixed[t, n] = (weights / weights.sum()) @ v[: t + 1, group]
    x = x + np.einsum("tnh,nhd->td", mixed, block["attn"]["out"]["kernel"])
    y, mlp = norm(x, block["mlp_norm"]), {n: w["kernel"] for n, w in block["mlp"].items()}
    x = x + (silu(y @ mlp["gate"]) * (y @ mlp["up"])) @ mlp["down"]
  return norm(x, p["final_norm"])


def test_hidden_states_equal_a_loop_written_from_the_papers(params):
  tokens = tiny.random_tokens((B, T), 0)
  got = run(params, tokens, *plain(tokens))
  for b in range(B):
    np.testing.assert_allclose(got[b], numpy_forward(params, tokens[b]), rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def influence(params):
  """The compiled `segments, positions -> [T, T]`: whether hidden state t depends on token s.

  All tokens differ, so the gradient in a row of the embedding is the influence of one column.
  """
  tokens = jnp.arange(2, 2 + T)
  probe = jax.random.normal(jax.random.key(0), (tiny.MODEL.d_model,))

  @jax.jit
  def depends(segments, positions):
    def probed(embedding):
      trunk = params | {"embed": {"embedding": embedding}}
      return run(trunk, tokens[None, :], positions[None, :], segments[None, :])[0] @ probe

    jacobian = jax.jacrev(probed)(params["embed"]["embedding"])[:, tokens]
    return jnp.any(jacobian != 0.0, axis=-1)

  return depends


@pytest.mark.conformance("B18")
@pytest.mark.parametrize(
  "segments, positions",
  [
    ([1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ([1, 1, 1, 2, 2, 3, 3, 0, 0], [0, 1, 2, 0, 1, 0, 1, 0, 0]),  # packed, padded on the right
    ([0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 2, 3, 4]),  # padded on the left
  ],
)
def test_gradients_prove_that_tokens_see_their_own_past_and_nothing_else(
  influence, segments, positions
):
  segments = np.array(segments)
  got = np.asarray(influence(jnp.asarray(segments), jnp.asarray(positions)))
  expected = np.tril(segments[:, None] == segments[None, :])
  real = segments > 0
  np.testing.assert_array_equal(got[real], expected[real])
  rows = jnp.asarray(segments)[None, :]
  mask = attention.attention_mask(rows, rows, 0)[0]
  np.testing.assert_array_equal(mask, expected & real[None, :])


@pytest.mark.conformance("A30", "B4", "B5")
@pytest.mark.parametrize("left, right", [(8, 0), (0, 8), (3, 5)])
def test_padding_on_either_side_changes_no_hidden_state(params, left, right):
  tokens = tiny.random_tokens((B, T), 1)
  junk = lambda width, seed: tiny.random_tokens((B, width), seed)
  padded = np.concatenate([junk(left, 2), tokens, junk(right, 3)], axis=1)
  mask = np.pad(np.ones((B, T), np.float32), ((0, 0), (left, right)))
  got = run(params, padded, *heads.layout(jnp.asarray(mask)))[:, left : left + T]
  np.testing.assert_allclose(got, run(params, tokens, *plain(tokens)), rtol=1e-5, atol=1e-5)


@pytest.mark.conformance("B4")
def test_a_row_does_not_depend_on_the_batch_it_stands_in(params):
  tokens = tiny.random_tokens((B, T), 4)
  whole = run(params, tokens, *plain(tokens))
  alone = run(params, tokens[:1], *plain(tokens[:1]))
  np.testing.assert_allclose(whole[0], alone[0], rtol=1e-5, atol=1e-5)
  others = run(params, tokens[::-1].copy(), *plain(tokens))
  np.testing.assert_allclose(whole, others[::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.conformance("B18")
def test_packed_documents_have_the_hidden_states_they_have_alone(params):
  lengths = np.array([4, 2, 3])
  documents = tiny.random_tokens((B, T), 5)
  mask = (np.arange(T)[None, :] < lengths[:, None]).astype(np.float32)
  alone = run(params, documents, *heads.layout(jnp.asarray(mask)))
  positions = np.concatenate([np.arange(n) for n in lengths])
  row = (documents[mask > 0], positions, np.repeat([1, 2, 3], lengths))
  packed = run(params, *(np.tile(x, (B, 1)) for x in row))  # the same row three times
  np.testing.assert_allclose(packed[0], alone[mask > 0], rtol=1e-5, atol=1e-5)


def read_in_pieces(network, params, tokens, mask, first):
  """Hidden states [B, T, D] through a cache: `first` columns at once, then one by one."""
  positions, segments = heads.layout(jnp.asarray(mask))
  cache, pieces = KVCache.empty(network.config, B, T + 2), []
  for cut in (slice(0, first), *(slice(t, t + 1) for t in range(first, T))):
    inputs = (tokens[:, cut], positions[:, cut], segments[:, cut])
    hidden, cache = run_cached(network, params, *inputs, cache)
    pieces.append(hidden)
  assert cache.index == T
  return np.concatenate(pieces, axis=1)


@pytest.mark.conformance("A29")
def test_reading_through_the_cache_equals_reading_at_once(params):
  tokens = tiny.random_tokens((B, T), 5)
  mask = (np.arange(T)[None, :] >= np.array([[0], [2], [3]])).astype(np.float32)
  expected = run(params, tokens, *heads.layout(jnp.asarray(mask)))
  got = read_in_pieces(NETWORK, params, tokens, mask, first=4)
  np.testing.assert_allclose(got[mask > 0], expected[mask > 0], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def scanned(params):
  """The same network with its layers under one scan, and its parameters, converted."""
  network = Transformer(tiny.changed(tiny.MODEL, compute__scan_layers=True))
  return network, pretrained.stack_layers({"trunk": params})["trunk"]


def test_scanned_layers_equal_unrolled_layers(params, scanned):
  network, stacked = scanned
  tokens = tiny.random_tokens((B, T), 6)
  blank = jnp.zeros((1, 2), jnp.int32)
  fresh = jax.eval_shape(network.init, jax.random.key(0), blank, blank, blank)["params"]
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stacked)
  got, _ = run_cached(network, stacked, tokens, *plain(tokens), None)
  np.testing.assert_allclose(got, run(params, tokens, *plain(tokens)), rtol=1e-5, atol=1e-5)


def test_scanned_layers_read_through_the_cache_as_well(params, scanned):
  tokens, mask = tiny.random_tokens((B, T), 7), np.ones((B, T), np.float32)
  expected = run(params, tokens, *plain(tokens))
  got = read_in_pieces(*scanned, tokens, mask, first=5)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


SOME = [(8, 9), (0, 9), (3, 7), "picked"]


@pytest.mark.parametrize(
  "compute",
  [{}, {"remat": True}, {"scan_layers": True}, {"scan_layers": True, "remat": True}],
  ids=str,
)
@pytest.mark.parametrize("columns", SOME, ids=str)
def test_some_columns_alone_have_the_states_and_gradients_that_they_have_among_all(
  params, columns, compute, monkeypatch
):
  monkeypatch.setattr(blocked, "BLOCK", 4)
  picked = np.array([[0, 8], [4, 4], [7, 2]])
  some = jnp.asarray(picked) if columns == "picked" else columns
  changes = {f"compute__{name}": value for name, value in compute.items()}
  network = Transformer(tiny.changed(tiny.MODEL, compute__attention="blocked", **changes))
  if "scan_layers" in compute:
    params = pretrained.stack_layers({"trunk": params})["trunk"]
  tokens, weights = tiny.random_tokens((B, T), 3), jax.random.normal(jax.random.key(0), (B, T, 1))
  take = lambda x: x[np.arange(B)[:, None], picked] if columns == "picked" else x[:, slice(*some)]

  def states(params, columns):
    run = lambda params: network.apply({"params": params}, tokens, *plain(tokens), columns=columns)
    hidden = run(params)[0] if columns is not None else take(run(params)[0])
    return jnp.sum(jnp.sin(hidden) * take(weights)), hidden

  of = lambda columns: jax.jit(
    jax.value_and_grad(lambda params: states(params, columns), has_aux=True)
  )(params)
  tiny.assert_trees_close(of(some), of(None), rtol=1e-4, atol=1e-5)


def test_a_prompt_read_for_its_last_column_fills_the_whole_cache(params):
  tokens = tiny.random_tokens((B, T), 4)
  read = jax.jit(
    lambda params, columns: NETWORK.apply(
      {"params": params}, tokens, *plain(tokens), KVCache.empty(tiny.MODEL, B, T), columns=columns
    ),
    static_argnums=1,
  )
  (last, cache), (whole, expected) = read(params, (T - 1, T)), read(params, None)
  np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=1e-5, atol=1e-5)
  tiny.assert_trees_close(cache, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_stem_and_the_blocks_after_it_equal_the_whole(params, blocks):
  tokens = tiny.random_tokens((B, T), 8)
  layout = plain(tokens)

  @jax.jit
  def in_two_parts(params):
    stem = NETWORK.apply({"params": params}, tokens, *layout, blocks, method="stem")
    return NETWORK.apply({"params": params}, stem, *layout, None, blocks)[0]

  expected = run(params, tokens, *layout)
  np.testing.assert_allclose(in_two_parts(params), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_activations_are_close_and_parameters_stay_float32(params):
  network = Transformer(tiny.changed(tiny.MODEL, compute__dtype="bfloat16"))
  tokens = tiny.random_tokens((B, T), 9)
  got, _ = run_cached(network, params, tokens, *plain(tokens), None)
  exact = run(params, tokens, *plain(tokens))
  assert got.dtype == jnp.bfloat16
  blank = jnp.zeros((1, 2), jnp.int32)
  fresh = jax.eval_shape(network.init, jax.random.key(0), blank, blank, blank)
  assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
  # bfloat16 keeps 8 bits; hidden states are of order 1 after the final norm.
  error = np.abs(np.asarray(got, np.float32) - exact)
  assert 0.0 < error.mean() < 0.02
  assert error.max() < 0.15


def test_a_row_of_padding_gives_finite_numbers_and_gradients(params):
  tokens = tiny.random_tokens((B, T), 10)
  layout = heads.layout(jnp.stack([jnp.ones(T), jnp.zeros(T), jnp.ones(T)]))
  loss = lambda params: jnp.sum(run(params, tokens, *layout) ** 2)
  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.conformance("A25")
def test_the_network_draws_no_random_number(params):
  tokens = tiny.random_tokens((1, 3), 11)
  program = str(jax.make_jaxpr(run)(params, tokens, *plain(tokens)))
  assert "dot_general" in program
  assert "random" not in program and "threefry" not in program


def test_rotary_angles_make_scores_depend_on_distance_alone():
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  def score(at, other):
    place = lambda p: attention.rotary(jnp.array([[p]]), 8, 100.0)
    turned = attention.rotate(query, *place(at)), attention.rotate(key, *place(other))
    return float(jnp.sum(turned[0] * turned[1]))

  np.testing.assert_allclose(score(7, 4), score(103, 100), rtol=1e-4)
  np.testing.assert_allclose(score(5, 5), np.sum(query * key), rtol=1e-5)
  assert abs(score(7, 4) - score(4, 7)) > 1e-3


@pytest.mark.parametrize("rows", [1, 3])
def test_a_query_of_zeros_beside_one_that_is_alone_changes_nothing(rows, monkeypatch):
  G, S, H = 2, 5, 8
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  cached = lambda: normal(G, S, H) if rows == 1 else normal(rows, G, S, H)
  query, mask = normal(rows, 1, G, H), jnp.asarray(rng.random((rows, 1, 2 * S)) < 0.7)
  inputs = query, cached(), cached(), mask, [(cached(), cached())]
  expected = attention.attend(*inputs)
  monkeypatch.setattr(mesh_lib, "platform", lambda: "tpu")
  np.testing.assert_allclose(attention.attend(*inputs), expected, rtol=1e-6, atol=1e-6)
  scores = f"f32[{G},2,{S}]" if rows == 1 else f"f32[{rows},{G},2,{S}]"
  assert scores in str(jax.make_jaxpr(attention.attend)(*inputs))


def test_the_gradient_of_swiglu_is_that_of_finite_differences():
  gate, up = np.linspace(-9, 9, 41), np.cos(np.arange(41.0))
  product = lambda gate, up: gate / (1 + np.exp(-gate)) * up
  both = functools.partial(map, np.float32)
  np.testing.assert_allclose(swiglu(*both((gate, up))), product(gate, up), rtol=1e-5, atol=1e-7)
  found = jax.grad(lambda *x: jnp.sum(swiglu(*x)), argnums=(0, 1))(*both((gate, up)))
  h = 1e-6
  along_gate = (product(gate + h, up) - product(gate - h, up)) / (2 * h)
  along_up = (product(gate, up + h) - product(gate, up - h)) / (2 * h)
  np.testing.assert_allclose(found, (along_gate, along_up), rtol=1e-4, atol=1e-6)


# Rematerialisation.


@pytest.mark.parametrize("scan_layers", [False, True])
def test_recomputing_blocks_changes_no_gradient_and_saves_memory(scan_layers):
  """Eight layers: what is kept between the passes is the stream, not what blocks do inside."""
  sizes = {"n_layers": 8, "d_model": 32, "d_ff": 256, "compute__scan_layers": scan_layers}
  tokens = tiny.random_tokens((4, 64), 8)

  def network(remat):
    return Transformer(tiny.changed(tiny.MODEL, compute__remat=remat, **sizes))

  def compiled(remat):
    def loss(params):
      hidden, _ = network(remat).apply({"params": params}, tokens, *plain(tokens))
      return jnp.mean(jnp.square(hidden[:, ::7]))

    return jax.jit(jax.grad(loss)).lower(params).compile()

  blank = jnp.zeros((1, 2), jnp.int32)
  init = lambda remat: network(remat).init(jax.random.key(0), blank, blank, blank)["params"]
  params = init(False)
  assert jax.tree.map(jnp.shape, init(True)) == jax.tree.map(jnp.shape, params)
  plainly, again = compiled(False), compiled(True)
  tiny.assert_trees_close(again(params), plainly(params), rtol=1e-3, atol=1e-6)
  if scan_layers:  # the CPU compiler orders unrolled blocks as it likes, and may keep all of them
    held = lambda program: program.memory_analysis().temp_size_in_bytes
    assert held(again) < held(plainly) / 2


def test_a_config_with_uneven_heads_or_odd_head_width_is_refused():
  fields = dataclasses.asdict(tiny.MODEL)
  with pytest.raises(UserError, match="n_heads 4 is not a multiple of n_kv_heads 3"):
    ModelConfig(**fields | {"n_kv_heads": 3})
  with pytest.raises(UserError, match="head_dim 5 must be even"):
    ModelConfig(**fields | {"head_dim": 5})
