"""Log-probabilities and entropies of given tokens under a policy, in nats."""

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.networks import heads
from rlhf_jax.types import Params


@flax.struct.dataclass
class Likelihood:
  """What a policy makes of tokens [B, T] that it has not read yet, each [B, T] float32."""

  logprobs: jax.Array  # of the tokens
  entropy: jax.Array  # of the distributions that they are taken from; without a gradient
  likeliest: jax.Array  # 1 where no token is likelier


def token_logprobs(logits: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
  """log softmax(logits / temperature) at `tokens`. [..., V], [...] to [...]."""
  scaled = logits / temperature
  chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy(logits: jax.Array, temperature: float) -> jax.Array:
  """-sum p log p of softmax(logits / temperature), [..., V] to [...]; at least 0."""
  logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
  return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def of_logits(
  logits: jax.Array, tokens: jax.Array, temperature: float
) -> tuple[Likelihood, jax.Array]:
  """The likelihood of tokens [..., T] by logits [..., T, V], and the log-normalisers [..., T]."""
  known = jax.lax.stop_gradient(logits)
  chosen = jnp.take_along_axis(known, tokens[..., None], axis=-1)[..., 0]
  of = Likelihood(
    logprobs=token_logprobs(logits, tokens, temperature),
    entropy=entropy(known, temperature),
    likeliest=(chosen >= jnp.max(known, axis=-1)).astype(jnp.float32),
  )
  return of, jax.nn.logsumexp(known / temperature, axis=-1)


def of_tokens(
  policy: heads.Policy, params: Params, hidden: jax.Array, tokens: jax.Array, temperature: float
) -> Likelihood:
  """The likelihood of tokens [B, T], each after the hidden state [B, T, D] of the column before.

  Logits are the largest arrays of a language model. With `logit_columns` C in the policy's config,
  no more than [B, C, V] of them exist at a time; the backward pass computes them anew.
  """

  def look(hidden: jax.Array, tokens: jax.Array) -> Likelihood:
    logits = policy.apply({"params": params}, hidden, method="logits")
    return of_logits(logits, tokens, temperature)[0]

  T, C = tokens.shape[1], policy.config.compute.logit_columns
  if C is None or C >= T:
    return look(hidden, tokens)
  pieces = -(-T // C)

  def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] to [pieces, B, C, ...]
    x = jnp.pad(x, ((0, 0), (0, pieces * C - T), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], pieces, C, *x.shape[2:]).swapaxes(0, 1)

  join = lambda x: x.swapaxes(0, 1).reshape(x.shape[1], pieces * C)[:, :T]
  looks = jax.lax.map(lambda piece: jax.checkpoint(look)(*piece), (cut(hidden), cut(tokens)))
  return jax.tree.map(join, looks)


def of_responses(
  policy: heads.Policy,
  params: Params,
  sequences: jax.Array,
  mask: jax.Array,
  responses: jax.Array,
  temperature: float,
  first_block: int = 0,
) -> Likelihood:
  """The likelihood of the last R tokens of B rows.

  Args:
    policy: the network.
    params: its parameters.
    sequences: [B, T] ids, or their stream [B, T, D] after the first `first_block` blocks.
    mask: [B, T], 1 on real tokens.
    responses: [B, R] ids, the last columns of the rows.
    temperature: of the distribution that they were drawn from.
    first_block: see `heads.shared_stem`.
  """
  hidden = before_responses(policy, params, sequences, mask, responses.shape[1], first_block)
  return of_tokens(policy, params, hidden, responses, temperature)


def before_responses(
  policy: heads.Policy,
  params: Params,
  sequences: jax.Array,
  mask: jax.Array,
  response_length: int,
  first_block: int = 0,
) -> jax.Array:
  """The hidden states [B, R, D] that the last R tokens of B rows are predicted from.

  The last block's queries are computed for these only. Arguments as those of `of_responses`.
  """
  positions, segments, columns = heads.layout_before(mask, response_length)
  hidden, _ = policy.apply(
    {"params": params},
    sequences,
    positions,
    segments,
    None,
    first_block,
    columns=columns,
    method="hidden",
  )
  return hidden
