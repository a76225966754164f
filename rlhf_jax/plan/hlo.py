"""What a compiled program does on one device, read from the text of its HLO.

Counted are matrix products and what devices send each other, each as often as its loop goes round.
XLA's own cost analysis counts the body of a loop once, which under `scan_layers` is one layer.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program, on one device."""

  flops: float = 0.0  # of matrix products, two for a multiply-add
  bytes: float = 0.0  # that these products read and write, if nothing stays in cache
  sent: Counter = dataclasses.field(default_factory=Counter)  # bytes that arrive, by collective
  times: Counter = dataclasses.field(default_factory=Counter)  # how often, by collective

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.bytes + other.bytes,
      self.sent + other.sent,
      self.times + other.times,
    )

  def __mul__(self, times: float) -> "Cost":
    scaled = lambda counter: Counter({k: v * times for k, v in counter.items()})
    return Cost(self.flops * times, self.bytes * times, scaled(self.sent), scaled(self.times))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str  # attributes


def cost(text: str, unknown_trips: int) -> Cost:
  """The cost of the entry computation; a loop whose trips XLA does not know goes round so often."""
  computations, entry = parse(text)
  stated = re.search(r"num_partitions=(\d+)", text)
  devices = int(stated[1]) if stated else 1
  known: dict[str, Cost] = {}

  def of(name: str) -> Cost:
    if name not in known:
      types = {i.name: i.type for i in computations[name]}
      known[name] = sum((one(i, types) for i in computations[name]), Cost())
    return known[name]

  def one(instruction: Instruction, types: dict[str, str]) -> Cost:
    found = own_cost(instruction, types, devices)
    trips = 1
    if instruction.opcode == "while":
      stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
      trips = int(stated[1]) if stated else unknown_trips
    for called in called_by(instruction):
      if called in computations:
        found += of(called) * trips
    return found

  return of(entry)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The instructions of every computation, and which of these is the entry."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
    if header:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and " = " in line:
      current.append(_instruction(line))
  return computations, entry


def own_cost(instruction: Instruction, types: dict[str, str], devices: int) -> Cost:
  """What an instruction costs without what it calls."""
  opcode = instruction.opcode.removesuffix("-start")
  if opcode == "dot":
    moved = sum(size_of(types[name]) for name in instruction.operands) + size_of(instruction.type)
    return Cost(flops=_dot_flops(instruction, types), bytes=moved)
  if opcode in COLLECTIVES:
    sent = _sent(opcode, instruction, types, devices)
    return Cost(sent=Counter({opcode: sent}), times=Counter({opcode: 1}))
  return Cost()


def called_by(instruction: Instruction) -> Iterator[str]:
  """The computations that an instruction runs; of the branches of a conditional, all."""
  yield from re.findall(
    r"(?:calls|body|condition|to_apply|_computation)=%([\w.\-]+)", instruction.rest
  )
  for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
    yield from re.findall(r"%([\w.\-]+)", branches)


def arrays_of(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
  """(dtype, shape) of an array type, or of each array in a tuple type."""
  found = re.findall(r"([a-z]+\d*)\[([0-9,]*)\]", type_text)
  return [(dtype, tuple(map(int, filter(None, axes.split(","))))) for dtype, axes in found]


def size_of(type_text: str) -> int:
  """Bytes."""
  return sum(BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in arrays_of(type_text))


def _dot_flops(instruction: Instruction, types: dict[str, str]) -> float:
  (_, left), (_, out) = arrays_of(types[instruction.operands[0]] + instruction.type)
  contracting = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.rest)[1]
  summed = math.prod(left[int(axis)] for axis in filter(None, contracting.split(",")))
  return 2.0 * math.prod(out) * summed


def _sent(opcode: str, instruction: Instruction, types: dict[str, str], devices: int) -> float:
  """Bytes that a device receives, by the ring algorithms."""
  n = _group_size(instruction.rest) or devices
  moved = size_of(instruction.type)
  if opcode == "reduce-scatter":
    moved = sum(size_of(types[name]) for name in instruction.operands)
  if opcode == "collective-permute":
    return moved
  return moved * (n - 1) / n * (2 if opcode == "all-reduce" else 1)


def _group_size(attributes: str) -> int:
  """Devices that take part, from `replica_groups=[4,2]<=...` or `{{0,4},{1,5}}`; 0: all."""
  iota = re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]", attributes)
  if iota:
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes)
  return len(listed[1].split(",")) if listed else 0


def _instruction(line: str) -> Instruction:
  name, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
  end = _closing(right) if right.startswith("(") else right.index(" ")
  type_text, call = right[:end], right[end:].lstrip()
  opcode, _, rest = call.partition("(")
  end = _closing("(" + rest) - 1
  operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
  return Instruction(name.lstrip("%"), type_text, opcode, operands, rest[end:])


def _closing(text: str) -> int:
  """Where the parenthesis that `text` opens with has closed."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return i + 1
  raise ValueError(f"a line of HLO does not close its parentheses: {text[:80]}")
