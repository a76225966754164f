"""The tables. A record is a row of `records` (who, when, of what kind) and one of its kind's table.

Lists inside a record are rows of a table of their own, with `owner` the record's id. When a person
withdraws, the rows of the kinds' tables are deleted; the row in `records` stays as the tombstone.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
  naming_convention={
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
  }
)

ID, WORD = sa.String(64), sa.String(32)
LINE = sa.String(400)  # shapes.Line
MOMENT = sa.String(27)  # 2022-11-30T18:00:00.000000Z
# Counts the records in the order of their coming; SQLite counts in INTEGER columns only.
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _reference(name: str, required: bool = False) -> sa.Column:
  return sa.Column(name, ID, sa.ForeignKey("records.id"), nullable=not required, index=True)


def _column(name: str, kind: sa.types.TypeEngine | type, required: bool = True) -> sa.Column:
  return sa.Column(name, kind, nullable=not required)


def _record(name: str, *columns: sa.Column) -> sa.Table:
  """A table with one row a record."""
  return sa.Table(
    name, metadata, sa.Column("id", ID, sa.ForeignKey("records.id"), primary_key=True), *columns
  )


def _items(name: str, owners: str, *columns: sa.Column) -> sa.Table:
  """A table with one row an item of a list inside the records of the table `owners`."""
  return sa.Table(
    name,
    metadata,
    sa.Column("owner", ID, sa.ForeignKey(f"{owners}.id"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    *columns,
  )


records = sa.Table(
  "records",
  metadata,
  sa.Column("serial", SERIAL, primary_key=True, autoincrement=True),
  sa.Column("id", ID, nullable=False, unique=True),
  sa.Column("kind", WORD, nullable=False, index=True),
  sa.Column("created_at", MOMENT, nullable=False),
  sa.Column("author", ID, nullable=True, index=True),  # null once withdrawn
  # Unique, so that of two corrections of one record the second is told of the first.
  sa.Column("supersedes", ID, sa.ForeignKey("records.id"), nullable=True, unique=True),
  _reference("withdrawal"),
)

# Whose words or signals are in a record; all of these can withdraw it.
people = sa.Table(
  "people",
  metadata,
  sa.Column("record", ID, sa.ForeignKey("records.id"), primary_key=True),
  sa.Column("person", LINE, primary_key=True, index=True),
)

policies = _record(
  "policies",
  _column("name", LINE),
  _column("checkpoint", sa.Text),
  _column("lineage", sa.JSON),
)
labelers = _record(
  "labelers", sa.Column("name", LINE, nullable=False, unique=True), _column("role", WORD)
)
activations = _record(
  "activations",
  _reference("labeler", required=True),
  _column("active", sa.Boolean),
  _column("reason", sa.Text),
)
messages = _record(
  "messages",
  sa.Column("conversation", ID, nullable=False, index=True),
  _reference("parent"),
  _column("role", WORD),
  _column("content", sa.Text),
  _reference("policy"),
  _column("sampling", sa.JSON),
  _column("seed", sa.BigInteger, required=False),
  _column("stopped", sa.Boolean),
)
demonstrations = _record(
  "demonstrations",
  _reference("task"),
  _column("seconds", sa.Float(53), required=False),
  _column("source", LINE),
)
turns = _items(
  "turns",
  "demonstrations",
  _column("role", WORD),
  _column("content", sa.Text),
  _column("suggestion", sa.Text, required=False),
  _reference("suggested_by"),
  _column("edit_distance", sa.Integer, required=False),
  _column("edit_fraction", sa.Float(53), required=False),
)
comparisons = _record(
  "comparisons",
  _column("conversation", sa.JSON),
  _column("presented", sa.JSON(none_as_null=True), required=False),
  _column("seconds", sa.Float(53), required=False),
  _column("source", LINE),
  _column("note", sa.Text),
  _reference("task"),
  _reference("message"),
)
answers = _items(
  "answers",
  "comparisons",
  _column("text", sa.Text),
  _column("writer", LINE),
  _column("rank", sa.Integer),
  _column("quality", sa.Integer, required=False),
  _column("flags", sa.JSON),
  _reference("policy"),
  _column("sampling", sa.JSON),
  _column("seed", sa.BigInteger, required=False),
)
skips = _record(
  "skips",
  _reference("task", required=True),
  _column("reason", LINE),
  _column("seconds", sa.Float(53), required=False),
)
feedback = _record(
  "feedback",
  _reference("message", required=True),
  _column("thumb", WORD),
  _column("tags", sa.JSON),
  _column("text", sa.Text),
  _column("ideal", sa.Text, required=False),
)
harm_reports = _record(
  "harm_reports",
  _reference("message", required=True),
  _column("category", LINE, required=False),
  _column("text", sa.Text),
)
verdicts = _record(
  "verdicts",
  _reference("message"),
  _column("text", sa.Text, required=False),
  _column("direction", WORD),
  _column("flagged", sa.Boolean),
  _column("action", WORD),
  _column("model", LINE),
)
category_scores = _items(
  "category_scores",
  "verdicts",
  _column("category", LINE),
  _column("score", sa.Float(53)),
  _column("threshold", sa.Float(53)),
)
verdict_reports = _record(
  "verdict_reports",
  _reference("verdict", required=True),
  _column("mistake", WORD),
  _column("category", LINE),
  _column("score", sa.Float(53), required=False),
  _column("threshold", sa.Float(53), required=False),
  _column("text", sa.Text),
)
tasks = _record(
  "tasks",
  _column("work", WORD),
  _column("conversation", sa.JSON(none_as_null=True), required=False),
  _column("instructions", sa.Text),
  _column("overlap", sa.Integer),
  _column("gold", sa.JSON(none_as_null=True), required=False),
  _column("priority", sa.Integer),
  _reference("message"),
)
candidates = _items(
  "candidates",
  "tasks",
  _column("text", sa.Text),
  _column("writer", LINE),
  _reference("policy"),
  _column("sampling", sa.JSON),
  _column("seed", sa.BigInteger, required=False),
)
uses = _record("uses", _reference("policy", required=True), _column("stage", WORD))
used_records = _items("used_records", "uses", _reference("record", required=True))
withdrawals = _record("withdrawals")
tombstones = _items(
  "tombstones",
  "withdrawals",
  _reference("record", required=True),
  _column("of", WORD),
  _column("was_created_at", MOMENT),
)

# What follows are no records: secrets, and the state of work that is under way.

tokens = sa.Table(
  "tokens",
  metadata,
  sa.Column("serial", SERIAL, primary_key=True, autoincrement=True),
  _reference("labeler", required=True),
  sa.Column("sha256", sa.String(64), nullable=False, unique=True),
  _column("created_at", MOMENT),
)

# A task has as many slots as it wants different labelers. An open slot is free where `labeler` is
# null or the lease is over; it is done where `record` is what was submitted.
slots = sa.Table(
  "slots",
  metadata,
  sa.Column("task", ID, sa.ForeignKey("tasks.id"), primary_key=True),
  sa.Column("number", sa.Integer, primary_key=True),
  _column("work", WORD),
  _column("labeler", ID, required=False),
  _column("lease_until", MOMENT, required=False),
  _reference("record"),
  # The place in the queue, which is the task's own: its priority, turned round so that one index
  # sorts all, and the serial of its record.
  _column("behind", sa.Integer),
  _column("serial", sa.BigInteger),
  sa.UniqueConstraint("task", "labeler"),
)
sa.Index(  # a labeler has one open assignment of a kind, however many pages they have open
  "uq_slots_open",
  slots.c.labeler,
  slots.c.work,
  unique=True,
  sqlite_where=slots.c.record.is_(None),
  postgresql_where=slots.c.record.is_(None),
)
sa.Index(  # the next task is found without a look at those behind it, or at what is done
  "ix_slots_queue",
  slots.c.work,
  slots.c.behind,
  slots.c.serial,
  slots.c.number,
  sqlite_where=slots.c.record.is_(None),
  postgresql_where=slots.c.record.is_(None),
)

drafts = sa.Table(
  "drafts",
  metadata,
  sa.Column("task", ID, sa.ForeignKey("tasks.id"), primary_key=True),
  sa.Column("labeler", ID, primary_key=True),
  _column("content", sa.JSON),
  _column("saved_at", MOMENT),
)

# Where the records of a kind are, and the lists inside them: kind -> table, {field -> table}.
TABLES: dict[str, sa.Table] = {
  "policy": policies,
  "labeler": labelers,
  "activation": activations,
  "message": messages,
  "demonstration": demonstrations,
  "comparison": comparisons,
  "skip": skips,
  "feedback": feedback,
  "harm_report": harm_reports,
  "verdict": verdicts,
  "verdict_report": verdict_reports,
  "task": tasks,
  "use": uses,
  "withdrawal": withdrawals,
}
LISTS: dict[str, dict[str, sa.Table]] = {
  "demonstration": {"turns": turns},
  "comparison": {"answers": answers},
  "verdict": {"scores": category_scores},
  "task": {"answers": candidates},
  "use": {"records": used_records},
  "withdrawal": {"tombstones": tombstones},
}
