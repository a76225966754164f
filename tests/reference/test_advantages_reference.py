"""GAE against rlax, and masked whitening against TRL."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

rlax = pytest.importorskip("rlax")
torch = pytest.importorskip("torch")
pytest.importorskip("trl")
with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # "experimental"
  trl_ppo = pytest.importorskip("trl.experimental.ppo.ppo_trainer")

from rlhf_jax import advantages, masked  # noqa: E402

pytestmark = pytest.mark.reference


@pytest.mark.conformance("A43", "B10", "B12")
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("length", [1, 7, 24])
def test_gae_is_that_of_rlax_on_the_response_alone(gamma, lam, length, assert_close):
  """rlax sees the tokens before the end and a last value of 0; we see padding full of NaN."""
  rng = np.random.default_rng(length)
  rewards, values = rng.standard_normal((2, 24)).astype(np.float32)
  mask = np.arange(24) < length
  padded = [jnp.asarray(np.where(mask, x, np.nan)) for x in (rewards, values)]
  ours, returns = jax.jit(functools.partial(advantages.gae, gamma=gamma, lam=lam))(*padded, mask)
  theirs = rlax.truncated_generalized_advantage_estimation(
    jnp.asarray(rewards[:length]),
    jnp.full((length,), gamma, jnp.float32),
    lam,
    jnp.append(values[:length], 0.0),
  )
  assert_close(ours[:length], theirs, atol=1e-5)
  assert_close(returns[:length], theirs + values[:length], atol=1e-5)
  assert not np.any(ours[length:]) and not np.any(returns[length:])


@pytest.fixture
def ragged():
  """Values [6, 20] and a mask of rows of unequal length."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal((6, 20)).astype(np.float32) * 3.0 + 1.5
  return values, np.arange(20)[None, :] < np.array([[20], [1], [7], [13], [2], [5]])


@pytest.mark.conformance("A45", "A46", "A47")
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_trls_with_a_biased_variance(ragged, shift_mean, monkeypatch, assert_close):
  values, mask = ragged
  ours = masked.whiten(jnp.asarray(values), jnp.asarray(mask), shift_mean=shift_mean)
  monkeypatch.setattr(trl_ppo, "masked_var", functools.partial(trl_ppo.masked_var, unbiased=False))
  theirs = trl_ppo.masked_whiten(torch.tensor(values), torch.tensor(mask), shift_mean).numpy()
  assert_close(np.asarray(ours)[mask], theirs[mask], atol=1e-5)


@pytest.mark.conformance("A46")
def test_whitening_as_trl_ships_it_differs_by_the_root_of_n_over_n_minus_1(ragged, assert_close):
  """TRL departs from lm-human-preferences here; this is the whole of the difference."""
  values, mask = ragged
  n = mask.sum()
  ours = masked.whiten(jnp.asarray(values), jnp.asarray(mask), shift_mean=True)
  theirs = trl_ppo.masked_whiten(torch.tensor(values), torch.tensor(mask)).numpy()
  assert_close(np.asarray(ours)[mask], theirs[mask] * np.sqrt(n / (n - 1)), atol=1e-5)
  assert np.abs(np.asarray(ours) - theirs)[mask].max() > 1e-3


@pytest.mark.conformance("A45")
def test_masked_mean_and_variance_are_trls(ragged, assert_close):
  values, mask = ragged
  x, kept = torch.tensor(values), torch.tensor(mask)
  ours = masked.mean(jnp.asarray(values), mask), masked.variance(jnp.asarray(values), mask)
  theirs = trl_ppo.masked_mean(x, kept), trl_ppo.masked_var(x, kept, unbiased=False)
  assert_close(np.array(ours), np.array(theirs), atol=1e-5)
