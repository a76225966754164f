"""How step time grows with devices, processes, response length and batch.

  python benchmarks/scaling.py [--repeats=9]

Strong scaling keeps the rows of a step, weak scaling the rows of a device. Every line is a run of
its own, of one process or several on this machine; a step's time is the median over repeats, with
the interquartile range. One CPU device already uses every core of the machine, so more of them
cannot be faster: "ideal" is the time of one device for the same rows, and what is lost to it is the
price of splitting. For rollouts the prediction beside a time
is the first one's, grown as the plan's least time at rates measured here grows (`calibrate`).
"""

import argparse
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
ROWS, PER_DEVICE, LENGTH = 32, 8, 128
LENGTHS, BATCHES = (16, 32, 64, 128), (8, 16, 32, 64)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=9, help="timed steps of each line")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.one:
    found = one(repeats=arguments.repeats, **json.loads(arguments.one))
    if found:
      print(json.dumps(found))
    return
  cores = len(os.sched_getaffinity(0))
  command = f"python benchmarks/scaling.py --repeats={arguments.repeats}"
  print(f"`{command}`, {platform.machine()}, {cores} cores.\n")
  devices_table(arguments.repeats)
  rollouts_table(arguments.repeats)


def devices_table(repeats):
  """SFT steps over devices of one process, and over processes of one device."""
  print("| scaling | processes x devices | rows | ms a step | IQR | ideal | reached |")
  print("|---|---|---:|---:|---:|---:|---:|")
  for kind in ("strong", "weak"):
    base = None
    for count, devices in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1)):
      total = count * devices
      rows = ROWS if kind == "strong" else PER_DEVICE * total
      found = run(repeats, count, devices, stage="sft step", rows=rows, length=LENGTH)
      base = base or found["median"]
      ideal = base * (1 if kind == "strong" else total)
      print(
        f"| {kind} | {count} x {devices} | {rows} | {found['median']:.1f} | {found['iqr']:.1f} | "
        f"{ideal:.1f} | {ideal / found['median']:.0%} |",
        flush=True,
      )
  print()


def rollouts_table(repeats):
  """Generation over response length and batch, beside what its work predicts."""
  print("| rollouts | rows | response | ms | IQR | predicted | measured / predicted |")
  print("|---|---:|---:|---:|---:|---:|---:|")
  for varied, cases in (
    ("response length", [(16, length) for length in LENGTHS]),
    ("batch", [(rows, 32) for rows in BATCHES]),
  ):
    first = None
    for rows, length in cases:
      found = run(repeats, 1, 1, stage="ppo generate", rows=rows, length=length)
      first = first or found
      predicted = first["median"] * found["least"] / first["least"]
      print(
        f"| {varied} | {rows} | {length} | {found['median']:.1f} | {found['iqr']:.1f} | "
        f"{predicted:.1f} | {found['median'] / predicted:.2f} |",
        flush=True,
      )


def run(repeats, count, devices, **case):
  """One line, in `count` processes; the first one says what it measured."""
  environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  environ |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  running = []
  for index in range(count):
    place = {"coordinator": f"localhost:{port}" if count > 1 else "none", "count": count}
    said = json.dumps(case | place | {"index": index})
    command = [sys.executable, __file__, f"--repeats={repeats}", f"--one={said}"]
    pipe = subprocess.PIPE
    running.append(subprocess.Popen(command, env=environ, text=True, stdout=pipe, stderr=pipe))
  outputs = [process.communicate() for process in running]
  for process, (_, errors) in zip(running, outputs):
    if process.returncode:
      sys.exit(errors)
  return json.loads(outputs[0][0].splitlines()[-1])  # gloo talks on stdout before


def one(repeats, stage, rows, length, coordinator, count, index):
  """Milliseconds a call of a stage's program, and the plan's least time for it."""
  import jax
  from common import fill

  from rlhf_jax import config as config_lib
  from rlhf_jax.experiment import ExperimentConfig
  from rlhf_jax.parallel import hosts
  from rlhf_jax.parallel import mesh as mesh_lib
  from rlhf_jax.plan import programs, roofline

  hosts.start(coordinator, count, index)
  config = config_lib.load(str(ROOT / "configs/village.py"))
  config.unlock()
  config.model.update(d_model=256, n_layers=4, n_heads=8, n_kv_heads=8, d_ff=768, vocab_size=2_048)
  config.sft.update(batch_size=rows, sequence_length=length)
  config.ppo.update(minibatches=1)
  config.ppo.rollout.update(batch_size=rows, prompt_length=16)
  config.ppo.rollout.sampling.max_new_tokens = length
  devices = jax.device_count()
  config.comparisons.batch_size = config.reward.batch_size = 8 * devices
  if stage != "ppo generate":
    config.ppo.rollout.batch_size = 8 * devices
  built = config_lib.build(ExperimentConfig, config)
  mesh = mesh_lib.make(built.mesh)
  program = next(p for p in programs.of_run(built, mesh) if p.name == stage)
  compiled = program.compile()
  least = roofline.estimate(program, compiled, calibrate()).least

  times = []
  for _ in range(repeats + 2):
    arguments = fill(program.shapes)  # anew, since some are donated
    hosts.wait("ready")
    began = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    times.append(1e3 * (time.perf_counter() - began))
  times = sorted(times[2:])
  quarter = len(times) // 4
  if not hosts.is_first():
    return None
  return {
    "median": statistics.median(times),
    "iqr": times[-1 - quarter] - times[quarter],
    "least": least,
  }


def calibrate():
  """This machine as a chip: float32 matrix products, and reads of a large array, a second."""
  import jax
  import jax.numpy as jnp

  from rlhf_jax.plan.roofline import Chip

  def seconds(function, *arguments):
    function = jax.jit(function)
    best = float("inf")
    for _ in range(5):
      began = time.perf_counter()
      jax.block_until_ready(function(*arguments))
      best = min(best, time.perf_counter() - began)
    return best

  x, long = jnp.ones((1_024, 1_024)), jnp.ones(1 << 25)
  return Chip(
    memory=float("inf"),
    flops=2 * 1_024**3 / seconds(jnp.dot, x, x),
    bandwidth=long.nbytes / seconds(jnp.sum, long),
    interconnect=float("inf"),
  )


if __name__ == "__main__":
  main()
