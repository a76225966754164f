"""What people and filters say, and what they say it about; which kinds of records there are."""

import collections
import dataclasses
from typing import Any, Literal

from rlhf_jax.config import Fraction
from rlhf_jax.feedback import shapes
from rlhf_jax.feedback.base import Part, Record, Seed, refers_to
from rlhf_jax.feedback.labels import Comparison, Demonstration, Skip, Task
from rlhf_jax.feedback.shapes import Identifier, Json, Line, Moment, Text
from rlhf_jax.text.messages import Role
from rlhf_jax.types import UserError

PersonRole = Literal["labeler", "researcher"]


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
  role: PersonRole

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
