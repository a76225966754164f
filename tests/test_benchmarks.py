"""The benchmarks run, at toy size, and say what a comparison needs; their arithmetic is right."""

import importlib
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import quick
import tiny

from rlhf_jax import config as config_lib
from rlhf_jax.experiment import ExperimentConfig
from rlhf_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
  """`benchmark("compare")`: a module of the folder."""
  monkeypatch.syspath_prepend(str(FOLDER))
  return importlib.import_module


def run(name, *arguments, toy=("--model=toy", "--repeats=1"), devices=2):
  """What a benchmark writes, in a process of its own."""
  environ = os.environ | {"XLA_FLAGS": "", "RLHF_BENCH_WAIT": "0", "RLHF_JAX_DEVICES": str(devices)}
  environ |= quick.settings(environ)
  command = [sys.executable, str(FOLDER / f"{name}.py"), *toy, *arguments]
  done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_generation_says_rate_bound_and_share_of_every_row():
  found = run("generate", "--batches=1,4", "--shapes=4x6", "--eos")
  assert [row["batch"] for row in found["runs"]] == [1, 4]
  for row in found["runs"]:
    rate = row["rate"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"] and row["compile_seconds"] > 0
    assert row["share"] == pytest.approx(rate["median"] / row["bound"])
    (tokens,) = row["tokens"]
    assert 0 < tokens <= row["batch"] * 6


@pytest.mark.parametrize(
  ("name", "sizes", "unit"),
  [
    ("sft", ("--rows=2", "--length=8"), "tokens/s"),
    ("sft", ("--rows=2", "--length=9", "--documents=2", "--attention=fused"), "tokens/s"),
    ("sft", ("--rows=4", "--length=8", "--micro_batches=2"), "tokens/s"),
    ("reward", ("--pairs=4", "--length=8", "--micro_batches=2"), "pairs/s"),
  ],
)
def test_a_step_that_is_timed_is_one_that_learns(name, sizes, unit):
  found = run(name, *sizes)
  assert found["unit"] == unit and found["rate"]["median"] > 0
  assert found["metrics"][f"{name}/grad_norm"] > 0


def test_growth_is_fitted_beside_theory():
  found = run("growth", "--shrink=8", "--axes=batch")
  assert [row["workload"] for row in found["runs"]] == ["generate", "sft"]
  for row in found["runs"]:
    assert row["sizes"] == sorted(row["sizes"]) and len(row["seconds"]) == 4
    exponents = row["exponents"]
    assert exponents["seconds"] == pytest.approx(
      np.polyfit(np.log(row["sizes"]), np.log(row["seconds"]), 1)[0]
    )
    assert exponents["flops"] == pytest.approx(1.0)
    assert 0 < exponents["least_seconds"] <= exponents["flops"] + 1e-6


@pytest.mark.parametrize(("B", "R"), [(1, 2), (16, 256)])
def test_the_least_time_to_generate_is_of_computing_or_of_reading(benchmark, B, R):
  growth = benchmark("growth")
  point = {"batch": B, "length": R, "width": 64, "depth": 2}
  config = growth.network(point).policy.config
  least = lambda **limits: growth.least_to_generate(config, point, limits)
  computed = growth.flops_to_generate(config, point)
  assert least(flops=1.0, bandwidth=np.inf) == pytest.approx(computed)
  # At every token but the first: weights, and keys and values of the columns so far, of 4 bytes.
  weights = 2 * (4 * 64 * 64 + 3 * 64 * config.d_ff) + 64 * config.vocab_size
  columns = (R - 1) * (growth.PROMPT + R / 2)
  read = 4 * ((R - 1) * weights + B * columns * 2 * 2 * 64)
  assert least(flops=np.inf, bandwidth=1.0) == pytest.approx(read)


def test_exponents_are_those_of_a_power(benchmark):
  growth = benchmark("growth")
  assert growth.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_an_iteration_of_ppo_is_split_into_its_phases():
  sizes = ("--episodes=8", "--prompt=4", "--response=4", "--minibatches=2", "--micro_batches=2")
  found = run("ppo", *sizes)
  seconds = found["breakdown_seconds"]
  assert list(seconds) == ["generation", "scoring", "update"]
  # Of every repetition: so of the fastest, whichever that is. Medians need not add up.
  assert 0 < sum(phase["min"] for phase in seconds.values()) <= found["seconds"]["min"]


def test_served_answers_are_those_of_each_request_alone():
  found = run("serve", "--clients=6", "--slots=4", "--prompt=8", "--response=8", "--columns=2")
  assert found["same_answers"] == 1.0
  (row,), (alone,) = found["at_once"], found["alone"]
  assert row["tokens"] == alone["tokens"] > 6
  assert found["ratio"]["median"] == pytest.approx(row["rate"] / alone["rate"])
  assert 0 < row["first_token"]["p50"] <= row["total"]["p50"] <= row["total"]["p99"]


@pytest.mark.slow
def test_people_who_rank_over_http_make_the_run_of_the_simulated_labeler(benchmark, tmp_path):
  values = {  # one labeler whose slips are all that there is to learn, so that two people are alike
    "labelers.noise": 1.0,
    "labelers.labelers": 1,
    "comparisons.heldout_prompts": 8,
    "comparisons.batch_size": 16,
    "rounds": 1,
    "sft.num_steps": 4,
    "sft.eval_every": 4,
    "ppo.num_steps": 1,
    "evaluation.prompts": 8,
    "store.poll_seconds": 0.2,
    "data.prepare.data_dir": tmp_path / "data",
  }
  config = f"{ROOT}/configs/village.py:tiny"
  told = [f"--config={config}", f"--workdir={tmp_path}/study", "--prompts=16", "--seed=5"]
  told += [f"--config.{key}={value}" for key, value in values.items()]
  found = run("people", *told, toy=(), devices=1)  # one compiles fastest
  ours, theirs = found["runs"]["people"], found["runs"]["simulated"]
  for name in ("gold", "covered", "accuracy", "rankings"):
    assert ours[name] == theirs[name]
  assert found["seed"] == 5 and ours["rankings"] == [24] and 0 < ours["accuracy"][0] < 1
  assert found["same"] == [{"answers": 24, "ranks": 24}]
  assert [(c["trained"], c["named"], c["others"]) for c in found["store"]["lineage"]] == [
    (16, 16, 0),
    (16, 16, 0),
  ]
  study, texts = benchmark("people"), {key: str(value) for key, value in values.items()}
  other = config_lib.build(ExperimentConfig, config_lib.load(config, texts | {"seed": "6"}))
  with pytest.raises(UserError, match="seed"):
    study.require_same(other, tmp_path / "study/simulated")


def test_a_process_of_a_study_that_dies_ends_it_with_its_last_lines(benchmark, tmp_path):
  dies = [sys.executable, "-c", "print('this is why'); raise SystemExit(3)"]
  with pytest.raises(SystemExit, match="(?s)the run ended with 3.*this is why"):
    with benchmark("people").started("the run", dies, tmp_path) as process:
      process.wait()


def test_a_comparison_alternates_and_puts_each_row_beside_the_best_peer(benchmark, tmp_path, capsys,
                                                                        monkeypatch):  # fmt: skip
  script = tmp_path / "writes.py"
  script.write_text(
    "import json, sys\n"
    "name, rate, out, log = sys.argv[1], float(sys.argv[2]), sys.argv[-1], sys.argv[3]\n"
    "open(log, 'a').write(name + ' ')\n"
    "rates = {'median': rate, 'min': rate - 1, 'max': rate + 1}\n"
    "runs = [{'batch': 2, 'prompt': 3, 'response': 4, 'dtype': 'float32', 'rate': rates}]\n"
    "json.dump({'kind': 'generate', 'peer': name, 'model': 'toy', 'runs': runs}, open(out, 'w'))\n"
  )
  log = tmp_path / "log"
  command = lambda name, rate: f"{sys.executable} {script} {name} {rate} {log}"
  told = ["--rounds=2", "--ours", command("ours", 30)]
  told += ["--peer", command("slow", 5), "--peer", command("fast", 20)]
  monkeypatch.setattr(sys, "argv", ["compare.py", *told])
  benchmark("compare").main()
  assert log.read_text().split() == ["slow", "fast", "ours", "ours", "fast", "slow"]
  row = "| toy | generate float32 2 3 4 | 30 [29, 31] | 20 [19, 21] | fast | 1.50 |"
  assert row in capsys.readouterr().out


def test_a_command_that_fails_ends_a_comparison_with_what_it_said(benchmark):
  with pytest.raises(SystemExit, match="ended with 3"):
    benchmark("compare").run(f"{sys.executable} -c 'raise SystemExit(3)'")


def test_calls_in_turn_are_compared_turn_by_turn(benchmark, tmp_path, capsys, monkeypatch):
  script = tmp_path / "answers.py"
  script.write_text(
    "import json, sys\n"
    "name, log, units, *seconds, last = sys.argv[1:]\n"
    "print('warms up\\nready', flush=True)\n"
    "for second, _ in zip(map(float, seconds), sys.stdin):\n"
    "  open(log, 'a').write(name + ' ')\n"
    "  done = {'seconds': second, 'units': json.loads(units)}\n"
    "  print(json.dumps(done), flush=True)\n"
    "sys.exit(0 if last == '--turns' else 3)\n"
  )
  log = tmp_path / "log"
  command = lambda name, told: f"{sys.executable} {script} {name} {log} {told}"
  ours, peer = command("ours", "8 1 2 4"), command("peer", "8 2 8 4")
  told = ["compare.py", "--calls=3", "--ours", ours, "--peer", peer]
  monkeypatch.setattr(sys, "argv", told)
  benchmark("compare").main()
  assert log.read_text().split() == ["peer", "ours"] * 3
  lines = capsys.readouterr().out.splitlines()
  assert lines[2:] == [f"| {peer} | 2 [1, 4] | 2 [1, 4] |", f"| {ours} | 4 [2, 8] |  |"]
  short = command("peer", "null 2")
  monkeypatch.setattr(sys, "argv", [*told[:-1], short])
  with pytest.raises(SystemExit, match=r"peer .* --turns\nended with 0"):
    benchmark("compare").main()


def test_a_benchmark_makes_a_call_for_each_line_of_input(benchmark, capsys, monkeypatch):
  common, calls = benchmark("common"), iter((5.0, 7.0, None))
  monkeypatch.setattr(common, "_turns", False)  # and so again afterwards
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n\n"))
  monkeypatch.setattr(sys, "argv", ["generate.py", "--turns"])
  assert common.arguments("Generates.", turns=common.TURNS).turns
  with pytest.raises(SystemExit) as ended:
    common.repeat(lambda: next(calls), 9)
  assert not ended.value.code
  ready, *done = capsys.readouterr().out.splitlines()
  assert ready == "ready"
  assert [json.loads(line)["units"] for line in done] == [5.0, 7.0, None]
  assert all(json.loads(line)["seconds"] >= 0 for line in done)


def test_flops_of_a_forward_pass_are_counted_by_hand(benchmark):
  c, rows, length = tiny.MODEL, 3, 8
  matrices = c.n_layers * (
    c.d_model * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads) + 3 * c.d_model * c.d_ff
  )
  head = c.vocab_size * c.d_model
  # Two products of every query with half of the keys, over all heads.
  attention = c.n_layers * 2 * c.n_heads * c.head_dim * length * length / 2
  expected = 2 * rows * (length * matrices + attention + 5 * head)
  assert benchmark("common").forward_flops(c, rows, length, 5) == expected
