"""Every experiment at its smallest size, and that they are one recipe."""

import io
import json
import pathlib
import shutil
import signal
import sqlite3

import httpx
import jax
import numpy as np
import pytest
import runs

from rlhf_jax import chat, launch
from rlhf_jax.data.records import Comparison, from_json
from rlhf_jax.networks import pretrained
from rlhf_jax.serving import load
from rlhf_jax.text.messages import Message
from rlhf_jax.training import checkpoint, metrics

STAGES = ("sft", "label", "reward", "ppo")
EXPERIMENTS = (*STAGES, "chatgpt", "evaluate", "chat", "serve")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def staged(tmp_path_factory, data_dir):
  """A workdir after sft, label, reward and ppo, each started as its own command line would."""
  workdir = tmp_path_factory.mktemp("runs") / "staged"
  for name in STAGES:
    launch.run(runs.experiment(name).main, runs.arguments(data_dir, workdir))
  return workdir


@pytest.fixture(scope="module")
def whole(staged, data_dir):
  """A workdir of chatgpt.py alone."""
  workdir = staged.parent / "whole"
  runs.experiment("chatgpt").main(runs.tiny(data_dir), workdir)
  return workdir


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_stage_by_stage_is_bit_for_bit_what_chatgpt_does_at_once(staged, whole):
  apart, together = runs.results(staged), runs.results(whole)
  measured = {name for name in together if name.startswith(("round_1/before", "round_1/after"))}
  assert len(measured) == 2
  assert {name: apart[name] for name in apart} == {
    name: result for name, result in together.items() if name not in measured
  }


def test_chatgpt_goes_on_from_stages_that_are_done(staged, whole, data_dir):
  before = runs.results(staged)
  runs.experiment("chatgpt").main(runs.tiny(data_dir), staged)
  after = runs.results(staged)
  assert {name: after[name] for name in before} == before
  assert after == runs.results(whole)


@pytest.mark.conformance("B24", "B25")
def test_stages_cut_off_between_two_checkpoints_go_on_bit_for_bit(whole, data_dir):
  cut = whole.parent / "cut"
  shutil.copytree(whole, cut)
  for stage, made in (
    ("sft", "policy"),
    ("round_1/reward", "reward_model"),
    ("round_1/ppo", "policy*"),
  ):
    (cut / stage / "done.json").unlink()
    for folder in (cut / stage).glob(made):
      shutil.rmtree(folder)
    earlier, newest = sorted((cut / stage / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert 0 < int(earlier.name) < int(newest.name)
    shutil.rmtree(newest)
  runs.experiment("chatgpt").main(runs.tiny(data_dir), cut)
  assert runs.results(cut) == runs.results(whole)


def test_every_stage_has_learnt_something(whole):
  sft = metrics.read_jsonl(whole / "sft/metrics.jsonl")
  assert [line["step"] for line in sft] == list(range(1, 9))
  assert sft[-1]["sft/loss"] < sft[0]["sft/loss"]
  assert metrics.read_jsonl(whole / "round_1/reward/metrics.jsonl")[-1]["reward/loss"] > 0
  ppo = metrics.read_jsonl(whole / "round_1/ppo/metrics.jsonl")
  assert abs(ppo[0]["objective/kl"]) < 1e-4 < abs(ppo[-1]["objective/kl"])
  digests = runs.results(whole)
  assert digests["sft/policy"] != digests["round_1/ppo/policy"]
  assert digests["round_1/ppo/policy"] == digests["round_1/ppo/policy_last"]  # no average


def test_lineage_names_every_comparison_that_trained_the_reward_model(whole):
  lineage = json.loads((whole / "lineage.json").read_text())
  (only,) = lineage["rounds"]
  assert only["reward"]["trained_on"] == ["round_1/comparisons/train.jsonl"]
  records = [from_json(Comparison, r) for r in lines(whole / "round_1/comparisons/train.jsonl")]
  assert only["comparisons"]["train"]["comparisons"] == [record.identity for record in records]
  assert {author for record in records for author in record.authors} == {"sft/policy"}
  assert only["ppo"]["reward_model"] == only["reward"]["reward_model"]
  assert only["ppo"]["started_from"] == only["ppo"]["reference"] == lineage["sft"]["policy"]


def test_evaluate_measures_what_chatgpt_measures(whole, data_dir, capsys):
  for policy, at in (("newest", "after"), ("sft/policy", "before")):
    args = [*runs.arguments(data_dir, whole), f"--policy={policy}"]
    launch.run(runs.experiment("evaluate").main, args, options=runs.experiment("evaluate").OPTIONS)
    by_chatgpt = json.loads((whole / f"round_1/{at}/done.json").read_text())["result"]
    kept = whole / "evaluation" / f"{by_chatgpt['policy'].replace('/', '_')}.json"
    by_evaluate = json.loads(kept.read_text())
    assert by_evaluate.pop("reward_model") == "round_1/reward/reward_model"
    assert by_evaluate == by_chatgpt
    shown = capsys.readouterr().out
    assert "follow_up" in shown and f"{by_chatgpt['overall']['gold']:.2f}" in shown


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("label", [], "experiments/sft.py first"),
    ("reward", [], "experiments/sft.py first"),
    ("evaluate", [], "experiments/sft.py first"),
  ],
)
def test_a_stage_before_its_turn_says_which_experiment_comes_first(
  name, arguments, message, tmp_path, data_dir, capsys
):
  module = runs.experiment(name)
  with pytest.raises(SystemExit) as ended:
    args = [*runs.arguments(data_dir, tmp_path / "w"), *arguments]
    launch.run(module.main, args, options=getattr(module, "OPTIONS", None))
  assert ended.value.code == 2 and message in capsys.readouterr().err


def test_after_the_last_round_there_is_nothing_to_label(whole, data_dir, capsys):
  with pytest.raises(SystemExit):
    launch.run(runs.experiment("label").main, runs.arguments(data_dir, whole))
  assert "all 1 rounds" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_holds_the_command_and_every_option(name, capsys):
  module = runs.experiment(name)
  options = getattr(module, "OPTIONS", None)
  launch.run(module.main, ["--help"], options=options)
  shown = capsys.readouterr().out
  assert f"python experiments/{name}.py --" in shown
  for option in ("config", "workdir", *(options or {})):
    assert f"\n  --{option} " in shown


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_screenful(name):
  source = pathlib.Path(runs.experiment(name).__file__).read_text()
  assert len(source.splitlines()) <= 65


def chat_with(monkeypatch, capsys, text, *args):
  """What chat.py writes when `text` is piped in."""
  module = runs.experiment("chat")
  monkeypatch.setattr("sys.stdin", io.StringIO(text))
  launch.run(module.main, list(args), options=module.OPTIONS, needs=())
  return capsys.readouterr().out


def test_chat_answers_piped_lines_and_obeys_commands(whole, monkeypatch, capsys):
  here = (f"--workdir={whole}", "--max_new_tokens=6", "--temperature=1.0")
  said = chat_with(monkeypatch, capsys, "Where does Alice live?\n/retry\n/new\n/nonsense\n", *here)
  first, again, new, unknown, *_ = said.split("\n")
  assert first and again and first != again
  assert new == "A new dialogue." and "/nonsense" in unknown
  assert chat_with(monkeypatch, capsys, "Where does Alice live?\n", *here) == f"{first}\n"
  other = chat_with(monkeypatch, capsys, "Where does Alice live?\n", *here, "--seed=1")
  assert other != f"{first}\n"
  of_sft = chat_with(monkeypatch, capsys, "Hello\n/quit\nHello\n", *here, "--policy=sft/policy")
  assert of_sft.count("\n") == 1  # nothing after /quit


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "give --workdir"),
    (["--workdir=WHOLE", "--policy=round_7/ppo/policy"], "there are: sft/policy, round_1/ppo"),
    (["--workdir=WHOLE/sft"], "there is no config.json in it"),
    (["--workdir=WHOLE", "--temperature=hot"], "--temperature takes a value of type float"),
    (["--workdir=WHOLE", "--temperature=-1"], "temperature: -1.0 is outside"),
    ([f"--config={runs.VILLAGE}:tiny"], "starts from no pretrained model"),
  ],
)
def test_chat_says_what_is_wrong_with_its_arguments(args, message, whole, monkeypatch, capsys):
  with pytest.raises(SystemExit) as ended:
    chat_with(monkeypatch, capsys, "", *[arg.replace("WHOLE", str(whole)) for arg in args])
  assert ended.value.code == 2 and message in capsys.readouterr().err


class Parrot:
  """A speaker that says the last message back, letter by letter."""

  def __init__(self, interrupt_after=None):
    self.interrupt_after, self.keys = interrupt_after, []

  def answer(self, messages, key):
    self.keys.append(np.asarray(jax.random.key_data(key)).tolist())
    for i, letter in enumerate(messages[-1].content):
      if i == self.interrupt_after:
        raise KeyboardInterrupt
      yield letter


def hold(speaker, *typed):
  """The dialogue and the output of `chat.talk`; an exception among the lines is raised."""
  script, out = iter(typed), io.StringIO()

  def read():
    line = next(script, EOFError)
    if isinstance(line, str):
      return line
    raise line

  messages = chat.talk(speaker, read, out, jax.random.key(0))
  return [(m.role, m.content) for m in messages], out.getvalue()


def test_a_dialogue_has_turns_a_system_message_and_new_beginnings():
  messages, out = hold(Parrot(), "/system be kind", "a", "b")
  assert messages == [
    ("system", "be kind"),
    *(("user", "a"), ("assistant", "a"), ("user", "b"), ("assistant", "b")),
  ]
  assert out == "A new dialogue.\na\nb\n"
  assert hold(Parrot(), "/system x", "a", "/new")[0] == [("system", "x")]
  assert hold(Parrot(), "/system x", "a", "/system")[0] == []
  assert hold(Parrot(), "", "   ") == ([], "")
  assert hold(Parrot(), "/retry")[0] == []


def test_a_retry_replaces_the_answer_and_draws_anew():
  parrot = Parrot()
  messages, out = hold(parrot, "a", "/retry")
  assert messages == [("user", "a"), ("assistant", "a")] and out == "a\na\n"
  assert parrot.keys[0] != parrot.keys[1]


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat():
  messages, out = hold(Parrot(interrupt_after=2), "abcd", KeyboardInterrupt(), "xyz")
  assert messages[:2] == [("user", "abcd"), ("assistant", "ab")]
  assert "ab [stopped]\n" in out and "Ctrl-D" in out
  assert messages[-1] == ("assistant", "xy")  # the chat went on


def test_a_message_that_cannot_be_answered_is_taken_back(whole):
  speaker = chat.speaker_of(load.of_run(whole, "newest"), runs.sampling(4), context=12)
  messages, out = hold(speaker, "Where does Alice live? " * 9, "Where does Alice live?")
  assert "error: a conversation needs" in out
  assert [role for role, _ in messages] == ["user", "assistant"]


def test_a_run_that_scans_layers_is_served_with_its_layers_one_by_one(whole, tmp_path):
  plain = load.of_run(whole, "sft/policy")
  config = json.loads((whole / "config.json").read_text())
  config["model"]["compute"]["scan_layers"] = True
  (tmp_path / "config.json").write_text(json.dumps(config))
  shutil.copytree(whole / "tokenizer", tmp_path / "tokenizer")
  stacked = pretrained.stack_layers(plain.params)
  checkpoint.save_params(tmp_path / "sft" / "policy", stacked, config)
  served = load.of_run(tmp_path, "newest")
  assert served.policy == plain.policy
  jax.tree.map(np.testing.assert_array_equal, served.params, plain.params)


def test_serve_answers_as_chat_does_registers_the_policy_and_ends_on_sigterm(whole, tmp_path):
  db = tmp_path / "records.sqlite"
  sizes = ("--slots=2", "--context=64", "--max_new_tokens=6", "--columns=2")
  process = runs.start("serve", f"--workdir={whole}", "--port=0", f"--db={db}", *sizes, devices=1)
  try:
    said = []
    while not said or "/metrics" not in said[-1]:
      said.append(process.stdout.readline())
      assert said[-1], process.stderr.read()
    (url,) = (line.split()[-1] for line in said if "/v1" in line)
    dialogue = {"model": "whole-round_1", "messages": [{"role": "user", "content": "Hello"}]}
    answer = httpx.post(f"{url}/chat/completions", json=dialogue | {"temperature": 0}, timeout=60)
    assert answer.status_code == 200
    speaker = chat.speaker_of(
      load.of_run(whole, "newest"), runs.sampling(6, temperature=0.0), context=64
    )
    spoken = "".join(speaker.answer((Message("user", "Hello"),), jax.random.key(0)))
    assert answer.json()["choices"][0]["message"]["content"] == spoken
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, process.stderr.read()
  finally:
    process.kill()
    process.wait()
  with sqlite3.connect(db) as read:
    (row,) = read.execute("SELECT name, checkpoint, lineage FROM policies")
  assert row[:2] == ("whole/round_1/ppo/policy", str(whole / "round_1/ppo/policy"))
  assert json.loads(row[2])["parents"] == ["sft/policy", "round_1/reward/reward_model"]


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--host=0.0.0.0"], "others can reach 0.0.0.0: make a key"),
    (["--keys=/nowhere.json"], "/nowhere.json holds no key"),
    (["--slots=0"], "--slots must be at least 1"),
    (["--port=99999"], "cannot listen at 127.0.0.1, port 99999"),
    (["--policy=round_7/ppo/policy"], "there are: sft/policy, round_1/ppo"),
  ],
)
def test_serve_says_what_is_wrong_before_it_compiles(args, message, whole, capsys):
  module = runs.experiment("serve")
  with pytest.raises(SystemExit) as ended:
    launch.run(
      module.main, [f"--workdir={whole}", *args], options=module.OPTIONS, needs=("workdir",)
    )
  assert ended.value.code == 2 and message in capsys.readouterr().err
