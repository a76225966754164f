"""People's rankings through HTTP against the simulated labeler's: the same run with each of them.

  python benchmarks/people.py --workdir=runs/people_study [--people=2] [--overlap=1]
    [--prompts=14000] [--seed=0] [--beside=runs/village] [--config.ppo.num_steps=50 ...]

Three processes, as in life: the run, which files its answers as tasks and waits; the server with
the labeling page; and here the people, who sign in with their tokens and rank what the page shows
them until the run is over. They see nothing else, and rank as the config's simulated labelers do
(`labelers.simulated`: the same rubric, the same slips). Then the run with the simulated labelers,
or that of --beside. The same command goes on where it was cut off. What a table shows is read from
the two working directories and from the store. Needs the extra `test` (`make .venv/test`).
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import common
import scripted

from rlhf_jax import config as config_lib
from rlhf_jax import standing
from rlhf_jax.data import village
from rlhf_jax.evaluation import artifacts, tables
from rlhf_jax.experiment import ExperimentConfig
from rlhf_jax.feedback import lineage
from rlhf_jax.feedback.labels import Comparison
from rlhf_jax.feedback.records import Policy
from rlhf_jax.feedback.store import Store
from rlhf_jax.labelers import gold, simulated
from rlhf_jax.training import metrics
from rlhf_jax.types import UserError

LAST = 20  # lines that are shown of a process that died
ROOM = ("--slots=2", "--columns=2", "--context=64", "--max_new_tokens=24")  # little is drawn there
PEOPLE_ONLY = ("labeler", "store")  # what may differ between the two runs


def main():
  given, overrides = arguments()
  folder = pathlib.Path(given.workdir).absolute()
  config = config_lib.build(ExperimentConfig, config_lib.load(given.config, overrides))
  if config.gold != "village":
    raise UserError(f"people here know the village only; config gold is {config.gold!r}.")
  beside = pathlib.Path(given.beside).absolute() if given.beside else folder / "simulated"
  if given.beside:
    require_same(config, beside)
  folder.mkdir(parents=True, exist_ok=True)
  url, run = str(folder / "feedback.db"), folder / "people"
  asked = overrides | {"labeler": "store", "store.url": url, "store.overlap": str(given.overlap)}
  have_ranked(config, experiment(given.config, asked, run), run, scripted.tokens(url, given.people))
  if not given.beside:
    with started("simulated", experiment(given.config, overrides, beside), folder) as process:
      process.wait()
  found = {
    "kind": "people",
    "seed": config.seed,
    "people": given.people,
    "overlap": given.overlap,
    "runs": {"people": figures(run), "simulated": figures(beside)},
    "same": agreement(run, beside),
    "store": of_store(url, run),
  }
  sys.stderr.write(table(found) + "\n")
  common.report(given.out, found | {"table": table(found)})


def arguments() -> tuple[argparse.Namespace, dict[str, str]]:
  """The command line, and the values of the config that it replaces."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  add = parser.add_argument
  add("--workdir", required=True, help="where the store and the runs are kept")
  add("--config", default=str(common.ROOT / "configs/village.py"), help="of both runs")
  add("--people", type=int, default=2, help="how many rank")
  add("--overlap", type=int, default=1, help="how many of them rank the same answers")
  add("--prompts", type=int, help="comparisons a round; none: as the config says")
  add("--seed", type=int, help="of both runs; none: as the config says")
  add("--beside", help="a finished run of the simulated labeler; none: it is run")
  add("--out", help="where the JSON goes; none prints it")
  given, more = parser.parse_known_args()
  overrides = {"seed": given.seed, "comparisons.prompts": given.prompts}
  overrides = {key: str(value) for key, value in overrides.items() if value is not None}
  for argument in more:
    match = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument)
    if not match:
      parser.error(f"unknown argument {argument}; values are --config.SECTION.KEY=VALUE")
    overrides[match[1]] = match[2]
  if not 1 <= given.overlap <= given.people:
    parser.error(f"--overlap={given.overlap} needs as many --people, and they are {given.people}")
  return given, overrides


def require_same(config: ExperimentConfig, beside: pathlib.Path) -> None:
  """Raises a UserError where the run beside ours is of another config or not over."""
  found = artifacts.read(beside)
  old, new = ({**c} for c in (found.config, config_lib.to_dict(config)))
  for name in PEOPLE_ONLY:
    old.pop(name), new.pop(name)
  differs = config_lib.differences(old, new)
  if differs or found.pending or found.config["labeler"] != "simulated":
    why = "; ".join(differs) or "it is not finished, or people ranked in it"
    raise UserError(f"{beside} cannot stand beside this study: {why}. Leave out --beside.")


# Processes.


@dataclasses.dataclass(frozen=True)
class Process:
  """One that writes what it has to say to a file."""

  name: str
  popen: subprocess.Popen
  log: pathlib.Path

  def is_over(self) -> bool:
    """Whether it has ended well; an end in error ends the study, with its last lines."""
    status = self.popen.poll()
    if status:
      lines = self.log.read_text(errors="replace").splitlines()[-LAST:]
      sys.exit("\n".join([f"{self.name} ended with {status}; {self.log} ends:", *lines]))
    return status == 0

  def wait(self, what=lambda: None):
    """Returns `what()` as soon as it is something; None when the process is over before."""
    told = time.monotonic()
    while not (found := what()) and not self.is_over():
      time.sleep(0.2)
      if time.monotonic() - told > 15.0:
        told, lines = time.monotonic(), self.log.read_text(errors="replace").splitlines()
        sys.stderr.write(f"{self.name}: {lines[-1] if lines else 'starts'}\n")
    return found


@contextlib.contextmanager
def started(name: str, command: list[str], folder: pathlib.Path) -> Iterator[Process]:
  """A process of its own for as long as the body runs; what it says goes to `folder`."""
  paths = [str(common.ROOT), os.environ.get("PYTHONPATH", "")]
  environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
  log = folder / f"{name}.log"
  with log.open("w") as out:
    popen = subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT)
  try:
    yield Process(name, popen, log)
  finally:
    popen.terminate()
    try:
      popen.wait(60.0)
    except subprocess.TimeoutExpired:
      popen.kill()
      popen.wait()


def experiment(config: str, overrides: dict[str, str], workdir: pathlib.Path) -> list[str]:
  """The command of a whole run."""
  script = [sys.executable, str(common.ROOT / "experiments/chatgpt.py")]
  values = [f"--config.{key}={value}" for key, value in overrides.items()]
  return [*script, f"--config={config}", f"--workdir={workdir}", *values]


def address(server: Process) -> str | None:
  """Where a server says that its labeling page is, once it says so."""
  match = re.search(r"labelling +(http\S+)/label", server.log.read_text(errors="replace"))
  return match and match[1]


def have_ranked(
  config: ExperimentConfig, command: list[str], run: pathlib.Path, issued: list[str]
) -> None:
  """The whole run, with a server beside it from the first policy on, and people at its page."""
  truth = gold.of_village(village.build_world(config.data.village))
  panel = simulated.panel(truth.totals, config.labelers)
  serve = [sys.executable, str(common.ROOT / "experiments/serve.py"), f"--workdir={run}"]
  over, pool = threading.Event(), concurrent.futures.ThreadPoolExecutor(len(issued))
  with started("people", command, run.parent) as process:
    process.wait(lambda: standing.policies(run))
    with started("server", [*serve, "--port=0", *ROOM], run.parent) as server, pool:
      try:
        url = server.wait(lambda: address(server))
        work = [
          pool.submit(scripted.rank, url, token, panel[i % len(panel)], over)
          for i, token in enumerate(issued)
        ]
        process.wait(lambda: server.is_over() or any(one.done() for one in work))
      finally:
        over.set()
      for one in work:
        one.result()  # raises what ended it
      if not process.is_over():
        sys.exit("the server or a person ended before the run did.")


# What came of it.


def figures(workdir: pathlib.Path) -> dict:
  """What a finished run says of itself."""
  found = artifacts.read(workdir)
  overall = [policy.overall for policy in found.policies]
  share, error = tables.closed(overall[0], overall[-1], found.maximum)
  count = lambda r, side: len(r.comparisons.result[side]["comparisons"])
  return {
    "gold": [{"mean": each["gold"], "stderr": each["gold_stderr"]} for each in overall],
    "covered": {"mean": share, "stderr": error},
    "accuracy": [r.reward.result["heldout"]["accuracy"] for r in found.rounds],
    "rankings": [count(r, "train") + count(r, "heldout") for r in found.rounds],
    "comparison_seconds": [r.comparisons.seconds for r in found.rounds],
    "seconds": sum(phase.seconds for phase in found.phases),
  }


def agreement(run: pathlib.Path, beside: pathlib.Path) -> list[dict[str, int]]:
  """Per round, how many of people's rankings are of answers that the other run has, too, and how
  many of these say the same as there."""
  rounds = []
  for name in (r.comparisons.name for r in artifacts.read(run).rounds):
    theirs = dict(rankings(beside / name))
    both = [(ranks, theirs[key]) for key, ranks in rankings(run / name) if key in theirs]
    rounds.append({"answers": len(both), "ranks": sum(a == b for a, b in both)})
  return rounds


def rankings(folder: pathlib.Path) -> Iterator[tuple[tuple[str, ...], list[int]]]:
  """The texts of each ranking of a round, and the ranks."""
  for side in ("train", "heldout"):
    for item in metrics.read_jsonl(folder / f"{side}.jsonl"):
      yield (str(item["messages"]), *item["responses"]), item["ranks"]


def of_store(url: str, run: pathlib.Path) -> dict:
  """How fast rankings came, and whether the store names those that trained each model.

  A rate counts the seconds in which any came: people wait for the run, and the machine is shared.
  """
  rates, trained, checks = [], set(), []
  read = datetime.datetime.fromisoformat
  with Store.open(url) as store:
    came = {record.id: read(record.created_at) for record in store.records(Comparison)}
    ids = {policy.checkpoint: policy.id for policy in store.records(Policy)}
    for r in artifacts.read(run).rounds:
      train, heldout = (r.comparisons.result[side]["records"] for side in ("train", "heldout"))
      moments = [came[id] for id in [*train, *heldout]]
      busy = len({moment.replace(microsecond=0) for moment in moments})
      rates.append({"rankings": len(moments), "seconds": busy, "rate": len(moments) / busy})
      trained |= set(train)
      made = {"reward": r.reward.result["reward_model"], "ppo": r.ppo.result["policy"]}
      for stage, path in made.items():
        uses = lineage.uses(store, policy=ids[str(run / path)])
        named = {use.record for use in uses if use.stage == stage}
        check = {"model": path, "trained": len(trained), "named": len(named & trained)}
        checks.append(check | {"others": len(named - trained)})
  return {"rates": rates, "lineage": checks}


def table(found: dict) -> str:
  """Markdown: both runs side by side."""
  runs, rates = list(found["runs"].values()), found["store"]["rates"]
  rows = [("", "people, over HTTP", "simulated labeler"), ("---", "---:", "---:")]
  for i in range(len(runs[0]["gold"])):
    golds = [run["gold"][i] for run in runs]
    name = f"gold score after {f'round {i}' if i else 'SFT'}"
    rows.append((name, *(f"{gold['mean']:.3f} ± {gold['stderr']:.3f}" for gold in golds)))
  covered = (f"{run['covered']['mean']:.1%}" for run in runs)
  rows.append(("of the distance to 1 covered", *covered))
  for i, (same, rate) in enumerate(zip(found["same"], rates)):
    name = f"reward model of round {i + 1}, accuracy on held-out pairs"
    rows.append((name, *(f"{run['accuracy'][i]:.3f}" for run in runs)))
    rows.append((f"rankings in round {i + 1}", *(f"{run['rankings'][i]:,}" for run in runs)))
    alike = f"{same['ranks']:,} of {same['answers']:,}"
    rows.append(("ranked as the other ranked the same answers", alike, ""))
    rows.append(("rankings a second, where any came", f"{rate['rate']:.1f}", ""))
  for check in found["store"]["lineage"]:
    text = f"{check['named']:,} of {check['trained']:,}, and {check['others']} others"
    rows.append((f"records behind {check['model']} that lineage names", text, ""))
  rows.append(("minutes that its phases took", *(f"{run['seconds'] / 60:.1f}" for run in runs)))
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
  try:
    main()
  except UserError as error:
    sys.exit(f"error: {error}")
