"""Generation: new tokens a second of the compiled decoding loop, prefill included.

  python benchmarks/generate.py --model=tiny [--batches=1,16,64] [--shapes=32x64,64x128]
    [--tensor=2] [--eos] [--compact=0.875,0.75,0.625,0.5,0.375,0.25]

Without --eos no row ends early. With it the ids i % 64 == 3 all end a row, so lengths are skewed
(about 1 in 64 a step for random weights), and the rate counts useful tokens: those up to the end.
"""

import common

if __name__ == "__main__":
  common.prepare()

import sys

import jax
import numpy as np

from rlhf_jax.generation import decode
from rlhf_jax.generation.sampling import SamplingConfig, Stops
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import PromptBatch

HAZARD = 64  # with --eos one id in so many ends a row


def main():
  given = common.arguments(
    __doc__,
    batches=("1,16,64", "rows"),
    shapes=("32x64,64x128", "tokens of prompt x response"),
    eos=(False, "rows end at random"),
    cache_sizes=(4, "sizes that the cache goes through as it fills"),
    tensor=(1, "devices that share the parameters"),
    compact=("", "shares of the batch that it goes on in when no more rows are open"),
    turns=common.TURNS,
  )
  networks = common.networks_of(given)
  limits = common.limits()
  runs = []
  for shape in given.shapes.split(","):
    P, R = map(int, shape.split("x"))
    for B in map(int, given.batches.split(",")):
      row = {"dtype": given.dtype, "batch": B, "prompt": P, "response": R}
      row |= measure(networks, B, P, R, given)
      row["bound"] = bound(networks.policy.config, B, P, R, limits)
      row["share"] = row["rate"]["median"] / row["bound"]
      runs.append(row)
      sys.stderr.write(
        f"{given.model} {shape} x {B}: {row['rate']['median']:.1f} {row['unit']}, "
        f"{row['share']:.0%} of the bound, compiled in {row['compile_seconds']:.1f} s\n"
      )
  kind = {"kind": "generate", "peer": "rlhf_jax", "model": given.model, "eos": given.eos}
  common.report(given.out, kind | {"limits": limits, "runs": runs})


def measure(networks, B, P, R, given) -> dict:
  """One row of the table."""
  V = networks.policy.config.vocab_size
  ends = tuple(range(common.FIRST_ID, V, HAZARD)) if given.eos else (common.NEVER,)
  shares = tuple(map(float, filter(None, given.compact.split(","))))
  sampling = SamplingConfig(
    R, 1.0, top_k=0, top_p=1.0, stop=None, compact_to=shares, cache_sizes=given.cache_sizes
  )
  mesh = common.mesh_of(common.devices_for(B, given.tensor), given.tensor)
  generate = decode.compiled(networks.policy, mesh, B, config=sampling, stops=Stops(ends), pad_id=0)
  params = rules.place(networks.policy_params, mesh)
  ids = np.random.default_rng(1_000 * B + P).integers(common.FIRST_ID, V, (B, P), np.int32)
  prompts = mesh_lib.put_batch(mesh, PromptBatch(ids, np.ones((B, P), np.float32)))
  key = mesh_lib.put_replicated(mesh, jax.random.key(0))
  compiled = {}

  def compile_it():
    compiled["it"] = generate.lower(params, prompts, key).compile()

  compile_seconds = common.timed(compile_it).seconds
  calls = iter(range(1, 1_000))

  def call():
    fresh = mesh_lib.put_replicated(mesh, jax.random.key(next(calls)))
    return float(np.sum(jax.block_until_ready(compiled["it"](params, prompts, fresh)).mask))

  call()
  done = common.repeat(call, given.repeats)
  found = common.rates(done, None, "useful tokens/s" if given.eos else "new tokens/s")
  tokens = [repetition.units for repetition in done]
  return found | {"compile_seconds": compile_seconds, "tokens": tokens}


def bound(config, B, P, R, limits) -> float:
  """Tokens a second if matrix products, or reads of weights and cache, were all there is."""
  width = 4 if config.compute.dtype == "float32" else 2
  a_token = common.forward_flops(config, 1, 1, 1)
  # A token's pass has the scores with itself in it, half a column of them, which are no weights.
  weights = width * (a_token / 2 - config.n_layers * config.n_heads * config.head_dim)
  cached = 2 * width * config.n_layers * config.n_kv_heads * config.head_dim
  seconds = common.forward_flops(config, B, P, 1) / limits["flops"]
  for column in range(P + 1, P + R):
    scores = 4 * config.n_layers * config.n_heads * config.head_dim * column
    flops = B * (a_token + scores) / limits["flops"]
    seconds += max(flops, (weights + B * cached * column) / limits["bandwidth"])
  return B * R / seconds


if __name__ == "__main__":
  main()
