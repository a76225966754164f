"""What a working directory says about its run, read from its files alone.

No model is loaded and nothing is computed again, so a run can be looked at while it is under way,
after it was cut off, and on another machine.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from rlhf_jax.training import files, metrics
from rlhf_jax.types import UserError

GOLD_MAXIMUM = {"village": 1.0, "reward_model": None}  # the best gold score, by `config.gold`
PER_ROUND = ("comparisons", "reward", "before", "ppo", "after")


@dataclasses.dataclass(frozen=True)
class Phase:
  """A folder that a phase works in; all is empty before the phase has begun."""

  name: str  # "sft", "round_1/ppo"
  seconds: float | None  # None: not done
  result: dict[str, Any] | None  # what `iterate` kept of it; None: not done
  metrics: list[dict[str, float]]  # one record a training step
  heldout: list[dict[str, float]]  # one record every `eval_every` steps

  @property
  def begun(self) -> bool:
    return self.result is not None or bool(self.metrics)


@dataclasses.dataclass(frozen=True)
class Round:
  """One round's phases."""

  number: int
  comparisons: Phase
  reward: Phase
  before: Phase
  ppo: Phase
  after: Phase

  @property
  def label(self) -> str:
    return f"round {self.number}"


@dataclasses.dataclass(frozen=True)
class Policy:
  """A policy as it was measured on the held-out prompts."""

  label: str  # "SFT", "round 1"
  index: int  # 0 for SFT, then the number of the round that made it
  path: str
  measured: dict[int, dict[str, Any]]  # `measure.measure`'s result, by the judging round's number

  @property
  def own(self) -> dict[str, Any]:
    """Measured with the reward model that it was trained on; SFT, with the first there is."""
    return self.measured[self.index] if self.index in self.measured else self._first

  @property
  def _first(self) -> dict[str, Any]:
    return self.measured[min(self.measured)]

  @property
  def overall(self) -> dict[str, Any]:
    return self.own["overall"]


@dataclasses.dataclass(frozen=True)
class Artifacts:
  """A working directory, read."""

  workdir: pathlib.Path
  config: dict[str, Any]
  sft: Phase
  gold: Phase | None  # None where the gold score is computed, not learnt
  rounds: tuple[Round, ...]  # all that the config asks for, begun or not

  @property
  def maximum(self) -> float | None:
    """The best possible gold score, where there is one."""
    return GOLD_MAXIMUM[self.config["gold"]]

  @property
  def phases(self) -> list[Phase]:
    """All of them, in the order of the run."""
    per_round = [getattr(r, name) for r in self.rounds for name in PER_ROUND]
    return [self.sft, *([self.gold] if self.gold else []), *per_round]

  @property
  def pending(self) -> list[Phase]:
    """What is not done."""
    return [phase for phase in self.phases if phase.result is None]

  @functools.cached_property
  def policies(self) -> list[Policy]:
    """Every policy that was measured: SFT, then one a round."""
    found = {}
    for r in self.rounds:
      for index, phase in ((r.number - 1, r.before), (r.number, r.after)):
        if phase.result is not None:
          label = f"round {index}" if index else "SFT"
          policy = Policy(label, index, phase.result["policy"], {})
          found.setdefault(index, policy).measured[r.number] = phase.result
    return [found[index] for index in sorted(found)]


def read(workdir: str | pathlib.Path) -> Artifacts:
  """Reads the records of a run, finished or not.

  Raises:
    UserError: `workdir` holds no run, or a file in it is broken.
  """
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").exists():
    raise UserError(f"{workdir} holds no run: it has no config.json. Name the workdir of a run.")
  config = files.read_json(workdir / "config.json")
  rounds = []
  for number in range(1, config["rounds"] + 1):
    phases = {name: read_phase(workdir, f"round_{number}/{name}") for name in PER_ROUND}
    rounds.append(Round(number, **phases))
  gold = read_phase(workdir, "gold") if config["gold_model"] is not None else None
  return Artifacts(workdir, config, read_phase(workdir, "sft"), gold, tuple(rounds))


def read_phase(workdir: pathlib.Path, name: str) -> Phase:
  """Reads a phase's folder, or what there is of it."""
  folder = workdir / name
  trained = (folder / "metrics.jsonl").exists()  # else a heldout.jsonl holds comparisons
  lines = lambda path: metrics.read_jsonl(path) if trained and path.exists() else []
  done = folder / "done.json"
  marker = files.read_json(done) if done.exists() else {"seconds": None, "result": None}
  training, heldout = lines(folder / "metrics.jsonl"), lines(folder / "heldout.jsonl")
  return Phase(name, marker["seconds"], marker["result"], training, heldout)


def series(records: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
  """The (steps, values) of a metric, where it was recorded."""
  pairs = [(r["step"], r[key]) for r in records if key in r]
  return [step for step, _ in pairs], [value for _, value in pairs]
