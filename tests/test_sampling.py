"""What is drawn: exact distributions, cut and counted against NumPy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import village
from rlhf_jax.generation import sampling
from rlhf_jax.generation.sampling import SamplingConfig, StopConfig, Stops
from rlhf_jax.networks import likelihood
from rlhf_jax.text import dialogue
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError

draw = jax.jit(sampling.draw)


@functools.partial(jax.jit, static_argnames="config")
def sample(logits, key, config):
  """`sampling.sample` with the chance of a key."""
  return sampling.sample(logits, jax.random.uniform(key, (logits.shape[0], 2)), config)


def config(temperature=1.0, top_k=0, top_p=1.0, stop=None):
  return SamplingConfig(
    max_new_tokens=1,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    stop=stop,
    compact_to=(),
    cache_sizes=1,
  )


def numpy_truncate(logits, temperature, top_k, top_p):
  """Probabilities of one row after temperature, top-k and top-p, one rule after the other."""
  scaled = np.asarray(logits, np.float64) / temperature
  kept = set(range(len(scaled)))
  best_first = np.argsort(-scaled, kind="stable")
  if top_k:
    kept &= set(best_first[:top_k].tolist())
  weights = np.array([np.exp(x) if i in kept else 0.0 for i, x in enumerate(scaled)])
  probabilities = weights / weights.sum()
  if top_p < 1.0:
    mass, nucleus = 0.0, []
    for i in best_first:
      if mass >= top_p:
        break
      nucleus.append(i)
      mass += probabilities[i]
    probabilities = np.where(np.isin(np.arange(len(scaled)), nucleus), probabilities, 0.0)
  return probabilities / probabilities.sum()


# Drawing.


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 12, 13])
def test_a_grid_of_uniforms_reproduces_integer_weights_exactly(size):
  # With n weights' total, the grid (i + 1/2) / n meets block b exactly as often as its weight says;
  # within the block, a grid of the least common multiple of the block totals does the same.
  weights = np.random.default_rng(size).integers(0, 4, size)
  weights[-1] = 1  # at least one
  block = max(1, math.isqrt(size))
  totals = [int(weights[i : i + block].sum()) for i in range(0, size, block)]
  inner = math.lcm(*(total for total in totals if total))
  grid = lambda n: (np.arange(n) + 0.5) / n
  pairs = np.stack(np.meshgrid(grid(weights.sum()), grid(inner)), axis=-1).reshape(-1, 2)
  rows = np.tile(weights.astype(np.float32), (len(pairs), 1))
  tokens = draw(rows, pairs.astype(np.float32))
  np.testing.assert_array_equal(np.bincount(tokens, minlength=size), inner * weights)


@pytest.mark.parametrize("size", [7, 40, 49])  # prime, neither prime nor square, square
def test_many_draws_pass_a_chi_square_test(size):
  rng = np.random.default_rng(size)
  weights, n = rng.exponential(size=size).astype(np.float32), 200_000
  weights[2] = 0.0
  tokens = np.asarray(draw(np.tile(weights, (n, 1)), rng.random((n, 2), np.float32)))
  counts, expected = np.bincount(tokens, minlength=size), n * weights / weights.sum()
  assert counts[2] == 0
  positive = weights > 0
  statistic = np.sum((counts - expected)[positive] ** 2 / expected[positive])
  freedom = positive.sum() - 1
  # Mean `freedom`, variance twice that; five deviations are one in a million.
  assert statistic < freedom + 5.0 * math.sqrt(2.0 * freedom)


@pytest.mark.parametrize("size", [1, 7, 40, 49, 1000])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-23])
def test_the_ends_of_the_unit_interval_draw_a_token_of_positive_weight(size, uniform):
  rng = np.random.default_rng(size)
  weights = rng.exponential(size=(50, size)) * (rng.random((50, size)) < 0.3)
  weights[:, rng.integers(size)] = 1e-6
  weights = weights.astype(np.float32)
  tokens = np.asarray(draw(weights, np.full((50, 2), uniform, np.float32)))
  assert np.all((tokens >= 0) & (tokens < size))
  assert np.all(np.take_along_axis(weights, tokens[:, None], axis=1) > 0.0)


def test_a_token_of_weight_zero_is_never_drawn_however_the_sums_round():
  # Long prefix sums are added up in a tree, so the rounded running sum moves even where the weight
  # is 0. Aim at these places: n blocks of n tokens, of which only the first of each has weight.
  rng, n = np.random.default_rng(0), 300
  weights = rng.exponential(size=(600, n)) * (rng.random((600, n)) < 0.4)
  weights = weights.astype(np.float32)
  running = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(weights))
  rows, columns = np.nonzero((weights[:, 1:] == 0.0) & (running[:, 1:] > running[:, :-1]))
  rows, columns = rows[:30], columns[:30]
  assert len(rows) == 30
  target = running[rows, columns] / running[rows, -1]
  grid = np.zeros((30, n, n), np.float32)
  grid[:, :, 0] = weights[rows]
  for shift in (-1, 0, 1):
    aimed = np.stack([target + shift * np.spacing(target), np.zeros(30)], axis=1)
    tokens = np.asarray(draw(grid.reshape(30, n * n), aimed.astype(np.float32)))
    assert np.all(grid.reshape(30, -1)[np.arange(30), tokens] > 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_need_no_normalisation(scale):
  rng = np.random.default_rng(1)
  weights = rng.integers(1, 5, (100, 10)).astype(np.float32)
  uniforms = rng.random((100, 2), np.float32)
  np.testing.assert_array_equal(
    draw(weights * np.float32(scale), uniforms), draw(weights, uniforms)
  )


# Distributions.


@pytest.mark.conformance("A27", "B15")
@pytest.mark.parametrize(
  "temperature, top_k, top_p",
  [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (1.0, 1, 1.0),
    (0.7, 5, 1.0),
    (1.0, 0, 0.9),
    (2.0, 0, 0.5),
    (1.0, 8, 0.8),
    (1.0, 100, 1.0),  # more than there are
    (1.0, 0, 1e-6),  # the best token alone
  ],
)
def test_the_sampling_distribution_equals_numpy_and_is_what_is_reported(temperature, top_k, top_p):
  logits = np.random.default_rng(0).normal(0.0, 2.0, (64, 13)).astype(np.float32)
  settings = config(temperature, top_k, top_p)
  expected = np.stack([numpy_truncate(row, temperature, top_k, top_p) for row in logits])
  got = jax.nn.softmax(sampling.truncate(jnp.asarray(logits), settings))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
  tokens, logprobs = sample(logits, jax.random.key(0), config=settings)
  drawn = np.take_along_axis(expected, np.asarray(tokens)[:, None], axis=1)[:, 0]
  assert tokens.dtype == jnp.int32
  np.testing.assert_allclose(logprobs, np.log(drawn), rtol=1e-4, atol=1e-5)


@pytest.mark.conformance("A26", "A27", "B2", "B15")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_untruncated_logprobs_are_the_ones_ppo_recomputes(temperature):
  logits = np.random.default_rng(1).normal(0.0, 5.0, (64, 40)).astype(np.float32)
  tokens, logprobs = sample(logits, jax.random.key(1), config=config(temperature))
  expected = likelihood.token_logprobs(logits, tokens, temperature)
  np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=2e-6)


def test_temperature_0_is_greedy_with_log_probability_0():
  logits = np.random.default_rng(2).normal(size=(16, 11)).astype(np.float32)
  tokens, logprobs = sample(logits, jax.random.key(0), config=config(temperature=0.0))
  np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
  np.testing.assert_array_equal(logprobs, 0.0)


@pytest.mark.conformance("A36")
def test_rows_draw_independently_and_keys_repeat():
  logits = jnp.zeros((512, 50))
  draw_with = functools.partial(sample, logits, config=config())
  first, again, other = (draw_with(jax.random.key(seed))[0] for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert len(np.unique(first)) > 45  # one logit row, many tokens
  assert np.mean(first == other) < 0.1  # 1/50 expected


@pytest.mark.parametrize("removed", [-np.inf, -1e30])
def test_tokens_of_probability_0_are_never_drawn_and_leave_finite_logprobs(removed):
  logits = jnp.where(jnp.arange(40) % 3 == 0, 0.0, removed)
  tokens, logprobs = sample(jnp.tile(logits, (2000, 1)), jax.random.key(0), config=config())
  assert np.all(np.asarray(tokens) % 3 == 0)
  np.testing.assert_allclose(logprobs, -np.log(14.0), rtol=1e-5)


@pytest.mark.conformance("A27", "B15")
@pytest.mark.parametrize("settings", [config(0.0), config(top_k=5), config(top_p=0.9)])
def test_truncated_settings_say_so(settings):
  assert settings.is_truncated
  assert not config(temperature=0.7).is_truncated


def test_top_p_0_is_refused():
  with pytest.raises(UserError, match="use temperature 0 for greedy"):
    config(top_p=0.0)


@pytest.fixture(scope="module")
def words():
  backend = village.build_tokenizer(village.build_world(village.STANDARD))
  return Tokenizer(backend, eos=dialogue.VILLAGE.end, pad="<pad>", bos=None)


@pytest.mark.conformance("A34")
def test_stop_tokens_are_found_in_the_vocabulary_beside_the_eos(words):
  stop = StopConfig(tokens=(".", "the"), at_or_after=0)
  ids = (words.token_id("."), words.token_id("▁the"))
  assert sampling.find_stops(config(stop=stop), words) == Stops((words.eos_id,), ids, 0)
  assert sampling.find_stops(config(), words) == Stops((words.eos_id,))


@pytest.mark.parametrize("text", ["two words", "unheard-of", ""])
def test_a_stop_text_that_is_not_one_token_is_named(words, text):
  with pytest.raises(
    UserError, match=re.escape(f"stop.tokens: no token of this vocabulary reads {text!r}")
  ):
    sampling.find_stops(config(stop=StopConfig((text,), 0)), words)


def test_a_stop_that_can_never_or_never_be_meant_to_happen_is_refused():
  with pytest.raises(UserError, match="at_or_after: 1 is past the last column of responses of 1"):
    config(stop=StopConfig((".",), 1))
  with pytest.raises(UserError, match="names no token"):
    StopConfig((), 0)
