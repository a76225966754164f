"""What all records have in common.

Every record has an id, a time, and an author: the labeler or the user of the chat whose doing it
is. Nothing is ever changed. Who changes their mind makes a new record that `supersedes` the old.
"""

import dataclasses
from typing import Annotated, Any, ClassVar

from rlhf_jax.config import Range
from rlhf_jax.feedback import shapes
from rlhf_jax.feedback.shapes import Identifier, Moment

Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]  # as databases hold it


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
