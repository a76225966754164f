"""Rollouts: what each network says, of which token, and where nobody says anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import rollout
from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.networks import heads, likelihood
from rlhf_jax.rollout import Judges, Scoring
from rlhf_jax.types import UserError

B, P, R = 8, 5, 6
EOS = 1
STOPS = tuple(range(1, 9))  # of which one is the EOS


@pytest.fixture(scope="module")
def networks():
  """Four different networks, so that none can stand in for another unnoticed."""
  return {
    "policy": tiny.params(tiny.POLICY, 0),
    "critic": tiny.params(tiny.SCALAR, 3),
    "judges": Judges(tiny.params(tiny.POLICY, 1), tiny.params(tiny.SCALAR, 2)),
  }


@pytest.fixture(scope="module")
def prompts():
  return tiny.mixed_prompts(B, P, 0)


@functools.cache
def compiled_generate(temperature):
  sampling = tiny.changed(tiny.SAMPLING, temperature=temperature)
  arguments = {"config": sampling, "stops": Stops(STOPS), "pad_id": tiny.PAD}
  return jax.jit(functools.partial(decode.generate, tiny.POLICY, **arguments))


@functools.partial(jax.jit, static_argnames=("temperature", "stem_blocks", "micro_batches"))
def score(judges, critic, prompts, completion, temperature=1.0, stem_blocks=0, micro_batches=1):
  how = Scoring(tiny.POLICY, tiny.SCALAR, temperature, EOS, stem_blocks, micro_batches)
  return rollout.score(how, judges, critic, prompts, completion)


@pytest.fixture(scope="module")
def completion(networks, prompts):
  return compiled_generate(1.0)(networks["policy"], prompts, jax.random.key(0))


@pytest.fixture(scope="module")
def seen(networks, prompts, completion):
  return score(networks["judges"], networks["critic"], prompts, completion)


@jax.jit
def whole(networks, seen):
  """Logits of the reference and values of the critic, [B, T, ...], in one plain pass."""
  tokens = jnp.concatenate([seen.prompts, seen.responses], axis=1)
  layout = heads.layout(jnp.concatenate([seen.prompt_mask, seen.mask], axis=1))
  logits = tiny.POLICY.apply({"params": networks["judges"].reference}, tokens, *layout)
  return logits, tiny.SCALAR.apply({"params": networks["critic"]}, tokens, *layout)


@pytest.mark.conformance("A26", "A28", "B2")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_kl_is_0_where_policy_and_reference_agree(networks, prompts, temperature):
  policy = networks["policy"]
  completion = compiled_generate(temperature)(policy, prompts, jax.random.key(1))
  judges = networks["judges"].replace(reference=policy)
  seen = score(judges, networks["critic"], prompts, completion, temperature=temperature)
  np.testing.assert_allclose(seen.logprobs, seen.ref_logprobs, atol=1e-5)
  assert 0 < float(jnp.sum(seen.mask)) < B * R


@pytest.mark.conformance("A26", "A31")
def test_reference_logprobs_are_the_references_of_the_sampled_tokens(networks, seen):
  logits, _ = whole(networks, seen)
  expected = likelihood.token_logprobs(logits[:, P - 1 : -1], seen.responses, 1.0)
  live = np.asarray(seen.mask) > 0
  np.testing.assert_allclose(seen.ref_logprobs[live], expected[live], rtol=1e-4, atol=1e-5)
  assert np.mean(np.abs(seen.ref_logprobs - seen.logprobs)[live]) > 0.1


@pytest.mark.conformance("B12")
def test_values_are_the_critics_before_each_response_token(networks, seen):
  _, values = whole(networks, seen)
  live = np.asarray(seen.mask) > 0
  np.testing.assert_allclose(seen.values[live], values[:, P - 1 : -1][live], rtol=1e-4, atol=1e-5)


@pytest.mark.conformance("B12")
def test_the_value_before_a_token_does_not_know_it(networks, prompts, completion, seen):
  column = 2
  other = completion.replace(tokens=completion.tokens.at[:, column].add(1) % 40)
  changed = score(networks["judges"], networks["critic"], prompts, other)
  live = np.asarray(seen.mask) > 0
  same = np.isclose(changed.values, seen.values, atol=1e-5)
  assert np.all(same[:, : column + 1])
  assert not np.any(same[:, column + 1 :][live[:, column + 1 :]])


@pytest.mark.conformance("A15", "A17", "A34", "B8")
def test_scores_are_those_of_the_whole_unpadded_conversation_closed_by_an_eos(
  networks, prompts, seen
):
  apply = jax.jit(tiny.SCALAR.apply)
  rows = []
  for b in range(B):
    real = np.asarray(seen.prompt_mask[b]) > 0, np.asarray(seen.mask[b]) > 0
    response = seen.responses[b][real[1]].tolist()
    ending = [] if response[-1] == EOS else [EOS]
    rows.append(seen.prompts[b][real[0]].tolist() + response + ending)
  lengths = np.sum(np.asarray(seen.mask), axis=1)
  ended = np.asarray(seen.finished) > 0
  last = np.asarray(seen.responses)[np.arange(B), lengths.astype(int) - 1]
  assert np.any(last == EOS) and np.any(ended & (last != EOS)) and np.any(~ended), "all three kinds"
  tokens, mask = tiny.right_padded(rows, P + R + 1)
  values = apply({"params": networks["judges"].reward}, tokens, *heads.layout(mask))
  expected = [values[b, len(row) - 1] for b, row in enumerate(rows)]
  np.testing.assert_allclose(seen.scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.conformance("A32", "A40", "B9")
def test_what_follows_the_stop_token_is_read_by_nobody(networks, prompts, completion, seen):
  live = completion.mask > 0
  soiled = completion.replace(
    tokens=jnp.where(live, completion.tokens, 33),
    logprobs=jnp.where(live, completion.logprobs, 0.0),
  )
  again = score(networks["judges"], networks["critic"], prompts, soiled)
  for name in ("logprobs", "ref_logprobs", "values", "scores"):
    np.testing.assert_allclose(getattr(again, name), getattr(seen, name), atol=1e-6)
  for array in (seen.logprobs, seen.ref_logprobs, seen.values):
    np.testing.assert_array_equal(np.asarray(array)[~np.asarray(live)], 0.0)


@pytest.mark.conformance("A30", "B4", "B5")
def test_prompts_padded_further_give_the_same_rollout(networks, prompts, completion, seen):
  wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (3, 0))), prompts)
  again = score(networks["judges"], networks["critic"], wide, completion)
  for name in ("ref_logprobs", "values", "scores"):
    np.testing.assert_allclose(getattr(again, name), getattr(seen, name), rtol=1e-4, atol=1e-5)


@pytest.mark.conformance("B30")
def test_an_empty_response_is_finite_and_scored_after_its_prompt(networks, prompts, completion):
  empty = completion.replace(mask=completion.mask.at[1].set(0.0))
  seen = score(networks["judges"], networks["critic"], prompts, empty)
  leaves = [leaf for leaf in jax.tree.leaves(seen) if leaf.dtype == jnp.float32]
  assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
  np.testing.assert_array_equal(seen.values[1], 0.0)
  np.testing.assert_array_equal(seen.ref_logprobs[1], 0.0)


def test_a_shared_stem_changes_no_number(networks, prompts, completion, seen):
  lowest = networks["policy"]["trunk"]
  share = lambda params: (
    params | {"trunk": params["trunk"] | {name: lowest[name] for name in ("embed", "block_0")}}
  )
  judges = Judges(*map(share, (networks["judges"].reference, networks["judges"].reward)))
  critic = share(networks["critic"])
  plain = score(judges, critic, prompts, completion)
  stemmed = score(judges, critic, prompts, completion, stem_blocks=1)
  assert plain.stream is None and stemmed.stream.shape == (B, P + R, tiny.MODEL.d_model)
  for name in ("ref_logprobs", "values", "scores"):
    got, expected = getattr(stemmed, name), getattr(plain, name)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stem_blocks", [0, 1])
def test_scoring_in_parts_changes_no_row(networks, prompts, completion, stem_blocks):
  critic, judges = networks["critic"], networks["judges"]
  whole = score(judges, critic, prompts, completion, stem_blocks=stem_blocks)
  parts = score(judges, critic, prompts, completion, stem_blocks=stem_blocks, micro_batches=4)
  tiny.assert_trees_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_judges_kept_in_the_compute_dtype_say_the_same_bit_for_bit(networks, prompts, completion):
  model = tiny.changed(tiny.MODEL, compute__dtype="bfloat16")
  policy, scalar = heads.Policy(model), heads.ScalarNetwork(model)
  judges = networks["judges"]
  small = Judges(
    rollout.in_compute_dtype(policy, judges.reference),
    rollout.in_compute_dtype(scalar, judges.reward),
  )
  look = jax.jit(functools.partial(rollout.score, Scoring(policy, scalar, 1.0, EOS)))
  critic = networks["critic"]
  found, expected = (look(j, critic, prompts, completion) for j in (small, judges))
  np.testing.assert_array_equal(found.ref_logprobs, expected.ref_logprobs)
  np.testing.assert_array_equal(found.scores, expected.scores)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  assert size(small) < 0.55 * size(judges)


@pytest.mark.conformance("A27", "B15")
@pytest.mark.parametrize("change", [{"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_rollouts_refuse_truncated_sampling(change):
  with pytest.raises(UserError, match="PPO compares log-probabilities of the full softmax"):
    tiny.changed(tiny.PPO.rollout, sampling=tiny.changed(tiny.SAMPLING, **change))
