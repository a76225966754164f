"""ConfigDict at the edge, frozen dataclass in the core.

`build(cls, section)` turns a ConfigDict (or a dict) into a frozen dataclass once, at the start of a
run, and rejects all that a hand-edited config gets wrong: unknown keys (with the nearest right
name), missing keys, wrong types and values out of range. Code below it reads plain attributes.

  @dataclasses.dataclass(frozen=True)
  class OptimConfig:
    learning_rate: Positive
    schedule: Literal["constant", "linear", "cosine"]

Dataclasses carry no defaults: a number is written once, in `configs/`.
"""

import ast
import collections.abc
import dataclasses
import difflib
import importlib.util
import inspect
import math
import pathlib
import types
import typing
from typing import Annotated, Any, Literal

import ml_collections

from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval that a number must lie in; the ends are included where `closed` says so."""

  low: float = -math.inf
  high: float = math.inf
  closed: Literal["both", "low", "high", "neither"] = "both"

  def __contains__(self, value: float) -> bool:
    above = value >= self.low if self.closed in ("both", "low") else value > self.low
    below = value <= self.high if self.closed in ("both", "high") else value < self.high
    return above and below

  def __str__(self) -> str:
    left = "[" if self.closed in ("both", "low") and self.low > -math.inf else "("
    right = "]" if self.closed in ("both", "high") and self.high < math.inf else ")"
    return f"{left}{self.low:g}, {self.high:g}{right}"


Positive = Annotated[float, Range(low=0.0, closed="neither")]
NonNegative = Annotated[float, Range(low=0.0)]
Fraction = Annotated[float, Range(low=0.0, high=1.0)]
PositiveInt = Annotated[int, Range(low=1)]
Count = Annotated[int, Range(low=0)]


def build(cls: type, section: Any, path: str = ""):
  """Turns one ConfigDict section into the frozen dataclass `cls`.

  Args:
    cls: a dataclass whose annotations say type and range of each key; nested dataclasses, tuples,
      dicts, `Literal`, `X | None` and `Annotated[..., Range]` are understood.
    section: a mapping with exactly the fields of `cls`.
    path: where the section stands in the whole config, for messages ("ppo.optim").

  Raises:
    UserError: an unknown key (the nearest right name is given), a missing key, a value of another
      type, or one out of its range; every problem of the section is named at once.
  """
  where = path or cls.__name__
  if not isinstance(section, collections.abc.Mapping) and not hasattr(section, "keys"):
    raise UserError(f"config {where}: expected a section with keys, got {section!r}.")
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = [field.name for field in dataclasses.fields(cls)]
  problems = [_unknown(where, key, fields) for key in section if key not in fields]
  problems += [f"config {where}: missing key {name!r}." for name in fields if name not in section]
  values = {}
  for name in fields:
    if name in section:
      try:
        values[name] = _convert(hints[name], section[name], f"{path}.{name}" if path else name)
      except UserError as error:
        problems.append(str(error))
  if problems:
    raise UserError("\n".join(problems))
  return cls(**values)


def load(path: str, overrides: dict[str, str] | None = None) -> ml_collections.ConfigDict:
  """The locked config of "configs/village.py" or "configs/hh.py:small", with values replaced.

  Args:
    path: a Python file with `get_config()` or `get_config(arg)`; what follows the colon is `arg`.
    overrides: {"ppo.kl_coef": "0.1"}: the text of a Python literal, or plain text.

  Raises:
    UserError: no such file, no `get_config`, a ValueError of `get_config` itself, or no such key
      (the nearest is named).
  """
  file, _, arg = str(path).partition(":")
  if not pathlib.Path(file).is_file():
    near = sorted(str(p) for p in pathlib.Path(file).parent.glob("*.py"))
    raise UserError(f"config file {file!r} does not exist; there are: {', '.join(near) or 'none'}.")
  spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise UserError(f"config file {file}, line {error.lineno}: {error.msg}.") from error
  if not hasattr(module, "get_config"):
    raise UserError(f"config file {file} defines no get_config().")
  if arg and not inspect.signature(module.get_config).parameters:
    raise UserError(f"config file {file} takes no argument, got {arg!r}.")
  try:
    config = module.get_config(arg) if arg else module.get_config()
  except ValueError as error:
    raise UserError(f"config {path}: {error}") from error
  for key, text in (overrides or {}).items():
    override(config, key, text)
  config.lock()
  return config


def override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
  """Sets config.a.b, for the key "a.b", to the value that `text` writes.

  The type is not held to the old value's (a `None` may become a number); `build` checks it.

  Raises:
    UserError: there is no such key, or it is a whole section.
  """
  *sections, name = key.split(".")
  for depth, part in enumerate([*sections, name]):
    inside = isinstance(config, ml_collections.ConfigDict)
    if config is None:
      section = ".".join(key.split(".")[:depth])
      raise UserError(
        f"config {section} is None, so it has no key {part!r}; take a config in which it is a "
        f'section, or give all of it: {section}="{{{part!r}: ...}}".'
      )
    if not inside or part not in config:
      known = sorted(config) if inside else []
      where = ".".join(key.split(".")[:depth]) or "(top level)"
      raise UserError(_unknown(where, part, known))
    if depth < len(sections):
      config = config[part]
  if isinstance(config[name], ml_collections.ConfigDict):
    inner = f"{key}.{next(iter(config[name]), 'KEY')}"
    raise UserError(f"config {key} is a section; override its keys one by one, as {inner}=...")
  with config.unlocked(), config.ignore_type():
    config[name] = _literal(text, config[name])


def _literal(text: str, old: Any) -> Any:
  """`text` as a Python literal; as it stands where it is none or the old value is text."""
  if isinstance(old, str) and text != "None":
    return text
  if isinstance(old, bool) and text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def to_dict(config: Any) -> Any:
  """The inverse of `build`: plain dicts, lists and numbers, ready for JSON."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, (tuple, list)):
    return [to_dict(value) for value in config]
  if isinstance(config, dict):
    return {key: to_dict(value) for key, value in config.items()}
  return config


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """The keys at which two plain-dict configs differ, as "ppo.kl_coef: 0.05 -> 0.1" lines."""
  if isinstance(old, dict) and isinstance(new, dict):
    lines = []
    for key in sorted(set(old) | set(new)):
      inner = f"{path}.{key}" if path else str(key)
      lines += differences(old.get(key, "absent"), new.get(key, "absent"), inner)
    return lines
  return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _unknown(where: str, key: str, fields: list[str]) -> str:
  near = difflib.get_close_matches(key, fields, 1)
  hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}."
  return f"config {where}: unknown key {key!r}; {hint}"


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks `value` against a type annotation; returns it in the annotated type."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    converted = _convert(args[0], value, path)
    for allowed in args[1:]:
      if isinstance(allowed, Range) and converted not in allowed:
        raise UserError(f"config {path}: {value!r} is outside {allowed}.")
    return converted
  if origin is Literal:
    if value not in args:
      raise UserError(f"config {path}: {value!r} is not one of {', '.join(map(repr, args))}.")
    return value
  if origin in (typing.Union, types.UnionType):
    return _convert_union(args, value, path)
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, collections.abc.Sequence):
      raise UserError(f"config {path}: expected a list, got {value!r}.")
    inner = args[:1] * len(value) if args[1:] == (...,) else args
    if len(inner) != len(value):
      raise UserError(f"config {path}: expected {len(inner)} values, got {len(value)}.")
    return tuple(_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
  if origin is dict:
    if not hasattr(value, "keys"):
      raise UserError(f"config {path}: expected a section with keys, got {value!r}.")
    return {key: _convert(args[1], value[key], f"{path}.{key}") for key in value}
  if dataclasses.is_dataclass(hint):
    return build(hint, value, path)
  return _convert_scalar(hint, value, path)


def _convert_union(args: tuple, value: Any, path: str) -> Any:
  if value is None and type(None) in args:
    return None
  problems = []
  for hint in args:
    if hint is not type(None):
      try:
        return _convert(hint, value, path)
      except UserError as error:
        problems.append(str(error))
  raise UserError(" or ".join(problems))


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
  """A bool is no int, an int passes for a float, and every number is finite."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is float and is_number:
    if not math.isfinite(value):
      raise UserError(f"config {path}: expected a finite number, got {value!r}.")
    return float(value)
  if hint is int and isinstance(value, bool) or not isinstance(value, hint):
    raise UserError(f"config {path}: expected {hint.__name__}, got {value!r}.")
  return value
