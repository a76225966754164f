"""The start of an experiment: environment, one re-exec, command line, messages and exit codes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from rlhf_jax import launch
from rlhf_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]

EXPERIMENT = '''
"""Says what it was started with.

Numbers to expect: none.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import build
from rlhf_jax.types import UserError


@jax.jit
def work(x):
  for _ in range(3):
    x = jnp.tanh(x @ x) / jnp.sqrt(jnp.mean(x * x) + 1e-3) + jnp.cumsum(x, axis=0)
  return jax.lax.fori_loop(0, 3, lambda i, y: y @ jnp.linalg.qr(y)[0], x)


def main(config, workdir):
  if config.bad:
    raise UserError("the rule, the values, the remedy.")
  hits = []
  jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
  result = np.asarray(work(jnp.ones((32, 32)) + jnp.eye(32)))
  print(json.dumps({
    "pid": os.getpid(), "config": config.to_dict(), "workdir": str(workdir),
    "devices": jax.device_count(), "malloc": os.environ.get("GLIBC_TUNABLES"),
    "digest": hashlib.sha256(result.tobytes()).hexdigest(),
    "hits": hits.count("/jax/compilation_cache/cache_hits"),
  }))


if __name__ == "__main__":
  launch.run(main)
'''

CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({"bad": False, "ppo": {"kl_coef": 0.1}})
"""


@pytest.fixture
def start(tmp_path):
  """Runs the experiment as a user would, in a folder of its own; returns the finished process."""
  (tmp_path / "experiment.py").write_text(EXPERIMENT)
  (tmp_path / "config.py").write_text(CONFIG)
  ours = re.compile("XLA|JAX|GLIBC|RLHF")
  inherited = {name: value for name, value in os.environ.items() if not ours.match(name)}

  def run(*arguments, **environment):
    defaults = {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    return subprocess.run(
      [sys.executable, "experiment.py", *arguments],
      cwd=tmp_path,
      env=inherited | defaults | environment,
      capture_output=True,
      text=True,
      timeout=60,
    )

  return run


GOOD = ("--config=config.py", "--workdir=runs/x")


def test_an_experiment_starts_prepared_and_the_second_start_reuses_the_first(start, tmp_path):
  # A fast machine compiles `work` in less than what is worth caching; here everything is.
  asked = {"RLHF_JAX_DEVICES": "2", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  first, second = (json.loads(start(*GOOD, **asked).stdout) for _ in range(2))
  assert first["devices"] == 2
  if sys.platform == "linux":
    assert first["malloc"] == "glibc.malloc.hugetlb=1"
  assert first["workdir"] == "runs/x" and first["config"]["ppo"] == {"kl_coef": 0.1}
  cached = {path.name for path in (tmp_path / "cache/rlhf_jax/xla").iterdir()}
  assert any(name.startswith("jit_work") for name in cached)
  assert second["digest"] == first["digest"]  # warm and cold agree bit for bit
  assert first["hits"] == 0 and second["hits"] >= 1


def test_one_device_is_a_choice_and_an_override_is_obeyed(start):
  said = json.loads(start(*GOOD, "--config.ppo.kl_coef=0.5", RLHF_JAX_DEVICES="1").stdout)
  assert said["devices"] == 1 and said["config"]["ppo"] == {"kl_coef": 0.5}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((*GOOD, "--config.ppo.kl_coeff=1"), "unknown key 'kl_coeff'; did you mean 'kl_coef'?"),
    ((*GOOD, "--config.bad=True"), "error: the rule, the values, the remedy."),
    (("--config=conf.py", "--workdir=w"), "config file 'conf.py' does not exist"),
  ],
)
def test_a_users_error_is_one_message_and_status_2(start, arguments, message):
  ended = start(*arguments)
  assert ended.returncode == 2 and ended.stdout == ""
  assert message in ended.stderr and "Traceback" not in ended.stderr


def test_help_is_the_experiments_docstring_and_the_usage(start):
  ended = start("--help")
  assert ended.returncode == 0
  assert "Numbers to expect" in ended.stdout and "--config=configs/FILE.py" in ended.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=w"], "argument --config is missing"),
    (["--config=c.py"], "argument --workdir is missing"),
    (["--config=c.py", "--workdir="], "argument --workdir is missing"),
    (["--config=c.py", "--workdir"], "argument --workdir has no value"),
    (["--config=c.py", "--workdir=w", "--confg.x=1"], "unknown argument '--confg.x=1'"),
    (["--config=c.py", "--workdir=w", "more"], "unknown argument 'more'"),
  ],
)
def test_a_wrong_command_line_is_a_clear_error(arguments, message):
  with pytest.raises(UserError, match=message):
    launch.parse(arguments)


def test_values_may_follow_an_equals_sign_or_a_space_and_hold_more_signs():
  parsed = launch.parse(
    ["--config", "c.py:a", "--workdir=w", "--config.x.y", "-1", "--config.name=a=b"]
  )
  assert parsed == ("c.py:a", "w", {"x.y": "-1", "name": "a=b"})


def test_launch_imports_nothing_of_jax():
  code = "import sys, rlhf_jax.launch; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(("cores", "devices"), [(1, None), (2, 2), (3, 2), (6, 4), (8, 8), (64, 8)])
def test_devices_are_a_power_of_two_within_the_cores(cores, devices):
  flags = launch.cpu_settings({}, cores).get("XLA_FLAGS")
  assert flags == (f"{launch.DEVICE_FLAG}={devices} {launch.PATIENCE}" if devices else None)


def test_what_the_environment_says_already_is_kept():
  environ = {
    "XLA_FLAGS": "--xla_foo=1",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",
    "RLHF_JAX_DEVICES": "4",
  }
  settings = launch.cpu_settings(environ, 2)
  assert settings["XLA_FLAGS"] == f"--xla_foo=1 {launch.DEVICE_FLAG}=4 {launch.PATIENCE}"
  if sys.platform == "linux":
    assert settings["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
  chosen = {"XLA_FLAGS": f"{launch.DEVICE_FLAG}=3", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"}
  assert launch.cpu_settings(chosen, 2) == {}
  mine = {"JAX_COMPILATION_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/cache"}
  assert "JAX_COMPILATION_CACHE_DIR" not in launch.cache_settings(mine)
  theirs = launch.cache_settings({"XDG_CACHE_HOME": "/cache"})
  assert theirs["JAX_COMPILATION_CACHE_DIR"] == "/cache/rlhf_jax/xla"


@pytest.mark.parametrize(
  ("environ", "found", "in_view"),
  [
    ({"JAX_PLATFORMS": "cpu"}, True, False),
    ({"JAX_PLATFORMS": "cuda,cpu"}, False, True),
    ({}, True, True),
    ({}, False, False),
    ({"CUDA_VISIBLE_DEVICES": ""}, True, False),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, True, False),
  ],
)
def test_an_accelerator_is_seen_by_its_device_file(monkeypatch, environ, found, in_view):
  nvidia = lambda pattern: ["/dev/nvidia0"] if found and "nvidia" in pattern else []
  monkeypatch.setattr(launch.glob, "glob", nvidia)
  monkeypatch.setattr(launch.os.path, "exists", lambda path: False)
  monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: "cuda13" in name)
  assert launch.accelerator_in_view(environ) == in_view


def test_a_process_that_has_jax_already_is_not_restarted(monkeypatch):
  monkeypatch.setattr(launch.os, "execve", lambda *_: pytest.fail("re-executed"))
  monkeypatch.setattr(launch.os, "environ", {"JAX_PLATFORMS": "cpu"})
  launch.prepare()
  assert launch.os.environ[launch.PREPARED] == "1"
