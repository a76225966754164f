"""Messages and conversations, and how to read them out of HH-RLHF's plain text."""

import dataclasses
import re
from typing import Literal, get_args

from rlhf_jax.types import UserError

Role = Literal["system", "user", "assistant"]

_PLAIN_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_PLAIN_HEADER = re.compile(r"\n\n(Human|Assistant):")


def check_text(value: object, name: str) -> None:
  """Raises UserError unless `value` is text that UTF-8 can write (JSON can hold half an emoji)."""
  if not isinstance(value, str):
    raise UserError(f"{name} must be text, got {value!r:.80}.")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError(f"{name} holds a lone surrogate at character {error.start}.") from error


@dataclasses.dataclass(frozen=True)
class Message:
  """What one side said in one turn."""

  role: Role
  content: str

  def __post_init__(self):
    if self.role not in get_args(Role):
      raise UserError(f"message role {self.role!r} is not one of {', '.join(get_args(Role))}.")
    check_text(self.content, "message content")


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Any number of turns; a system message comes first or not at all.

  People send two messages in a row, so the roles need not alternate.
  """

  messages: tuple[Message, ...]

  def __post_init__(self):
    if not self.messages:
      raise UserError("a conversation needs at least one message, got none.")
    for i, message in enumerate(self.messages):
      if not isinstance(message, Message):
        raise UserError(f"message {i} must be a Message, got {message!r}.")
      if message.role == "system" and i > 0:
        raise UserError(f"message {i} is a system message; only the first message may be one.")

  @classmethod
  def of(cls, *turns: tuple[Role, str]) -> "Conversation":
    """`Conversation.of(("user", "Hi!"), ("assistant", "Hello."))`."""
    return cls(tuple(Message(role, content) for role, content in turns))

  @classmethod
  def from_json(cls, messages: object) -> "Conversation":
    """From `[{"role": ..., "content": ...}, ...]`; raises UserError on any other shape."""
    if not isinstance(messages, list):
      raise UserError(f"messages must be a list, got {type(messages).__name__}.")
    for i, message in enumerate(messages):
      if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise UserError(f"message {i} must have exactly 'role' and 'content', got {message!r:.200}")
    return cls(tuple(Message(m["role"], m["content"]) for m in messages))

  def to_json(self) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in self.messages]

  @property
  def last(self) -> Message:
    return self.messages[-1]

  @property
  def assistant_turns(self) -> tuple[int, ...]:
    """The indices of the assistant's messages."""
    return tuple(i for i, m in enumerate(self.messages) if m.role == "assistant")

  def prompt_before(self, i: int) -> "Conversation":
    """The true prefix of message `i`: all that was said before it."""
    return Conversation(self.messages[:i])

  def with_message(self, role: Role, content: str) -> "Conversation":
    return Conversation((*self.messages, Message(role, content)))

  def with_reply(self, content: str) -> "Conversation":
    return self.with_message("assistant", content)


def parse_plain(text: str) -> Conversation:
  """Reads `"\\n\\nHuman: ...\\n\\nAssistant: ..."`, the form of HH-RLHF.

  White space at both ends of a turn is dropped: rendering with the plain template gives the text
  back but for that. Two turns of one side in a row stay two messages, and empty turns stay empty;
  both occur in HH-RLHF, where a model wrote the other side's header or said nothing.

  Raises:
    UserError: the text does not begin with a header.
  """
  before, *parts = _PLAIN_HEADER.split(text)
  if before.strip() or not parts:
    raise UserError(
      f"a dialogue must begin with '\\n\\nHuman:' or '\\n\\nAssistant:', got {text[:60]!r}."
    )
  turns = zip(parts[::2], parts[1::2])
  return Conversation.of(*((_PLAIN_ROLES[name], content.strip()) for name, content in turns))
