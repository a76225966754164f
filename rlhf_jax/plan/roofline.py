"""How long programs take at least, and whether they fit, on devices that are only described."""

import collections
import dataclasses
from typing import Any

from rlhf_jax.plan import hlo
from rlhf_jax.plan.programs import Program

GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, by its maker's data sheet."""

  memory: float  # bytes
  flops: float  # a second, dense, bfloat16
  bandwidth: float  # bytes a second from its memory
  interconnect: float  # bytes a second from the other devices, one way
  clock: float = 0.0  # cycles a second, of a TPU


CHIPS = {
  "a100": Chip(80e9, 312e12, 2_039e9, 300e9),
  "h100": Chip(80e9, 989e12, 3_350e9, 450e9),
  "h200": Chip(141e9, 989e12, 4_800e9, 450e9),
  "v5e": Chip(16e9, 197e12, 819e9, 100e9, 1.5e9),
  "v5p": Chip(95e9, 459e12, 2_765e9, 300e9, 1.75e9),
  "v6e": Chip(32e9, 918e12, 1_640e9, 224e9, 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What one program needs on each device."""

  name: str
  arguments: dict[str, int]  # bytes
  beside: int  # bytes of the phase that it does not take
  temporary: int  # bytes of intermediate values at the worst moment
  results: int  # bytes of results that reuse no argument
  flops: float
  moved: float  # bytes between memory and matrix units
  sent: collections.Counter  # bytes from other devices, by kind of collective
  times: collections.Counter  # collectives, by kind
  seconds: dict[str, float]  # at the least, by what would take them: "compute", ...
  thought: float | None  # seconds by the compiler's own estimate, where it makes one

  @property
  def peak(self) -> int:
    """Bytes on a device at the worst moment."""
    return sum(self.arguments.values()) + self.beside + self.temporary + self.results

  @property
  def bottleneck(self) -> str:
    """What takes longest."""
    return max(self.seconds, key=self.seconds.get)

  @property
  def least(self) -> float:
    """Seconds, if all else hides behind the bottleneck."""
    return self.seconds[self.bottleneck]


def estimate(program: Program, compiled: Any, chip: Chip) -> Estimate:
  """The needs of a program that was compiled for a mesh of `chip`s."""
  memory = compiled.memory_analysis()
  cost = hlo.cost(compiled.as_text(), program.loops)
  return Estimate(
    name=program.name,
    arguments=program.arguments,
    beside=program.beside,
    temporary=memory.temp_size_in_bytes,
    results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    flops=cost.flops,
    moved=cost.bytes,
    sent=cost.sent,
    times=cost.times,
    seconds={
      "compute": cost.flops / chip.flops,
      "memory": cost.bytes / chip.bandwidth,
      "interconnect": sum(cost.sent.values()) / chip.interconnect,
    },
    thought=cost.cycles / chip.clock if cost.cycles and chip.clock else None,
  )


def advice(found: Estimate, chip: Chip) -> str | None:
  """What to change where a program does not fit; None where it does."""
  if found.peak <= chip.memory:
    return None
  over = (found.peak - chip.memory) / GIGA
  start = f"{found.name} needs {over:.1f} GB more than a device has"
  kept = sum(found.arguments.values()) + found.beside
  if found.name == "ppo generate" and found.temporary > kept:
    return f"{start}, most of it the cache of keys and values: lower ppo.rollout.batch_size."
  if found.temporary > kept:
    section = "ppo.rollout" if found.name == "ppo score" else found.name.split()[0]
    return (
      f"{start}, most of it activations: raise {section}.micro_batches, set model.compute.remat, "
      "or lower model.compute.logit_columns."
    )
  return (
    f"{start}, most of it parameters and optimiser state: raise mesh.fsdp or mesh.tensor, or use "
    "more devices."
  )
