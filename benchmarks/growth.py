"""How cost grows: time over batch, length, width and depth, as fitted exponents beside theory's.

  python benchmarks/growth.py [--workloads=generate,sft] [--repeats=5]

Each axis is stretched alone, the others stay as they are. An exponent is the slope of log time over
log size (least squares). Theory's is that of the least time for the same points: `bound` of
`generate.py`, where a step computes or reads its weights and cache, whichever takes longer, with
limits measured at the start; for a training step, multiply-adds. Those of multiply-adds alone
stand beside it: decoding is bound by what it reads. An exponent below theory's is overhead that
larger sizes spread over more work.
"""

import common

if __name__ == "__main__":
  common.prepare()

import functools
import sys
import types

import generate
import numpy as np
import sft

SIZES = {
  "generate": {
    "batch": (8, 16, 32, 64),
    "length": (32, 64, 128, 256),
    "width": (128, 256, 512),
    "depth": (3, 6, 12),
  },
  "sft": {
    "batch": (4, 8, 16, 32),
    "length": (64, 128, 256, 512),
    "width": (128, 256, 512),
    "depth": (3, 6, 12),
  },
}
BASE = {
  "generate": {"batch": 16, "length": 64, "width": 256, "depth": 6},
  "sft": {"batch": 8, "length": 128, "width": 256, "depth": 6},
}
PROMPT = 32  # tokens before what is generated
VOCABULARY, HEAD = 4_096, 32
random_networks = functools.cache(common.random_networks)


def main():
  given = common.arguments(
    __doc__,
    workloads=("generate,sft", "which"),
    axes=("batch,length,width,depth", "what is stretched"),
    shrink=(1, "divides every size but the head's, to try the program out"),
  )
  rows, limits = [], common.limits()
  for workload in given.workloads.split(","):
    for axis in given.axes.split(","):
      points = [BASE[workload] | {axis: size} for size in SIZES[workload][axis]]
      points = [{name: max(n // given.shrink, 1) for name, n in p.items()} for p in points]
      rows.append(stretch(workload, axis, points, limits, given.repeats))
      sys.stderr.write(line(rows[-1]) + "\n")
  head = "| workload | axis | sizes | ms | exponent | multiply-adds | theory | beyond theory |"
  table = "\n".join([head, "|---|---|---|---|---:|---:|---:|---:|", *map(line, rows)])
  sys.stderr.write(table + "\n")
  about = {"kind": "growth", "peer": "rlhf_jax", "limits": limits}
  common.report(given.out, about | {"runs": rows, "table": table})


def stretch(workload, axis, points, limits, repeats) -> dict:
  """The exponents of one axis."""
  networks = [network(point) for point in points]
  configs = [each.policy.config for each in networks]
  sizes = [point[axis] for point in points]
  costs = {
    "seconds": [MEASURE[workload](*each, repeats) for each in zip(networks, points)],
    "flops": [FLOPS[workload](*each) for each in zip(configs, points)],
    "least_seconds": [LEAST[workload](*each, limits) for each in zip(configs, points)],
  }
  exponents = {name: exponent(sizes, found) for name, found in costs.items()}
  return {"workload": workload, "axis": axis, "sizes": sizes, "exponents": exponents} | costs


def exponent(sizes, costs) -> float:
  """The slope of log cost over log size."""
  return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def network(point) -> common.Networks:
  """Random weights; heads grow with the width, and the feed-forward width is 2.7 times it."""
  D = max(point["width"] // HEAD, 1) * HEAD
  sizes = (VOCABULARY, D, point["depth"], D // HEAD, D // HEAD, 688 * D // 256, False)
  return random_networks(sizes)


def seconds_to_generate(networks, point, repeats) -> float:
  """The median time of a call."""
  how = types.SimpleNamespace(eos=False, compact="", cache_sizes=4, tensor=1, repeats=repeats)
  found = generate.measure(networks, point["batch"], PROMPT, point["length"], how)
  return found["seconds"]["median"]


def seconds_of_a_step(networks, point, repeats) -> float:
  """The median time of an SFT step."""
  step, state = sft.begin(networks, point["batch"], point["length"])
  found = common.measure_step(step, state, repeats)
  return common.rates(found["repetitions"], 1.0, "steps/s")["seconds"]["median"]


def flops_to_generate(config, point) -> float:
  """Multiply-adds of the prompt and of every token after it."""
  B, R = point["batch"], point["length"]
  a_token = common.forward_flops(config, B, 1, 1)
  scores = 4 * config.n_layers * config.n_heads * config.head_dim
  columns = sum(range(PROMPT + 1, PROMPT + R))
  return common.forward_flops(config, B, PROMPT, 1) + (R - 1) * a_token + B * scores * columns


def flops_of_a_step(config, point) -> float:
  """Multiply-adds forwards and, twice as many, backwards."""
  B, T = point["batch"], point["length"]
  return 3 * common.forward_flops(config, B, T, T)


def least_to_generate(config, point, limits) -> float:
  """Seconds by the bound that `generate.py` states."""
  B, R = point["batch"], point["length"]
  return B * R / generate.bound(config, B, PROMPT, R, limits)


def least_of_a_step(config, point, limits) -> float:
  """Seconds by the bound that `sft.py` states."""
  return flops_of_a_step(config, point) / limits["flops"]


def line(row) -> str:
  """A line of the table."""
  sizes = ", ".join(map(str, row["sizes"]))
  times = ", ".join(f"{1e3 * s:.0f}" for s in row["seconds"])
  found, work, theory = (row["exponents"][name] for name in ("seconds", "flops", "least_seconds"))
  return (
    f"| {row['workload']} | {row['axis']} | {sizes} | {times} | {found:.2f} | {work:.2f} | "
    f"{theory:.2f} | {found / theory - 1:+.0%} |"
  )


MEASURE = {"generate": seconds_to_generate, "sft": seconds_of_a_step}
FLOPS = {"generate": flops_to_generate, "sft": flops_of_a_step}
LEAST = {"generate": least_to_generate, "sft": least_of_a_step}

if __name__ == "__main__":
  main()
