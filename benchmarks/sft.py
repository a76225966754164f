"""A step of supervised fine-tuning: tokens a second, AdamW and clipping included.

  python benchmarks/sft.py --model=tiny [--rows=16] [--length=256] [--documents=1]

Every token carries loss, all parameters train, nothing is computed again. Documents that are packed
into a row see nothing of each other.
"""

import common

if __name__ == "__main__":
  common.prepare()

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sft
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.training import accumulate, optim
from rlhf_jax.types import TokenBatch


def main():
  given = common.arguments(
    __doc__,
    rows=(16, "rows of a step"),
    length=(256, "tokens of a row"),
    documents=(1, "documents of a row, as long as each other"),
    remat=(False, "blocks are computed again in the backward pass"),
    scan=(False, "one compiled layer"),
    micro_batches=(1, "parts that a batch goes through the network in"),
    attention=common.ATTENTION,
    turns=common.TURNS,
  )
  B, T, D = given.rows, given.length, given.documents
  networks = common.networks_of(given)
  config = networks.policy.config
  step, state = begin(networks, B, T, given.micro_batches, D)
  found = common.measure_step(step, state, given.repeats)
  limits = common.limits()
  bound = B * T * limits["flops"] / (3 * common.forward_flops(config, B * D, T / D, T / D))
  found |= common.rates(found.pop("repetitions"), B * T, "tokens/s")
  found |= {"bound": bound, "share": found["rate"]["median"] / bound, "limits": limits}
  about = {"kind": "sft", "peer": "rlhf_jax", "model": given.model, "batch": B, "seq": T}
  about |= {"documents": D, "micro_batches": given.micro_batches, "attention": given.attention}
  common.report(given.out, about | {"dtype": given.dtype} | found)


def begin(networks, B, T, micro_batches=1, documents=1):
  """`state -> (state, metrics)` on B rows of T random tokens, and the first state."""
  accumulate.check("sft", B, micro_batches)
  mesh = common.mesh_of(common.devices_for(B // micro_batches))
  optimizer = optim.make(common.adamw(1e-4, clip_norm=1.0), 1_000_000)
  own = jax.tree.map(jnp.copy, networks.policy_params)  # the state is donated
  state = rules.place(sft.init(own, optimizer), mesh)
  step = functools.partial(
    sft.step, policy=networks.policy, optimizer=optimizer, micro_batches=micro_batches
  )
  step = rules.compile_step(step, state, mesh)
  V = networks.policy.config.vocab_size
  ids = np.random.default_rng(0).integers(common.FIRST_ID, V, (B, T), np.int32)
  lengths = [len(some) for some in np.array_split(np.arange(T), documents)]
  segments = np.repeat(np.arange(documents) + 1, lengths)
  positions = np.concatenate([np.arange(length) for length in lengths])
  segments, positions = (np.tile(row, (B, 1)).astype(np.int32) for row in (segments, positions))
  batch = TokenBatch(ids, segments, positions, np.ones(ids.shape, np.float32))
  batch = mesh_lib.put_batch(mesh, batch)
  return lambda state: step(state, batch, {}), state


if __name__ == "__main__":
  main()
