"""What people (and filters) say, as frozen records.

Every record has an id, a time, and an author: the labeler or the user of the chat whose doing it
is. Nothing is ever changed. Who changes their mind makes a new record that `supersedes` the old.
Fields made by `refers_to` hold the id of another record.
"""

import collections
import dataclasses
from typing import Annotated, Any, ClassVar, Literal, Self

from rlhf_jax.config import Count, Fraction, NonNegative, Range
from rlhf_jax.feedback import edits, shapes
from rlhf_jax.feedback.shapes import Identifier, Json, Line, Moment, Text
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
TaskRole = Literal["labeler", "researcher"]
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
Overlap = Annotated[int, Range(1, 1000)]
MAX_ANSWERS = 32


def refers_to(kind: str, **options) -> Any:
  """A field that holds the id of a record of this kind."""
  return dataclasses.field(metadata={"refers_to": kind}, **options)


@dataclasses.dataclass(frozen=True)
class Part:
  """A list item inside a record; `where` is what messages call it."""

  where: ClassVar[str] = "a part"

  def __post_init__(self):
    shapes.conform_fields(self, self.where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """What all records have in common."""

  kind: ClassVar[str]
  is_personal: ClassVar[bool] = True  # goes when its author withdraws

  author: Identifier
  id: Identifier = dataclasses.field(default_factory=shapes.new_id)
  created_at: Moment = dataclasses.field(default_factory=shapes.now)
  supersedes: Identifier | None = None

  def __post_init__(self):
    shapes.conform_fields(self, f"a {self.kind}")
    self.check()

  def check(self) -> None:
    """Raises UserError where fields do not go together."""

  def says_the_same(self, other: "Record") -> bool:
    """Whether two records differ at most in their times."""
    return self == dataclasses.replace(other, created_at=self.created_at)

  @property
  def references(self) -> dict[str, str]:
    """Ids that this record refers to, each with the kind it must have; supersedes aside."""
    return {
      getattr(self, field.name): field.metadata["refers_to"]
      for field in dataclasses.fields(self)
      if "refers_to" in field.metadata and getattr(self, field.name) is not None
    }

  @property
  def writers(self) -> set[str]:
    """People beside the author whose words are in this record."""
    return set()

  def to_json(self) -> dict:
    """One line of an export; `from_json` is the inverse."""
    return {"kind": self.kind, **shapes.plain(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(Record):
  """A model that answers."""

  kind = "policy"
  is_personal = False

  name: Line
  checkpoint: Text  # its path
  lineage: Json  # run, round, step, parents, hash of the config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labeler(Record):
  """A person who labels; the record's id is their id from then on."""

  kind = "labeler"
  is_personal = False  # of the researcher who wrote it; it is its subject's

  name: Line
  role: TaskRole

  @property
  def writers(self) -> set[str]:
    return {self.id}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation(Record):
  """Whether a labeler works here from now on; the newest counts."""

  kind = "activation"
  is_personal = False

  labeler: Identifier = refers_to("labeler")
  active: bool
  reason: Text = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatMessage(Record):
  """A node in the tree of a conversation; edits and regenerations share a parent.

  The author is whose conversation it is, also of what the assistant says.
  """

  kind = "message"

  conversation: Identifier
  parent: Identifier | None = refers_to("message", default=None)
  role: Role
  content: Text
  policy: Identifier | None = refers_to("policy", default=None)
  sampling: Json = dataclasses.field(default_factory=dict)
  seed: Seed | None = None
  stopped: bool = False  # by the person, before it was whole

  def check(self):
    if self.role == "system" and self.parent is not None:
      raise UserError("a system message can only be the first of a conversation; it has a parent.")
    if self.policy is not None and self.role != "assistant":
      raise UserError(f"a policy writes as the assistant, this message is by the {self.role}.")


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
class Feedback(Record):
  """A thumb on one message of the chat, with what else the person had to say."""

  kind = "feedback"

  message: Identifier = refers_to("message")
  thumb: Literal["up", "down"]
  tags: tuple[Literal["harmful", "untrue", "not_helpful"], ...] = ()
  text: Text = ""
  ideal: Text | None = None  # what the answer should have been

  def check(self):
    if len(set(self.tags)) != len(self.tags):
      raise UserError(f"each tag is given once, got {list(self.tags)}.")
    if self.ideal is not None and not self.ideal.strip():
      raise UserError("an ideal answer must say something; leave it out where there is none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarmReport(Record):
  """Somebody reports a harmful output."""

  kind = "harm_report"

  message: Identifier = refers_to("message")
  category: Line | None = None  # of the moderation model
  text: Text = ""


@dataclasses.dataclass(frozen=True)
class CategoryScore(Part):
  """What the moderation model gave one category."""

  where = "a category's score"

  category: Line
  score: Fraction
  threshold: Fraction

  @property
  def is_flagged(self) -> bool:
    return self.score >= self.threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Record):
  """What the filter said of a message, or of a text that became none because it was blocked."""

  kind = "verdict"

  message: Identifier | None = refers_to("message", default=None)
  text: Text | None = None
  direction: Literal["input", "output"]
  scores: tuple[CategoryScore, ...]
  flagged: bool
  action: Literal["none", "warn", "block"]
  model: Line  # which moderation model

  def check(self):
    if (self.message is None) == (self.text is None):
      raise UserError("a verdict is on a message or on a text: give exactly one of them.")
    names = [score.category for score in self.scores]
    if not names or len(set(names)) != len(names):
      raise UserError(f"a verdict needs one score for each category, got {names}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerdictReport(Record):
  """Somebody says that the filter was wrong about one category.

  `score` and `threshold` are those of the verdict; the store fills them in.
  """

  kind = "verdict_report"

  verdict: Identifier = refers_to("verdict")
  mistake: Literal["false_positive", "false_negative"]
  category: Line
  score: Fraction | None = None
  threshold: Fraction | None = None
  text: Text = ""


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


@dataclasses.dataclass(frozen=True)
class UsedRecord(Part):
  """One of the records that trained a policy."""

  where = "a used record"

  record: Identifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use(Record):
  """Which records trained which policy."""

  kind = "use"
  is_personal = False

  policy: Identifier = refers_to("policy")
  stage: Literal["sft", "reward", "ppo", "moderation"]
  records: tuple[UsedRecord, ...]

  def check(self):
    ids = collections.Counter(used.record for used in self.records)
    twice = [id for id, count in ids.items() if count > 1]
    if not ids or twice:
      raise UserError(f"a use names at least one record and each once; twice: {twice[:5]}.")


@dataclasses.dataclass(frozen=True)
class Tombstone(Part):
  """What is left of a withdrawn record."""

  where = "a tombstone"

  record: Identifier
  of: Identifier  # its kind
  was_created_at: Moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Withdrawal(Record):
  """A person has withdrawn; made by `withdrawal.withdraw`. It does not say who."""

  kind = "withdrawal"
  is_personal = False

  tombstones: tuple[Tombstone, ...]


KINDS: dict[str, type[Record]] = {
  cls.kind: cls
  for cls in (
    *(Policy, Labeler, Activation, ChatMessage, Demonstration, Comparison, Skip, Feedback),
    *(HarmReport, Verdict, VerdictReport, Task, Use, Withdrawal),
  )
}


def from_json(item: Any) -> Record:
  """The record of one line of an export.

  Raises:
    UserError: it has no kind, a missing or unknown key, or a value that is not allowed.
  """
  kind = item.get("kind") if isinstance(item, dict) else None
  if not isinstance(kind, str) or kind not in KINDS:
    raise UserError(f"a record's kind is one of {', '.join(KINDS)}; got {kind!r:.80}.")
  fields = {key: value for key, value in item.items() if key != "kind"}
  return shapes.build(KINDS[kind], fields, f"a {kind}")


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
