"""What a run will need on devices that nobody has paid for yet.

  python -m rlhf_jax.plan --config=configs/paper.py:instructgpt --devices=8 --chip=h200

Compiles every program of the hot path for a mesh of so many devices, simulated on this machine's
CPU: arrays are shapes, nothing is allocated, no data or weights are read. Prints for each program
the bytes on a device at the worst moment, what devices send each other, and the least time that the
chip's peak rates allow, with the bottleneck; and what to change where it does not fit. Exits with
status 3 where something does not fit.

The CPU compiler lays matrix products of bfloat16 out in float32, so intermediate values and
collectives of such a model are upper estimates, by up to a factor of two. --compiler=tpu compiles
with libtpu for a slice of --chip instead, and no TPU is needed: sizes are those of that slice, and
beside the least time stands the one that its compiler thinks the program takes.
"""

import os
import sys

from rlhf_jax import launch

DEVICES = "--devices"


def simulated(argv: list[str]) -> str:
  """The number after --devices, before anything imports jax."""
  for i, argument in enumerate(argv):
    name, _, value = argument.partition("=")
    if name == DEVICES:
      return value or (argv[i + 1] if i + 1 < len(argv) else "8")
  return "8"


if __name__ == "__main__":
  os.environ |= {"JAX_PLATFORMS": "cpu", "RLHF_JAX_DEVICES": simulated(sys.argv[1:])}
  launch.prepare()

import time

import rich.box
import rich.console
import rich.table

from rlhf_jax import config as config_lib
from rlhf_jax.experiment import ExperimentConfig, check_batches
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.plan import programs, roofline, topology
from rlhf_jax.plan.roofline import CHIPS, GIGA, Chip
from rlhf_jax.types import UserError

DOES_NOT_FIT = 3
TABLE_WIDTH = 120  # columns
OPTIONS = {
  "devices": launch.Option(8, "how many devices to plan for"),
  "chip": launch.Option("h200", f"which device: {', '.join(CHIPS)}; sets the four below"),
  "compiler": launch.Option("cpu", "cpu, or tpu for that of a TPU (pip install 'rlhf_jax[tpu]')"),
  "memory": launch.Option(0.0, "GB of a device; 0 as the chip has"),
  "flops": launch.Option(0.0, "dense bfloat16 TFLOP/s of a device; 0 as the chip has"),
  "bandwidth": launch.Option(0.0, "GB/s from a device's memory; 0 as the chip has"),
  "interconnect": launch.Option(0.0, "GB/s from other devices, one way; 0 as the chip has"),
}


def main(config, workdir, devices, chip, compiler, **own):
  if chip not in CHIPS:
    raise UserError(f"argument --chip={chip}: known are {', '.join(CHIPS)}.")
  if compiler not in ("cpu", "tpu"):
    raise UserError(f"argument --compiler={compiler}: known are cpu and tpu.")
  on = topology.tpus(chip, devices) if compiler == "tpu" else None
  chip = described(CHIPS[chip], **own)
  for name, choice in (("attention", "plain"), ("panels", "never")):
    if config.model.compute[name] == "auto":  # as it is on a chip, not on this machine's CPU
      config_lib.override(config, f"model.compute.{name}", choice)
  built = config_lib.build(ExperimentConfig, config)
  mesh = mesh_lib.make(built.mesh, on)
  check_batches(built, mesh)
  found = []
  for program in programs.of_run(built, mesh):
    began = time.monotonic()
    found.append(roofline.estimate(program, program.compile(), chip))
    sys.stderr.write(f"compiled {program.name} in {time.monotonic() - began:.0f} s\n")
  console = rich.console.Console(width=TABLE_WIDTH)
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  console.print(f"{devices} devices of {chip.memory / GIGA:g} GB, {axes}", highlight=False)
  console.print(memory_table(found, chip))
  console.print(time_table(found))
  console.print(collectives_table(found))
  advices = [roofline.advice(f, chip) for f in found]
  advices = [advice for advice in advices if advice]
  for advice in advices:
    console.print(advice, highlight=False)
  if advices:
    sys.exit(DOES_NOT_FIT)


def described(known, memory, flops, bandwidth, interconnect):
  """A chip with what the command line says of it, where that is not 0."""
  return Chip(
    memory * GIGA or known.memory,
    flops * 1e12 or known.flops,
    bandwidth * GIGA or known.bandwidth,
    interconnect * GIGA or known.interconnect,
    known.clock,
  )


def memory_table(found, chip):
  """Bytes on each device, by program."""
  table = rich.table.Table(title="bytes on a device", box=rich.box.SIMPLE)
  table.add_column("program", no_wrap=True)
  for name in ("arguments", "kept beside", "temporary", "results", "peak", "of memory"):
    table.add_column(name, justify="right", no_wrap=True)
  for f in found:
    sizes = (sum(f.arguments.values()), f.beside, f.temporary, f.results, f.peak)
    table.add_row(f.name, *(short(size, "B") for size in sizes), f"{f.peak / chip.memory:.0%}")
  return table


def time_table(found):
  """Work and least time of each program."""
  table = rich.table.Table(title="one call, on each device", box=rich.box.SIMPLE)
  table.add_column("program", no_wrap=True)
  columns = ("matmuls", "moved", "received", "compute", "memory", "interconnect", "bottleneck")
  for name in columns:
    table.add_column(name, justify="right", no_wrap=True)
  if any(f.thought for f in found):
    table.add_column("estimate", justify="right", no_wrap=True)
  for f in found:
    work = short(f.flops, "FLOP"), short(f.moved, "B"), short(sum(f.sent.values()), "B")
    times = (short(f.seconds[kind], "s") for kind in ("compute", "memory", "interconnect"))
    thought = (short(f.thought, "s"),) if f.thought else ()
    table.add_row(f.name, *work, *times, f.bottleneck, *thought)
  return table


def collectives_table(found):
  """What devices receive from each other, by kind."""
  table = rich.table.Table(title="collectives of one call, on each device", box=rich.box.SIMPLE)
  table.add_column("program", no_wrap=True)
  kinds = sorted({kind for f in found for kind in f.times})
  for kind in kinds:
    table.add_column(kind, justify="right", no_wrap=True)
  for f in found:
    cells = [f"{f.times[k]:,.0f} x, {short(f.sent[k], 'B')}" if f.times[k] else "" for k in kinds]
    table.add_row(f.name, *cells)
  return table


def short(number, unit):
  """A number with three digits and a prefix, as "1.23 GB"."""
  prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "u"}
  factor = next((factor for factor in prefixes if number >= factor), 1.0)
  return f"{number / factor:.3g} {prefixes[factor]}{unit}"


if __name__ == "__main__":
  launch.run(main, options=OPTIONS, needs=("config",))
