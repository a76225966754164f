"""What a value of a record may be: bounded texts, identifiers, moments, ranges.

Everything here comes from a browser, a file or a model. `conform` holds a value to its annotation
and says what is wrong with it, before anything is stored.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
import time
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from rlhf_jax.config import Range
from rlhf_jax.text.messages import Conversation, check_text
from rlhf_jax.types import UserError

MAX_JSON = 65_536  # characters of sampling parameters, a lineage or a draft
MAX_ITEMS = 100_000  # of one list, as the records that trained a policy


@dataclasses.dataclass(frozen=True)
class Length:
  """How many characters a text may have."""

  low: int
  high: int


@dataclasses.dataclass(frozen=True)
class Pattern:
  """What a short text must look like as a whole."""

  regex: str
  says: str  # in words, for the message


Text = Annotated[str, Length(0, 100_000)]
Line = Annotated[str, Length(1, 400)]  # a name, a path, a reason
Identifier = Annotated[str, Pattern(r"[0-9A-Za-z._:@-]{1,64}", "1 to 64 letters, digits or ._:@-")]
Moment = Annotated[
  str, Pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", "UTC as 2022-11-30T18:00:00.000000Z")
]
Json = dict[str, Any]  # an object of JSON, up to MAX_JSON characters

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32


def new_id() -> str:
  """A ULID: 48 bits of milliseconds and 80 random ones in 26 letters, which sort by time."""
  number = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
  return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def now(ahead: float = 0.0) -> str:
  """The time, `ahead` seconds from now; as text, moments sort by time."""
  moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
  return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
  """The annotations of a dataclass' fields."""
  found = typing.get_type_hints(cls, include_extras=True)
  return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def conform(hint: Any, value: Any, where: str) -> Any:
  """`value` in the annotated type; lists become tuples, and dicts the dataclass they describe.

  Raises:
    UserError: it is of another type, too long, out of its range, or cannot be stored everywhere.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    return _bounded(conform(args[0], value, where), args[1:], where)
  if origin is Literal:
    if value not in args:
      raise UserError(f"{where} is {value!r:.80}, which is not one of {', '.join(map(str, args))}.")
    return value
  if origin in (types.UnionType, typing.Union):
    kind = next(arg for arg in args if arg is not type(None))
    return None if value is None else conform(kind, value, where)
  if origin is tuple:
    return _items(args[0], value, where)
  if origin is dict:
    return _json(value, where)
  if hint is Conversation:
    return _conversation(value, where)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else build(hint, value, where)
  return _scalar(hint, value, where)


def build(cls: type, item: Any, where: str) -> Any:
  """A dataclass from a mapping of its fields; those with a default may be absent."""
  if not isinstance(item, Mapping):
    raise UserError(f"{where} must be an object with keys, got {item!r:.80}.")
  fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
  nothing = dataclasses.MISSING
  needed = [
    name
    for name, field in fields.items()
    if field.default is nothing and field.default_factory is nothing
  ]
  missing, unknown = [n for n in needed if n not in item], sorted(set(item) - set(fields), key=str)
  if missing or unknown:
    raise UserError(f"{where} has the keys {list(fields)}; missing {missing}, unknown {unknown}.")
  return cls(**item)


def conform_fields(record: Any, where: str) -> None:
  """Holds every field of a frozen dataclass to its annotation; for its `__post_init__`."""
  for name, hint in hints(type(record)).items():
    value = conform(hint, getattr(record, name), f"{name} of {where}")
    object.__setattr__(record, name, value)


def plain(value: Any) -> Any:
  """A record or a value in it as JSON has it; `conform` is the inverse."""
  if isinstance(value, Conversation):
    return value.to_json()
  if dataclasses.is_dataclass(value):
    return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
  if isinstance(value, tuple):
    return [plain(item) for item in value]
  return value


def _bounded(value: Any, limits: tuple, where: str) -> Any:
  for limit in limits:
    if isinstance(limit, Length) and not limit.low <= len(value) <= limit.high:
      raise UserError(
        f"{where} has {len(value)} characters; it may have {limit.low} to {limit.high}."
      )
    if isinstance(limit, Pattern) and not re.fullmatch(limit.regex, value, re.ASCII):
      raise UserError(f"{where} is {value!r:.80}; it must be {limit.says}.")
    if isinstance(limit, Range) and value not in limit:
      raise UserError(f"{where} is {value!r}, which is outside {limit}.")
  return value


def _scalar(hint: type, value: Any, where: str) -> Any:
  """A bool is no int, and an int passes for a float."""
  if hint is str:
    check_text(value, where)
    if "\0" in value:
      raise UserError(f"{where} holds a NUL character, which not every database keeps; remove it.")
    return value
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint or value != value or value in (float("inf"), float("-inf")):
    raise UserError(f"{where} must be a finite {hint.__name__}, got {value!r:.80}.")
  return value


def _items(hint: Any, value: Any, where: str) -> tuple:
  if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > MAX_ITEMS:
    raise UserError(f"{where} must be a list of at most {MAX_ITEMS} values, got {value!r:.80}.")
  return tuple(conform(hint, item, f"{where}, item {i},") for i, item in enumerate(value))


def _json(value: Any, where: str) -> Json:
  if not isinstance(value, dict) or any(not isinstance(key, str) for key in value):
    raise UserError(f"{where} must be an object of JSON, got {value!r:.80}.")
  try:
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")
  except (TypeError, ValueError, RecursionError) as error:
    raise UserError(f"{where} cannot be written as JSON: {error}.") from error
  if len(text) > MAX_JSON or "\\u0000" in text:
    raise UserError(
      f"{where} has {len(text)} characters as JSON; it may have {MAX_JSON}, and no NUL."
    )
  return json.loads(text)


def _conversation(value: Any, where: str) -> Conversation:
  if not isinstance(value, Conversation):
    value = Conversation.from_json(list(value) if isinstance(value, tuple) else value)
  for i, message in enumerate(value.messages):
    conform(Text, message.content, f"{where}, message {i},")
  return value
