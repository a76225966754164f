"""The rules of the house, held by reading the source: order of imports, lengths, unread keys."""

import ast
import pathlib
import re
import sys

import conformance
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_jax"
SOURCES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}

# A module imports from its own line and the lines above it, never from below.
ORDER = [
  {"types", "config"},
  {"parallel"},
  {"training"},
  {"text"},
  {"data"},
  {"networks"},
  {"generation"},
  {"masked", "surrogate", "advantages"},
  {"sft", "comparisons", "reward", "rollout", "ppo", "ppo_config", "fit"},
  {"labelers"},
  {"feedback", "moderation"},
  {"experiment", "feeds", "phases", "standing"},
  {"evaluation", "plan"},
  {"asking", "iterate"},
  {"serving", "chat"},
  {"doctor"},
]
LAYER = {module: layer for layer, modules in enumerate(ORDER) for module in modules}


def imported(tree):
  """The modules of the package that a source names, as ("networks", line) pairs."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf_jax":
      parts = node.module.split(".")
      names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
      yield from ((name, node.lineno) for name in names)
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("rlhf_jax."):
          yield alias.name.split(".")[1], node.lineno


def module_of(name):
  """ "rlhf_jax/networks/heads.py" -> "networks"."""
  return pathlib.Path(name).with_suffix("").parts[1]


def functions():
  for name, tree in SOURCES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield f"{name}:{node.lineno} {node.name}", node


def test_every_module_has_its_place_in_the_order():
  apart = {"__init__", "launch"}
  assert {module_of(name) for name in SOURCES} - apart <= set(LAYER)


def test_imports_point_up_the_order_only():
  wrong = [
    f"{name}:{line} imports {target}"
    for name, tree in SOURCES.items()
    if module_of(name) in LAYER
    for target, line in imported(tree)
    if not (target == "launch" and name.endswith("__main__.py"))
    if target not in LAYER or LAYER[target] > LAYER[module_of(name)]
  ]
  assert not wrong


def test_launch_leans_on_the_ground_only():
  tree = SOURCES["rlhf_jax/launch.py"]
  assert {target for target, _ in imported(tree)} <= {"types", "config", "parallel", "training"}


def test_the_package_imports_only_what_setup_names():
  core = (ROOT / "setup.py").read_text().split("EXTRAS")[0]
  named = {
    re.sub("[-_]", "", name.lower()) for name in re.findall(r'^  "([A-Za-z0-9_-]+)', core, re.M)
  }
  aliases = {"absl": "abslpy", "orbax": "orbaxcheckpoint", "mldtypes": "jax", "grpc": ""}
  foreign = set()
  for tree in SOURCES.values():
    for node in ast.walk(tree):
      modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
      foreign |= {module.split(".")[0] for module in modules}
  plain = {re.sub("[-_]", "", m.lower()) for m in foreign - set(sys.stdlib_module_names)}
  assert {aliases.get(name, name) for name in plain} - {"rlhfjax"} <= named


@pytest.mark.conformance("B31")
def test_nothing_evaluates_or_unpickles():
  banned = {"eval", "exec", "compile", "__import__"}
  modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
  wrong = []
  for name, tree in SOURCES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Call) and getattr(node.func, "id", "") in banned:
        wrong.append(f"{name}:{node.lineno} {node.func.id}")
      if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
        wrong += [f"{name}:{node.lineno} {found}" for found in names & modules]
      if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
        if getattr(node.value, "value", True) is not False:
          wrong.append(f"{name}:{node.lineno} allow_pickle")
  assert not wrong


def test_nothing_in_the_package_prints():
  wrong = [
    f"{name}:{node.lineno}"
    for name, tree in SOURCES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
  ]
  assert not wrong


def test_no_function_is_longer_than_sixty_lines():
  lengths = {where: node.end_lineno - node.lineno + 1 for where, node in functions()}
  assert not {where: length for where, length in lengths.items() if length > 60}


def test_no_function_takes_more_than_eight_parameters():
  count = lambda a: len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
  counts = {where: count(node.args) for where, node in functions()}
  assert not {where: number for where, number in counts.items() if number > 8}


def config_classes():
  """(class, field names) of every dataclass whose name ends in Config."""
  for tree in SOURCES.values():
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
        items = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        yield node.name, items


def attributes_read(tree):
  """Names read as `x.name`, and the keys of tables in a source that reads `getattr(x, key)`."""
  names, keys, by_table = set(), set(), False
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      names.add(node.attr)
    elif isinstance(node, ast.Dict):
      keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
      by_table |= not isinstance(node.args[1], ast.Constant)
  return names | keys if by_table else names


def test_every_config_field_is_read_somewhere_in_the_package():
  read = set().union(*map(attributes_read, SOURCES.values()))
  assert not [
    f"{name}.{item.target.id}"
    for name, items in config_classes()
    for item in items
    if item.target.id not in read
  ]


def test_config_classes_carry_no_defaults():
  assert not [
    f"{name}.{item.target.id}" for name, items in config_classes() for item in items if item.value
  ]


def test_no_config_is_read_with_a_default():
  wrong = [
    f"{name}:{node.lineno} {ast.unparse(node)}"
    for name, tree in SOURCES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and getattr(node.func, "attr", "") == "get"
    and len(node.args) > 1
    and re.search(r"(^|\.)(config|cfg|c)$", ast.unparse(node.func.value))
  ]
  assert not wrong


def test_the_conformance_page_is_what_the_markers_say():
  page = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
  assert page == conformance.table(), "docs/conformance.md is stale: make conformance"
