"""Generation against fresh forward passes, and what must not change a row."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.generation import compact, decode
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.networks import heads, likelihood, pretrained
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.types import PromptBatch

B, P, R = 8, 5, 6
SAMPLING = tiny.SAMPLING
STOP_IDS = tuple(range(1, 9))  # a fifth of the vocabulary: rows end at different columns
STOPS = Stops(STOP_IDS)


@pytest.fixture(scope="module")
def params():
  return tiny.params(tiny.POLICY, 0)


@functools.cache
def compiled(sampling=SAMPLING, stops=STOPS, pad_id=tiny.PAD):
  return jax.jit(
    functools.partial(decode.generate, tiny.POLICY, config=sampling, stops=stops, pad_id=pad_id)
  )


@pytest.fixture(scope="module")
def sampled(params):
  """Prompts of 1 to P tokens and one completion of each."""
  prompts = tiny.mixed_prompts(B, P, 0)
  return prompts, compiled()(params, prompts, jax.random.key(0))


@jax.jit
def fresh_logits(params, prompts, completion):
  """Logits [B, R, V] of one forward pass over the finished rows."""
  sequences = jnp.concatenate([prompts.tokens, completion.tokens], axis=1)
  mask = jnp.concatenate([prompts.mask, completion.mask], axis=1)
  logits = tiny.POLICY.apply({"params": params}, sequences, *heads.layout(mask))
  return logits[:, P - 1 : -1]


def assert_same(completion, expected, rows=slice(None)):
  """The same tokens, and log-probabilities that differ by rounding alone."""
  for name in ("tokens", "mask", "finished"):
    got = np.asarray(getattr(completion, name))[rows]
    np.testing.assert_array_equal(got, np.asarray(getattr(expected, name))[rows], err_msg=name)
  np.testing.assert_allclose(completion.logprobs[rows], expected.logprobs[rows], atol=1e-5)


@pytest.mark.conformance("A26", "A28", "A29", "B2")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_generation_logprobs_equal_those_of_a_fresh_forward_pass(params, temperature):
  prompts = tiny.mixed_prompts(B, P, 1)
  completion = compiled(tiny.changed(SAMPLING, temperature=temperature))(
    params, prompts, jax.random.key(1)
  )
  logits = fresh_logits(params, prompts, completion)
  fresh = likelihood.token_logprobs(logits, completion.tokens, temperature)
  live = np.asarray(completion.mask) > 0
  assert 0 < live.sum() < live.size  # some rows ended early
  np.testing.assert_allclose(completion.logprobs[live], fresh[live], rtol=1e-4, atol=1e-5)


@pytest.mark.conformance("A32")
def test_after_the_first_stop_token_there_is_only_padding(sampled):
  _, completion = sampled
  for tokens, mask, logprobs, finished in zip(*jax.tree.leaves(jax.device_get(completion))):
    stops = np.flatnonzero(np.isin(tokens, STOP_IDS))
    length = int(stops[0]) + 1 if len(stops) else R
    np.testing.assert_array_equal(mask, np.arange(R) < length)
    np.testing.assert_array_equal(tokens[length:], tiny.PAD)
    np.testing.assert_array_equal(logprobs[length:], 0.0)
    assert finished == bool(len(stops))
  assert 0 < float(jnp.sum(completion.finished)) < B


@pytest.mark.conformance("B7")
def test_with_pad_equal_to_eos_the_real_eos_still_counts(params, sampled):
  prompts, expected = sampled
  same_id = compiled(pad_id=STOP_IDS[0])(params, prompts, jax.random.key(0))
  assert_same(same_id.replace(tokens=expected.tokens), expected)
  live = np.asarray(expected.mask) > 0
  np.testing.assert_array_equal(np.asarray(same_id.tokens)[live], expected.tokens[live])


@pytest.mark.conformance("B20")
def test_a_custom_stop_token_ends_and_finishes_a_response(params):
  prompts = tiny.mixed_prompts(B, P, 0)
  free = compiled(stops=Stops(()))(params, prompts, jax.random.key(0))
  assert np.all(np.asarray(free.mask) == 1.0) and np.all(np.asarray(free.finished) == 0.0)
  stop = int(free.tokens[2, 3])
  stopped = compiled(stops=Stops((stop,)))(params, prompts, jax.random.key(0))
  first = int(np.flatnonzero(np.asarray(free.tokens[2]) == stop)[0])
  assert stopped.finished[2] == 1.0
  np.testing.assert_array_equal(stopped.mask[2], np.arange(R) <= first)


@pytest.mark.conformance("A35")
def test_rows_do_not_change_when_their_neighbours_end_early(params, sampled):
  # Stop tokens that end other rows earlier must leave the tokens up to the end untouched.
  prompts, early = sampled
  free = compiled(stops=Stops(()))(params, prompts, jax.random.key(0))
  live = np.asarray(early.mask) > 0
  np.testing.assert_array_equal(np.asarray(early.tokens)[live], np.asarray(free.tokens)[live])
  np.testing.assert_allclose(early.logprobs[live], free.logprobs[live], atol=1e-6)


@pytest.mark.conformance("A30", "B4", "B5")
def test_prompts_padded_to_a_longer_width_sample_the_same_tokens(params, sampled):
  prompts, expected = sampled
  wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (4, 0))), prompts)
  assert_same(compiled()(params, wide, jax.random.key(0)), expected)


@pytest.mark.conformance("B4")
def test_ids_under_the_prompt_mask_change_nothing(params, sampled):
  prompts, expected = sampled
  junk = jnp.where(prompts.mask > 0, prompts.tokens, 7)
  soiled = compiled()(params, PromptBatch(junk, prompts.mask), jax.random.key(0))
  assert_same(soiled, expected)


@pytest.mark.conformance("B4")
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_does_not_depend_on_the_batch_size(params, sampled, rows):
  first, expected = jax.tree.map(lambda x: x[:rows], sampled)
  assert_same(compiled()(params, first, jax.random.key(0)), expected)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_several_samples_of_a_prompt_are_those_of_as_many_copies_of_it(scan_layers):
  policy = heads.Policy(tiny.changed(tiny.MODEL, compute__scan_layers=scan_layers))
  params = tiny.params(policy, 0)
  generate = functools.partial(
    decode.generate, policy, config=SAMPLING, stops=STOPS, pad_id=tiny.PAD
  )
  prompts = tiny.mixed_prompts(3, P, 0)
  copies = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), prompts)
  together = jax.jit(functools.partial(generate, samples=4))(params, prompts, jax.random.key(0))
  assert_same(together, jax.jit(generate)(params, copies, jax.random.key(0)))
  assert len(np.unique(np.asarray(together.tokens)[:4], axis=0)) > 1  # and they are not one sample


def test_scanned_layers_decode_one_by_one(params):
  scanned = heads.Policy(tiny.changed(tiny.MODEL, compute__scan_layers=True))
  prompts, key = tiny.mixed_prompts(B, P, 0), jax.random.key(0)
  run = lambda policy: jax.jit(
    functools.partial(decode.generate, policy, config=SAMPLING, stops=STOPS, pad_id=tiny.PAD)
  )
  stacked = jax.tree.map(jnp.asarray, pretrained.stack_layers(params))
  program = run(scanned).lower(stacked, prompts, key).compile()
  assert_same(program(stacked, prompts, key), run(tiny.POLICY)(params, prompts, key))
  caches = f"[{tiny.MODEL.n_layers},{B},{tiny.MODEL.n_kv_heads},"  # of all layers in one
  assert caches not in program.as_text()


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("devices", [1, 4])
def test_smaller_batches_and_growing_caches_change_no_token(devices, scan_layers, monkeypatch):
  monkeypatch.setattr(decode, "LOOK_EVERY", 1)
  policy = heads.Policy(tiny.changed(tiny.MODEL, compute__scan_layers=scan_layers))
  params, prompts = tiny.params(policy, 0), tiny.mixed_prompts(B, P, 0)
  axis_types = (jax.sharding.AxisType.Auto,) * 3
  names, some = ("data", "fsdp", "tensor"), jax.devices()[:devices]
  mesh = jax.make_mesh((devices, 1, 1), names, axis_types, devices=some)

  def generate(shares, sizes=1):
    sampling = tiny.changed(SAMPLING, compact_to=shares, cache_sizes=sizes)
    run = functools.partial(
      decode.generate, policy, config=sampling, stops=STOPS, pad_id=tiny.PAD, samples=2
    )
    placed = mesh_lib.put_batch(mesh, jax.device_get(prompts))
    key = mesh_lib.put_replicated(mesh, jax.random.key(0))
    replicated = mesh_lib.put_replicated(mesh, params)
    compiled = mesh_lib.jit(run, mesh).lower(replicated, placed, key).compile()
    return compiled(replicated, placed, key), compiled.as_text()

  together, plain = generate(())
  shrunk, text = generate((0.5, 0.25))
  assert_same(shrunk, together)
  assert 0 < float(jnp.sum(together.finished)) < 2 * B
  assert text.count(" while(") >= plain.count(" while(") + 2  # each size has a loop of its own
  grown, text = generate((), 3)
  assert_same(grown, together)
  assert text.count(" while(") >= plain.count(" while(") + 2
  assert_same(generate((0.5,), 2)[0], together)


def test_smaller_batches_hold_the_caches_of_two_of_them_at_a_time(params):
  rows, columns = 16, 512
  prompts = tiny.mixed_prompts(rows, P, 0)

  def temporaries(shares):
    sampling = tiny.changed(SAMPLING, compact_to=shares, max_new_tokens=columns)
    program = compiled(sampling).lower(params, prompts, jax.random.key(0)).compile()
    return program.memory_analysis().temp_size_in_bytes

  model = tiny.MODEL
  a_row = 2 * 4 * model.n_layers * model.n_kv_heads * model.head_dim * (P + columns)  # bytes
  added = temporaries((0.75, 0.625, 0.5, 0.375, 0.25)) - temporaries(())
  assert added < 1.2 * 12 * a_row  # the next largest, not the 40 rows of all five


def test_a_cache_grows_in_equal_parts_to_all_columns():
  assert decode.cache_columns(128, 4) == (32, 64, 96, 128)
  assert decode.cache_columns(7, 3) == (3, 5, 7)
  assert decode.cache_columns(2, 5) == (1, 2)


def test_the_loop_shrinks_as_soon_as_the_open_rows_fit():
  finished = jnp.array([1, 0, 0, 1, 1, 1, 0, 1], jnp.float32)
  assert int(compact.needed(finished, 1)) == 3
  assert int(compact.needed(finished, 2)) == 4  # the first device has two, the second one
  np.testing.assert_array_equal(compact.still_open(finished, 4, 2), [[1, 2], [2, 0]])
  np.testing.assert_array_equal(compact.still_open(finished, 3, 1), [[1, 2, 6]])
  assert compact.sizes(16, (0.5, 0.26, 0.25), 2) == (16, 8, 6, 4)
  assert compact.sizes(2, (0.9, 0.5), 2) == (2,)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_rows_are_taken_from_their_own_device_along_any_axis(axis):
  x = np.arange(4 * 4 * 4).reshape(4, 4, 4)
  index = jnp.array([[1], [0]])
  np.testing.assert_array_equal(compact.take(jnp.asarray(x), index, axis), np.take(x, [1, 2], axis))


def test_rows_put_back_stand_where_they_came_from():
  x, index = jnp.arange(8.0).reshape(8, 1), jnp.array([[3, 0], [1, 2]])
  put = compact.put(jnp.zeros_like(x), index, compact.take(x, index))
  np.testing.assert_array_equal(put[:, 0], [0, 0, 0, 3, 0, 5, 6, 0])


@pytest.mark.conformance("A36")
def test_rows_with_one_prompt_and_steps_with_one_batch_draw_differently(params):
  prompts = jax.tree.map(lambda x: jnp.tile(x[4:5], (B, 1)), tiny.mixed_prompts(B, P, 2))
  draw = lambda seed: compiled(stops=Stops(()))(params, prompts, jax.random.key(seed)).tokens
  first, again, other = draw(0), draw(0), draw(1)
  assert len({tuple(row) for row in np.asarray(first).tolist()}) == B
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)


def test_greedy_decoding_is_the_argmax_of_fresh_forward_passes(params):
  prompts = tiny.mixed_prompts(B, P, 3)
  greedy = compiled(tiny.changed(SAMPLING, temperature=0.0), stops=Stops(()))
  completion = greedy(params, prompts, jax.random.key(0))
  # Causality makes one pass over the finished rows as good as R passes over their prefixes.
  logits = fresh_logits(params, prompts, completion)
  np.testing.assert_array_equal(completion.tokens, jnp.argmax(logits, axis=-1))
  np.testing.assert_array_equal(completion.logprobs, 0.0)


@pytest.mark.conformance("A27", "B15")
def test_truncated_generation_reports_the_truncated_distribution(params):
  prompts = tiny.mixed_prompts(B, P, 4)
  sampling = tiny.changed(SAMPLING, top_k=2, temperature=0.8)
  completion = compiled(sampling, stops=Stops(()))(params, prompts, jax.random.key(0))
  logits = fresh_logits(params, prompts, completion)
  best = np.sort(np.asarray(logits), axis=-1)[..., -2:] / 0.8
  chosen = np.take_along_axis(np.asarray(logits), completion.tokens[..., None], axis=-1)[..., 0]
  expected = chosen / 0.8 - np.log(np.sum(np.exp(best), axis=-1))
  np.testing.assert_allclose(completion.logprobs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.conformance("B30")
def test_a_row_without_a_prompt_yields_finite_numbers_and_disturbs_nobody(params, sampled):
  prompts, expected = sampled
  blank = lambda x: x.at[3].set(0)
  completion = compiled()(params, jax.tree.map(blank, prompts), jax.random.key(0))
  assert np.all(np.isfinite(completion.logprobs))
  assert_same(completion, expected, rows=np.array([0, 1, 2, 4, 5, 6, 7]))


class Successor(nn.Module):
  """A policy that always says the id after the one it read; it needs no parameters."""

  config: ModelConfig

  def __call__(self, tokens, positions, segments):
    return self.logits(self.hidden(tokens, positions, segments, None)[0])

  def hidden(self, tokens, positions, segments, cache, first_block=0, columns=(0, None)):
    return jax.nn.one_hot(tokens[:, slice(*columns)] + 1, self.config.vocab_size), cache

  def logits(self, hidden):
    return 100.0 * hidden


def test_a_policy_that_counts_makes_responses_that_count_to_the_stop_token():
  prompts = tiny.left_padded([[3], [9, 5], [8, 8, 10]], P)
  generate = functools.partial(
    decode.generate, Successor(tiny.MODEL), config=SAMPLING, stops=Stops((12,)), pad_id=tiny.PAD
  )
  completion = jax.jit(generate)({}, prompts, jax.random.key(0))
  expected = [[4, 5, 6, 7, 8, 9], [6, 7, 8, 9, 10, 11], [11, 12, 0, 0, 0, 0]]
  np.testing.assert_array_equal(completion.tokens, expected)
  np.testing.assert_array_equal(completion.finished, [0.0, 0.0, 1.0])
  np.testing.assert_array_equal(jnp.sum(completion.mask, axis=1), [6.0, 6.0, 2.0])
  np.testing.assert_allclose(completion.logprobs, 0.0, atol=1e-6)


class Indifferent(Successor):
  """A policy to which all tokens are alike."""

  def logits(self, hidden):
    return 0.0 * hidden


@pytest.mark.conformance("A36")
def test_columns_of_a_row_draw_independently():
  n, prompts = 1000, tiny.mixed_prompts(1000, P, 0)
  generate = functools.partial(
    decode.generate, Indifferent(tiny.MODEL), config=SAMPLING, stops=Stops(()), pad_id=tiny.PAD
  )
  tokens = np.asarray(jax.jit(generate)({}, prompts, jax.random.key(0)).tokens)
  # Two columns agree by chance in one of 40 rows; five deviations around that.
  for column in range(1, R):
    agreeing = np.sum(tokens[:, column] == tokens[:, column - 1])
    assert abs(agreeing - n / 40) < 5.0 * (n / 40) ** 0.5


def test_decoding_is_one_loop_on_the_device(params):
  prompts = tiny.mixed_prompts(B, P, 0)
  traces = []

  class Counting(Successor):
    def logits(self, hidden):
      traces.append(hidden.shape)
      return super().logits(hidden)

  generate = functools.partial(
    decode.generate, Counting(tiny.MODEL), config=SAMPLING, stops=STOPS, pad_id=tiny.PAD
  )
  jax.make_jaxpr(generate)({}, prompts, jax.random.key(0))
  # Traced at most three times (first token, loop body, its shape check), whatever R is.
  assert len(traces) <= 3


@pytest.mark.parametrize("rows", [1, 2, B])
def test_no_cache_is_copied_from_token_to_token(params, rows):
  prompts = tiny.mixed_prompts(rows, P, 0)
  program = compiled().lower(params, prompts, jax.random.key(0)).compile().as_text()
  cache = rf"{tiny.MODEL.n_kv_heads},{P + R},{tiny.MODEL.head_dim}\]"
  copies = re.findall(rf"= f32\[(?:\d+,)?{cache}\S* copy\(", program)
  assert len(copies) <= 2 * tiny.MODEL.n_layers  # of keys and values, before the loop


def cut_as_ziegler(tokens, wanted, first):
  """Columns [B, R] that are kept: up to the first wanted token at or after `first`.

  Ziegler et al. 2019 mark the tokens, drop the marks before `first`, and keep what has no mark
  before it.
  """
  marks = np.isin(tokens, wanted)
  marks[:, :first] = False
  return np.cumsum(marks, axis=1) - marks == 0, marks.any(axis=1)


@pytest.mark.conformance("A34")
@pytest.mark.parametrize("first", [0, 1, 3, R - 1])
def test_a_late_stop_token_ends_a_response_at_or_after_its_column_only(params, first):
  prompts = tiny.mixed_prompts(32, P, 0)
  free = compiled(stops=Stops(()))(params, prompts, jax.random.key(0))
  stops = Stops((), late=STOP_IDS, at_or_after=first)
  completion = compiled(stops=stops)(params, prompts, jax.random.key(0))
  kept, ended = cut_as_ziegler(np.asarray(free.tokens), STOP_IDS, first)
  np.testing.assert_array_equal(completion.mask, kept)
  np.testing.assert_array_equal(completion.tokens, np.where(kept, free.tokens, tiny.PAD))
  np.testing.assert_array_equal(completion.finished, ended)
  early = np.isin(free.tokens[:, :first], STOP_IDS).any()
  assert first == 0 or early, "a stop token before its column is what the rule is about"
  assert 0 < ended.sum() < 32


@pytest.mark.conformance("A34")
def test_eos_ends_a_response_before_the_column_of_other_stop_tokens():
  prompts = tiny.left_padded([[3], [9, 5], [8, 8, 10]], P)
  stops = Stops((12,), late=(6, 11), at_or_after=2)
  generate = functools.partial(
    decode.generate, Successor(tiny.MODEL), config=SAMPLING, stops=stops, pad_id=tiny.PAD
  )
  completion = jax.jit(generate)({}, prompts, jax.random.key(0))
  expected = [[4, 5, 6, 0, 0, 0], [6, 7, 8, 9, 10, 11], [11, 12, 0, 0, 0, 0]]
  np.testing.assert_array_equal(completion.tokens, expected)
  np.testing.assert_array_equal(completion.finished, [1.0, 1.0, 1.0])
