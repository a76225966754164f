"""What the labeling page sends. The records that are made of it hold it to their own rules."""

from typing import Annotated, Literal

import pydantic

from rlhf_jax.feedback.labels import MAX_ANSWERS, TaskKind

Text = Annotated[str, pydantic.Field(max_length=100_000)]
Name = Annotated[str, pydantic.Field(pattern=r"^[0-9A-Za-z._:@-]{1,64}$")]
Seconds = Annotated[float, pydantic.Field(ge=0, le=1e7, allow_inf_nan=False)] | None
MOST_TURNS = 200


class Body(pydantic.BaseModel):
  """Unknown keys are mistakes, and a text is no number."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class SignIn(Body):
  """A labeler's token."""

  token: Annotated[str, pydantic.Field(min_length=1, max_length=200)]


class Next(Body):
  """Which kind of task is wanted."""

  work: TaskKind


class Draft(Body):
  """What there is so far, as the page keeps it."""

  content: dict


class OneJudgment(Body):
  """Of one answer, by its place in the task."""

  rank: int
  quality: int | None = None
  flags: Annotated[list[str], pydantic.Field(max_length=32)] = []


class Ranking(Body):
  """A finished comparison; judgments stand in the task's order."""

  submission: Name
  judgments: Annotated[list[OneJudgment], pydantic.Field(max_length=MAX_ANSWERS)]
  note: Text = ""
  seconds: Seconds = None


class OneTurn(Body):
  """What was written for one side, and the suggestion it began as."""

  role: Literal["user", "assistant"]
  content: Text
  suggestion: Text | None = None
  suggested_by: Name | None = None


class Dialogue(Body):
  """A finished demonstration, without the turns that the task came with."""

  submission: Name
  turns: Annotated[list[OneTurn], pydantic.Field(max_length=MOST_TURNS)]
  seconds: Seconds = None


class Refusal(Body):
  """A task that somebody does not want to do."""

  submission: Name
  reason: Annotated[str, pydantic.Field(min_length=1, max_length=400)]
  seconds: Seconds = None


class Wanted(Body):
  """A suggestion for one side, after the turns written so far."""

  role: Literal["user", "assistant"]
  turns: Annotated[list[OneTurn], pydantic.Field(max_length=MOST_TURNS)]


class Import(Body):
  """A file of tasks, one JSON object a line."""

  lines: Annotated[str, pydantic.Field(max_length=10_000_000)]
