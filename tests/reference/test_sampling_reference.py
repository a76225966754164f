"""Sampling distributions against transformers' warpers, log-probabilities against PyTorch, TRL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from trl.trainer.utils import selective_log_softmax  # noqa: E402

from rlhf_jax.generation import sampling  # noqa: E402
from rlhf_jax.networks import likelihood  # noqa: E402

pytestmark = pytest.mark.reference

B, V = 16, 101


@pytest.fixture
def logits():
  """Rows from nearly flat to sharply peaked."""
  rng = np.random.default_rng(0)
  return (rng.standard_normal((B, V)) * np.geomspace(0.1, 5.0, B)[:, None]).astype(np.float32)


def config(temperature, top_k=0, top_p=1.0):
  return sampling.SamplingConfig(
    max_new_tokens=1,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    stop=None,
    compact_to=(),
    cache_sizes=1,
  )


def warped(logits, temperature, top_k, top_p):
  """transformers' logits after temperature, top-k and top-p, in the order of its `generate`."""
  warpers = transformers.LogitsProcessorList()
  warpers.append(transformers.TemperatureLogitsWarper(temperature))
  if top_k:
    warpers.append(transformers.TopKLogitsWarper(top_k))
  if top_p < 1.0:
    warpers.append(transformers.TopPLogitsWarper(top_p))
  return warpers(None, torch.tensor(logits))


CUTS = [(0, 1.0), (1, 1.0), (5, 1.0), (V, 1.0), (0, 0.1), (0, 0.9), (0, 0.999), (20, 0.8)]


@pytest.mark.conformance("A27", "B15")
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_the_tokens_kept_and_their_probabilities_are_those_of_transformers(
  logits, temperature, top_k, top_p, assert_close
):
  ours = sampling.truncate(jnp.asarray(logits), config(temperature, top_k, top_p))
  theirs = warped(logits, temperature, top_k, top_p)
  np.testing.assert_array_equal(np.isfinite(ours), torch.isfinite(theirs).numpy())
  assert_close(jax.nn.softmax(ours), torch.softmax(theirs, dim=-1).numpy(), atol=1e-5)


@pytest.mark.conformance("A27", "B15")
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_a_drawn_tokens_logprob_is_that_of_the_distribution_it_was_drawn_from(
  logits, top_k, top_p, assert_close
):
  settings = config(0.7, top_k, top_p)
  uniforms = jax.random.uniform(jax.random.key(0), (20, B, 2))
  draw = jax.jit(jax.vmap(lambda chance: sampling.sample(jnp.asarray(logits), chance, settings)))
  tokens, logprobs = draw(uniforms)
  reference = torch.log_softmax(warped(logits, 0.7, top_k, top_p), dim=-1).numpy()
  theirs = reference[np.arange(B)[None, :], np.asarray(tokens)]
  assert np.all(np.isfinite(theirs))  # no removed token was drawn
  assert_close(logprobs, theirs, atol=1e-5)


@pytest.mark.conformance("A26")
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7])
def test_token_logprobs_are_torchs_and_trls_at_the_temperature(logits, temperature, assert_close):
  tokens = np.random.default_rng(1).integers(0, V, B)
  ours = likelihood.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), temperature)
  scaled, index = torch.tensor(logits) / temperature, torch.tensor(tokens)
  picked = torch.log_softmax(scaled, dim=-1).gather(1, index[:, None])[:, 0]
  assert_close(ours, picked.numpy(), atol=1e-5)
  assert_close(ours, selective_log_softmax(scaled, index).numpy(), atol=1e-5)


@pytest.mark.conformance("B9")
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_entropy_is_that_of_torchs_categorical(logits, temperature, assert_close):
  ours = likelihood.entropy(jnp.asarray(logits), temperature)
  theirs = torch.distributions.Categorical(logits=torch.tensor(logits) / temperature).entropy()
  assert_close(ours, theirs.numpy(), atol=1e-5)
  assert np.all(np.asarray(ours) >= 0)
