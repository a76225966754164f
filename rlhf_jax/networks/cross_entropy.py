"""The loss of next tokens together with its gradient, a few columns of the rows at a time.

Logits are the largest arrays of a training step. Where every token's weight in the loss is known
beforehand, the gradient of some columns can be computed while their logits are at hand, so that
nothing of size [B, T, V] is kept, moved through memory or computed twice (Hsu et al. 2024, Liger
Kernel, section 3.2, does it by rows). PPO cannot have this: its weights depend on all
log-probabilities of a batch; see `likelihood.of_tokens`.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.networks import heads
from rlhf_jax.parallel import rules
from rlhf_jax.types import Params

TOKENS = 256  # whose logits a CPU holds at once: many enough for fast products, few for its cache


def of_tokens(
  policy: heads.Policy, params: Params, hidden: jax.Array, tokens: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The sum of weights [B, T] times -log p of tokens [B, T], in nats, and which are the likeliest.

  hidden [B, T, D] are those of the columns before. The second result, [B, T] float32, is 1 where no
  token is likelier than the given one. Only the first has a gradient, towards parameters and hidden
  states. At most `logit_columns` columns of the policy's config have logits at a time; None leaves
  it to the backend: what stays in its cache on a CPU, elsewhere all.
  """
  B, T = tokens.shape
  own = B // rules.row_shards(B)
  on_cpu, columns = jax.default_backend() == "cpu", policy.config.compute.logit_columns
  columns = min(columns or (max(1, TOKENS // own) if on_cpu else T), T)
  kernel = policy.apply({"params": params}, method="head_kernel")
  return _loss(columns, kernel, hidden, tokens, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(columns, kernel, hidden, tokens, weights):
  sums, each = _by_columns(_read, columns, kernel, hidden, tokens, weights)
  return sums["loss"], each["likeliest"]


def _forward(columns, kernel, hidden, tokens, weights):
  sums, each = _by_columns(_read_with_gradient, columns, kernel, hidden, tokens, weights)
  return (sums["loss"], each["likeliest"]), (sums["kernel"], each["hidden"])


def _backward(columns, gradients, moved):
  scale = lambda x: (x * moved[0]).astype(x.dtype)
  return *map(scale, gradients), None, None


_loss.defvjp(_forward, _backward)


def _read(kernel, hidden, tokens, weights):
  """What some columns [B, C] add to the loss, and what is known of each."""
  return _of_logits(_logits(kernel, hidden), tokens, weights)[:2]


def _read_with_gradient(kernel, hidden, tokens, weights):
  """As `_read`, with what they add to the kernel's gradient, and that of each hidden state.

  With probabilities p and weights w, the gradient of the logits is w (p - one_hot(token)).
  """
  logits = _logits(kernel, hidden)
  sums, each, normaliser = _of_logits(logits, tokens, weights)
  excess = jnp.exp(logits - normaliser[..., None]) - jax.nn.one_hot(tokens, logits.shape[-1])
  weights = weights[..., None]
  excess = jnp.where(weights > 0, weights * excess, 0.0).astype(hidden.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  of_kernel = product("bcd,bcv->dv", hidden, excess)
  of_hidden = product("bcv,dv->bcd", excess, kernel.astype(hidden.dtype)).astype(hidden.dtype)
  return sums | {"kernel": of_kernel}, each | {"hidden": of_hidden}


def _logits(kernel, hidden):
  """[B, C, V] float32; the product is in the dtype of the hidden states, as `Policy.logits` is."""
  return (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)


def _of_logits(logits, tokens, weights):
  """Sums and columns as `_read` has them, and the log-normalisers [B, C]."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  peak, normaliser = jnp.max(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1)
  loss = jnp.sum(jnp.where(weights > 0, weights * (normaliser - chosen), 0.0))
  return {"loss": loss}, {"likeliest": (chosen >= peak).astype(jnp.float32)}, normaliser


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
