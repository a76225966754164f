"""The queue of labeling tasks: who does what, how many do the same, and what is kept meanwhile.

A task wants `overlap` different labelers and has a slot for each. A labeler holds one assignment of
a kind at a time, under a lease. A page that is loaded again gets the same one, with its draft. When
a lease is over and nobody has taken the slot, it is still the labeler's; when somebody has, what
they submit is refused, and kept as a draft.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from rlhf_jax.feedback import people, rows, schema, shapes
from rlhf_jax.feedback.base import Record
from rlhf_jax.feedback.labels import (
  Answer,
  Comparison,
  Demonstration,
  Judgment,
  Skip,
  Task,
  TaskKind,
  Turn,
)
from rlhf_jax.feedback.shapes import Json
from rlhf_jax.feedback.store import Store, insert, require
from rlhf_jax.types import UserError

LEASE_SECONDS = 3600.0


class LeaseLost(UserError):
  """Somebody else does this task now."""


@dataclasses.dataclass(frozen=True)
class Assignment:
  """A task in a labeler's hands."""

  task: Task  # without its gold ranks
  lease_until: str  # then it may go to somebody else
  draft: Json | None  # what the labeler had saved last


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far the tasks of one kind have come, in slots; `overlap` of them make a task."""

  tasks: int
  slots: int
  done: int
  leased: int
  skips: int


def next_task(
  store: Store, labeler: str, work: TaskKind, *, lease_seconds: float = LEASE_SECONDS
) -> Assignment | None:
  """The labeler's open assignment, or a new one, under a fresh lease; None if nothing is left.

  Tasks of higher priority go first, then older ones. Nobody gets a task that they have done or
  skipped, and no slot goes to two people.

  Raises:
    UserError: they are no active labeler.
  """

  def take(connection: sa.Connection) -> Assignment | None:
    _require_active(connection, labeler)
    slot = _open_slot(connection, labeler, work) or _free_slot(connection, labeler, work)
    if slot is None:
      return None
    until = shapes.now(ahead=lease_seconds)
    _update(connection, slot, labeler=labeler, lease_until=until)
    task = dataclasses.replace(require(connection, slot.task, Task), gold=None)
    return Assignment(task, until, _draft(connection, labeler, slot.task))

  return store.transact(take)


def renew(
  store: Store, labeler: str, task: str, *, lease_seconds: float = LEASE_SECONDS
) -> str | None:
  """Until when a task stays with a labeler from now on; None where it is not, or no longer, theirs.

  Raises:
    UserError: they are no active labeler.
  """

  def extend(connection: sa.Connection) -> str | None:
    _require_active(connection, labeler)
    slot = _slot_of(connection, labeler, task)
    if slot is None or slot.record is not None:
      return None
    until = shapes.now(ahead=lease_seconds)
    _update(connection, slot, lease_until=until)
    return until

  return store.transact(extend)


def save_draft(store: Store, labeler: str, task: str, content: Json) -> bool:
  """Keeps what a labeler has so far, in place of their last draft.

  Returns whether the task is still theirs; the draft is kept in any case, and left out of exports.

  Raises:
    UserError: there is no such task, they are no active labeler, or the draft is too long.
  """
  content = shapes.conform(Json, content, "a draft")
  drafts = schema.drafts
  mine = sa.and_(drafts.c.task == task, drafts.c.labeler == labeler)

  def save(connection: sa.Connection) -> bool:
    _require_active(connection, labeler)
    require(connection, task, Task)
    values = {"content": content, "saved_at": shapes.now()}
    if not connection.execute(sa.update(drafts).where(mine).values(values)).rowcount:
      connection.execute(sa.insert(drafts).values(task=task, labeler=labeler, **values))
    return _slot_of(connection, labeler, task) is not None

  return store.transact(save)


def submit_comparison(
  store: Store,
  labeler: str,
  task: str,
  judgments: Sequence[Judgment],
  *,
  submission: str,
  seconds: float | None = None,
  presented: Sequence[int] | None = None,
  note: str = "",
) -> str:
  """Stores a labeler's ranking of a task's answers and ends the assignment; returns its id.

  Args:
    judgments: one for each answer, in the task's order.
    submission: the id that the record will have; sent twice, it is one record.
    presented: presented[i] is the answer that was shown i-th, by its place in the task.

  Raises:
    LeaseLost: the task went to somebody else; what was submitted is kept as a draft.
    UserError: ranks or flags are wrong, or they did this task already; nothing is stored.
  """

  def record(found: Task) -> Comparison:
    if found.work != "compare" or len(judgments) != len(found.answers):
      raise UserError(
        f"task {task} is to {found.work} and has {len(found.answers)} answers; got "
        f"{len(judgments)} judgments."
      )
    return Comparison(
      author=labeler,
      id=submission,
      conversation=found.conversation,
      answers=tuple(map(Answer.of, found.answers, judgments)),
      presented=None if presented is None else tuple(presented),
      seconds=seconds,
      note=note,
      task=task,
      message=found.message,
    )

  content = {"judgments": shapes.plain(tuple(judgments)), "note": note}
  return _submit(store, labeler, task, submission, record, content)


def submit_demonstration(
  store: Store,
  labeler: str,
  task: str,
  turns: Sequence[Turn],
  *,
  submission: str,
  seconds: float | None = None,
) -> str:
  """Stores the turns that a labeler wrote, after those the task came with; returns the id.

  Raises:
    As `submit_comparison`.
  """

  def record(found: Task) -> Demonstration:
    if found.work != "demonstrate":
      raise UserError(f"task {task} is to {found.work}, not to demonstrate.")
    begun = found.conversation.messages if found.conversation else ()
    given = tuple(Turn(message.role, message.content) for message in begun)
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
      raise UserError("a demonstration needs an assistant's turn of the labeler's own.")
    return Demonstration(
      author=labeler, id=submission, turns=(*given, *turns), task=task, seconds=seconds
    )

  content = {"turns": shapes.plain(tuple(turns))}
  return _submit(store, labeler, task, submission, record, content)


def skip(
  store: Store,
  labeler: str,
  task: str,
  reason: str,
  *,
  submission: str,
  seconds: float | None = None,
) -> str:
  """Stores that a labeler would not do a task; it goes to somebody else, and never to them again.

  Raises:
    As `submit_comparison`.
  """
  record = Skip(author=labeler, id=submission, task=task, reason=reason, seconds=seconds)
  return _submit(store, labeler, task, submission, lambda _: record, {"reason": reason})


def progress(store: Store) -> dict[str, Progress]:
  """How far the tasks of each kind have come."""
  slots, skips, tasks = schema.slots.c, schema.skips.c, schema.tasks.c
  is_leased = sa.and_(slots.record.is_(None), slots.lease_until >= shapes.now())
  query = sa.select(
    slots.work,
    sa.func.count(slots.task.distinct()),
    sa.func.count(),
    sa.func.count(slots.record),
    sa.func.count(sa.case((is_leased, 1))),
  ).group_by(slots.work)
  skipped = sa.select(tasks.work, sa.func.count()).join(schema.skips, skips.task == tasks.id)
  with store.reading() as connection:
    skip_counts = {work: n for work, n in connection.execute(skipped.group_by(tasks.work))}
    return {
      work: Progress(*counts, skips=skip_counts.get(work, 0))
      for work, *counts in connection.execute(query)
    }


def occupy(connection: sa.Connection, record: Comparison | Demonstration) -> None:
  """Gives a finished record that came from elsewhere its slot, if its task has one left."""
  slots = schema.slots
  if _slot_of(connection, record.author, record.task) is None:
    free = (slots.c.task == record.task, slots.c.labeler.is_(None))
    slot = connection.execute(sa.select(slots).where(*free).order_by(slots.c.number)).first()
    if slot is not None:
      _update(connection, slot, labeler=record.author, record=record.id)


def _submit(
  store: Store,
  labeler: str,
  task: str,
  submission: str,
  build: Callable[[Task], Record],
  content: Json,
) -> str:
  def work(connection: sa.Connection) -> str:
    _require_active(connection, labeler)
    record = build(require(connection, task, Task))
    if rows.find(connection, submission):
      return insert(connection, record)  # sent again, or the id is another record's
    slot = _slot_of(connection, labeler, task)
    if slot is None:
      raise LeaseLost(
        f"task {task} is not yours: its lease was over and it went to somebody else. What you "
        "submitted is kept as your draft; ask for the next task."
      )
    if slot.record is not None:
      raise UserError(
        f"you have done task {task} already, as {slot.record}; a correction is a new record that "
        "supersedes it."
      )
    insert(connection, record)
    if record.kind == "skip":
      _update(connection, slot, labeler=None, lease_until=None)
    else:
      _update(connection, slot, record=record.id)
    drafts = schema.drafts
    mine = (drafts.c.task == task, drafts.c.labeler == labeler)
    connection.execute(sa.delete(drafts).where(*mine))
    return record.id

  try:
    return store.transact(work)
  except LeaseLost:
    save_draft(store, labeler, task, content)
    raise


def _require_active(connection: sa.Connection, labeler: str) -> None:
  if not people.is_active(connection, labeler):
    raise UserError(f"{labeler!r:.80} is no active labeler; a researcher can add or activate them.")


def _slot_of(connection: sa.Connection, labeler: str, task: str) -> sa.Row | None:
  slots = schema.slots
  query = sa.select(slots).where(slots.c.task == task, slots.c.labeler == labeler)
  return connection.execute(query.with_for_update()).first()


def _open_slot(connection: sa.Connection, labeler: str, work: str) -> sa.Row | None:
  slots = schema.slots
  mine = (slots.c.labeler == labeler, slots.c.work == work, slots.c.record.is_(None))
  return connection.execute(sa.select(slots).where(*mine).with_for_update()).first()


def _free_slot(connection: sa.Connection, labeler: str, work: str) -> sa.Row | None:
  """PostgreSQL passes over a slot that somebody is just taking; SQLite has one writer at a time."""
  slots, skips, head = schema.slots, schema.skips, schema.records
  own = slots.alias("own")
  held = sa.exists().where(own.c.task == slots.c.task, own.c.labeler == labeler)
  skipped = sa.exists().where(
    skips.c.task == slots.c.task, head.c.id == skips.c.id, head.c.author == labeler
  )
  query = (
    sa.select(slots)
    .where(
      slots.c.work == work,
      slots.c.record.is_(None),
      sa.or_(slots.c.labeler.is_(None), slots.c.lease_until < shapes.now()),
      ~held,
      ~skipped,
    )
    .order_by(slots.c.behind, slots.c.serial, slots.c.number)
    .limit(1)
  )
  return connection.execute(query.with_for_update(of=slots, skip_locked=True)).first()


def _update(connection: sa.Connection, slot: sa.Row, **values: Any) -> None:
  slots = schema.slots
  this = (slots.c.task == slot.task, slots.c.number == slot.number)
  connection.execute(sa.update(slots).where(*this).values(values))


def _draft(connection: sa.Connection, labeler: str, task: str) -> Json | None:
  drafts = schema.drafts.c
  mine = (drafts.task == task, drafts.labeler == labeler)
  return connection.scalar(sa.select(drafts.content).where(*mine))
