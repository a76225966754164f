"""What each option that saves memory saves: predicted by the plan, and measured in a process.

  python benchmarks/memory.py [--rows=16] [--length=256]

Every row is one step of a stage in a process of its own, on one CPU device and with random weights:
the plan's bytes (arguments, and intermediate values at the worst moment), and how much memory the
process gained at its peak while it ran the step, by the kernel's count. Prints a Markdown table.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

MODEL = dict(
  vocab_size=8_192,
  d_model=512,
  n_layers=8,
  n_heads=8,
  n_kv_heads=8,
  head_dim=64,
  d_ff=1_536,
  rope_base=10_000.0,
  norm_eps=1e-5,
  tie_embeddings=True,
)
PLAIN = dict(
  dtype="float32",
  scan_layers=True,
  remat=False,
  logit_columns=None,
  attention="auto",
  panels="auto",
)
OPTIONS = {
  "plain": {},
  "logit_columns 32": {"logit_columns": 32},
  "remat": {"remat": True},
  "remat, logit_columns 32": {"remat": True, "logit_columns": 32},
  "4 micro-batches": {"micro_batches": 4},
  "all of them": {"remat": True, "logit_columns": 32, "micro_batches": 4},
}
STAGES = ("sft step", "reward step", "ppo generate", "ppo score", "ppo update")
MEGA = 1e6


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=16, help="rows of a step")
  parser.add_argument("--length", type=int, default=256, help="tokens of a row")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.one:
    stage, option = json.loads(arguments.one)
    print(json.dumps(one(stage, OPTIONS[option], arguments.rows, arguments.length)))
    return
  command = f"python benchmarks/memory.py --rows={arguments.rows} --length={arguments.length}"
  print(f"`{command}`, {platform.machine()}, one CPU device, float32; MB.\n")
  print("| stage | option | arguments | temporary | predicted peak | measured peak | ratio |")
  print("|---|---|---:|---:|---:|---:|---:|")
  for stage in STAGES:
    for option in OPTIONS:
      if stage == "ppo generate" and option != "plain":
        continue
      told = in_a_process(stage, option, sys.argv[1:])
      kept, temporary, measured = (x / MEGA for x in told)
      predicted = kept + temporary
      sizes = " | ".join(f"{x:.0f}" for x in (kept, temporary, predicted, measured))
      print(f"| {stage} | {option} | {sizes} | {measured / predicted:.2f} |", flush=True)


def in_a_process(stage, option, argv):
  """The same script for one row of the table."""
  environ = os.environ | {"JAX_PLATFORMS": "cpu", "RLHF_JAX_DEVICES": "1", "XLA_FLAGS": ""}
  environ |= {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
  # The allocator gives what is freed back at once, and touches no more than it is asked for.
  environ |= {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=0"}
  command = [sys.executable, __file__, *argv, f"--one={json.dumps([stage, option])}"]
  done = subprocess.run(command, env=environ, text=True, capture_output=True)
  if done.returncode:
    sys.exit(done.stderr)
  return json.loads(done.stdout)


def one(stage, changes, rows, length):
  """(bytes of arguments, predicted temporary bytes, gain of the process's peak) of one step."""
  import gc

  import jax
  from common import fill

  from rlhf_jax import config as config_lib
  from rlhf_jax.experiment import ExperimentConfig
  from rlhf_jax.parallel import mesh as mesh_lib
  from rlhf_jax.plan import programs

  config = config_lib.load("configs/village.py")
  config.unlock()
  changes = dict(changes)
  parts = changes.pop("micro_batches", 1)
  config.model.update(MODEL, compute=PLAIN | changes)
  config.sft.update(batch_size=rows, micro_batches=parts, sequence_length=length)
  config.reward.update(batch_size=rows, micro_batches=parts, sequence_length=length)
  config.ppo.update(minibatches=1, micro_batches=parts)
  config.ppo.rollout.update(batch_size=rows, micro_batches=parts, prompt_length=length // 2)
  config.ppo.rollout.sampling.max_new_tokens = length // 2
  config.comparisons.update(prompt_length=length // 4)
  config.comparisons.sampling.max_new_tokens = 8
  built = config_lib.build(ExperimentConfig, config)
  mesh = mesh_lib.make(built.mesh)
  program = next(p for p in programs.of_run(built, mesh) if p.name == stage)
  compiled = program.compile()
  memory = compiled.memory_analysis()
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  gc.collect()
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
  before = resident()
  arguments = fill(program.shapes)
  gc.collect()
  jax.block_until_ready(compiled(*arguments))
  kept = sum(program.arguments.values())
  return kept, memory.temp_size_in_bytes + results, resident("VmHWM") - before


def resident(field="VmRSS"):
  """Bytes of this process in memory, now or (VmHWM) at the most so far."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
  main()
