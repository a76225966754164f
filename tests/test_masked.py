"""Masked statistics against NumPy on the kept entries alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import masked

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 2.0, (5, 7)).astype(np.float32)
MASK = (RNG.random((5, 7)) < 0.6).astype(np.float32)
KEPT = X[MASK > 0]
STATISTICS = {
  "total": masked.total,
  "mean": masked.mean,
  "variance": masked.variance,
  "whiten": lambda x, mask: jnp.sum(masked.whiten(x, mask, shift_mean=True) ** 3),
  "scale": lambda x, mask: jnp.sum(masked.whiten(x, mask, shift_mean=False) ** 3),
}


def test_total_mean_and_variance_are_those_of_the_kept_entries():
  np.testing.assert_allclose(masked.total(X, MASK), KEPT.sum(), rtol=1e-6)
  np.testing.assert_allclose(masked.mean(X, MASK), KEPT.mean(), rtol=1e-6)
  np.testing.assert_allclose(masked.variance(X, MASK), KEPT.var(), rtol=1e-5)


@pytest.mark.conformance("A45")
def test_whitening_gives_the_kept_entries_mean_0_and_variance_1():
  whitened = np.asarray(masked.whiten(X, MASK, shift_mean=True))
  assert abs(whitened[MASK > 0].mean()) < 1e-6
  np.testing.assert_allclose(whitened[MASK > 0].var(), 1.0, rtol=1e-5)
  assert np.all(whitened[MASK == 0] == 0.0)


@pytest.mark.conformance("A46")
def test_whitening_divides_by_the_biased_variance_with_1e_8_inside_the_root():
  # Of +-1e-4 the biased variance is 1e-8, so the quotient is 1e-4 / sqrt(2e-8) = 0.70711. The
  # unbiased variance would give 0.57735, an epsilon outside the root 0.99990.
  x, mask = jnp.array([1e-4, 50.0, -1e-4]), jnp.array([1.0, 0.0, 1.0])
  got = masked.whiten(x, mask, shift_mean=True)
  np.testing.assert_allclose(got, [0.70711, 0.0, -0.70711], rtol=1e-4)


@pytest.mark.conformance("A47")
def test_whitening_without_shift_keeps_the_mean():
  scaled = np.asarray(masked.whiten(X, MASK, shift_mean=False))[MASK > 0]
  np.testing.assert_allclose(scaled.mean(), KEPT.mean(), rtol=1e-5)
  np.testing.assert_allclose(scaled.var(), 1.0, rtol=1e-5)


@pytest.mark.conformance("B10", "B11")
@pytest.mark.parametrize("junk", [100.0, np.nan, np.inf])
@pytest.mark.parametrize("name", STATISTICS)
def test_what_lies_under_the_mask_reaches_neither_value_nor_gradient(name, junk):
  statistic = STATISTICS[name]
  clean = np.where(MASK > 0, X, 0.0).astype(np.float32)
  dirty = np.where(MASK > 0, X, junk).astype(np.float32)
  value, gradient = jax.value_and_grad(statistic)(dirty, MASK)
  expected, expected_gradient = jax.value_and_grad(statistic)(clean, MASK)
  np.testing.assert_array_equal(value, expected)
  np.testing.assert_array_equal(gradient, expected_gradient)
  assert np.all(np.asarray(gradient)[MASK == 0] == 0.0)


@pytest.mark.conformance("B30")
@pytest.mark.parametrize("name", STATISTICS)
def test_an_empty_mask_gives_0_and_a_zero_gradient(name):
  value, gradient = jax.value_and_grad(STATISTICS[name])(X, np.zeros_like(X))
  assert value == 0.0
  assert np.all(np.asarray(gradient) == 0.0)


@pytest.mark.conformance("B16")
def test_totals_over_parts_divided_by_all_tokens_are_the_mean_of_the_whole():
  # The mean of the parts' means is another number; parts must be added up as totals.
  parts = [(X[:1], MASK[:1]), (X[1:], MASK[1:])]
  added = sum(masked.total(*part) for part in parts) / sum(np.sum(mask) for _, mask in parts)
  np.testing.assert_allclose(added, masked.mean(X, MASK), rtol=1e-6)
  assert abs(np.mean([masked.mean(*part) for part in parts]) - masked.mean(X, MASK)) > 0.01
