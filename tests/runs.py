"""Runs of the village's tiny config, shared by the tests that go through a whole experiment."""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import quick

from rlhf_jax import config as config_lib
from rlhf_jax import launch
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
VILLAGE = ROOT / "configs/village.py"


def tiny(data_dir, **overrides):
  """The tiny config with noisy labelers (or all its comparisons are ties, and nothing is learnt).

  `overrides` are named like `sft__num_steps`.
  """
  values = {"rounds": 1, "labelers__noise": 1.0, "data__prepare__data_dir": str(data_dir)}
  texts = {k.replace("__", "."): str(v) for k, v in (values | overrides).items()}
  return config_lib.load(f"{VILLAGE}:tiny", texts)


def arguments(data_dir, workdir, **overrides):
  """The same as a command line."""
  values = {"rounds": 1, "labelers__noise": 1.0, "data__prepare__data_dir": str(data_dir)}
  texts = [f"--config.{k.replace('__', '.')}={v}" for k, v in (values | overrides).items()]
  return [f"--config={VILLAGE}:tiny", f"--workdir={workdir}", *texts]


def experiment(name):
  """The module experiments/NAME.py, loaded once."""
  module_name = f"experiment_{name}"
  if module_name not in sys.modules:
    path = ROOT / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(module_name, path)
    sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module_name])
  return sys.modules[module_name]


def start(name, *args, devices=2, **kwargs):
  """An experiment in a process of its own, as a user starts it."""
  return spawn(ROOT / "experiments" / f"{name}.py", *args, devices=devices, **kwargs)


def spawn(script, *args, devices, **kwargs):
  """A Python process with so many CPU devices, whatever this one has."""
  ours = re.compile("XLA_FLAGS|GLIBC|RLHF_JAX_(DEVICES|PREPARED)")
  environ = {key: value for key, value in os.environ.items() if not ours.match(key)}
  environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "RLHF_JAX_DEVICES": str(devices)}
  environ |= quick.settings(environ)
  for_cpu = launch.cpu_settings(environ, devices)
  environ["XLA_FLAGS"] = for_cpu.get("XLA_FLAGS", environ["XLA_FLAGS"])
  command = [sys.executable, str(script), *map(str, args)]
  return subprocess.Popen(
    command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
  )


def free_port():
  """A port of this machine that nobody listens on, for processes that will talk to each other."""
  try:
    socket.gethostbyname(socket.gethostname())
  except OSError:
    pytest.skip("this machine's own name does not resolve, as processes that use gloo need")
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def results(workdir):
  """Everything a run has to show, without what depends on the clock, by path.

  Texts as they stand, parameters as a digest of their bits.
  """
  found = {}
  for path in sorted(workdir.rglob("*")):
    name = str(path.relative_to(workdir))
    if path.name == "done.json":
      found[name] = json.loads(path.read_text())["result"]
    elif path.name == "lineage.json" or path.suffix == ".jsonl" and path.name != "timing.jsonl":
      found[name] = path.read_text()
    elif path.name in ("policy", "policy_last", "reward_model"):
      params, _ = checkpoint.load_params(path)
      digest = hashlib.sha256()
      for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
      found[name] = digest.hexdigest()
  return found


def fingerprint(folder):
  """The bytes of every file below a folder, by path; seconds a step are beside the point."""
  files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "timing.jsonl")
  return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def sampling(max_new_tokens, **changes):
  values = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "stop": None,
    "compact_to": (),
    "cache_sizes": 1,
  } | changes
  return SamplingConfig(max_new_tokens=max_new_tokens, **values)
