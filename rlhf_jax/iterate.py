"""The whole recipe: supervised fine-tuning, then rounds of comparisons, reward model and PPO.

Each phase is a function of what earlier phases left in the working directory, and leaves a folder
with a `done.json`. A killed run goes on with the same command: finished phases are passed over, the
one that was cut off goes on from its newest checkpoint, and every random number depends only on the
seed, the phase and the step. `lineage.json` says what was made from what.

  workdir/sft/                  policy/
  workdir/gold/                 reward_model/          where a reward model plays the people
  workdir/round_1/comparisons/  train.jsonl, heldout.jsonl; what people were asked, if they were
  workdir/round_1/reward/       reward_model/
  workdir/round_1/before/                              what the policy is like before PPO ...
  workdir/round_1/ppo/          policy/, policy_last/
  workdir/round_1/after/                               ... and after it
"""

import functools
import json
import pathlib
from typing import Any

from rlhf_jax import asking, comparisons, feeds, phases, rollout
from rlhf_jax import config as config_lib
from rlhf_jax.data import records, village
from rlhf_jax.data.records import Comparison, Demonstration, Split
from rlhf_jax.evaluation import measure
from rlhf_jax.experiment import Run
from rlhf_jax.labelers import gold as gold_lib
from rlhf_jax.labelers import simulated
from rlhf_jax.parallel import hosts
from rlhf_jax.standing import Result, is_done, phase, said
from rlhf_jax.training import checkpoint, files
from rlhf_jax.types import Params


def sft(run: Run) -> Result:
  """Supervised fine-tuning, to `sft/policy`."""

  def work(folder: pathlib.Path) -> Result:
    save(run, folder / "policy", phases.supervise(run, folder))
    demonstrations = run.data.by_source(Demonstration, "train")
    return {
      "policy": "sft/policy",
      "pretrained": run.config.pretrained,
      "demonstrations": {name: len(some) for name, some in demonstrations.items()},
    }

  return phase(run, "sft", work)


def gold(run: Run) -> gold_lib.Gold:
  """The true reward: the village's, or a reward model fitted to people's comparisons."""
  if run.config.gold == "village":
    return gold_lib.of_village(village.build_world(run.config.data.village))

  def work(folder: pathlib.Path) -> Result:
    split = lambda side: run.data.records(Comparison, side)
    # A network without pretraining knows no language before SFT.
    start = run.initial_policy() if run.config.pretrained else load(run, said(run, "sft")["policy"])
    trunk, config = start["trunk"], run.config.gold_model
    model, heldout = phases.fit_reward(run, folder, config, trunk, split("train"), split("heldout"))
    save(run, folder / "reward_model", model)
    return {"reward_model": "gold/reward_model", "heldout": heldout}

  result = phase(run, "gold", work)
  scorer = gold_lib.Scorer(
    run.scalar,
    run.tokenizer,
    run.template,
    run.mesh,
    run.config.reward.sequence_length,
    run.config.reward.max_responses,
  )
  return gold_lib.of_reward_model("gold", scorer, load(run, result["reward_model"]))


def compare(run: Run, round_name: str, policy: str, truth: gold_lib.Gold) -> Result:
  """Fresh comparisons of the current policy's answers, ranked by simulated labelers or people."""
  config = run.config.comparisons
  responder = run.responder(
    config.sampling, config.prompt_length, config.batch_size, config.responses
  )
  params = functools.cache(lambda: load(run, policy))

  def sample(side: Split) -> list[comparisons.Unranked]:
    count = config.prompts if side == "train" else config.heldout_prompts
    dialogues = run.data.records(Demonstration, side)
    prompts = comparisons.draw_prompts(dialogues, count, run.seed(round_name, side), responder.fits)
    key = run.key(round_name, "comparisons", side)
    return comparisons.sample(config, responder, params(), prompts, key, author=policy)

  def simulate(folder: pathlib.Path) -> Result:
    labelers = simulated.panel(truth.totals, run.config.labelers)
    result = {"policy": policy, "labelers": [l.name for l in labelers]}
    for side in ("train", "heldout"):
      found = comparisons.rank(sample(side), labelers, source=policy)
      lines = [json.dumps(records.to_json(record)) + "\n" for record in found]
      if hosts.is_first():
        files.write_text_atomic(folder / f"{side}.jsonl", "".join(lines))
      result[side] = {
        "file": f"{round_name}/comparisons/{side}.jsonl",
        "comparisons": [record.identity for record in found],
      }
    return result

  def ask(folder: pathlib.Path) -> Result:
    return asking.ask(run, folder, policy, sample, earlier_comparisons(run, round_name))

  work = {"simulated": simulate, "store": ask}[run.config.labeler]
  return phase(run, f"{round_name}/comparisons", work)


def earlier_comparisons(run: Run, round_name: str) -> list[Result]:
  """What the comparisons of the rounds before this one had to say."""
  number = int(round_name.removeprefix("round_"))
  return [said(run, f"round_{earlier}/comparisons") for earlier in range(1, number)]


def trained_on(run: Run, rounds: list[Result]) -> list[str]:
  """The store's records among the comparisons that a reward model is fitted to."""
  recorded = (
    run.data.records(Comparison, "train") if run.config.comparisons.include_recorded else []
  )
  ids = [None] * len(recorded)
  for result in rounds:
    side = result["train"]
    ids += side["records"] if "records" in side else [None] * len(side["comparisons"])
  drawn = feeds.draw(ids, run.config.reward.max_train, run.seed("reward", "train"))
  return [id for id in drawn if id is not None]


def refit(run: Run, round_name: str, rounds: list[Result], sft_policy: str) -> Result:
  """A new reward model, from the SFT policy's trunk, on the comparisons of all rounds so far."""

  def work(folder: pathlib.Path) -> Result:
    read = lambda side: [c for r in rounds for c in read_comparisons(run, r[side]["file"])]
    trunk = load(run, sft_policy)["trunk"]
    train, heldout = read("train"), read("heldout")
    if run.config.comparisons.include_recorded:
      train = run.data.records(Comparison, "train") + train
    model, figures = phases.fit_reward(run, folder, run.config.reward, trunk, train, heldout)
    save(run, folder / "reward_model", model)
    asking.mark(run, f"{round_name}/reward/reward_model", "reward", trained_on(run, rounds))
    return {
      "reward_model": f"{round_name}/reward/reward_model",
      "trained_on": [r["train"]["file"] for r in rounds],
      "recorded_comparisons": len(train) - sum(len(r["train"]["comparisons"]) for r in rounds),
      "heldout": figures,
    }

  return phase(run, f"{round_name}/reward", work)


def improve(run: Run, round_name: str, policy: str, reward_model: str, reference: str) -> Result:
  """PPO from `policy` against `reward_model`, held near `reference`."""

  def work(folder: pathlib.Path) -> Result:
    last, average = phases.train_policy(
      run,
      folder,
      load(run, policy),
      rollout.Judges(load(run, reference), load(run, reward_model)),
    )
    save(run, folder / "policy", average)
    save(run, folder / "policy_last", last)
    asking.hand_on(run, f"{round_name}/ppo/policy", reward_model)
    return {
      "policy": f"{round_name}/ppo/policy",
      "started_from": policy,
      "reward_model": reward_model,
      "reference": reference,
    }

  return phase(run, f"{round_name}/ppo", work)


def assess(
  run: Run, name: str, policy: str, reward_model: str, reference: str, truth: gold_lib.Gold
) -> Result:
  """Measures a policy on held-out prompts."""

  def work(folder: pathlib.Path) -> Result:
    judges = rollout.Judges(load(run, reference), load(run, reward_model))
    return {"policy": policy, **measure.measure(run, load(run, policy), judges, truth)}

  return phase(run, name, work)


def chatgpt(run: Run) -> dict[str, Any]:
  """Everything in order; returns the lineage, which stands in `lineage.json` too."""
  asking.check(run)
  reference = sft(run)["policy"]
  truth = gold(run)
  policy, found = reference, []
  for number in range(1, run.config.rounds + 1):
    name = f"round_{number}"
    found.append(compare(run, name, policy, truth))
    model = refit(run, name, found, reference)["reward_model"]
    assess(run, f"{name}/before", policy, model, reference, truth)
    improved = improve(run, name, policy, model, reference)["policy"]
    assess(run, f"{name}/after", improved, model, reference, truth)
    policy = improved
    write_lineage(run)
  return write_lineage(run)


def write_lineage(run: Run) -> dict[str, Any]:
  """Which comparisons trained which reward model, and that which policy, to `lineage.json`.

  It is put together from what finished phases said, so it is the same whether one process ran the
  recipe or one ran each stage.
  """
  lineage = {
    "config": config_lib.to_dict(run.config),
    "sft": said(run, "sft"),
    "rounds": [
      {stage: said(run, f"round_{number}/{stage}") for stage in ("comparisons", "reward", "ppo")}
      for number in range(1, run.config.rounds + 1)
      if is_done(run, f"round_{number}/ppo")
    ],
  }
  if hosts.is_first():
    files.write_json_atomic(run.workdir / "lineage.json", lineage)
  hosts.wait("lineage")
  return lineage


def save(run: Run, folder: pathlib.Path, params: Params) -> None:
  """Parameters with what it takes to use them: model sizes and chat template."""
  about = {"model": config_lib.to_dict(run.config.model), "template": run.template.name}
  checkpoint.save_params(folder, params, about)


def load(run: Run, path: str) -> Params:
  """Parameters from a path inside the working directory, on the mesh.

  Raises:
    UserError: nothing there, damaged, or of another shape than the run's networks.
  """
  network = run.scalar if path.endswith("reward_model") else run.policy
  params, _ = checkpoint.load_params(run.workdir / path, run.abstract(network))
  return params


def read_comparisons(run: Run, path: str) -> list[Comparison]:
  """The comparisons in a file of the working directory."""
  lines = (run.workdir / path).read_text(encoding="utf-8").splitlines()
  return [records.from_json(Comparison, json.loads(line)) for line in lines]
