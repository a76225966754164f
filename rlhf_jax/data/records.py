"""What a data source yields: demonstrations, comparisons, prompts and plain text.

Records are immutable and know their own `identity`, a hash of their content, so that lineage can
say which of them trained which model. Their `prompt_key` decides between training and held-out.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Literal, TypeVar

from rlhf_jax.text.messages import Conversation, check_text
from rlhf_jax.types import UserError

Split = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A dialogue whose assistant turns show what to do."""

  conversation: Conversation
  source: str  # which data set it comes from

  def __post_init__(self):
    if not self.conversation.assistant_turns:
      raise UserError("a demonstration needs an assistant message; this dialogue has none.")

  @functools.cached_property
  def identity(self) -> str:
    return _hash(self.conversation.to_json())

  @functools.cached_property
  def prompt_key(self) -> str:
    return opening_key(self.conversation)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """K >= 2 answers to one prompt, ranked by one labeler."""

  conversation: Conversation  # ends with the user's message
  responses: tuple[str, ...]  # [K]
  ranks: tuple[int, ...]  # [K], 0 is best; equal ranks are ties
  authors: tuple[str, ...]  # [K], the model or person that wrote each answer
  labeler: str  # who ranked
  source: str

  def __post_init__(self):
    count = len(self.responses)
    if self.conversation.last.role != "user":
      raise UserError("the conversation of a comparison must end with the user's message.")
    if count < 2:
      raise UserError(f"a comparison needs at least 2 responses to rank, got {count}.")
    if len(self.ranks) != count or len(self.authors) != count:
      raise UserError(
        f"a comparison of {count} responses needs as many ranks and authors, got "
        f"{len(self.ranks)} ranks and {len(self.authors)} authors."
      )
    if any(type(rank) is not int or rank < 0 for rank in self.ranks) or min(self.ranks) != 0:
      raise UserError(f"ranks must be whole numbers with 0 for the best, got {list(self.ranks)}.")
    for text in self.responses + self.authors:
      check_text(text, "a response or author of a comparison")

  @functools.cached_property
  def identity(self) -> str:
    content = [self.responses, self.ranks, self.authors, self.labeler]
    return _hash([self.conversation.to_json(), *content])

  @functools.cached_property
  def prompt_key(self) -> str:
    return opening_key(self.conversation)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A conversation that waits for the assistant's reply."""

  conversation: Conversation
  source: str

  def __post_init__(self):
    if self.conversation.last.role != "user":
      raise UserError("a prompt must end with the user's message.")

  @functools.cached_property
  def identity(self) -> str:
    return _hash(self.conversation.to_json())

  @functools.cached_property
  def prompt_key(self) -> str:
    return opening_key(self.conversation)


@dataclasses.dataclass(frozen=True)
class Text:
  """A document for the language-model loss (PPO-ptx)."""

  text: str
  source: str

  def __post_init__(self):
    check_text(self.text, "a document")
    if not self.text.strip():
      raise UserError("a document must hold text, this one is empty.")

  @functools.cached_property
  def identity(self) -> str:
    return _hash(self.text)

  @property
  def prompt_key(self) -> str:
    return self.identity


Record = Demonstration | Comparison | Prompt | Text
RecordType = TypeVar("RecordType", Demonstration, Comparison, Prompt, Text)


def opening_key(conversation: Conversation) -> str:
  """Hash of the first user message, letter case and spacing aside.

  Every later turn of a dialogue grows out of its opening. Splitting by the opening, rather than by
  the whole prompt, keeps a dialogue, its prefixes and all comparisons made from it on one side.
  """
  texts = [m.content for m in conversation.messages if m.role == "user"]
  opening = texts[0] if texts else conversation.messages[0].content
  return _hash(" ".join(opening.casefold().split()))


def split_of(prompt_key: str, heldout_fraction: float, seed: int) -> Split:
  """On which side of the split a prompt lies; the same for ever for the same seed.

  Each prompt is held out with probability `heldout_fraction`, independently of all others, so
  adding data never moves a prompt from one side to the other.
  """
  if not 0.0 <= heldout_fraction < 1.0:
    raise UserError(f"heldout_fraction {heldout_fraction} is outside [0, 1).")
  draw = int(_hash([seed, prompt_key]), 16) / 16.0**_HASH_LETTERS
  return "heldout" if draw < heldout_fraction else "train"


def to_prompt(record: Demonstration | Comparison | Prompt) -> Prompt | None:
  """What a record's answers answer; of a demonstration, all before its last answer to a user.

  None for a demonstration in which the assistant never answers a user.
  """
  if isinstance(record, Prompt):
    return record
  if isinstance(record, Comparison):
    return Prompt(record.conversation, record.source)
  messages = record.conversation.messages
  for i in reversed(range(1, len(messages))):
    if (messages[i - 1].role, messages[i].role) == ("user", "assistant"):
      return Prompt(record.conversation.prompt_before(i), record.source)
  return None


def to_json(record: Record) -> dict:
  """The record as a dict for one line of JSON; `from_json` is the inverse."""
  fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
  if "conversation" in fields:
    fields = {"messages": fields.pop("conversation").to_json(), **fields}
  return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def from_json(cls: type[RecordType], item: object) -> RecordType:
  """A record of type `cls` from a dict with exactly its keys.

  Raises:
    UserError: the item is no dict, a key is missing or unknown, or a value has the wrong shape.
  """
  names = [f.name if f.name != "conversation" else "messages" for f in dataclasses.fields(cls)]
  kind = cls.__name__.lower()
  if not isinstance(item, dict):
    raise UserError(f"a {kind} must be a JSON object, got {type(item).__name__}.")
  missing, unknown = [n for n in names if n not in item], sorted(set(item) - set(names))
  if missing or unknown:
    raise UserError(f"a {kind} has the keys {names}; missing {missing}, unknown {unknown}.")
  values = {}
  for field in dataclasses.fields(cls):
    if field.name == "conversation":
      values["conversation"] = Conversation.from_json(item["messages"])
    elif field.name in ("responses", "ranks", "authors"):
      values[field.name] = _tuple(item[field.name], field.name)
    elif not isinstance(item[field.name], str):
      raise UserError(f"{field.name} of a {kind} must be text, got {item[field.name]!r:.80}.")
    else:
      values[field.name] = item[field.name]
  return cls(**values)


_HASH_LETTERS = 16


def _hash(content: object) -> str:
  """64 bits of SHA-256 over canonical JSON, in hexadecimal."""
  canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
  return hashlib.sha256(canonical.encode()).hexdigest()[:_HASH_LETTERS]


def _tuple(value: object, name: str) -> tuple:
  if not isinstance(value, list):
    raise UserError(f"{name} must be a list, got {value!r:.80}.")
  return tuple(value)
