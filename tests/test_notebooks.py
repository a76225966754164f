"""The notebooks run from top to bottom at their smallest size, and define nothing."""

import ast
import json
import os
import pathlib
import re

import nbformat
import pytest
import quick
from nbclient import NotebookClient

from rlhf_jax import launch

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = 5  # lines of a function; a longer one lives in the package


def read(path):
  return nbformat.read(path, as_version=4)


def python(cell):
  """A code cell without the lines that only IPython understands."""
  return re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M)


def definitions(notebook):
  for cell in notebook.cells:
    if cell.cell_type == "code":
      kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
      yield from (n for n in ast.walk(ast.parse(python(cell))) if isinstance(n, kinds))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_no_class_and_no_long_function(path):
  long = [
    node.name
    for node in definitions(read(path))
    if isinstance(node, ast.ClassDef) or node.end_lineno - node.lineno + 1 > LONGEST
  ]
  assert not long


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
  cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
  assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.fixture
def smallest(tmp_path, monkeypatch):
  """What a notebook's kernel starts with: the smallest size, and folders of its own."""
  for name, value in launch.cache_settings(os.environ).items():
    monkeypatch.setenv(name, value)  # shared with the rest of the suite: compile once
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_FLAGS", quick.settings(os.environ | {"XLA_FLAGS": ""})["XLA_FLAGS"])
  monkeypatch.setenv("RLHF_JAX_DEVICES", "2")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("RLHF_JAX_NOTEBOOK_CONFIG", "configs/village.py:tiny")
  monkeypatch.setenv("RLHF_JAX_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
  return tmp_path / "run"


def shown(notebook, kind):
  """The outputs of one MIME type, cell by cell."""
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_the_story_runs_from_demonstrations_to_a_report(smallest):
  notebook = read(ROOT / "notebooks/01_the_story.ipynb")
  folder = {"metadata": {"path": ROOT / "notebooks"}}
  NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()

  assert len(shown(notebook, "image/png")) == 4  # SFT, reward model, PPO, both rounds
  frames = [page for page in shown(notebook, "text/html") if page.startswith("<iframe")]
  assert len(frames) == 5  # demonstrations, comparisons, policies; dialogues, policies at the end
  lineage = json.loads((smallest / "lineage.json").read_text())
  assert [r["ppo"]["policy"] for r in lineage["rounds"]] == [
    "round_1/ppo/policy",
    "round_2/ppo/policy",
  ]
  assert (smallest / "report.html").stat().st_size > 50_000
