"""How far a run has come, by what stands in its working directory.

A phase is done when its folder holds a `done.json`, with what it had to say; nothing else is kept
about progress, so a killed run, one run stage by stage and one run whole cannot be told apart.
"""

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

from rlhf_jax.experiment import Run
from rlhf_jax.parallel import hosts
from rlhf_jax.training import files
from rlhf_jax.types import UserError

Result = dict[str, Any]  # what a phase has to say, as JSON
# Which experiment does a phase.
MAKERS = {"sft": "sft", "comparisons": "label", "reward": "reward", "ppo": "ppo"}


def phase(run: Run, name: str, work: Callable[[pathlib.Path], Result]) -> Result:
  """Does `work(folder)` unless it is done; what it returns is kept in the folder's done.json."""
  marker = run.workdir / name / "done.json"
  is_due = not marker.exists()
  hosts.wait(f"whether {name} is due")
  if is_due:
    marker.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result = work(marker.parent)
    seconds = round(time.monotonic() - began, 1)
    if hosts.is_first():
      files.write_json_atomic(marker, {"seconds": seconds, "result": result})
    hosts.wait(f"{name} is done")
  return files.read_json(marker)["result"]


def is_done(run: Run, name: str) -> bool:
  """Whether a phase has come to its end."""
  return (run.workdir / name / "done.json").exists()


def said(run: Run, name: str) -> Result:
  """What a finished phase had to say.

  Raises:
    UserError: it is not done; names the experiment that does it.
  """
  if not is_done(run, name):
    maker = MAKERS[name.rpartition("/")[2]]
    raise UserError(f"{run.workdir / name} is not done; run experiments/{maker}.py first.")
  return files.read_json(run.workdir / name / "done.json")["result"]


def policies(workdir: pathlib.Path) -> list[str]:
  """The finished policies of a working directory as paths inside it, the newest last."""
  rounds = {
    int(match[1]): f"{folder.name}/ppo/policy"
    for folder in workdir.glob("round_*")
    if (match := re.fullmatch(r"round_(\d+)", folder.name))
  }
  paths = ["sft/policy", *(rounds[number] for number in sorted(rounds))]
  return [path for path in paths if (workdir / path / "about.json").exists()]


def find_policy(workdir: pathlib.Path, name: str) -> str:
  """The path inside `workdir` of the policy called `name`; "newest" is the newest.

  Raises:
    UserError: there is no such policy, or none at all.
  """
  known = policies(workdir)
  if not known:
    raise UserError(f"{workdir} holds no finished policy yet; run experiments/sft.py first.")
  if name != "newest" and name not in known:
    raise UserError(f"{workdir} holds no policy {name!r}; there are: {', '.join(known)}.")
  return known[-1] if name == "newest" else name


def newest_reward_model(run: Run) -> str:
  """The path of the last reward model that was fitted; raises a UserError where there is none."""
  rounds = [f"round_{number}/reward" for number in range(1, run.config.rounds + 1)]
  done = [name for name in rounds if is_done(run, name)]
  return said(run, done[-1] if done else rounds[0])["reward_model"]


@dataclasses.dataclass(frozen=True)
class Round:
  """The round that a working directory stands in, and what it starts from."""

  name: str
  policy: str  # that answers, and that PPO improves
  reference: str  # the SFT policy
  earlier: tuple[Result, ...]  # the comparisons of the rounds before


def current_round(run: Run) -> Round:
  """The first round whose PPO is not done: where an experiment of a single stage works.

  Raises:
    UserError: there is no SFT policy yet, or every round is done.
  """
  policy = reference = said(run, "sft")["policy"]
  earlier = []
  for number in range(1, run.config.rounds + 1):
    name = f"round_{number}"
    if not is_done(run, f"{name}/ppo"):
      return Round(name, policy, reference, tuple(earlier))
    policy = said(run, f"{name}/ppo")["policy"]
    earlier.append(said(run, f"{name}/comparisons"))
  raise UserError(
    f"all {run.config.rounds} rounds of {run.workdir} are done; experiments/evaluate.py measures "
    "its policies. More rounds need another --workdir and a larger --config.rounds."
  )
