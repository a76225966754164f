"""Bodies of requests as OpenAI's API has them, and which of its fields are not answered here.

A field that nobody knows is passed over, as OpenAI's clients send new ones all the time. One that
is known to change the answer, and cannot be obeyed, is refused by its name.
"""

from typing import Annotated, Any, Literal

import pydantic

from rlhf_jax.serving.errors import BadField
from rlhf_jax.text.messages import Conversation, Message

# Fields that change an answer, with the values that ask for nothing; any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
  "audio": (),
  "best_of": (1,),
  "echo": (False,),
  "frequency_penalty": (0,),
  "function_call": ("none", "auto"),
  "functions": ([],),
  "guided_choice": (),
  "guided_json": (),
  "guided_regex": (),
  "logit_bias": ({},),
  "min_p": (0,),
  "min_tokens": (0,),
  "modalities": (["text"],),
  "prediction": (),
  "presence_penalty": (0,),
  "reasoning_effort": ("none",),
  "repetition_penalty": (1,),
  "response_format": ({"type": "text"},),
  "stop_token_ids": ([],),
  "suffix": ("",),
  "tool_choice": ("none", "auto"),
  "tools": ([],),
  "top_k": (0, -1),
  "top_logprobs": (0,),
  "verbosity": ("medium",),
  "web_search_options": (),
}
MOST_CHOICES = 16
MOST_PROMPTS = 64  # of one request for completions
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Choices = Annotated[int, pydantic.Field(ge=1, le=MOST_CHOICES)]
Tokens = Annotated[int, pydantic.Field(ge=1)]
Seed = Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, pydantic.Field(min_length=1, max_length=1_000)]
Stops = Annotated[list[Stop], pydantic.Field(max_length=4)]


class Body(pydantic.BaseModel):
  """Strict about the fields that are known: the text "5" is no number."""

  model_config = pydantic.ConfigDict(extra="allow", strict=True)


class StreamOptions(Body):
  """What a stream ends with."""

  include_usage: bool | None = None


class Sampling(Body):
  """What both kinds of requests have in common."""

  model: str
  max_tokens: Tokens | None = None
  n: Choices | None = None
  seed: Seed | None = None
  stop: Stop | Stops | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  temperature: Annotated[Finite, pydantic.Field(ge=0, le=2)] | None = None
  top_p: Annotated[Finite, pydantic.Field(gt=0, le=1)] | None = None
  user: str | None = None

  def check(self) -> None:
    """Raises BadField for a field that would change the answer and cannot be obeyed."""
    for name, value in (self.model_extra or {}).items():
      if name in NEUTRAL and value is not None and not any(map(_same(value), NEUTRAL[name])):
        allowed = "; leave it out" if not NEUTRAL[name] else f" other than {NEUTRAL[name][0]!r}"
        raise BadField(name, f"{name} is not supported{allowed}.", code="unsupported_parameter")
    if self.stream_options is not None and not self.stream:
      raise BadField("stream_options", "stream_options is allowed only where stream is true.")

  @property
  def stops(self) -> tuple[str, ...]:
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

  @property
  def wants_usage(self) -> bool:
    """Whether a stream ends with what it cost."""
    return bool(self.stream_options and self.stream_options.include_usage)


def _same(value: Any):
  """Equal and no bool for a number, as 1 == True."""
  return lambda other: value == other and isinstance(value, bool) == isinstance(other, bool)


class TextPart(Body):
  """A part of a message; only text is understood."""

  type: Literal["text"]
  text: str


class ChatTurn(Body):
  """One message of a dialogue; `developer` is OpenAI's newer name of `system`."""

  role: Literal["system", "developer", "user", "assistant"]
  content: str | list[TextPart]


class ChatBody(Sampling):
  """`POST /v1/chat/completions`."""

  messages: Annotated[list[ChatTurn], pydantic.Field(min_length=1, max_length=10_000)]
  max_completion_tokens: Tokens | None = None
  logprobs: bool | None = None

  def conversation(self) -> Conversation:
    """What was said.

    Raises:
      UserError: a text that is none, or a system message that is not the first.
    """
    for i, turn in enumerate(self.messages):
      if (turn.model_extra or {}).get("tool_calls"):
        raise BadField(f"messages.{i}.tool_calls", "tool_calls is not supported.")
    role = lambda turn: "system" if turn.role == "developer" else turn.role
    return Conversation(tuple(Message(role(turn), _text(turn)) for turn in self.messages))


def _text(turn: ChatTurn) -> str:
  if isinstance(turn.content, str):
    return turn.content
  return "".join(part.text for part in turn.content)


Ids = Annotated[list[int], pydantic.Field(min_length=1)]
Texts = Annotated[list[str], pydantic.Field(min_length=1, max_length=MOST_PROMPTS)]


class CompletionBody(Sampling):
  """`POST /v1/completions`."""

  prompt: str | Texts | Ids | Annotated[list[Ids], pydantic.Field(min_length=1, max_length=64)]
  logprobs: int | None = None

  def prompts(self) -> list[str | tuple[int, ...]]:
    """One or more texts or ids to go on from."""
    asked = self.prompt
    if isinstance(asked, str):
      return [asked]
    if isinstance(asked[0], int):
      return [tuple(asked)]
    return [one if isinstance(one, str) else tuple(one) for one in asked]

  def check(self) -> None:
    super().check()
    if self.logprobs not in (None, 0):
      raise BadField(
        "logprobs", "logprobs is 0, for those of the tokens drawn, or left out; others of the most "
        "likely tokens are not kept.", code="unsupported_parameter"
      )  # fmt: skip


class ModerationBody(Body):
  """`POST /v1/moderations`."""

  input: str | Annotated[list[str | TextPart], pydantic.Field(min_length=1, max_length=256)]
  model: str | None = None

  def texts(self) -> list[str]:
    asked = [self.input] if isinstance(self.input, str) else self.input
    return [one if isinstance(one, str) else one.text for one in asked]
