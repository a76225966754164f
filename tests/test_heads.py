"""Heads on the trunk: how they start, where they are read, and token likelihoods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.networks import heads, likelihood

D = tiny.MODEL.d_model


@pytest.fixture(scope="module")
def policy_params():
  return tiny.params(tiny.POLICY, 0)


@pytest.fixture(scope="module")
def scalar_params():
  return tiny.params(tiny.SCALAR, 1)


@pytest.mark.conformance("A14")
@pytest.mark.parametrize("way", ["init", "scalar_from_trunk"])
def test_the_scalar_head_starts_with_std_1_over_root_of_d_plus_1_and_bias_0(way):
  keys = jax.random.split(jax.random.key(0), 300)
  if way == "init":
    draw = lambda key: heads.init(tiny.SCALAR, key)["score"]
  else:
    draw = lambda key: heads.scalar_from_trunk(tiny.SCALAR, {}, key)["score"]
  score = jax.jit(jax.vmap(draw))(keys)
  np.testing.assert_allclose(np.std(score["kernel"]), (D + 1) ** -0.5, rtol=0.1)
  assert abs(np.mean(score["kernel"])) < 0.02
  assert np.all(np.asarray(score["bias"]) == 0.0)


@pytest.mark.conformance("B22")
def test_the_scalar_network_gives_one_float32_a_token(scalar_params):
  tokens = tiny.random_tokens((3, 5), 0)
  layout = heads.layout(jnp.ones((3, 5)))
  values = jax.eval_shape(tiny.SCALAR.apply, {"params": scalar_params}, tokens, *layout)
  assert values.shape == (3, 5) and values.dtype == jnp.float32
  assert scalar_params["score"]["kernel"].shape == (D, 1)


@pytest.mark.conformance("A54")
def test_a_scalar_network_from_a_policy_copies_its_trunk_and_shares_no_buffer(policy_params):
  scalar = heads.scalar_from_trunk(tiny.SCALAR, policy_params["trunk"], jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, scalar["trunk"], policy_params["trunk"])
  address = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
  assert not address(scalar) & address(policy_params)


@pytest.mark.conformance("B22")
def test_the_same_key_gives_the_same_parameters_and_another_key_others():
  init = jax.jit(lambda key: heads.init(tiny.SCALAR, key))
  draw = lambda seed: tiny.digest(init(jax.random.key(seed)))
  assert draw(3) == draw(3)
  assert draw(3) != draw(4)


def test_layout_counts_real_tokens_only():
  mask = jnp.array([[0.0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]])
  positions, segments = heads.layout(mask)
  expected = [[0, 0, 0, 1, 2], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
  np.testing.assert_array_equal(positions, expected)
  np.testing.assert_array_equal(segments, mask)


@pytest.mark.conformance("A15", "A17")
def test_the_last_token_is_the_last_real_column_wherever_the_padding_is():
  mask = jnp.array([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
  np.testing.assert_array_equal(heads.last_column(mask), [4, 1, 4, 2])


def test_a_tied_head_is_the_transposed_embedding():
  network = heads.Policy(dataclasses.replace(tiny.MODEL, tie_embeddings=True))
  params = tiny.params(network, 2)
  assert set(params) == {"trunk"}
  tokens = tiny.random_tokens((2, 4), 0)
  layout = heads.layout(jnp.ones((2, 4)))
  apply = jax.jit(network.apply, static_argnames="method")
  hidden, _ = apply({"params": params}, tokens, *layout, method="hidden")
  logits = apply({"params": params}, tokens, *layout)
  expected = np.asarray(hidden) @ np.asarray(params["trunk"]["embed"]["embedding"]).T
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


# Blocks that all networks share.


def trunks(changed_name=None):
  """A policy's trunk and a copy in which one part may differ."""
  first = tiny.params(tiny.POLICY, 3)["trunk"]
  move = lambda name, tree: jax.tree.map(lambda x: x + (name == changed_name), tree)
  return first, {name: move(name, tree) for name, tree in first.items()}


@pytest.mark.parametrize(
  "changed_name, frozen_names, blocks",
  [
    (None, ("embed", "block_0", "block_1"), 2),
    (None, ("embed", "block_0"), 1),
    ("block_1", ("embed", "block_0", "block_1"), 1),  # another block 1: not shared
    (None, ("block_0", "block_1"), 0),  # the embedding trains
    ("embed", ("embed", "block_0"), 0),
    ("final_norm", ("embed", "block_0"), 1),  # comes after the blocks
  ],
)
def test_the_shared_stem_ends_where_networks_differ_or_train(changed_name, frozen_names, blocks):
  first, other = trunks(changed_name)
  frozen = {name: first[name] for name in frozen_names}
  assert heads.shared_stem(tiny.MODEL, [first, other], frozen) == blocks


def test_a_partly_frozen_block_is_not_shared():
  first, other = trunks()
  frozen = {"embed": first["embed"], "block_0": {"mlp": first["block_0"]["mlp"]}}
  assert heads.shared_stem(tiny.MODEL, [first, other], frozen) == 0


# Likelihoods.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_logprobs_and_entropy_equal_numpy(temperature):
  rng = np.random.default_rng(0)
  logits = rng.normal(0.0, 3.0, (4, 5, 7)).astype(np.float32)
  tokens = rng.integers(0, 7, (4, 5))
  scaled = logits.astype(np.float64) / temperature
  logs = scaled - np.log(np.sum(np.exp(scaled), axis=-1, keepdims=True))
  expected = np.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]
  got = likelihood.token_logprobs(logits, tokens, temperature)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  entropy = -np.sum(np.exp(logs) * logs, axis=-1)
  np.testing.assert_allclose(likelihood.entropy(logits, temperature), entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.conformance("B9")
def test_entropy_is_between_0_and_log_v():
  logits = jnp.stack([jnp.zeros(8), jnp.arange(8) * 50.0, jnp.full(8, -1e4)])
  np.testing.assert_allclose(
    likelihood.entropy(logits, 1.0), [np.log(8), 0.0, np.log(8)], rtol=1e-5, atol=1e-6
  )


def test_logprobs_of_huge_logits_are_finite_with_finite_gradients():
  logits = jnp.array([[3e4, -3e4, 0.0]])
  value, gradient = jax.value_and_grad(
    lambda x: jnp.sum(likelihood.token_logprobs(x, jnp.array([1]), 0.5))
  )(logits)
  np.testing.assert_allclose(value, -1.2e5, rtol=1e-6)
  np.testing.assert_allclose(gradient, [[-2.0, 2.0, 0.0]], atol=1e-6)


@pytest.mark.conformance("A31")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_responses_are_scored_by_the_column_before_each_token(policy_params, temperature):
  P, R = 4, 3
  tokens = tiny.random_tokens((2, P + R), 0)
  mask = jnp.ones((2, P + R))
  whole = jax.jit(tiny.POLICY.apply)({"params": policy_params}, tokens, *heads.layout(mask))
  logits, responses = whole[:, P - 1 : -1], tokens[:, P:]
  of = jax.jit(functools.partial(likelihood.of_responses, tiny.POLICY, temperature=temperature))
  got = of(policy_params, tokens, mask, responses)
  expected = likelihood.token_logprobs(logits, responses, temperature)
  np.testing.assert_allclose(got.logprobs, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    got.entropy, likelihood.entropy(logits, temperature), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(got.likeliest, np.argmax(logits, axis=-1) == responses)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("columns", [1, 3, 4, 99])
def test_logits_a_few_columns_at_a_time_change_neither_likelihoods_nor_gradients(columns, tied):
  whole = heads.Policy(tiny.changed(tiny.MODEL, tie_embeddings=tied))
  few = heads.Policy(tiny.changed(whole.config, compute__logit_columns=columns))
  params = tiny.params(whole, 0)
  hidden = np.random.default_rng(0).normal(size=(2, 8, tiny.MODEL.d_model)).astype(np.float32)
  tokens = tiny.random_tokens((2, 8), 1)
  weights = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def run(policy, params, hidden):
    def loss(params, hidden):
      of = likelihood.of_tokens(policy, params, hidden, tokens, 0.7)
      return jnp.sum(weights * of.logprobs), of

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, hidden)

  expected, got = run(whole, params, hidden), run(few, params, hidden)
  tiny.assert_trees_close(got, expected, rtol=1e-4, atol=1e-5)
  assert any(np.any(np.asarray(leaf) != 0.0) for leaf in jax.tree.leaves(got[1]))


def test_logits_a_few_columns_at_a_time_hold_that_share_of_the_memory():
  # 64 rows of 64 columns over a vocabulary of 8,192: the logits are 128 MiB, all else is small.
  def peak(columns):
    sizes = {"vocab_size": 8_192, "compute__logit_columns": columns}
    policy = heads.Policy(tiny.changed(tiny.MODEL, **sizes))
    params = jax.eval_shape(lambda: heads.init(policy, jax.random.key(0)))
    hidden = jax.ShapeDtypeStruct((64, 64, tiny.MODEL.d_model), jnp.float32)
    tokens = jax.ShapeDtypeStruct((64, 64), jnp.int32)
    loss = lambda *inputs: -jnp.mean(likelihood.of_tokens(policy, *inputs, 1.0).logprobs)
    compiled = jax.jit(jax.grad(loss)).lower(params, hidden, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20

  whole, few = peak(None), peak(8)
  assert whole > 128.0
  assert few < whole / 4


@pytest.mark.conformance("A31")
def test_the_gradient_of_a_logprob_never_reaches_its_own_or_later_tokens(policy_params):
  # All tokens differ, so a row of the embedding's gradient is the influence of one column.
  P, R, tokens = 3, 4, jnp.arange(2, 9)[None, :]
  embedding = policy_params["trunk"]["embed"]["embedding"]

  def logprobs(embedding):
    trunk = policy_params["trunk"] | {"embed": {"embedding": embedding}}
    params = policy_params | {"trunk": trunk}
    mask = jnp.ones((1, P + R))
    of = likelihood.of_responses(tiny.POLICY, params, tokens, mask, tokens[:, P:], 1.0)
    return of.logprobs[0]

  jacobian = jax.jit(jax.jacrev(logprobs))(embedding)[:, tokens[0]]
  influence = np.asarray(jnp.any(jacobian != 0.0, axis=-1))
  np.testing.assert_array_equal(influence, np.tri(R, P + R, P - 1, bool))
