"""Log-probabilities and entropies of given tokens under a policy, in nats."""

import jax
import jax.numpy as jnp

from rlhf_jax.networks import heads
from rlhf_jax.types import Params


def token_logprobs(logits: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
  """log softmax(logits / temperature) at `tokens`. [..., V], [...] to [...]."""
  scaled = logits / temperature
  chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy(logits: jax.Array, temperature: float) -> jax.Array:
  """-sum p log p of softmax(logits / temperature), [..., V] to [...]; at least 0."""
  logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
  return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def response_logits(
  policy: heads.Policy,
  params: Params,
  sequences: jax.Array,
  mask: jax.Array,
  response_length: int,
  first_block: int = 0,
) -> jax.Array:
  """Logits [B, R, V] that predicted the last R tokens of B rows.

  The logits at column t - 1 score the token at t, so the slice is [P - 1, T - 1). The head is
  applied to these columns only.

  Args:
    policy: the network.
    params: its parameters.
    sequences: [B, T] ids, or their stream [B, T, D] after the first `first_block` blocks.
    mask: [B, T], 1 on real tokens.
    response_length: R.
    first_block: see `heads.shared_stem`.
  """
  positions, segments = heads.layout(mask)
  hidden, _ = policy.apply(
    {"params": params}, sequences, positions, segments, None, first_block, method="hidden"
  )
  start = mask.shape[1] - response_length - 1
  hidden = hidden[:, start : start + response_length]
  return policy.apply({"params": params}, hidden, method="logits")
