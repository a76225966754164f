"""PPO's clipped losses and their gradients against PyTorch's autograd.

The reference is written from the released lm-human-preferences: with ratio = exp(logp - old_logp),

  pg = mean max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
  vf = 1/2 mean max((V - ret)^2, (clip(V, V_old - c, V_old + c) - ret)^2)

on the tokens of the responses alone, picked out one by one, so that no mask is needed.
`test_ppo_trl.py` runs TRL's own lines.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rlhf_jax import surrogate  # noqa: E402

pytestmark = pytest.mark.reference

CLIPRANGE = 0.2
MASK = np.arange(15)[None, :] < np.array([[15], [1], [9], [4], [12]])


@pytest.fixture(params=[0, 1, 2])
def arrays(request):
  """Four [B, R] arrays whose ratios and values lie inside and outside the clip range."""
  rng = np.random.default_rng(request.param)
  return [x.astype(np.float32) for x in rng.normal(scale=0.4, size=(4, *MASK.shape))]


def torch_loss_and_gradient(loss, moving, *fixed):
  """Loss, and its gradient [B, R] with respect to `moving`, over the kept tokens."""
  moving = torch.tensor(moving, requires_grad=True)
  kept = [moving[torch.tensor(MASK)]] + [torch.tensor(x[MASK]) for x in fixed]
  value = loss(*kept)
  value.backward()
  return value.item(), moving.grad.numpy()


def our_loss_and_gradient(loss, moving, *fixed):
  """The same of ours, with NaN under the mask of everything that is given."""
  given = [jnp.asarray(np.where(MASK, x, np.nan)) for x in (moving, *fixed)]
  run = jax.jit(
    jax.value_and_grad(
      lambda *arrays: loss(*arrays, jnp.asarray(MASK), cliprange=CLIPRANGE), has_aux=True
    )
  )
  (value, metrics), gradient = run(*given)
  return value, gradient, metrics


@pytest.mark.conformance("A50", "B11")
def test_policy_loss_and_gradient(arrays, assert_close):
  logprobs, old_logprobs, advantages, _ = arrays

  def reference(logprobs, old_logprobs, advantages):
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = torch.clamp(ratio, 1.0 - CLIPRANGE, 1.0 + CLIPRANGE)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()

  value, gradient, metrics = our_loss_and_gradient(surrogate.policy_loss, *arrays[:3])
  expected, slope = torch_loss_and_gradient(reference, logprobs, old_logprobs, advantages)
  assert_close(value, expected, atol=1e-5)
  assert_close(gradient, slope, atol=1e-5)
  flat = np.sum((np.asarray(gradient) == 0) & MASK)
  assert 0.1 < metrics["policy/clipfrac"] < 0.6 and flat / MASK.sum() == pytest.approx(
    float(metrics["policy/clipfrac"]), abs=1e-6
  )


@pytest.mark.conformance("A49", "B11")
def test_value_loss_and_gradient_with_clipping_around_the_rollouts_values(arrays, assert_close):
  values, old_values, returns, _ = arrays

  def reference(values, old_values, returns):
    near = torch.clamp(values, old_values - CLIPRANGE, old_values + CLIPRANGE)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()

  value, gradient, metrics = our_loss_and_gradient(surrogate.value_loss, *arrays[:3])
  expected, slope = torch_loss_and_gradient(reference, values, old_values, returns)
  assert_close(value, expected, atol=1e-5)
  assert_close(gradient, slope, atol=1e-5)
  assert 0.1 < metrics["val/clipfrac"] < 0.9
