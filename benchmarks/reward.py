"""A step of the reward model: pairs a second, AdamW included.

  python benchmarks/reward.py --model=tiny [--pairs=16] [--length=128]

The two answers of a pair share no token, so nothing is gained by reading a prompt once.
"""

import common

if __name__ == "__main__":
  common.prepare()

import functools

import numpy as np

from rlhf_jax import reward
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import RankingBatch


def main():
  given = common.arguments(
    __doc__,
    pairs=(16, "pairs of a step"),
    length=(128, "tokens of an answer"),
    micro_batches=(1, "parts that a batch goes through the network in"),
    attention=common.ATTENTION,
    turns=common.TURNS,
  )
  B, T, parts = given.pairs, given.length, given.micro_batches
  accumulate.check("reward", B, parts)
  networks = common.networks_of(given)
  config, mesh = networks.scalar.config, common.mesh_of(common.devices_for(B // parts))
  optimizer = optim.make(common.adamw(1e-4, clip_norm=1.0), 1_000_000)
  state = rules.place(reward.init(networks.reward_params, optimizer), mesh)
  step = functools.partial(
    reward.step, network=networks.scalar, optimizer=optimizer, micro_batches=parts
  )
  step = rules.compile_step(step, state, mesh)
  batch = mesh_lib.put_batch(mesh, unlike_pairs(B, T, config.vocab_size))
  found = common.measure_step(lambda state: step(state, batch, {}), state, given.repeats)
  limits = common.limits()
  bound = B * limits["flops"] / (3 * common.forward_flops(config, 2 * B, T, 0))
  found |= common.rates(found.pop("repetitions"), B, "pairs/s")
  found |= {"bound": bound, "share": found["rate"]["median"] / bound, "limits": limits}
  about = {"kind": "rm", "peer": "rlhf_jax", "model": given.model, "pairs": B, "seq": T}
  about |= {"micro_batches": parts, "attention": given.attention}
  common.report(given.out, about | {"dtype": given.dtype} | found)


def unlike_pairs(B, T, vocab_size) -> RankingBatch:
  """B pairs of answers of T random tokens; the first is the better one."""
  ids = np.random.default_rng(0).integers(common.FIRST_ID, vocab_size, (B, 2 * T), np.int32)
  halves = np.repeat(np.arange(2, dtype=np.int32), T)
  row = lambda values: np.broadcast_to(values, (B, 2 * T)).astype(np.int32)
  slot = lambda values: np.broadcast_to(values, (B, 1, 2))
  return RankingBatch(
    tokens=ids,
    segments=np.ones_like(ids),
    branches=row(halves + 1),
    positions=row(np.tile(np.arange(T), 2)),
    ends=slot(np.array([T - 1, 2 * T - 1], np.int32)),
    ranks=slot(np.array([0, 1], np.int32)),
    valid=slot(np.ones(2, np.float32)),
    lengths=slot(np.array([T, T], np.int32)),
  )


if __name__ == "__main__":
  main()
