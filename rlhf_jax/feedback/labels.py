"""What labelers are asked and what they say: tasks, demonstrations, rankings, skips."""

import dataclasses
from typing import Annotated, Literal, Self

from rlhf_jax.config import Count, Fraction, NonNegative, Range
from rlhf_jax.feedback import edits
from rlhf_jax.feedback.base import Part, Record, Seed, refers_to
from rlhf_jax.feedback.shapes import Identifier, Json, Line, Text
from rlhf_jax.text.messages import Conversation, Role
from rlhf_jax.types import UserError

# The yes-or-no questions of Ouyang et al. 2022, table 3, in its order.
FLAGS = {
  "fails_task": "Fails to follow the correct instruction / task",
  "inappropriate": "Inappropriate for customer assistant",
  "hallucination": "Hallucination",
  "satisfies_constraint": "Satisfies constraint provided in the instruction",
  "sexual": "Contains sexual content",
  "violent": "Contains violent content",
  "encourages_harm": "Encourages or fails to discourage violence/abuse/terrorism/self-harm",
  "denigrates": "Denigrates a protected class",
  "harmful_advice": "Gives harmful advice",
  "opinion": "Expresses opinion",
  "moral_judgment": "Expresses moral judgment",
}
Flag = Literal[tuple(FLAGS)]
Quality = Annotated[int, Range(1, 7)]  # Likert, 7 is best
TaskKind = Literal["demonstrate", "compare"]
Overlap = Annotated[int, Range(1, 1000)]
MAX_ANSWERS = 32


@dataclasses.dataclass(frozen=True)
class Turn(Part):
  """What a labeler wrote for one side, and the suggestion they had asked for, if any."""

  where = "a turn"

  role: Role
  content: Text
  suggestion: Text | None = None
  suggested_by: Identifier | None = dataclasses.field(
    default=None, metadata={"refers_to": "policy"}
  )
  edit_distance: Count | None = None  # characters between suggestion and content; computed
  edit_fraction: Fraction | None = None  # of the longer of both; computed

  def __post_init__(self):
    super().__post_init__()
    if self.suggestion is None:
      if (self.suggested_by, self.edit_distance, self.edit_fraction) != (None, None, None):
        raise UserError("a turn without a suggestion has no policy of one and no edit distance.")
    elif self.edit_distance is None or self.edit_fraction is None:
      distance = edits.levenshtein(self.suggestion, self.content)
      longer = max(len(self.suggestion), len(self.content), 1)
      object.__setattr__(self, "edit_distance", distance)
      object.__setattr__(self, "edit_fraction", distance / longer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration(Record):
  """A dialogue of which a labeler wrote both sides."""

  kind = "demonstration"

  turns: tuple[Turn, ...]
  task: Identifier | None = refers_to("task", default=None)
  seconds: NonNegative | None = None
  source: Line = "labeling"

  @property
  def conversation(self) -> Conversation:
    return Conversation.of(*((turn.role, turn.content) for turn in self.turns))

  @property
  def references(self) -> dict[str, str]:
    suggested = {turn.suggested_by: "policy" for turn in self.turns if turn.suggested_by}
    return super().references | suggested

  def check(self):
    if not any(turn.role == "assistant" and turn.content.strip() for turn in self.turns):
      raise UserError("a demonstration needs an assistant's turn that says something.")
    self.conversation  # a system message comes first  # noqa: B018


@dataclasses.dataclass(frozen=True)
class Candidate(Part):
  """An answer that may be ranked."""

  where = "an answer"

  text: Text
  writer: Line  # the policy's name, or the person
  policy: Identifier | None = dataclasses.field(default=None, metadata={"refers_to": "policy"})
  sampling: Json = dataclasses.field(default_factory=dict)
  seed: Seed | None = None


@dataclasses.dataclass(frozen=True)
class Judgment(Part):
  """What a labeler says of one answer."""

  where = "a judgment"

  rank: Count  # 0 is best; equal is a tie
  quality: Quality | None = None
  flags: tuple[Flag, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if len(set(self.flags)) != len(self.flags):
      raise UserError(f"a flag is raised once or not at all, got {list(self.flags)}.")


@dataclasses.dataclass(frozen=True)
class Answer(Part):
  """An answer with its rank and what else was said of it."""

  where = "an answer"

  text: Text
  writer: Line
  rank: Count
  quality: Quality | None = None
  flags: tuple[Flag, ...] = ()
  policy: Identifier | None = dataclasses.field(default=None, metadata={"refers_to": "policy"})
  sampling: Json = dataclasses.field(default_factory=dict)
  seed: Seed | None = None

  @classmethod
  def of(cls, candidate: Candidate, judgment: Judgment) -> Self:
    """The two together."""
    return cls(**{**vars(candidate), **vars(judgment)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Record):
  """K answers to one conversation, ranked by one person."""

  kind = "comparison"

  conversation: Conversation
  answers: tuple[Answer, ...]
  presented: tuple[Count, ...] | None = None  # presented[i]: the answer that was shown i-th
  seconds: NonNegative | None = None
  source: Line = "labeling"  # "chat" for a preference between two regenerations
  note: Text = ""
  task: Identifier | None = refers_to("task", default=None)
  message: Identifier | None = refers_to("message", default=None)  # that the answers answer

  @property
  def references(self) -> dict[str, str]:
    return super().references | _policies(self.answers)

  @property
  def writers(self) -> set[str]:
    return _people(self.answers)

  def check(self):
    check_candidates(self.conversation, self.answers, "a comparison")
    check_dense([answer.rank for answer in self.answers])
    order = self.presented
    if order is not None and sorted(order) != list(range(len(self.answers))):
      raise UserError(
        f"presented must name each of the {len(self.answers)} answers once, got {list(order)}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip(Record):
  """A task that a labeler would not do, and why."""

  kind = "skip"

  task: Identifier = refers_to("task")
  reason: Line
  seconds: NonNegative | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Record):
  """Work for labelers: a dialogue to write, or answers to rank."""

  kind = "task"
  is_personal = False  # who queues work is not who wrote its texts

  work: TaskKind
  conversation: Conversation | None = None  # a dialogue to go on with; None: begin one
  answers: tuple[Candidate, ...] = ()
  instructions: Text = ""
  overlap: Overlap = 1  # how many different labelers do it
  gold: tuple[Count, ...] | None = None  # a researcher's ranks of the answers
  priority: int = 0  # higher goes first
  message: Identifier | None = refers_to("message", default=None)  # where its texts come from

  @property
  def references(self) -> dict[str, str]:
    return super().references | _policies(self.answers)

  @property
  def writers(self) -> set[str]:
    return _people(self.answers)

  def check(self):
    if not -1000 <= self.priority <= 1000:
      raise UserError(f"priority {self.priority} is outside [-1000, 1000].")
    if self.work == "demonstrate":
      if self.answers or self.gold is not None:
        raise UserError("a task to demonstrate has no answers to rank and no gold ranks.")
      return
    if self.conversation is None:
      raise UserError("a task to compare needs the conversation that its answers answer.")
    check_candidates(self.conversation, self.answers, "a task to compare")
    if self.gold is not None:
      if len(self.gold) != len(self.answers):
        raise UserError(f"{len(self.answers)} answers need as many gold ranks, got {self.gold}.")
      check_dense(self.gold)


def check_candidates(conversation: Conversation, answers: tuple, what: str) -> None:
  """Raises UserError unless there are answers to rank, to a user's message."""
  if conversation.last.role != "user":
    raise UserError(f"the conversation of {what} must end with the user's message.")
  if not 2 <= len(answers) <= MAX_ANSWERS:
    raise UserError(f"{what} needs 2 to {MAX_ANSWERS} answers, got {len(answers)}.")


def check_dense(ranks) -> None:
  """Raises UserError unless ranks are 0 for the best and leave none out; equal is a tie."""
  if set(ranks) != set(range(len(set(ranks)))):
    raise UserError(
      f"ranks begin at 0 for the best and leave none out, as in 0 1 1 2; got {list(ranks)}."
    )


def _policies(answers: tuple) -> dict[str, str]:
  return {answer.policy: "policy" for answer in answers if answer.policy}


def _people(answers: tuple) -> set[str]:
  """Who wrote answers that no policy did; a name that is no person's does no harm here."""
  return {answer.writer for answer in answers if answer.policy is None}
