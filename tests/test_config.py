"""Configs: what `build` accepts and refuses, and what `load` and `override` make of a file."""

import dataclasses
from typing import Annotated, Literal

import pytest
from ml_collections import ConfigDict

from rlhf_jax import config as config_lib
from rlhf_jax.config import Count, Fraction, NonNegative, Positive, PositiveInt, Range
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: Positive
  kind: Literal["linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: PositiveInt
  seed: Count
  decay: NonNegative
  dropout: Fraction
  clip: Positive | None
  frozen: tuple[str, ...]
  betas: tuple[float, float]
  weights: dict[str, float]
  name: str
  flag: bool
  inner: Inner


def good():
  return ConfigDict(
    {
      "steps": 10,
      "seed": 0,
      "decay": 0,
      "dropout": 0.5,
      "clip": None,
      "frozen": ("a", "b"),
      "betas": [0.9, 1],
      "weights": {"village": 1, "hh": 0.5},
      "name": "x",
      "flag": True,
      "inner": {"rate": 1, "kind": "linear"},
    }
  )


def refused(key, value):
  """The message of building `good()` with one value changed."""
  section = good()
  with section.ignore_type():
    parent, _, name = key.rpartition(".")
    (section[parent] if parent else section)[name] = value
  with pytest.raises(UserError) as caught:
    config_lib.build(Outer, section)
  return str(caught.value)


def test_a_good_section_becomes_a_frozen_dataclass_of_the_annotated_types():
  built = config_lib.build(Outer, good())
  assert built == Outer(
    10,
    0,
    0.0,
    0.5,
    None,
    ("a", "b"),
    (0.9, 1.0),
    {"village": 1.0, "hh": 0.5},
    "x",
    True,
    Inner(1.0, "linear"),
  )
  assert type(built.decay) is float and type(built.inner.rate) is float
  with pytest.raises(dataclasses.FrozenInstanceError):
    built.steps = 11


def test_to_dict_and_build_are_inverse():
  built = config_lib.build(Outer, good())
  assert config_lib.build(Outer, config_lib.to_dict(built)) == built


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("step", 1, "config Outer: unknown key 'step'; did you mean 'steps'?"),
    ("inner.rat", 1, "config inner: unknown key 'rat'; did you mean 'rate'?"),
    ("zzz", 1, "unknown key 'zzz'; known keys: betas, clip, decay"),
    ("steps", 0, "config steps: 0 is outside [1, inf)."),
    ("steps", 1.0, "config steps: expected int, got 1.0."),
    ("steps", True, "config steps: expected int, got True."),
    ("steps", None, "config steps: expected int, got None."),
    ("inner.rate", -1e-3, "config inner.rate: -0.001 is outside (0, inf)."),
    ("inner.rate", 0, "config inner.rate: 0 is outside (0, inf)."),
    ("inner.rate", "1e-3", "config inner.rate: expected float, got '1e-3'."),
    ("inner.rate", float("nan"), "config inner.rate: expected a finite number, got nan"),
    ("inner.rate", float("inf"), "config inner.rate: expected a finite number, got inf"),
    ("decay", float("inf"), "config decay: expected a finite number, got inf."),
    ("dropout", 1.5, "config dropout: 1.5 is outside [0, 1]."),
    ("clip", 0.0, "config clip: 0.0 is outside (0, inf)."),
    ("clip", "off", "config clip: expected float, got 'off'."),
    ("frozen", "abc", "config frozen: expected a list, got 'abc'."),
    ("frozen", (1,), "config frozen[0]: expected str, got 1."),
    ("betas", (0.9,), "config betas: expected 2 values, got 1."),
    ("weights", {"hh": "x"}, "config weights.hh: expected float, got 'x'."),
    ("weights", 3, "config weights: expected a section with keys, got 3."),
    ("name", 3, "config name: expected str, got 3."),
    ("flag", 1, "config flag: expected bool, got 1."),
    ("inner.kind", "cos", "config inner.kind: 'cos' is not one of 'linear', 'cosine'."),
    ("inner", 3, "config inner: expected a section with keys, got 3."),
  ],
)
def test_what_is_wrong_is_named_with_key_value_and_rule(key, value, message):
  assert message in refused(key, value)


def test_all_problems_of_a_section_are_named_at_once():
  section = good()
  del section["seed"]
  section.steps = -1
  section.stepz = 3
  with pytest.raises(UserError) as caught:
    config_lib.build(Outer, section)
  lines = str(caught.value).splitlines()
  assert len(lines) == 3
  assert any("missing key 'seed'" in line for line in lines)
  assert any("unknown key 'stepz'" in line for line in lines)
  assert any("-1 is outside [1, inf)" in line for line in lines)


@pytest.mark.parametrize(
  ("closed", "inside", "outside"),
  [
    ("both", (0.0, 1.0), (-0.1, 1.1)),
    ("low", (0.0, 0.9), (1.0,)),
    ("high", (0.1, 1.0), (0.0,)),
    ("neither", (0.5,), (0.0, 1.0)),
  ],
)
def test_a_range_includes_the_ends_that_it_says(closed, inside, outside):
  interval = Range(low=0.0, high=1.0, closed=closed)
  assert all(value in interval for value in inside)
  assert not any(value in interval for value in outside)


def test_differences_name_the_keys_that_changed():
  old = {"ppo": {"kl_coef": 0.05, "lam": 0.95}, "seed": 1}
  new = {"ppo": {"kl_coef": 0.1, "lam": 0.95}, "rounds": 2}
  assert config_lib.differences(old, new) == [
    "ppo.kl_coef: 0.05 -> 0.1",
    "rounds: 'absent' -> 2",
    "seed: 1 -> 'absent'",
  ]
  assert config_lib.differences(old, old) == []


FILE = """
from ml_collections import ConfigDict

def get_config(arg="tiny"):
  config = ConfigDict()
  config.size = {"tiny": 1, "small": 2}[arg]
  config.ppo = ConfigDict(dict(kl_coef=0.1, clip_norm=None, frozen=(), name="a", flag=True))
  return config
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "toy.py"
  path.write_text(FILE)
  return str(path)


def test_load_passes_the_argument_and_locks_the_config(config_file):
  assert config_lib.load(config_file).size == 1
  config = config_lib.load(f"{config_file}:small")
  assert config.size == 2
  with pytest.raises(AttributeError):
    config.sise = 3


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [
    ("size", "7", 7),
    ("ppo.kl_coef", "0.2", 0.2),
    ("ppo.kl_coef", "1e-3", 1e-3),
    ("ppo.kl_coef", "None", None),
    ("ppo.clip_norm", "1.0", 1.0),
    ("ppo.frozen", "('a', 'b')", ("a", "b")),
    ("ppo.name", "7", "7"),
    ("ppo.name", "it's", "it's"),
    ("ppo.flag", "false", False),
    ("ppo.flag", "True", True),
  ],
)
def test_any_value_can_be_overridden(config_file, key, text, value):
  config = config_lib.load(config_file, {key: text})
  for part in key.split("."):
    config = config[part]
  assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("ppo.kl_coeff", "config ppo: unknown key 'kl_coeff'; did you mean 'kl_coef'?"),
    ("poo.kl_coef", r"config \(top level\): unknown key 'poo'; did you mean 'ppo'?"),
    ("ppo.kl_coef.x", "config ppo.kl_coef: unknown key 'x'"),
    ("ppo.clip_norm.x", "config ppo.clip_norm is None, so it has no key 'x'; take a config"),
    ("ppo", "config ppo is a section; override its keys one by one, as ppo.clip_norm=..."),
  ],
)
def test_an_override_of_no_key_names_the_nearest(config_file, key, message):
  with pytest.raises(UserError, match=message):
    config_lib.load(config_file, {key: "1"})


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "does not exist; there are: .*other.py"),
    ("def get_config(:\n", "line 1: invalid syntax"),
    ("x = 1\n", "defines no get_config"),
    ("def get_config():\n  return None\n", "takes no argument, got 'small'"),
    ("def get_config(arg):\n  raise ValueError('no variant')\n", "bad.py:small: no variant"),
  ],
)
def test_a_config_file_that_cannot_be_used_is_a_clear_error(tmp_path, text, message):
  (tmp_path / "other.py").write_text("")
  if text is not None:
    (tmp_path / "bad.py").write_text(text)
  with pytest.raises(UserError, match=message):
    config_lib.load(f"{tmp_path / 'bad.py'}:small")


def test_a_section_checks_its_own_rules_when_built():
  @dataclasses.dataclass(frozen=True)
  class Batch:
    size: PositiveInt
    minibatches: Annotated[int, Range(low=1, high=64)]

    def __post_init__(self):
      if self.size % self.minibatches:
        raise UserError(f"size {self.size} is not divisible by minibatches {self.minibatches}.")

  with pytest.raises(UserError, match="size 10 is not divisible by minibatches 4"):
    config_lib.build(Batch, {"size": 10, "minibatches": 4})
