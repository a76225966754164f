"""What a compiled program does on one device, read from the text of its HLO.

Counted are matrix products and what devices send each other, each as often as its loop goes round.
XLA's own cost analysis counts the body of a loop once, which under `scan_layers` is one layer. The
text is that of XLA's compiler for CPUs or of the one for TPUs, where products are convolutions,
loops do not say how often they go round, and instructions have the cycles that they should take.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2}
SCATTERED = "all-reduce-scatter"  # how a TPU's compiler names a fusion of an all-reduce
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program, on one device."""

  flops: float = 0.0  # of matrix products, two for a multiply-add; not those in custom calls
  bytes: float = 0.0  # that these products read and write, if nothing stays in cache
  sent: Counter = dataclasses.field(default_factory=Counter)  # bytes that arrive, by collective
  times: Counter = dataclasses.field(default_factory=Counter)  # how often, by collective
  cycles: float = 0.0  # by the compiler's estimate, custom calls left out; 0 where it makes none

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.bytes + other.bytes,
      self.sent + other.sent,
      self.times + other.times,
      self.cycles + other.cycles,
    )

  def __mul__(self, times: float) -> "Cost":
    scaled = lambda counter: Counter({k: v * times for k, v in counter.items()})
    counters = scaled(self.sent), scaled(self.times)
    return Cost(self.flops * times, self.bytes * times, *counters, self.cycles * times)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO."""

  name: str
  type: str
  opcode: str
  given: str  # between its parentheses
  rest: str  # attributes

  @property
  def operands(self) -> tuple[str, ...]:
    """The names of the instructions whose results it takes."""
    return tuple(re.findall(r"%([\w.\-]+)", self.given))


Scope = dict[str, Instruction]  # those of a computation, by name


def cost(text: str, unknown_trips: int) -> Cost:
  """The cost of the entry computation; a loop whose trips XLA does not know goes round so often."""
  computations, entry = parse(text)
  stated = re.search(r"num_partitions=(\d+)", text)
  devices = int(stated[1]) if stated else 1
  known: dict[str, Cost] = {}

  def of(name: str) -> Cost:
    if name not in known:
      scope = {i.name: i for i in computations[name]}
      types = {i.name: i.type for i in computations[name]}
      known[name] = sum((one(i, scope, types) for i in computations[name]), Cost())
      if name.startswith(SCATTERED):
        known[name] = _scattered(known[name])
    return known[name]

  def one(instruction: Instruction, scope: Scope, types: dict[str, str]) -> Cost:
    found = own_cost(instruction, types, devices)
    trips = 1
    if instruction.opcode == "while":
      trips = _trips(instruction, scope, computations) or unknown_trips
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
  estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
  cycles = float(estimate[1]) if estimate else 0.0
  if opcode in PRODUCTS:
    moved = sum(size_of(types[name]) for name in instruction.operands) + size_of(instruction.type)
    return Cost(flops=PRODUCTS[opcode](instruction, types), bytes=moved, cycles=cycles)
  if opcode in COLLECTIVES:
    sent = _sent(opcode, instruction, types, devices)
    return Cost(sent=Counter({opcode: sent}), times=Counter({opcode: 1}), cycles=cycles)
  return Cost(cycles=cycles)


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


def _convolution_flops(instruction: Instruction, types: dict[str, str]) -> float:
  """Of a matrix product that is written as a convolution.

  Of a batch of B products [M, K] x [K, N] the operands and the result have B M K, B K N and B M N
  numbers, whatever axes these letters stand for; B is in all three, or a number of groups.
  """
  arrays = [arrays_of(types[name])[0][1] for name in instruction.operands]
  arrays.append(arrays_of(instruction.type)[0][1])
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
  groups = map(int, re.findall(r"(?:feature|batch)_group_count=(\d+)", instruction.rest))
  sizes = [dict(zip(*pair)) for pair in zip(labels, arrays)]
  window = filter(str.isdigit, labels[0])
  in_all = (sizes[0][axis] for axis in window if len({of[axis] for of in sizes}) == 1)
  batch = math.prod(groups) * math.prod(in_all)
  return 2.0 * math.sqrt(math.prod(map(math.prod, arrays)) / batch)


PRODUCTS = {"dot": _dot_flops, "convolution": _convolution_flops}


def _trips(
  loop: Instruction, scope: Scope, computations: dict[str, list[Instruction]]
) -> int | None:
  """How often a loop goes round: as it says, or up to the constant that its counter stays below."""
  stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if stated:
    return int(stated[1])
  condition = re.search(r"condition=%([\w.\-]+)", loop.rest)[1]
  inside = {i.name: i for i in computations[condition]}
  carried = scope[loop.operands[0]]

  def number(name: str, where: Scope) -> int | None:
    found = where.get(name)
    if found is None:
      return None
    if found.opcode == "constant":
      return int(found.given) if found.type.startswith(("s32[]", "u32[]")) else None
    if found.opcode == "get-tuple-element" and where is inside and carried.opcode == "tuple":
      index = int(re.search(r"index=(\d+)", found.rest)[1])
      return number(carried.operands[index], scope)
    return number(found.operands[0], where) if found.opcode in ("copy", "bitcast") else None

  below = [i for i in inside.values() if i.opcode == "compare" and "direction=LT" in i.rest]
  limits = [number(i.operands[1], inside) for i in below]
  return max((limit for limit in limits if limit is not None), default=None)


def _scattered(cost: Cost) -> Cost:
  """An all-reduce of which each device keeps its part, so that half as much is sent."""
  counts = lambda kinds, share: Counter({"reduce-scatter": kinds["all-reduce"] * share})
  return dataclasses.replace(cost, sent=counts(cost.sent, 0.5), times=counts(cost.times, 1))


def _sent(opcode: str, instruction: Instruction, types: dict[str, str], devices: int) -> float:
  """Bytes that a device receives, by the ring algorithms."""
  n = _group_size(instruction.rest) or devices
  moved, given = (
    sum(map(size_of, texts))
    for texts in ((instruction.type,), map(types.get, instruction.operands))
  )
  if opcode == "reduce-scatter":
    moved = given
  elif instruction.opcode in ("all-gather-start", "collective-permute-start"):
    moved -= given  # operands are among the results
  if opcode == "collective-permute":
    return moved
  return moved * (n - 1) / n * (2 if opcode == "all-reduce" else 1)


def _group_size(attributes: str) -> int:
  """Devices that take part, of `replica_groups`; 0: all.

  They are `[4,2]<=...`, or `{{0,4},{1,5}}`, or `mesh['a'=4,'b'=2] {'b'}`, here always 2.
  """
  iota = re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]", attributes)
  if iota:
    return int(iota[1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
  if named:
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", named[2]))
  listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes)
  return len(listed[1].split(",")) if listed else 0


def _instruction(line: str) -> Instruction:
  name, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
  end = _closing(right) if right.startswith("(") else right.index(" ")
  type_text, call = right[:end], right[end:].lstrip()
  opcode, _, rest = call.partition("(")
  end = _closing("(" + rest) - 1
  return Instruction(name.lstrip("%"), type_text, opcode, rest[: end - 1], rest[end:])


def _closing(text: str) -> int:
  """Where the parenthesis that `text` opens with has closed."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return i + 1
  raise ValueError(f"a line of HLO does not close its parentheses: {text[:80]}")
