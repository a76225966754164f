"""How OpenAI's API writes an answer: as the assistant's message, or as a text that goes on."""

import dataclasses
from typing import Protocol


@dataclasses.dataclass
class Choice:
  """An answer, or a part of it."""

  index: int
  seed: int | None = None  # that draws it again
  text: str = ""
  tokens: tuple[str, ...] = ()
  logprobs: tuple[float, ...] = ()
  offset: int = 0  # characters of the answer before this part
  finish: str | None = None

  def write(self, form: dict) -> dict:
    """A choice with what all forms have; `seed` is ours."""
    return {"index": self.index, **form, "finish_reason": self.finish, "seed": self.seed}


class Form(Protocol):
  """How choices are written."""

  prefix: str  # of ids
  whole: str  # what a response is called
  part: str  # what an event is called

  def choice(self, choice: Choice, logprobs: bool) -> dict:
    """All of an answer."""
    ...

  def first(self) -> dict | None:
    """What a stream begins with."""
    ...

  def delta(self, choice: Choice, logprobs: bool) -> dict:
    """What has come since."""
    ...


class ChatForm:
  """How an answer to a dialogue is written."""

  prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

  @staticmethod
  def choice(choice: Choice, logprobs: bool) -> dict:
    """All of an answer."""
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return {"message": message, "logprobs": _chat_logprobs(choice) if logprobs else None}

  @staticmethod
  def first() -> dict | None:
    """What a stream begins with."""
    return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

  @staticmethod
  def delta(choice: Choice, logprobs: bool) -> dict:
    """What has come since."""
    written = {"content": choice.text} if choice.text or choice.tokens else {}
    return {"delta": written, "logprobs": _chat_logprobs(choice) if logprobs else None}


def _chat_logprobs(choice: Choice) -> dict:
  content = [
    {"token": t, "logprob": p, "bytes": list(t.encode()), "top_logprobs": []}
    for t, p in zip(choice.tokens, choice.logprobs)
  ]
  return {"content": content, "refusal": None}


class TextForm:
  """How a text's continuation is written."""

  prefix, whole, part = "cmpl", "text_completion", "text_completion"

  @staticmethod
  def choice(choice: Choice, logprobs: bool) -> dict:
    """All of an answer, or what has come since."""
    return {"text": choice.text, "logprobs": _text_logprobs(choice) if logprobs else None}

  delta = choice

  @staticmethod
  def first() -> dict | None:
    """A stream of text begins with its text."""
    return None


def _text_logprobs(choice: Choice) -> dict:
  offsets, at = [], choice.offset
  for token in choice.tokens:
    offsets.append(at)
    at += len(token)
  return {
    "tokens": choice.tokens,
    "token_logprobs": choice.logprobs,
    "top_logprobs": None,
    "text_offset": offsets,
  }


CHAT, TEXT = ChatForm(), TextForm()
