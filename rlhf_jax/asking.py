"""Comparisons by people: a round's answers become tasks in the store, and rankings come back.

With `labeler = "store"` a round samples its answers as always and files them as tasks; people rank
them on the labeling page, at their own pace and from wherever the store is served. The round then
goes on with their rankings, and with those that no reward model has seen yet, such as what people
of the chat preferred. The store says which record trained which policy.

  round_1/comparisons/train_tasks.jsonl     what was asked, written before it is filed
  round_1/comparisons/train.jsonl           what was said; "source" ends with the record's id

A run that is killed while it waits asks nothing twice, and SIGTERM lets it go on later.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence

import rich.console

from rlhf_jax import config as config_lib
from rlhf_jax import experiment
from rlhf_jax.comparisons import Unranked
from rlhf_jax.data import records as data
from rlhf_jax.data import rows
from rlhf_jax.data.records import Comparison, Demonstration, Split
from rlhf_jax.experiment import Run
from rlhf_jax.feedback import exchange, lineage, rounds
from rlhf_jax.feedback.labels import Candidate, Task
from rlhf_jax.feedback.store import Store
from rlhf_jax.feedback.training import Stored
from rlhf_jax.parallel import hosts
from rlhf_jax.standing import Result
from rlhf_jax.training import files, preemption
from rlhf_jax.types import UserError

SIDES: tuple[Split, ...] = ("train", "heldout")
TICK = 0.5  # seconds; so soon after SIGTERM a run that waits ends
SAY_EVERY = 30.0  # seconds between lines, where the output is no terminal
INSTRUCTIONS = (
  "Rank the answers from best to worst; answers that are equally good may share a rank."
)


def check(run: Run) -> None:
  """Raises a UserError where people are to be asked and the store cannot be used."""
  if run.config.labeler == "store" and hosts.is_first():
    open_store(run).close()


def open_store(run: Run) -> Store:
  """The store of people's records that the config names."""
  return Store.open(run.config.store.url)


def ask(
  run: Run,
  folder: pathlib.Path,
  policy: str,
  sample: Callable[[Split], Sequence[Unranked]],
  earlier: Sequence[Result],
) -> Result:
  """Has people rank fresh answers of a policy; leaves train.jsonl and heldout.jsonl in `folder`.

  Args:
    run: its `config.store` says whom to ask and how long to wait.
    folder: of the round's comparisons.
    policy: the path of the policy that answers.
    sample: the answers for a side; the same in every start of the run.
    earlier: what the comparisons of earlier rounds had to say.

  Raises:
    UserError: the store cannot be used, or there are too few rankings to go on.
    Preempted: SIGTERM came while people were ranking.
  """
  paths = {side: folder / f"{side}_tasks.jsonl" for side in SIDES}
  store = open_store(run) if hosts.is_first() else None
  try:
    name = register(run, store, policy) if store else None
    for side, path in paths.items():
      if hosts.agreed(not path.exists()):
        found = sample(side)
        if store:
          tasks = [to_task(run, policy, name, unranked) for unranked in found]
          exchange.write(path, (task.to_json() for task in tasks))
    asked = {side: exchange.read(path) for side, path in paths.items()} if store else {}
    if store:
      rounds.file(store, [task for some in asked.values() for task in some])
    ids = {side: [task.id for task in tasks] for side, tasks in asked.items()}
    wait(run, store, [id for some in ids.values() for id in some])
    result = take(run, store, folder, ids, earlier) if store else {}
  finally:
    if store:
      store.close()
  return {"policy": policy, **result}


def to_task(run: Run, policy: str, registered: str, unranked: Unranked) -> Task:
  """Answers to be ranked, with who wrote them and how they were sampled."""
  sampling = config_lib.to_dict(run.config.comparisons.sampling)
  answers = []
  for text, author in zip(unranked.responses, unranked.authors):
    text = text.replace("\0", "\ufffd")  # which not every database keeps
    if author == policy:
      answers.append(Candidate(text, name_of(run, policy), registered, sampling))
    else:
      answers.append(Candidate(text, author))
  return Task(
    author=rounds.AUTHOR,
    work="compare",
    conversation=unranked.conversation,
    answers=tuple(answers),
    instructions=INSTRUCTIONS,
    overlap=run.config.store.overlap,
  )


def wait(run: Run, store: Store | None, tasks: Sequence[str]) -> None:
  """Returns when people are done, or their time is up; at once where what is there is taken."""
  config, began = run.config.store, time.monotonic()
  patience = math.inf if config.timeout_hours is None else 3600.0 * config.timeout_hours
  with preemption.watching(), _Line() as line:
    if store and config.wait == "wait":
      line.note(f"the labeling page: python experiments/serve.py --workdir={run.workdir}")
    for tick in itertools.count():
      if tick % math.ceil(config.poll_seconds / TICK) == 0:
        is_over = config.wait == "take" or time.monotonic() - began > patience
        if store:
          now = rounds.standing(store, tasks)
          line.say(f"{now.rankings} of {now.wanted} rankings, {now.at_work} people at work")
          is_over = is_over or now.open == 0
        if hosts.agreed(is_over):
          return
      if preemption.is_due(tick):
        raise preemption.Preempted("while people were ranking, whose rankings are kept")
      time.sleep(min(TICK, config.poll_seconds))


def take(
  run: Run,
  store: Store,
  folder: pathlib.Path,
  tasks: dict[Split, list[str]],
  earlier: Sequence[Result],
) -> Result:
  """Writes what people have said into the round's files."""
  config = run.config.store
  known = [id for result in earlier for side in SIDES for id in result[side]["records"]]
  every = [id for some in tasks.values() for id in some]
  others = rounds.elsewhere(store, every, known) if config.earlier else []
  usable = [stored for stored in others if fits(run, stored.item)]
  held = {r.prompt_key for r in run.data.records(Demonstration, "heldout")}
  ranked = {side: rounds.of_tasks(store, ids) for side, ids in tasks.items()}
  for stored in usable:
    ranked[side_of(run, stored.item, held)].append(stored)
  if len(ranked["train"]) < config.fewest or not ranked["heldout"]:
    raise UserError(
      f"there are {len(ranked['train'])} rankings to train on and {len(ranked['heldout'])} held "
      f"out; config store.fewest asks for {config.fewest}, and measuring for at least 1. "
      f"{len(every)} tasks wait in {config.url}: have people rank them on the labeling page, and "
      "start the same command again."
    )
  labelers = {stored.item.labeler for some in ranked.values() for stored in some}
  return {
    "labelers": sorted(labelers),
    "tasks": len(every),
    "from_elsewhere": len(usable),
    "left_out": len(others) - len(usable),
    **{side: _written(folder, side, some) for side, some in ranked.items()},
  }


def side_of(run: Run, comparison: Comparison, held: set[str]) -> Split:
  """Where a ranking from elsewhere belongs: no prompt is trained on and held out."""
  if comparison.prompt_key in held:
    return "heldout"
  prepare = run.config.data.prepare
  return data.split_of(comparison.prompt_key, prepare.heldout_fraction, prepare.split_seed)


def fits(run: Run, comparison: Comparison) -> bool:
  """Whether the reward model can read a ranking: it has room for so many answers, so long."""
  config = run.config.reward
  if len(comparison.responses) > config.max_responses:
    return False
  found = rows.ranking_rows(
    [comparison],
    run.template,
    run.tokenizer,
    max_tokens=config.sequence_length,
    max_prompts=1,
    max_responses=config.max_responses,
    on_too_long="skip",
    packing_seed=0,
  )
  return not found.skipped


def register(run: Run, store: Store, path: str) -> str:
  """The id in the store of what stands at a path of the working directory.

  The same run registers it once, however often it is started.
  """
  return register_at(store, run.config, run.workdir, path)


def register_at(
  store: Store, config: experiment.ExperimentConfig, workdir: pathlib.Path, path: str
) -> str:
  """`register`, for whoever has only a working directory and its config, as a server."""
  name, checkpoint = f"{workdir.name}/{path}", str(workdir.absolute() / path)
  made = {"run": workdir.name} | origin(config, path)
  return lineage.register(store, name, checkpoint, made, author=rounds.AUTHOR)


def origin(config: experiment.ExperimentConfig, path: str) -> dict:
  """Where a policy or reward model comes from: round, parents by path, hash of the config."""
  settings = config_lib.to_dict(config)
  for section in experiment.MAY_CHANGE:
    del settings[section]
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
  match = re.fullmatch(r"round_(\d+)/(\w+)/\w+", path)
  number, parents = int(match[1]) if match else 0, []
  if match and match[2] == "reward":
    parents = ["sft/policy"]
  elif match:
    before = "sft/policy" if number == 1 else f"round_{number - 1}/ppo/policy"
    parents = [before, f"round_{number}/reward/reward_model"]
  return {"round": number, "parents": parents, "config": digest[:16]}


def name_of(run: Run, path: str) -> str:
  """What a policy is called in the store: "village/round_1/ppo/policy"."""
  return f"{run.workdir.name}/{path}"


def mark(run: Run, path: str, stage: rounds.Stage, records: Sequence[str]) -> None:
  """Notes in the store that these records trained what stands at `path`; does it once."""
  if records and hosts.is_first():
    with open_store(run) as store:
      rounds.mark(store, register(run, store, path), records, stage)


def hand_on(run: Run, policy: str, reward_model: str) -> None:
  """Notes that the records which trained a reward model trained the policy that obeyed it."""
  if run.config.labeler == "store" and hosts.is_first():
    with open_store(run) as store:
      uses = lineage.uses(store, policy=register(run, store, reward_model))
    mark(run, policy, "ppo", [use.record for use in uses if use.stage == "reward"])


def _written(folder: pathlib.Path, side: Split, ranked: Sequence[Stored[Comparison]]) -> Result:
  path = folder / f"{side}.jsonl"
  lines = [json.dumps(data.to_json(stored.item)) + "\n" for stored in ranked]
  files.write_text_atomic(path, "".join(lines))
  return {
    "file": f"{folder.parent.name}/{folder.name}/{path.name}",
    "comparisons": [stored.item.identity for stored in ranked],
    "records": [stored.id for stored in ranked],
  }


@dataclasses.dataclass
class _Line:
  """A line that changes on a terminal, and is written anew now and then elsewhere."""

  said: str = ""
  at: float = -math.inf

  @functools.cached_property
  def console(self) -> rich.console.Console:
    return rich.console.Console(file=sys.stderr, markup=False, highlight=False, soft_wrap=True)

  def __enter__(self) -> "_Line":
    self.status = self.console.status("people are ranking")
    if self.console.is_terminal:
      self.status.start()
    return self

  def __exit__(self, *_) -> None:
    self.status.stop()

  def note(self, text: str) -> None:
    """Writes a line that stays."""
    self.console.print(text)

  def say(self, text: str) -> None:
    """Shows how far people have come."""
    self.status.update(f"people are ranking: {text}")
    is_due = text != self.said and time.monotonic() - self.at >= SAY_EVERY
    if is_due and hosts.is_first() and not self.console.is_terminal:
      self.console.print(f"people are ranking: {text}")
      self.said, self.at = text, time.monotonic()
