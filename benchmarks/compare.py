"""Ours beside a peer's, alternately in one run: medians, and their ratio row by row.

  python benchmarks/compare.py --rounds=2 \\
    --peer="PEER_PYTHON peer_generate.py --model tiny" \\
    --ours="python benchmarks/generate.py --model=tiny --models=MODELS"

Every command is run with `--out FILE` behind it, once a round, and writes one JSON object: `peer`,
`model`, and either a rate of its own or a list of `runs`, each with the sizes of its row. A rate is
{"median", "min", "max"}, under "rate" or, where rows end early, "useful_tokens_per_s". Several
peers may be given; the ratio is to the best of them. Prints a Markdown table: medians over rounds,
in brackets the least and the most that any round saw.

  python benchmarks/compare.py --calls=15 --peer="python OLD/benchmarks/generate.py --batches=16" \\
    --ours="python benchmarks/generate.py --batches=16"

Where a machine is not equally fast from one minute to the next, --calls starts all the programs and
asks them for one call in turn, so many times; the ratio is the median of those of each turn. Then a
command has `--turns` behind it, says "ready", and answers each line of input with {"seconds",
"units"} of a call, units null where every call does the same work. Ours do so for the first row.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict

SIZES = ("dtype", "batch", "prompt", "response")
RATES = ("useful_tokens_per_s", "rate")
PHASES = "breakdown_seconds"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--ours", required=True, help="a command")
  parser.add_argument("--peer", required=True, action="append", help="a command; may be repeated")
  parser.add_argument("--rounds", type=int, default=2, help="how often each command is run")
  parser.add_argument("--calls", type=int, help="calls in turn, in place of rounds")
  parser.add_argument("--json", help="keeps what every command wrote")
  given = parser.parse_args()
  commands, found = [*given.peer, given.ours], []
  if given.calls:
    done = in_turn(commands, given.calls)
    if given.json:
      pathlib.Path(given.json).write_text(json.dumps(done))
    print(table_of_turns(done, given.ours))
    return
  for number in range(given.rounds):
    order = commands if number % 2 == 0 else commands[::-1]
    for command in order:
      found.append((command == given.ours, run(command)))
  if given.json:
    pathlib.Path(given.json).write_text(json.dumps([one for _, one in found]))
  ours = gather([one for is_ours, one in found if is_ours])
  peers = gather([one for is_ours, one in found if not is_ours])
  print(table(ours, peers))


def run(command: str) -> dict:
  """What one command wrote."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "out.json"
    done = subprocess.run(
      [*shlex.split(command), "--out", str(out)], env=environ(), stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode or not out.exists():
      sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def environ() -> dict[str, str]:
  """What a command starts with: nothing that was set for this process's own speed."""
  return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "GLIBC_TUNABLES")}


def in_turn(commands: list[str], calls: int) -> dict[str, list[float]]:
  """The rate of each call of each command: units, or calls, a second."""
  with contextlib.ExitStack() as stack:
    programs = {command: stack.enter_context(Program(command)) for command in commands}
    rates = {command: [] for command in commands}
    for _ in range(calls):
      for command, program in programs.items():
        rates[command].append(program.call())
  return rates


class Program:
  """A command that has been started and waits for its turns."""

  def __init__(self, command: str):
    self.command, self.said = command, tempfile.TemporaryFile("w+")
    self.popen = subprocess.Popen(
      [*shlex.split(command), "--turns"], env=environ(), stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=self.said, text=True,
    )  # fmt: skip
    while self.answer() != "ready":
      pass

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.popen.communicate()  # its input ends, and so does it
    self.said.close()

  def answer(self) -> str:
    """The next line that it writes; its end ends the comparison."""
    line = self.popen.stdout.readline()
    if not line:
      status = self.popen.wait()
      self.said.seek(0)
      sys.exit(f"{self.command} --turns\nended with {status}:\n{self.said.read()[-3000:]}")
    return line.strip()

  def call(self) -> float:
    """The rate of one call."""
    with contextlib.suppress(BrokenPipeError):  # if it has ended, `answer` says why
      print(file=self.popen.stdin, flush=True)
    done = json.loads(self.answer())
    return (done["units"] or 1.0) / done["seconds"]


def table_of_turns(rates: dict[str, list[float]], ours: str) -> str:
  """Markdown; the ratio is of ours to each of the others."""
  lines = ["| command | a second | ours to it, by turns |", "|---|---:|---:|"]
  spread = lambda values: f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"
  for command, found in rates.items():
    ratios = [own / other for own, other in zip(rates[ours], found)]
    lines.append(f"| {command} | {spread(found)} | {spread(ratios) if command != ours else ''} |")
  return "\n".join(lines)


def gather(results: list[dict]) -> dict:
  """{row: {peer: [rate, ...]}} over all rounds; a row is (model, what is measured)."""
  rows = defaultdict(lambda: defaultdict(list))
  for result in results:
    name = result["peer"] + (f" ({result['mode']})" if result.get("mode") else "")
    for row in result.get("runs", [result]):
      sizes = [f"{row[size]}" for size in SIZES if size in row and "runs" in result]
      label = " ".join([result["kind"], *sizes])
      rate = next(row[key] for key in RATES if key in row)
      told = {**rate, "contended": row.get("contended", False), "phases": row.get(PHASES)}
      rows[result["model"], label][name].append(told)
  return rows


def table(ours: dict, peers: dict) -> str:
  """Markdown; a star marks rates that other processes disturbed."""
  lines = ["| model | row | ours | best peer | which | ratio |", "|---|---|---:|---:|---|---:|"]
  for (model, label), mine in ours.items():
    (rates,) = mine.values()
    others = peers.get((model, label), {})
    if not others:
      lines.append(f"| {model} | {label} | {show(rates)} | | | |")
      continue
    best = max(others, key=lambda name: middle(others[name]))
    ratio = middle(rates) / middle(others[best])
    lines.append(
      f"| {model} | {label} | {show(rates)} | {show(others[best])} | {best} | {ratio:.2f} |"
    )
    if rates[0]["phases"] and others[best][0]["phases"]:
      for phase in rates[0]["phases"]:
        own, theirs = seconds(rates, phase), seconds(others[best], phase)
        lines.append(f"| | {phase}, s | {own:.2f} | {theirs:.2f} | | {theirs / own:.2f} |")
  return "\n".join(lines)


def middle(rates: list[dict]) -> float:
  return statistics.median(rate["median"] for rate in rates)


def seconds(rates: list[dict], phase: str) -> float:
  return statistics.median(rate["phases"][phase]["median"] for rate in rates)


def show(rates: list[dict]) -> str:
  """A median with its spread."""
  low, high = min(rate["min"] for rate in rates), max(rate["max"] for rate in rates)
  star = "*" if any(rate["contended"] for rate in rates) else ""
  return f"{middle(rates):.4g}{star} [{low:.4g}, {high:.4g}]"


if __name__ == "__main__":
  main()
