"""Dimension letters, and the pytrees that travel between the stages.

Letters, used in every docstring, einsum and assert of the package:

  B prompts (rows)      P prompt length       D model width        F feed-forward width
  K responses a prompt  R response length     N query heads        V vocabulary
  L layers              T = P + R             G key-value heads    H head width

One convention serves right padding, left padding and packing: every token has a *segment* (0 for
padding, 1.. for the documents of a row) and a *position* inside its document. A token attends to
the earlier tokens of its own segment and to nothing else. Where a document goes on in several ways,
as a prompt with its ranked answers, a *branch* (0 for the prompt, 1.. for the answers) keeps these
from seeing each other.
"""

from typing import Any

import flax.struct
import jax

Params = Any  # a pytree of arrays, as `module.init(...)["params"]` returns it
Metrics = dict[str, jax.Array]


class UserError(ValueError):
  """Input that the user can mend: the message names the rule, the values and the remedy.

  Experiments print the message without a traceback and exit with status 2.
  """


@flax.struct.dataclass
class TokenBatch:
  """Rows of text with the tokens that carry loss, packed or padded."""

  tokens: jax.Array  # [B, T] int32 ids
  segments: jax.Array  # [B, T] int32, 0 on padding, 1.. the document inside the row
  positions: jax.Array  # [B, T] int32, place inside the document, 0 on padding
  loss_mask: jax.Array  # [B, T] float32, 1 where the token is a target of the loss


@flax.struct.dataclass
class PromptBatch:
  """Prompts that end where a response begins, left-padded so that responses start in one column."""

  tokens: jax.Array  # [B, P] int32 ids
  mask: jax.Array  # [B, P] float32, 1 on real tokens


@flax.struct.dataclass
class RankingBatch:
  """Rows of up to M prompts, each followed by its K ranked answers, which share its tokens.

  A prompt and its answers are one segment, each answer a branch of it whose positions go on from
  the prompt's; so an answer's tokens see the prompt and what the answer says before them.
  """

  tokens: jax.Array  # [B, T] int32 ids
  segments: jax.Array  # [B, T] int32, 0 on padding, 1.. the prompt inside the row
  branches: jax.Array  # [B, T] int32, 0 on prompts and padding, 1.. the answer
  positions: jax.Array  # [B, T] int32, place in the dialogue of prompt and answer
  ends: jax.Array  # [B, M, K] int32, column of each answer's last token
  ranks: jax.Array  # [B, M, K] int32, 0 is best; equal ranks are ties
  valid: jax.Array  # [B, M, K] float32, 0 on slots that hold no answer
  lengths: jax.Array  # [B, M, K] int32, tokens in the answer (for the longer-answer baseline)


@flax.struct.dataclass
class Rollout:
  """What PPO learns from. Log-probabilities are in nats, at the sampling temperature."""

  prompts: jax.Array  # [B, P] int32 ids, left-padded
  prompt_mask: jax.Array  # [B, P] float32, 1 on real tokens
  responses: jax.Array  # [B, R] int32 ids, pad after the first stop token
  mask: jax.Array  # [B, R] float32, 1 up to and including the stop token
  logprobs: jax.Array  # [B, R] under the policy that sampled
  ref_logprobs: jax.Array  # [B, R] under the reference (SFT) policy
  values: jax.Array  # [B, R] the critic's value before each token
  scores: jax.Array  # [B] reward model, before any KL and before the missing-EOS rule
  finished: jax.Array  # [B] float32, 1 where the response ended with a stop token
  stream: jax.Array | None = None  # [B, T, D] after the blocks that all networks share, if any
