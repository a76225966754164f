"""What the chat page sends: the bodies of its requests, every field bounded."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Id = Annotated[str, Field(pattern=r"^[0-9A-Za-z._:@-]{1,64}$", description="id of a record")]
NewId = Annotated[
  str,
  Field(
    pattern=r"^[0-9A-Za-z-]{16,48}$",
    description="made by the page, so that a request sent twice is one record",
  ),
]
MOST = 20_000  # characters of a message, or of what is said about one
Said = Annotated[str, Field(max_length=MOST)]
Tag = Literal["harmful", "untrue", "not_helpful"]


class Body(BaseModel):
  """A body with no other fields than its own."""

  model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Sampling(Body):
  """How answers are drawn."""

  temperature: float = Field(1.0, ge=0, le=2)  # 0 is greedy
  top_p: float = Field(1.0, gt=0, le=1)
  max_tokens: int | None = Field(None, ge=1, le=100_000)  # None: as many as the engine allows
  seed: int | None = Field(None, ge=0, lt=2**63)  # None: drawn


class Send(Body):
  """A new message: the first of a conversation, the next one, or an edit beside an old one."""

  id: NewId
  conversation: NewId
  parent: Id | None = None  # the message it comes after; None: it begins the conversation
  text: Said
  system: Said | None = None  # of a new conversation
  sampling: Sampling = Sampling()


class Draw(Body):
  """One more answer to a message, or two to choose from."""

  count: Literal[1, 2] = 1
  sampling: Sampling = Sampling()


class Stop(Body):
  """No more of this answer; an empty object."""


class Thumb(Body):
  """What a person thinks of an answer."""

  thumb: Literal["up", "down"]
  tags: list[Tag] = Field([], max_length=3)
  text: Said = ""
  ideal: Said | None = None  # what the answer should have been


class Harm(Body):
  """A harmful answer is reported."""

  category: Annotated[str, Field(min_length=1, max_length=400)] | None = None
  text: Said = ""


class Preference(Body):
  """Which of two answers is better."""

  id: NewId
  first: Id
  second: Id
  choice: Literal["first", "second", "tie"]
  seconds: float | None = Field(None, ge=0, le=1e7)  # from both being there to the choice


class Mistake(Body):
  """The filter was wrong about a category."""

  mistake: Literal["false_positive", "false_negative"]
  category: Annotated[str, Field(min_length=1, max_length=400)]
  text: Said = ""


class Withdraw(Body):
  """A person takes back everything; said twice, as it is for good."""

  confirm: Literal[True]
