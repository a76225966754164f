"""experiments/moderate.py at its smallest size, and what reports of false positives do."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import runs
import tiny
from moderation_cases import EIGHT, FILE, LEARNS, arguments, overrides, run, write_data

from rlhf_jax import config as config_lib
from rlhf_jax import launch, moderation
from rlhf_jax.data import moderation as data_lib
from rlhf_jax.data.moderation import CATEGORIES, ModerationExample
from rlhf_jax.moderation import bench as bench_lib
from rlhf_jax.moderation import fitting, measures, page, reports, study
from rlhf_jax.moderation.calibration import Platt, Threshold
from rlhf_jax.moderation.config import ModerationConfig
from rlhf_jax.networks import heads
from rlhf_jax.training import checkpoint
from rlhf_jax.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write_data(folder)
  return folder


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "moderation"
  run(*arguments(folder, workdir, **EIGHT))
  return workdir


def test_the_experiment_leaves_table_figure_and_a_moderator(workdir):
  result = json.loads((workdir / "evaluation.json").read_text())
  assert list(result["categories"]) == list(CATEGORIES)
  table = (workdir / "evaluation.md").read_text()
  assert "Trained on 120 of samples; 2-fold" in table
  for name, part in result["categories"].items():
    assert f"| {name} | {part['known']}" in table
    assert part["known"] < 120 and 0 <= part["auprc_interval"][0] <= part["auprc_interval"][1] <= 1
  assert (workdir / "evaluation.png").read_bytes().startswith(b"\x89PNG")
  moderator = moderation.load(workdir)
  verdicts = moderator(["the cat sat", "wordS by the river"])
  assert all(set(v.scores) == set(CATEGORIES) for v in verdicts)


def test_a_run_that_was_cut_off_goes_on_to_the_same_result(workdir, folder, capsys):
  kept = {p: p.read_bytes() for p in workdir.glob("*.json")}
  copy = workdir.parent / "cut"
  shutil.copytree(workdir, copy)
  for name in ("fold_1/done.json", "evaluation.json", "thresholds.json"):
    (copy / name).unlink()
  run(*arguments(folder, copy, **EIGHT))
  assert {p.name: (copy / p.name).read_bytes() for p in kept} == {
    p.name: content for p, content in kept.items()
  }


def test_another_config_in_the_same_workdir_is_refused(workdir, folder, capsys):
  with pytest.raises(SystemExit):
    run(*arguments(folder, workdir, **EIGHT, **{"fit.num_epochs": "3"}))
  assert "fit.num_epochs: 2 -> 3" in capsys.readouterr().err


def test_every_text_is_scored_by_a_fold_that_has_not_seen_its_like(workdir, folder):
  config = config_lib.load(f"{FILE}:tiny", overrides(folder, **EIGHT))
  bench = bench_lib.start(config, workdir)
  fold = study.assign_folds(bench)["samples"]
  for number in range(2):
    kept = json.loads((workdir / f"fold_{number}/done.json").read_text())["texts"]
    assert kept == [e.identity for e, f in zip(bench.evaluated, fold) if f == number]
  near = [ModerationExample(e.text + "!", {"hate": 0}, "r") for e in bench.evaluated[:20]]
  apart = [ModerationExample("nothing like any of the others, 0123456789", {"hate": 0}, "r")]
  both = dataclasses.replace(bench, examples={**bench.examples, "reports": near + apart})
  assigned = study.assign_folds(both)
  assert assigned["reports"][:20].tolist() == assigned["samples"][:20].tolist()
  assert assigned["reports"][20] == -1


# Reports.


@pytest.fixture(scope="module")
def reported(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("reports")
  run(*arguments(folder, workdir, "--study=reports", **LEARNS))
  return workdir


def test_reports_lower_false_positives_where_they_came_from_at_every_threshold_shown(reported):
  result = json.loads((reported / "reports.json").read_text())
  test = result["tests"]["other half of the pool"]
  before, after = test["before"], test["after"]
  assert after["at_half"]["false_positive_rate"] < before["at_half"]["false_positive_rate"]
  rate = lambda curve, t: np.interp(
    t, curve["thresholds"][::-1], curve["false_positive_rate"][::-1]
  )
  grid = np.linspace(0.2, 0.8, 7)
  assert np.mean([rate(after, t) for t in grid]) < np.mean([rate(before, t) for t in grid])
  table = (reported / "reports.md").read_text()
  assert "4 reports of false positives of hate" in table and "recall 50%" in table
  assert (reported / "reports.png").exists()


def test_the_reports_are_the_highest_scored_innocents_and_can_be_trained_on(reported, folder):
  (reported / "reports/reports.jsonl").stat()
  config = config_lib.load(f"{FILE}:tiny", overrides(folder))
  section = dict(paths=[str(reported / "reports/reports.jsonl")], on_malformed="error")
  with config.unlocked():
    config.data.reports = section
    config.data.weights = dict(samples=1.0, reports=0.1)
  built = config_lib.build(ModerationConfig, config)
  found = data_lib.load(built.data, 0)["reports"]
  assert len(found) == 4 and all(dict(e.labels) == {"hate": 0} for e in found)
  pool = [ModerationExample(f"t {i}", {"hate": int(i % 2)}, "p") for i in range(10)]
  worst = reports.simulate(pool, np.arange(10.0), "hate", 2)
  assert [e.text for e in worst] == ["t 8", "t 6"]


def test_lower_scores_of_innocents_move_the_curve_and_unknown_texts_do_not():
  some = [ModerationExample(f"t {i}", {"hate": int(i < 5)}, "p") for i in range(20)]
  some += [ModerationExample(f"u {i}", {"sexual": 1}, "p") for i in range(9)]
  before = np.linspace(1.0, -1.0, 29)
  before[10:15] = 3.0  # false positives
  after = before.copy()
  after[10:15] = -3.0
  found = reports.compare(some, before.tolist(), after.tolist(), "hate")
  assert (found["known"], found["positives"]) == (20, 5)
  assert found["before"]["auprc"] < found["after"]["auprc"] == 1.0
  assert found["before"]["at_recall"][-1]["false_positive_rate"] == 5 / 15
  assert found["after"]["at_recall"][-1]["false_positive_rate"] == 0.0


def test_a_report_about_a_sample_corrects_it(folder, tmp_path):
  config = config_lib.load(f"{FILE}:tiny", overrides(folder))
  before = data_lib.load(config_lib.build(ModerationConfig, config).data, 0)["samples"]
  wrong = next(e for e in before if e.labels.get("hate") == 1)
  report = ModerationExample(wrong.text, {"hate": 0}, "reports")
  (tmp_path / "reports.jsonl").write_text(data_lib.write_jsonl([report]))
  with config.unlocked():
    config.data.reports = dict(paths=[str(tmp_path / "reports.jsonl")], on_malformed="error")
    config.data.weights = dict(samples=1.0, reports=0.1)
  after = data_lib.load(config_lib.build(ModerationConfig, config).data, 0)["samples"]
  changed = [(a, b) for a, b in zip(before, after) if a.labels != b.labels]
  assert [b.identity for _, b in changed] == [wrong.identity]
  assert dict(changed[0][1].labels) == {**wrong.labels, "hate": 0}


# Starting from a model that is there.


def test_a_runs_policy_becomes_the_trunk_and_its_frozen_blocks_run_once(folder, tmp_path):
  more = {**EIGHT, "trunk.model.n_layers": "2", "trunk.blocks": "1"}
  more |= {"trunk.checkpoint": str(tmp_path / "policy"), "fit.num_epochs": "1"}
  more |= {"fit.frozen": "(r'trunk/embed/', r'trunk/block_0/')"}
  config = config_lib.load(f"{FILE}:tiny", overrides(folder, **more))
  built = config_lib.build(ModerationConfig, config)
  policy = tiny.params(heads.Policy(built.trunk.model), 0)
  about = {"model": config_lib.to_dict(built.trunk.model), "template": "plain"}
  checkpoint.save_params(tmp_path / "policy", policy, about)
  bench = bench_lib.start(config, tmp_path / "work")
  assert bench.stem == 1 and sorted(bench.trunk) == ["block_0", "embed", "final_norm"]
  tiny.assert_trees_close(bench.trunk["block_0"], policy["trunk"]["block_0"], rtol=0)
  rule = (Platt(1.0, 0.0, 9, 9, "fitted"), Threshold(0.5, "test"))
  made = study.train_moderator(bench, [rule] * len(CATEGORIES))
  tiny.assert_trees_close(made.params["trunk"]["block_0"], policy["trunk"]["block_0"], rtol=0)
  assert np.any(made.params["trunk"]["final_norm"]["scale"] != bench.trunk["final_norm"]["scale"])
  (kept,) = (tmp_path / "work/streams").iterdir()
  written = kept.stat().st_mtime_ns
  texts = [e.text for e in bench.evaluated]
  by_stream = fitting.score(bench, made.params, bench.windows(texts))
  assert kept.stat().st_mtime_ns == written
  np.testing.assert_allclose(by_stream, made.logits(texts), rtol=1e-4, atol=1e-5)
  wrong = {**more, "trunk.model.d_ff": "64"}
  config = config_lib.load(f"{FILE}:tiny", overrides(folder, **wrong))
  with pytest.raises(UserError, match="other sizes.*d_ff: 32 -> 64"):
    bench_lib.start(config, tmp_path / "other")


def test_a_category_without_a_positive_is_a_dash_in_the_table_and_null_in_json(tmp_path):
  assert measures.for_json({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}
  assert page.fixed(None) == "–"


@pytest.mark.parametrize("variant", ["", ":smollm2", ":tiny", ":reports", ":smollm2,reports"])
def test_a_config_builds_and_survives_the_way_through_json(variant):
  built = config_lib.build(ModerationConfig, config_lib.load(f"{FILE}{variant}"))
  assert config_lib.build(ModerationConfig, config_lib.to_dict(built)) == built


def test_help_holds_the_command_and_every_option(capsys):
  module = runs.experiment("moderate")
  launch.run(module.main, ["--help"], options=module.OPTIONS)
  shown = capsys.readouterr().out
  assert "python experiments/moderate.py --" in shown and "--study" in shown
