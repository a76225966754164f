"""Mistakes of a user: one clear message, status 2, in seconds, and what was there stays."""

import json
import os
import re
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from rlhf_jax import config as config_lib
from rlhf_jax import launch
from rlhf_jax.networks import heads, pretrained
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.training import checkpoint, metrics
from rlhf_jax.types import UserError

SECONDS = 15.0  # of this process; a busy machine makes the clock on the wall no judge
GOOD_LINE = {
  "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, data_dir):
  """A workdir whose supervised fine-tuning is done."""
  workdir = tmp_path_factory.mktemp("runs") / "begun"
  runs.experiment("sft").main(runs.tiny(data_dir), workdir)
  return workdir


@pytest.fixture
def fails(capsys, data_dir):
  """`fails(workdir, *more)`: the message of chatgpt.py, after checking how it ended."""

  def run(workdir, *more, config=None, name="chatgpt"):
    before = runs.fingerprint(workdir)
    args = runs.arguments(data_dir, workdir)
    args = [f"--config={config}", *args[1:2]] if config else args
    capsys.readouterr()
    began = time.process_time()
    with pytest.raises(SystemExit) as ended:
      launch.run(runs.experiment(name).main, [*args, *more])
    assert time.process_time() - began < SECONDS
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") or "\nerror: " in message
    assert "Traceback" not in message and message.count("error: ") == 1
    after = runs.fingerprint(workdir)
    assert {name: after.get(name) for name in before} == before  # nothing is lost
    return message

  return run


@pytest.fixture
def jsonl(tmp_path, data_dir):
  """`jsonl(lines)`: a config file whose dialogues are these lines."""

  def write(*lines, kind="demonstrations", path=None):
    file = tmp_path / "dialogues.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    paths = {"demonstrations": (), "comparisons": (), "prompts": ()}
    paths |= {kind: (str(path or file),)}
    config = tmp_path / "config.py"
    config.write_text(
      "from rlhf_jax import config as config_lib\n\n"
      "def get_config():\n"
      f"  config = config_lib.load({f'{runs.VILLAGE}:tiny'!r})\n"
      "  config.unlock()\n"
      f"  config.data.prepare.data_dir = {str(data_dir)!r}\n"
      f"  config.data.jsonl = dict(on_malformed='error', **{paths!r})\n"
      "  config.data.weights.jsonl = 1.0\n"
      "  return config\n"
    )
    return config

  return write


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.ppo.kl.koef=0.1", "config ppo.kl: unknown key 'koef'; did you mean 'coef'?"),
    ("--config.pop.kl.coef=0.1", "unknown key 'pop'; did you mean 'ppo'?"),
    ("--config.nothing_like_it=1", "unknown key 'nothing_like_it'"),
    ("--config.sft.optim.learning_rate=-0.001", "learning_rate: -0.001 is outside (0, inf)"),
    ("--config.comparisons.responses=1", "comparisons.responses: 1 is outside [2, inf)"),
    ("--config.ppo.rollout.prompt_length=8", "a conversation needs"),
    ("--config.reward.sequence_length=60", "config reward.sequence_length 60 is shorter"),
    ("--config.comparisons.responses=5", "config reward.max_responses 4 is fewer than the 5"),
    ("--config.sft.batch_size=9", "9 rows do not split over the 8 devices"),
    ("--config.seed=1", "was made with another config"),
    ("--config.model.d_model=64", "model.d_model: 32 -> 64"),
  ],
)
def test_a_wrong_value_is_named_before_anything_is_touched(argument, message, begun, fails):
  before = runs.fingerprint(begun)
  said = fails(begun, argument)
  if "made with another" not in said:  # the value itself is wrong, whatever the workdir
    assert message in said
  else:
    assert message in said or f"{argument.split('=')[0].removeprefix('--config.')}" in said
  assert runs.fingerprint(begun) == before


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.ppo.rollout.prompt_length=8", "max_tokens is 8; raise max_tokens"),
    ("--config.sft.sequence_length=8", "max_tokens is 8; raise max_tokens"),
  ],
)
def test_a_conversation_that_is_too_long_is_found_before_training(
  argument, message, tmp_path, fails
):
  said = fails(tmp_path / "w", argument)
  assert message in said and "village" in said
  assert not (tmp_path / "w/sft/metrics.jsonl").exists()


def test_a_missing_config_file_is_named_with_those_there_are(tmp_path, fails):
  said = fails(tmp_path, config=runs.ROOT / "configs/vilage.py")
  assert "vilage.py' does not exist" in said and "configs/village.py" in said


def test_a_missing_data_file_is_named(tmp_path, fails, jsonl):
  assert "nowhere.jsonl" in fails(tmp_path / "w", config=jsonl(path=tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
  ("bad", "kind", "message"),
  [
    ('{"messages": [{"role": "user", "con', "demonstrations", "dialogues.jsonl"),
    (json.dumps({"messages": GOOD_LINE["messages"][:1]}), "demonstrations", "assistant"),
    (json.dumps(GOOD_LINE | {"mesages": 1}), "demonstrations", "mesages"),
    (
      json.dumps({"messages": GOOD_LINE["messages"][:1], "responses": ["only one"]}),
      "comparisons",
      "at least 2 responses",
    ),
  ],
)
def test_a_bad_line_of_data_is_named_with_file_line_and_reason(
  bad, kind, message, tmp_path, fails, jsonl
):
  good = {"messages": GOOD_LINE["messages"][:1], "responses": ["a", "b"]}
  good = GOOD_LINE if kind == "demonstrations" else good
  said = fails(tmp_path / "w", config=jsonl(json.dumps(good), bad, kind=kind))
  assert message in said and re.search(r"dialogues\.jsonl.*\b2\b", said)


def test_weights_of_another_shape_are_named_tensor_by_tensor(tmp_path, data_dir, fails):
  model = config_lib.build(ModelConfig, runs.tiny(data_dir).model)
  init = lambda: heads.init(heads.Policy(model), jax.random.key(0))
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(init))
  pretrained.save_safetensors(tmp_path / "weights", model, params)
  more = (f"--config.pretrained={tmp_path / 'weights'}", "--config.model.d_ff=128")
  said = fails(tmp_path / "w", *more)
  assert "d_ff" in said and "64" in said and "128" in said


def test_a_policy_of_another_shape_in_the_workdir_is_not_overwritten(begun, tmp_path, fails):
  _, about = checkpoint.load_params(begun / "sft/policy")
  small = {"trunk": {"embed": {"embedding": jnp.zeros((4, 2))}}}
  workdir = tmp_path / "w"
  subprocess.run(["cp", "-r", begun, workdir], check=True)
  checkpoint.save_params(workdir / "sft/policy", small, about)
  said = fails(workdir)
  assert "does not fit this configuration" in said and "sft/policy" in said


def test_a_workdir_of_another_config_says_what_changed(begun, fails):
  said = fails(begun, "--config.ppo.kl.coef=0.7", "--config.seed=3")
  assert "ppo.kl.coef: " in said and "-> 0.7" in said and "seed: 0 -> 3" in said


def test_a_workdir_that_cannot_be_made_is_an_error(tmp_path, fails):
  (tmp_path / "file").write_text("in the way")
  assert "cannot be written" in fails(tmp_path / "file/w")


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 3 MB."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
  )
  if mounted.returncode:
    pytest.skip("this user may not mount a small disk")
  yield disk
  subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_what_is_on_it(small_disk, begun, fails):
  subprocess.run(["cp", "-r", begun / "config.json", begun / "tokenizer", small_disk], check=True)
  free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
  (small_disk / "precious").write_bytes(b"x" * (free - 1_200_000))
  said = fails(small_disk)
  assert "free" in said.lower() and "space" in said.lower()
  assert not list(small_disk.rglob("policy"))


def test_a_process_ends_with_the_status_and_in_seconds(tmp_path, data_dir):
  args = runs.arguments(data_dir, tmp_path / "w", sft__optim__learning_rate=-0.5)
  process = runs.start("chatgpt", *args)
  out, errors = process.communicate(timeout=120)
  assert process.returncode == 2 and out == ""
  assert errors == "error: config sft.optim.learning_rate: -0.5 is outside (0, inf).\n"


def test_a_loss_that_diverges_stops_with_step_and_metric_and_keeps_the_last_good(tmp_path, fails):
  # The rate climbs from 0 to an absurd one: step 1 changes nothing, step 2 ruins the policy.
  absurd = (
    "--config.sft.optim.learning_rate=1e30",
    "--config.sft.optim.warmup_from=0.0",
    "--config.sft.optim.warmup_steps=4",
    "--config.sft.eval_every=1",
  )
  workdir = tmp_path / "w"
  said = fails(workdir, *absurd)
  step, metric = re.search(r"step (\d+): (?:metric|the state: ?)?\W*'([\w/]+)'", said).groups()
  assert int(step) == 2 and metric.startswith("sft/")
  assert "training stopped" in said and f"{workdir}/sft/checkpoints/1" in said
  kept = tiny.checkpointer(workdir / "sft/checkpoints", keep=2)
  assert kept.steps() == [1]
  heldout = metrics.read_jsonl(workdir / "sft/heldout.jsonl")
  assert np.isfinite(heldout[0]["sft/heldout_loss"])
  again = fails(workdir, *absurd)  # goes on from there, to the same end
  assert "step 2" in again and kept.steps() == [1]


def test_a_pretrained_model_with_a_nan_stops_at_the_first_step(tmp_path, data_dir, fails):
  model = config_lib.build(ModelConfig, runs.tiny(data_dir).model)
  params = heads.init(heads.Policy(model), jax.random.key(0))
  embedding = params["trunk"]["embed"]["embedding"]
  params["trunk"]["embed"]["embedding"] = embedding.at[:, 0].set(jnp.nan)
  pretrained.save_safetensors(tmp_path / "weights", model, params)
  said = fails(tmp_path / "w", f"--config.pretrained={tmp_path / 'weights'}")
  assert "NaN" in said or "nan" in said
  with pytest.raises(UserError):
    checkpoint.load_params(tmp_path / "w/sft/policy")
