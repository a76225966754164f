"""The store of records: opened once, shared by all threads, read and written by the record.

  store = Store.open("feedback.db", create=True)
  store.add(Feedback(author="ann", message=message.id, thumb="up"))
  store.records(Feedback, author="ann")

The modules beside it do what is more than that, each taking the store as its first argument.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any, Self, TypeVar

import sqlalchemy as sa

from rlhf_jax.feedback import database, rows, schema
from rlhf_jax.feedback.base import Record
from rlhf_jax.feedback.labels import Task
from rlhf_jax.feedback.records import (
  KINDS,
  ChatMessage,
  Feedback,
  Labeler,
  Use,
  Verdict,
  VerdictReport,
)
from rlhf_jax.types import UserError

RecordType = TypeVar("RecordType", bound=Record)
CHUNK = 500  # ids in one statement


class Store:
  """People's records in a database; safe to share between threads."""

  def __init__(self, engine: sa.Engine):
    self.engine = engine

  @classmethod
  def open(cls, url: str, create: bool = False) -> Self:
    """Opens a path, a `sqlite:///FILE` or a `postgresql://USER@HOST/NAME`.

    With `create` the tables are made, or brought up to date, if need be.

    Raises:
      UserError: it cannot be reached, is not there, or has not the tables of this version.
    """
    engine = database.engine_for(url)
    try:
      _require_tables(engine, create)
    except BaseException:
      engine.dispose()
      raise
    return cls(engine)

  def close(self) -> None:
    """Closes its connections."""
    self.engine.dispose()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
    """A transaction that reads one state of the database."""
    return database.reading(self.engine)

  def writing(self, exclusive: bool = False) -> contextlib.AbstractContextManager[sa.Connection]:
    """A transaction that is stored as a whole or not at all."""
    return database.writing(self.engine, exclusive=exclusive)

  def add(self, record: Record) -> str:
    """Stores a record and returns its id; once this returns, the record survives a power cut.

    The same record again, as a browser sends it that saw no answer, is one record.

    Raises:
      UserError: the id is another record's, or what it refers to is not there; nothing is stored.
    """
    return self.add_all([record])[0]

  def add_all(self, new: Iterable[Record]) -> list[str]:
    """Stores all of these records or none; later ones may refer to earlier ones."""
    new = list(new)

    def insert_all(connection: sa.Connection) -> list[str]:
      return [insert(connection, record) for record in new]

    return self.transact(insert_all)

  def transact(self, work) -> Any:
    """Runs `work(connection)` as one transaction; again where another one came between.

    Two that write the same at the same time meet at a unique constraint. The second attempt of the
    later sees what the earlier has written, and stops with a message or does something else.
    """
    for attempt in range(8):
      try:
        with self.writing() as connection:
          return work(connection)
      except sa.exc.IntegrityError:
        if attempt == 7:
          raise

  def get(self, id: str) -> Record:
    """The record with this id.

    Raises:
      UserError: there is none, or it was withdrawn.
    """
    with self.reading() as connection:
      record = rows.load(connection, id)
      if record is None:
        head = rows.find(connection, id)
        raise UserError(f"record {id!r:.80} {'was withdrawn' if head else 'does not exist'}.")
    return record

  def records(
    self, kind: type[RecordType], *, superseded: bool = False, **equal: Any
  ) -> list[RecordType]:
    """All records of a kind in the order of their coming, those withdrawn never.

    `records(Feedback, message=id, author="ann")` are those with these values. Records that were
    corrected are left out unless `superseded`.
    """
    conditions = [_column(kind, name) == value for name, value in equal.items()]
    if not superseded:
      later = schema.records.alias("later")
      newer = sa.select(later.c.id).where(later.c.supersedes == schema.records.c.id)
      conditions.append(~newer.exists())
    with self.reading() as connection:
      return rows.select(connection, kind.kind, *conditions)

  def counts(self) -> dict[str, dict[str, int]]:
    """How many records there are of each kind: {"comparison": {"stored": 9, "withdrawn": 1}}."""
    head = schema.records.c
    query = sa.select(head.kind, sa.func.count(), sa.func.count(head.withdrawal))
    with self.reading() as connection:
      found = {kind: (n, gone) for kind, n, gone in connection.execute(query.group_by(head.kind))}
    counted = {kind: found.get(kind, (0, 0)) for kind in KINDS}
    return {kind: {"stored": n - gone, "withdrawn": gone} for kind, (n, gone) in counted.items()}


def _require_tables(engine: sa.Engine, create: bool) -> None:
  name = database.name_of(engine)
  if not create and not database.exists(engine):
    raise UserError(f"{name} does not exist; make it: python -m rlhf_jax.feedback init --db=...")
  found, needed = database.revision(engine), database.newest_revision()
  if found == needed:
    return
  if not create:
    raise UserError(
      f"{name} stands at revision {found}, this version needs {needed}; make a copy, then: "
      "python -m rlhf_jax.feedback migrate --db=..."
    )
  database.migrate(engine)


def insert(connection: sa.Connection, record: Record) -> str:
  """Checks a record against those that are there, and writes it; see `Store.add`."""
  record = _completed(connection, record)
  head = rows.find(connection, record.id)
  if head is not None:
    _require_same(connection, record, head)
    return record.id
  people = _people(connection, record)
  _check(connection, record)
  serial = rows.insert(connection, record, people)
  if isinstance(record, Task):
    place = {"work": record.work, "behind": -record.priority, "serial": serial}
    slots = [{"task": record.id, "number": i, **place} for i in range(record.overlap)]
    connection.execute(sa.insert(schema.slots), slots)
  return record.id


def require(connection: sa.Connection, id: str, kind: type[RecordType]) -> RecordType:
  """The record that another one refers to.

  Raises:
    UserError: it does not exist, is of another kind, or was withdrawn.
  """
  found = rows.select(connection, kind.kind, schema.records.c.id == id)
  if not found:
    raise UserError(_absence(id, kind.kind, rows.find(connection, id)))
  return found[0]


def _absence(id: str, kind: str, head: sa.Row | None) -> str:
  if head is None:
    return f"there is no {kind} with the id {id!r:.80}."
  if head.withdrawal is not None:
    return f"the {head.kind} {id} was withdrawn by a person whose words were in it."
  return f"record {id} is a {head.kind}, where a {kind} is needed."


def _require_same(connection: sa.Connection, record: Record, head: sa.Row) -> None:
  if head.withdrawal is not None:
    raise UserError(f"record {record.id} was withdrawn and cannot be stored again.")
  if head.kind != record.kind or not rows.load(connection, record.id).says_the_same(record):
    raise UserError(
      f"the id {record.id} is taken by a {head.kind} that says something else; nothing is ever "
      "changed here. A correction is a new record with an id of its own, and supersedes this one."
    )


def _people(connection: sa.Connection, record: Record) -> set[str]:
  """Whose words or signals are in a record, those of the records that it refers to included.

  Raises:
    UserError: one of these is not there, is of another kind, or was withdrawn.
  """
  references = dict(record.references)
  if record.supersedes is not None:
    references[record.supersedes] = record.kind
  for id, kind in references.items():
    head = rows.find(connection, id)
    if head is None or head.kind != kind or head.withdrawal is not None:
      raise UserError(f"a {record.kind} cannot be stored: {_absence(id, kind, head)}")
  there = schema.people.c
  query = sa.select(there.person).where(there.record.in_(list(references)))
  own = record.writers | ({record.author} if record.is_personal else set())
  return own | set(connection.scalars(query))


def _completed(connection: sa.Connection, record: Record) -> Record:
  """A report on the filter holds what the filter had given."""
  if not isinstance(record, VerdictReport):
    return record
  verdict = require(connection, record.verdict, Verdict)
  for given in verdict.scores:
    if given.category == record.category:
      if (record.score, record.threshold) not in (
        (None, None),
        (given.score, given.threshold),
      ):
        raise UserError(
          f"the verdict gave {record.category!r} the score {given.score:g} at the threshold "
          f"{given.threshold:g}, not {record.score} at {record.threshold}."
        )
      return dataclasses.replace(record, score=given.score, threshold=given.threshold)
  known = ", ".join(given.category for given in verdict.scores)
  raise UserError(f"the verdict has no category {record.category!r}; it has: {known}.")


def _check(connection: sa.Connection, record: Record) -> None:
  """What a record alone cannot know."""
  if record.supersedes is not None:
    _check_correction(connection, record)
  if isinstance(record, ChatMessage) and record.parent is not None:
    parent = require(connection, record.parent, ChatMessage)
    if parent.conversation != record.conversation:
      raise UserError(
        f"the parent {parent.id} is of conversation {parent.conversation}, not of "
        f"{record.conversation}."
      )
  if isinstance(record, Feedback):
    message = require(connection, record.message, ChatMessage)
    if message.role != "assistant" or message.parent is None:
      raise UserError("a thumb is for an answer of the assistant, not for what it answers.")
  if isinstance(record, Labeler):
    same = sa.select(schema.labelers.c.id).where(schema.labelers.c.name == record.name)
    if connection.execute(same).first():
      raise UserError(f"there is a labeler called {record.name!r} already; give another name.")
  if isinstance(record, Use):
    ids = [used.record for used in record.records]
    known: set[str] = set()
    for start in range(0, len(ids), CHUNK):
      chunk = schema.records.c.id.in_(ids[start : start + CHUNK])
      known |= set(connection.scalars(sa.select(schema.records.c.id).where(chunk)))
    missing = [id for id in ids if id not in known]
    if missing:
      raise UserError(f"{len(missing)} of the records used are not here, such as {missing[0]!r}.")


def _check_correction(connection: sa.Connection, record: Record) -> None:
  """A record is corrected once, by its author or a researcher; then its correction may be."""
  old = rows.find(connection, record.supersedes)
  head = schema.records.c
  newer = connection.scalar(sa.select(head.id).where(head.supersedes == old.id))
  if newer is not None:
    raise UserError(f"{old.kind} {old.id} was corrected already; supersede {newer} instead.")
  role = sa.select(schema.labelers.c.role).where(schema.labelers.c.id == record.author)
  if old.author != record.author and connection.scalar(role) != "researcher":
    raise UserError(f"{old.kind} {old.id} can be corrected by its author or by a researcher only.")


def _column(kind: type[Record], name: str) -> sa.Column:
  for table in (schema.TABLES[kind.kind], schema.records):
    if name in table.c:
      return table.c[name]
  known = [*schema.TABLES[kind.kind].c.keys(), *rows.HEAD]
  raise UserError(f"a {kind.kind} is not found by {name!r}; it is by {', '.join(known)}.")
