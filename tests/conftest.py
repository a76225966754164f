"""Every test runs on the CPU backend with eight devices; plain computations stay on the first."""

import importlib.util
import os
import pathlib

import quick

from rlhf_jax import launch

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.update(quick.settings(os.environ))
os.environ["XLA_FLAGS"] += f" {launch.DEVICE_FLAG}=8 {launch.PATIENCE}"
# Exchanges of a program from the cache come in any order (see mesh._cache): a thread for each.
os.environ.setdefault("PJRT_NPROC", "16")
os.environ.update(launch.cache_settings(os.environ))  # the second run of the suite compiles less

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # broadcasting is written out


def pytest_collection_modifyitems(config, items):
  """Leaves out the tests marked `matrix` unless -m asks for them, and those marked `reference`
  where PyTorch is not installed."""
  left_out = set() if "matrix" in config.option.markexpr else {"matrix"}
  if importlib.util.find_spec("torch") is None:
    left_out.add("reference")
  marks = lambda item: {mark.name for mark in item.iter_markers()}
  kept = [item for item in items if not marks(item) & left_out]
  config.hook.pytest_deselected(items=[item for item in items if item not in kept])
  items[:] = kept


def _folder(variable: str) -> pathlib.Path:
  if not os.environ.get(variable):
    pytest.skip(f"{variable} does not name a folder")
  return pathlib.Path(os.environ[variable])


@pytest.fixture
def data_folder() -> pathlib.Path:
  """Real dialogues and comparisons, one folder a source; the test skips where there are none."""
  return _folder("RLHF_JAX_DATA")


@pytest.fixture
def weights_folder() -> pathlib.Path:
  """Real checkpoints; the test skips where there are none."""
  return _folder("RLHF_JAX_WEIGHTS")
