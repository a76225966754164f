"""Phases, rounds and lineage: what is done once, and what is made from what."""

import dataclasses
import itertools
import json
import pathlib
import types

import jax
import numpy as np
import pytest
import runs

from rlhf_jax import experiment, iterate, phases, standing
from rlhf_jax.data import records
from rlhf_jax.data.records import Comparison
from rlhf_jax.labelers import simulated
from rlhf_jax.types import UserError


def fake_run(workdir, rounds=3):
  """As much of a run as the bookkeeping looks at."""
  config = types.SimpleNamespace(rounds=rounds)
  return types.SimpleNamespace(workdir=pathlib.Path(workdir), config=config)


def finish(run, name, **result):
  standing.phase(run, name, lambda folder: result)


def test_a_phase_is_done_once_and_remembers_what_it_said(tmp_path):
  run, calls = fake_run(tmp_path), []

  def work(folder):
    calls.append(folder)
    return {"answer": 42}

  for _ in range(3):
    assert standing.phase(run, "round_1/ppo", work) == {"answer": 42}
  assert calls == [tmp_path / "round_1/ppo"]


def test_a_phase_that_failed_is_not_done(tmp_path):
  run = fake_run(tmp_path)

  def fail(folder):
    raise UserError("no space left.")

  with pytest.raises(UserError):
    standing.phase(run, "sft", fail)
  assert not standing.is_done(run, "sft")
  assert standing.phase(run, "sft", lambda folder: {"policy": "p"}) == {"policy": "p"}


def test_the_current_round_is_the_first_without_a_policy(tmp_path):
  run = fake_run(tmp_path, rounds=2)
  with pytest.raises(UserError, match="run experiments/sft.py first"):
    standing.current_round(run)
  finish(run, "sft", policy="sft/policy")
  for number in (1, 2):
    now = standing.current_round(run)
    assert now.name == f"round_{number}" and now.reference == "sft/policy"
    assert now.policy == ("sft/policy" if number == 1 else "round_1/ppo/policy")
    assert now.earlier == (({"of": 1},) if number == 2 else ())
    with pytest.raises(UserError, match="run experiments/reward.py first"):
      standing.newest_reward_model(run) if number == 1 else standing.said(run, "round_2/reward")
    finish(run, f"round_{number}/comparisons", of=number)
    finish(run, f"round_{number}/reward", reward_model=f"model {number}")
    assert standing.newest_reward_model(run) == f"model {number}"
    assert standing.current_round(run) == now  # until there is a policy
    finish(run, f"round_{number}/ppo", policy=f"round_{number}/ppo/policy")
  with pytest.raises(UserError, match="all 2 rounds"):
    standing.current_round(run)


def test_policies_are_listed_by_round_and_found_by_name(tmp_path):
  with pytest.raises(UserError, match="run experiments/sft.py first"):
    standing.find_policy(tmp_path, "newest")
  for path in ("round_10/ppo/policy", "round_9/ppo/policy", "sft/policy", "round_x/ppo/policy"):
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / path / "about.json").write_text("{}")
  (tmp_path / "round_11/ppo/policy").mkdir(parents=True)  # not whole
  names = ["sft/policy", "round_9/ppo/policy", "round_10/ppo/policy"]
  assert standing.policies(tmp_path) == names
  assert standing.find_policy(tmp_path, "newest") == "round_10/ppo/policy"
  assert standing.find_policy(tmp_path, "sft/policy") == "sft/policy"
  with pytest.raises(UserError, match="no policy 'round_11/ppo/policy'; there are: sft/policy"):
    standing.find_policy(tmp_path, "round_11/ppo/policy")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  config = runs.tiny(tmp_path_factory.mktemp("data"), rounds=2, labelers__labelers=3)
  return experiment.start(config, tmp_path_factory.mktemp("runs"))


def stand_ins(monkeypatch, calls):
  """The costly stages replaced by ones that hand back fresh parameters and say what they got."""
  fresh = itertools.count()

  def policy(run):
    params = run.initial_policy()
    mark = next(fresh)
    return jax.tree.map(lambda leaf: leaf + 0.01 * mark, params)

  def supervise(run, directory):
    return policy(run)

  def fit_reward(run, directory, config, trunk, train, heldout):
    calls.append(("reward", [c.identity for c in train], [c.identity for c in heldout], trunk))
    params = {"trunk": trunk, "score": {"kernel": np.zeros((32, 1)), "bias": np.zeros(1)}}
    as_floats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    return as_floats, {"accuracy": 0.5}

  def train_policy(run, directory, start, judges):
    calls.append(("ppo", start, judges))
    return policy(run), policy(run)

  monkeypatch.setattr(phases, "supervise", supervise)
  monkeypatch.setattr(phases, "fit_reward", fit_reward)
  monkeypatch.setattr(phases, "train_policy", train_policy)
  monkeypatch.setattr(iterate.measure, "measure", lambda *arguments: {})


@pytest.fixture(scope="module")
def lineage(run):
  """Two rounds, with the calls of the stages."""
  calls = []
  with pytest.MonkeyPatch.context() as patch:
    stand_ins(patch, calls)
    found = iterate.chatgpt(run)
  return found, calls


def ids(run, path):
  lines = (run.workdir / path).read_text().splitlines()
  return [records.from_json(Comparison, json.loads(line)).identity for line in lines]


def test_a_reward_model_learns_from_the_comparisons_of_all_rounds_so_far(run, lineage):
  found, calls = lineage
  fits = [call for call in calls if call[0] == "reward"]
  first, second = (r["comparisons"] for r in found["rounds"])
  assert fits[0][1] == first["train"]["comparisons"]
  assert fits[1][1] == first["train"]["comparisons"] + second["train"]["comparisons"]
  assert fits[1][2] == first["heldout"]["comparisons"] + second["heldout"]["comparisons"]
  assert found["rounds"][1]["reward"]["trained_on"] == [
    first["train"]["file"],
    second["train"]["file"],
  ]


def test_lineage_names_every_comparison_in_the_files(run, lineage):
  found, _ = lineage
  assert json.loads((run.workdir / "lineage.json").read_text()) == json.loads(json.dumps(found))
  for number, entry in enumerate(found["rounds"], start=1):
    for side, count in (("train", 32), ("heldout", 16)):
      stated = entry["comparisons"][side]
      assert stated["file"] == f"round_{number}/comparisons/{side}.jsonl"
      assert (
        stated["comparisons"] == ids(run, stated["file"]) and len(stated["comparisons"]) == count
      )


def test_training_and_heldout_comparisons_share_no_prompt(run, lineage):
  keys = {}
  for side in ("train", "heldout"):
    paths = [entry["comparisons"][side]["file"] for entry in lineage[0]["rounds"]]
    found = [c for path in paths for c in iterate.read_comparisons(run, path)]
    keys[side] = {c.prompt_key for c in found}
  assert keys["train"] and keys["heldout"] and not keys["train"] & keys["heldout"]


def test_each_round_is_answered_by_the_newest_policy_and_held_near_sft(run, lineage):
  found, calls = lineage
  first, second = found["rounds"]
  assert first["comparisons"]["policy"] == first["ppo"]["started_from"] == "sft/policy"
  assert second["comparisons"]["policy"] == second["ppo"]["started_from"] == "round_1/ppo/policy"
  assert first["ppo"]["reference"] == second["ppo"]["reference"] == "sft/policy"
  assert second["ppo"]["reward_model"] == "round_2/reward/reward_model"
  load = lambda path: iterate.load(run, path)
  for (_, start, judges), entry in zip([c for c in calls if c[0] == "ppo"], found["rounds"]):
    for got, path in ((start, "started_from"), (judges.reference, "reference")):
      same = jax.tree.map(np.array_equal, got, load(entry["ppo"][path]))
      assert all(jax.tree.leaves(same))
    same = jax.tree.map(np.array_equal, judges.reward, load(entry["ppo"]["reward_model"]))
    assert all(jax.tree.leaves(same))


def test_every_reward_model_starts_from_the_sft_policys_trunk(run, lineage):
  trunk = iterate.load(run, "sft/policy")["trunk"]
  for _, _, _, given in [c for c in lineage[1] if c[0] == "reward"]:
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, given, trunk)))


def test_comparisons_say_who_wrote_and_who_ranked_in_turn(run, lineage):
  names = [p.name for p in simulated.panel(lambda c, r: [0.0] * len(r), run.config.labelers)]
  assert len(names) == 3
  for entry in lineage[0]["rounds"]:
    found = iterate.read_comparisons(run, entry["comparisons"]["train"]["file"])
    assert {author for c in found for author in c.authors} == {entry["comparisons"]["policy"]}
    assert [c.labeler for c in found] == [names[i % 3] for i in range(len(found))]
    assert all(len(c.responses) == run.config.comparisons.responses for c in found)


def test_the_two_rounds_ask_differently(run, lineage):
  first, second = (
    [c.conversation for c in iterate.read_comparisons(run, r["comparisons"]["train"]["file"])]
    for r in lineage[0]["rounds"]
  )
  assert first != second


def test_a_finished_run_does_nothing_again_and_says_the_same(run, lineage, monkeypatch):
  calls = []
  stand_ins(monkeypatch, calls)
  before = runs.fingerprint(run.workdir)
  assert iterate.chatgpt(run) == lineage[0] and not calls
  assert runs.fingerprint(run.workdir) == before


def test_parameters_of_another_shape_are_refused(run, lineage, tmp_path):
  model = dataclasses.replace(run.config.model, d_ff=2 * run.config.model.d_ff)
  other = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
  with pytest.raises(UserError, match="does not fit this configuration"):
    iterate.load(other, "sft/policy")
