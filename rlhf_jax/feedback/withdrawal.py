"""A person takes back what they said: the one way in which anything leaves the store."""

import collections

import sqlalchemy as sa

from rlhf_jax.feedback import rows, schema
from rlhf_jax.feedback.records import Tombstone, Withdrawal
from rlhf_jax.feedback.store import CHUNK, Store, insert
from rlhf_jax.types import UserError


def withdraw(store: Store, person: str, *, author: str) -> Withdrawal:
  """Deletes every record that holds words or signals of a person, for good.

  That is what they wrote and said; what they wrote answers in; and what others said about their
  words: rankings, thumbs, verdicts and tasks on their conversations. If they are a labeler, their
  name and token go too, and their places in tasks are free again. A record's id, kind and time
  stay, as does which policies it trained. Policies, and tasks that they only queued, are not
  theirs.

  Args:
    person: the id of a labeler, or of a user of the chat.
    author: who does it, for the record of the withdrawal; of the person themselves it says "self".

  Raises:
    UserError: nothing here is this person's.
  """
  author = "self" if author == person else author
  with store.writing(exclusive=True) as connection:
    found = _records_of(connection, person)
    left = _leave_tasks(connection, person)
    if not found and not left:
      raise UserError(f"no record holds anything of {person!r:.80}; ids are as records name them.")
    tombstones = [Tombstone(row.id, row.kind, row.created_at) for row in found]
    record = Withdrawal(author=author, tombstones=tombstones)
    insert(connection, record)
    bury(connection, record)
  empty_log(store.engine)
  return record


def preview(store: Store, person: str) -> dict[str, int]:
  """How many records of each kind `withdraw` would delete."""
  with store.reading() as connection:
    return dict(collections.Counter(row.kind for row in _records_of(connection, person)))


def bury(connection: sa.Connection, record: Withdrawal) -> None:
  """Deletes the records that a withdrawal names and marks their rows with it."""
  by_kind: dict[str, list[str]] = {}
  for stone in record.tombstones:
    by_kind.setdefault(stone.of, []).append(stone.record)
  head = schema.records
  marks = {"author": None, "supersedes": None, "withdrawal": record.id}
  for kind, ids in by_kind.items():
    for start in range(0, len(ids), CHUNK):
      chunk = ids[start : start + CHUNK]
      rows.delete(connection, kind, chunk)
      connection.execute(sa.update(head).where(head.c.id.in_(chunk)).values(marks))


def empty_log(engine: sa.Engine) -> None:
  """Moves SQLite's log into its file, where `secure_delete` has overwritten what was deleted.

  Where somebody is just reading, the log is emptied by a later write instead.
  """
  if engine.dialect.name == "sqlite":
    raw = engine.raw_connection()
    try:
      raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
      raw.close()


def _records_of(connection: sa.Connection, person: str) -> list[sa.Row]:
  head, people = schema.records, schema.people
  query = (
    sa.select(head.c.id, head.c.kind, head.c.created_at)
    .join(people, people.c.record == head.c.id)
    .where(people.c.person == person, head.c.withdrawal.is_(None))
    .order_by(head.c.serial)
  )
  return list(connection.execute(query))


def _leave_tasks(connection: sa.Connection, person: str) -> int:
  """Frees their slots and deletes their drafts; returns how many there were."""
  slots, drafts = schema.slots, schema.drafts
  free = {"labeler": None, "lease_until": None, "record": None}
  freed = connection.execute(sa.update(slots).where(slots.c.labeler == person).values(free))
  deleted = connection.execute(sa.delete(drafts).where(drafts.c.labeler == person))
  return freed.rowcount + deleted.rowcount
