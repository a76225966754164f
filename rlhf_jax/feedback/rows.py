"""Records into rows and back, inside a transaction that the caller holds."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from rlhf_jax.feedback import schema, shapes
from rlhf_jax.feedback.base import Record
from rlhf_jax.feedback.records import KINDS

HEAD = ("author", "id", "created_at", "supersedes")  # the fields that all records have


def insert(connection: sa.Connection, record: Record, people: set[str]) -> int:
  """Writes a record, and whose words are in it; returns its serial number.

  The caller has checked what it refers to.
  """
  head = {name: getattr(record, name) for name in HEAD} | {"kind": record.kind}
  written = connection.execute(sa.insert(schema.records).values(head))
  if people:
    rows = [{"record": record.id, "person": person} for person in sorted(people)]
    connection.execute(sa.insert(schema.people), rows)
  table = schema.TABLES[record.kind]
  connection.execute(sa.insert(table).values(_row(record, table)))
  for field, items in schema.LISTS.get(record.kind, {}).items():
    places = enumerate(getattr(record, field))
    rows = [{"owner": record.id, "position": i, **_row(item, items)} for i, item in places]
    if rows:
      connection.execute(sa.insert(items), rows)
  return written.inserted_primary_key.serial


def select(connection: sa.Connection, kind: str, *conditions: Any) -> list[Record]:
  """The records of a kind that are not withdrawn, in the order of their coming.

  `conditions` are on columns of `schema.records` and of the kind's own table.
  """
  head, table = schema.records, schema.TABLES[kind]
  source = table.join(head, table.c.id == head.c.id)
  alive = sa.and_(head.c.withdrawal.is_(None), *conditions)
  columns = [*(head.c[name] for name in HEAD), *(c for c in table.c if c.name != "id")]
  query = sa.select(*columns).select_from(source).where(alive).order_by(head.c.serial)
  rows = [dict(row) for row in connection.execute(query).mappings()]
  ids = sa.select(table.c.id).select_from(source).where(alive)
  for field, items in schema.LISTS.get(kind, {}).items():
    lists: dict[str, list] = {row["id"]: [] for row in rows}
    query = sa.select(items).where(items.c.owner.in_(ids)).order_by(items.c.owner, items.c.position)
    for item in connection.execute(query).mappings():
      if item["owner"] in lists:  # else it came between the two queries
        lists[item["owner"]].append(
          {key: value for key, value in item.items() if key not in ("owner", "position")}
        )
    for row in rows:
      row[field] = lists[row["id"]]
  return [KINDS[kind](**row) for row in rows]


def find(connection: sa.Connection, id: str) -> sa.Row | None:
  """The row of `schema.records` with this id, also of a withdrawn record."""
  return connection.execute(sa.select(schema.records).where(schema.records.c.id == id)).first()


def load(connection: sa.Connection, id: str) -> Record | None:
  """The record with this id; None where there is none or it is withdrawn."""
  head = find(connection, id)
  found = select(connection, head.kind, schema.records.c.id == id) if head else []
  return found[0] if found else None


def delete(connection: sa.Connection, kind: str, ids: Sequence[str]) -> None:
  """Deletes all of these records but their rows in `schema.records`; for a withdrawal."""
  if kind == "task":
    for table in (schema.drafts, schema.slots):
      connection.execute(sa.delete(table).where(table.c.task.in_(ids)))
  if kind == "labeler":
    connection.execute(sa.delete(schema.tokens).where(schema.tokens.c.labeler.in_(ids)))
  for items in schema.LISTS.get(kind, {}).values():
    connection.execute(sa.delete(items).where(items.c.owner.in_(ids)))
  table = schema.TABLES[kind]
  connection.execute(sa.delete(table).where(table.c.id.in_(ids)))
  connection.execute(sa.delete(schema.people).where(schema.people.c.record.in_(ids)))


def _row(value: Any, table: sa.Table) -> dict[str, Any]:
  names = [c.name for c in table.c if c.name not in ("owner", "position")]
  return {name: shapes.plain(getattr(value, name)) for name in names}
