"""A loss of tokens' log-probabilities with its gradient, a few columns of the rows at a time.

Logits are the largest arrays of a training step. Where what a token adds to the loss depends on its
own log-probability alone, the gradient of some columns can be computed while their logits are at
hand, so that nothing of size [B, T, V] is kept, moved through memory or computed twice (Hsu et al.
2024, Liger Kernel, section 3.2, does it by rows, for cross-entropy). Both losses of a policy are of
this kind: SFT's negative log-likelihood, and PPO's clipped surrogate, whose advantages and old
log-probabilities are constants.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.networks import heads
from rlhf_jax.networks.likelihood import Likelihood, of_logits
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import Params

TOKENS = 256  # whose logits a CPU holds at once: many enough for fast products, few for its cache


def total(
  losses: Callable,
  policy: heads.Policy,
  params: Params,
  hidden: jax.Array,
  tokens: jax.Array,
  temperature: float,
  *known: jax.Array,
) -> tuple[jax.Array, Likelihood]:
  """The sum of `losses(logprobs, *known)` over tokens, and the likelihood of these.

  At most `logit_columns` columns of the policy's config have logits at a time; None leaves it to
  the backend: what stays in its cache on a CPU, elsewhere all.

  Args:
    losses: what each token adds to the loss: maps log-probabilities and `known`, some columns of
      each, to an array of their shape, entry by entry.
    policy: the network.
    params: its parameters.
    hidden: [B, T, D], the hidden states of the columns before the tokens.
    tokens: [B, T] ids.
    temperature: of the distribution whose log-probabilities are meant.
    *known: [B, T] each; constants, as far as the gradient is concerned.

  Returns:
    The sum, with a gradient towards parameters and hidden states, and the likelihood, without one.
  """
  B, T = tokens.shape
  own = B // rules.row_shards(B)
  on_cpu, columns = mesh_lib.platform() == "cpu", policy.config.compute.logit_columns
  columns = min(columns or (max(1, TOKENS // own) if on_cpu else T), T)
  kernel = policy.apply({"params": params}, method="head_kernel")
  return _total(losses, temperature, columns, kernel, hidden, tokens, known)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _total(losses, temperature, columns, kernel, hidden, tokens, known):
  read = functools.partial(_read, losses, temperature)
  sums, each = _by_columns(read, columns, kernel, hidden, tokens, *known)
  return sums["loss"], each["of"]


def _forward(losses, temperature, columns, kernel, hidden, tokens, known):
  read = functools.partial(_read_with_gradient, losses, temperature)
  sums, each = _by_columns(read, columns, kernel, hidden, tokens, *known)
  return (sums["loss"], each["of"]), (sums["kernel"], each["hidden"])


def _backward(losses, temperature, columns, gradients, moved):
  scale = lambda x: (x * moved[0]).astype(x.dtype)
  return *map(scale, gradients), None, None


_total.defvjp(_forward, _backward)


def _read(losses, temperature, kernel, hidden, tokens, *known):
  """What some columns [B, C] add to the loss, and the likelihood of their tokens."""
  of, _ = of_logits(_logits(kernel, hidden), tokens, temperature)
  return {"loss": jnp.sum(losses(of.logprobs, *known))}, {"of": of}


def _read_with_gradient(losses, temperature, kernel, hidden, tokens, *known):
  """As `_read`, with what they add to the kernel's gradient, and that of each hidden state.

  With probabilities p and a loss whose slope in log p of the token is s, the gradient of the logits
  is s (one_hot(token) - p) / temperature.
  """
  logits = _logits(kernel, hidden)
  of, normaliser = of_logits(logits, tokens, temperature)
  loss, slopes = jax.value_and_grad(lambda x: jnp.sum(losses(x, *known)))(of.logprobs)
  p = jnp.exp(logits / temperature - normaliser[..., None])
  slopes = slopes[..., None] / temperature
  moved = slopes * (jax.nn.one_hot(tokens, logits.shape[-1]) - p)
  moved = jnp.where(slopes != 0, moved, 0.0).astype(hidden.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  of_kernel = product("bcd,bcv->dv", hidden, moved)
  of_hidden = product("bcv,dv->bcd", moved, kernel.astype(hidden.dtype)).astype(hidden.dtype)
  return {"loss": loss, "kernel": of_kernel}, {"of": of, "hidden": of_hidden}


def _logits(kernel, hidden):
  """[B, C, V] float32; the product is in the dtype of the hidden states, as `Policy.logits` is."""
  return (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)


def _by_columns(read, C, kernel, *arrays):
  """`read` of C columns after the other: its sums added up, its columns put side by side."""
  B, T = arrays[0].shape[:2]
  pieces = -(-T // C)
  if pieces == 1:
    return read(kernel, *arrays)

  def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] to [pieces, B, C, ...]
    x = jnp.pad(x, ((0, 0), (0, pieces * C - T), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], pieces, C, *x.shape[2:]).swapaxes(0, 1)

  def join(x: jax.Array) -> jax.Array:  # the inverse
    return x.swapaxes(0, 1).reshape(x.shape[1], pieces * C, *x.shape[3:])[:, :T]

  def local(kernel, *arrays):
    some = [cut(x) for x in arrays]
    sums, _ = jax.eval_shape(read, kernel, *(x[0] for x in some))

    def add(sums, some):
      more, each = read(kernel, *some)
      return jax.tree.map(jnp.add, sums, more), each

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    sums, each = jax.lax.scan(add, nothing, some)
    return sums, jax.tree.map(join, each)

  return rules.sum_over_rows(local, B)(kernel, *arrays)
