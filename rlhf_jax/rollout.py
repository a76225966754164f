"""Rollouts: responses sampled from the policy, and everything PPO must know about them.

Two compiled functions: `generate` (in `generation/decode.py`) and `score` below. The reference is
the SFT policy and never changes; the critic says what it expected before each token; the reward
model scores the whole response, closed with an EOS as in the comparisons that it learnt from.
Networks have no dropout, so sampling and scoring see the same one.
"""

import dataclasses
import re

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.config import PositiveInt
from rlhf_jax.generation.decode import Completion
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.networks import heads, likelihood
from rlhf_jax.parallel import rules
from rlhf_jax.reward import score_sequences
from rlhf_jax.training import accumulate
from rlhf_jax.types import Params, PromptBatch, Rollout, UserError

MATRICES = re.compile(r"^trunk/.*(kernel|embedding)$|^lm_head/kernel$")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """One batch of experience."""

  batch_size: PositiveInt  # B, episodes an iteration
  micro_batches: PositiveInt  # parts that they are scored in, to save memory
  prompt_length: PositiveInt  # P, tokens; prompts are padded on the left to it
  sampling: SamplingConfig

  def __post_init__(self):
    accumulate.check("ppo.rollout", self.batch_size, self.micro_batches)
    if self.sampling.is_truncated:
      raise UserError(
        f"config sampling: rollouts need temperature > 0, top_k 0 and top_p 1 (got "
        f"{self.sampling.temperature:g}, {self.sampling.top_k}, {self.sampling.top_p:g}): PPO "
        "compares log-probabilities of the full softmax."
      )


@flax.struct.dataclass
class Judges:
  """The networks that PPO reads and never writes."""

  reference: Params  # the SFT policy
  reward: Params  # the reward model


def in_compute_dtype(network: heads.Policy | heads.ScalarNetwork, params: Params) -> Params:
  """The parameters of a network that does not train, stored in the dtype they are computed in.

  Matrices are cast to it before they are used in any case, so no number changes, and in bfloat16
  they take half the memory. Norms and the scalar head are computed in float32 and stay so.
  """
  dtype = network.config.compute.dtype
  cast = lambda name, x: x.astype(dtype) if MATRICES.search(name) else x
  return jax.tree_util.tree_map_with_path(lambda p, x: cast(rules.path_name(p), x), params)


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How rollouts are scored: all that is static in `score`."""

  policy: heads.Policy
  scalar: heads.ScalarNetwork
  temperature: float  # of the sampling; the reference is read at it too
  eos_id: int  # closes what the reward model reads
  stem_blocks: int = 0  # lowest blocks that all networks share (`heads.shared_stem`)
  micro_batches: int = 1  # parts that the rows go through the networks in


def score(
  how: Scoring, judges: Judges, critic: Params, prompts: PromptBatch, completion: Completion
) -> Rollout:
  """What reference, critic and reward model say of B responses; pure and jittable.

  Reference log-probabilities are taken at the sampling temperature, like the sampler's own, or the
  KL would not be 0 where the two policies agree. The value at column t is the critic's before
  response token t, that is, at sequence column P + t - 1. The blocks that all networks share run
  once, and their output travels with the rollout.
  """
  look = lambda part: _score(how, judges, critic, *part)
  return accumulate.in_parts(look, (prompts, completion), how.micro_batches)


def _score(how, judges, critic, prompts, completion) -> Rollout:
  R = completion.tokens.shape[1]
  mask = jnp.concatenate([prompts.mask, completion.mask], axis=1)
  closed, closed_mask = close(prompts, completion, how.eos_id)
  if how.stem_blocks:
    layout = heads.layout(closed_mask)
    stem = {"params": judges.reference}
    closed = how.policy.apply(stem, closed, *layout, how.stem_blocks, method="stem")
  inputs = closed[:, :-1]
  reference = likelihood.of_responses(
    how.policy,
    judges.reference,
    inputs,
    mask,
    completion.tokens,
    how.temperature,
    how.stem_blocks,
  )
  values = response_values(how.scalar, critic, inputs, mask, R, how.stem_blocks)
  live = completion.mask > 0
  return Rollout(
    prompts=prompts.tokens,
    prompt_mask=prompts.mask,
    responses=completion.tokens,
    mask=completion.mask,
    logprobs=completion.logprobs,
    ref_logprobs=jnp.where(live, reference.logprobs, 0.0),
    values=jnp.where(live, values, 0.0),
    scores=score_sequences(how.scalar, judges.reward, closed, closed_mask, how.stem_blocks),
    finished=completion.finished,
    stream=inputs if how.stem_blocks else None,
  )


def close(prompts: PromptBatch, completion: Completion, eos_id: int) -> tuple[jax.Array, jax.Array]:
  """Ids and mask [B, P + R + 1] of prompts and responses, each of which ends with an EOS.

  A response that another stop token ended, or that was cut at its longest, gets the EOS it lacks.
  """
  lengths = jnp.sum(completion.mask, axis=1, keepdims=True).astype(jnp.int32)
  last = jnp.take_along_axis(completion.tokens, jnp.maximum(lengths - 1, 0), axis=1)
  lacking = (lengths == 0) | (last != eos_id)
  blank = jnp.zeros_like(lengths)
  tokens = jnp.concatenate([prompts.tokens, completion.tokens, blank], axis=1)
  mask = jnp.concatenate([prompts.mask, completion.mask, blank], axis=1)
  after = jnp.arange(tokens.shape[1])[None] == prompts.tokens.shape[1] + lengths
  added = lacking & after
  return jnp.where(added, eos_id, tokens), jnp.where(added, 1.0, mask)


def response_values(
  scalar: heads.ScalarNetwork,
  params: Params,
  sequences: jax.Array,
  mask: jax.Array,
  response_length: int,
  first_block: int = 0,
) -> jax.Array:
  """The critic's value before each response token, [B, R].

  Arguments as those of `likelihood.of_responses`.
  """
  positions, segments, columns = heads.layout_before(mask, response_length)
  return scalar.apply(
    {"params": params}, sequences, positions, segments, first_block, columns=columns
  )
