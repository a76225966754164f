"""The tables: what migrations make is what `schema.py` says, and holds every field of a record."""

import dataclasses
import shutil
import typing

import feedback_cases as cases
import pytest
import sqlalchemy as sa

from rlhf_jax.feedback import database, rows, schema, shapes, tasks
from rlhf_jax.feedback.records import KINDS
from rlhf_jax.feedback.store import Store
from rlhf_jax.types import UserError


@pytest.fixture(scope="module", params=cases.BACKENDS)
def place(request, tmp_path_factory):
  """A kind of database, and the folder where it is made."""
  if request.param == "sqlite":
    yield "sqlite", tmp_path_factory.mktemp("sqlite")
  else:
    with cases.postgres_server() as folder:
      yield "postgresql", folder


def index(found):
  """An index as text, with the rows that it is for."""
  options = {name: str(value) for name, value in found.pop("dialect_options", {}).items()}
  return str((found, options))


def shape(engine):
  """Everything that the database says of its tables."""
  seen = sa.inspect(engine)
  found = {}
  for table in sorted(set(seen.get_table_names()) - {"alembic_version"}):
    columns = [
      (c["name"], str(c["type"]), c["nullable"], c["default"]) for c in seen.get_columns(table)
    ]
    found[table] = {
      "columns": columns,
      "key": seen.get_pk_constraint(table),
      "foreign": sorted(map(str, seen.get_foreign_keys(table))),
      "unique": sorted(map(str, seen.get_unique_constraints(table))),
      "indexes": sorted(map(index, seen.get_indexes(table))),
    }
  return found


def test_migrations_leave_nothing_of_the_schema_to_change(place):
  engine = database.engine_for(cases.new_database(*place))
  database.migrate(engine)
  assert database.drift(engine) == []
  with database.writing(engine) as connection:  # the comparison can see a difference
    connection.execute(sa.text("DROP TABLE drafts"))
  assert [change[0] for change in database.drift(engine)] == ["add_table"]
  engine.dispose()


def test_upgrading_an_empty_database_equals_creating_the_schema(place):
  upgraded, created = (database.engine_for(cases.new_database(*place)) for _ in range(2))
  database.migrate(upgraded)
  with database.writing(created) as connection:
    schema.metadata.create_all(connection)
  assert shape(upgraded) == shape(created)
  assert "slots" in shape(upgraded)
  upgraded.dispose()
  created.dispose()


def test_migrating_twice_changes_nothing_and_keeps_records(place):
  url = cases.new_database(*place)
  with Store.open(url, create=True) as store:
    records = cases.one_of_each()
    store.add_all(records)
    before = shape(store.engine)
    database.migrate(store.engine)
    assert shape(store.engine) == before
    assert store.get(records[-1].id) == records[-1]


def test_slots_of_an_older_database_get_their_places_in_the_queue(place):
  made = [cases.compare_task(priority=p, overlap=2) for p in (0, 3, -1)]
  with Store.open(cases.new_database(*place), create=True) as store:
    store.add_all(made)
    (ann,) = cases.labelers(store, 1)
    before = sorted(cases.rows_of(store, "slots"))
    with database.writing(store.engine) as connection:  # back to the tables of revision 0001
      for statement in (
        "DROP INDEX ix_slots_queue",
        "ALTER TABLE slots DROP COLUMN behind",
        "ALTER TABLE slots DROP COLUMN serial",
        "CREATE INDEX ix_slots_unfinished ON slots (work, task) WHERE record IS NULL",
        "UPDATE alembic_version SET version_num = '0001'",
      ):
        connection.execute(sa.text(statement))
    database.migrate(store.engine)
    assert database.drift(store.engine) == []
    assert sorted(cases.rows_of(store, "slots")) == before and len(before) == 6
    assert tasks.next_task(store, ann, "compare").task.id == made[1].id


def test_a_database_of_a_newer_version_is_refused_and_left_alone(place):
  url = cases.new_database(*place)
  Store.open(url, create=True).close()
  engine = database.engine_for(url)
  with database.writing(engine) as connection:
    connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
  for create in (False, True):
    with pytest.raises(UserError, match="9999"):
      Store.open(url, create=create)
  assert database.revision(engine) == "9999"
  engine.dispose()


def test_a_database_without_tables_is_refused_with_the_command_that_makes_them(place):
  with pytest.raises(UserError, match="rlhf_jax.feedback (init|migrate)"):
    Store.open(cases.new_database(*place))


def test_a_change_of_the_schema_becomes_a_migration_that_makes_it(tmp_path, monkeypatch):
  engine = database.engine_for(f"sqlite:///{tmp_path}/old.db")
  database.migrate(engine)
  with database.writing(engine) as connection:  # as if the schema had just gained a table
    connection.execute(sa.text("DROP TABLE drafts"))
  copied = shutil.copytree(database.MIGRATIONS, tmp_path / "migrations")
  monkeypatch.setattr(database, "MIGRATIONS", copied)
  before = set((copied / "versions").glob("*.py"))
  database.new_revision(engine, "drafts are kept")
  (written,) = set((copied / "versions").glob("*.py")) - before
  assert written.read_text().startswith('"""drafts are kept."""')
  database.migrate(engine)
  assert database.drift(engine) == []
  assert database.revision(engine) != "0001"
  engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_record_has_a_column_and_every_column_a_field(kind):
  lists = schema.LISTS.get(kind, {})
  fields = {field.name for field in dataclasses.fields(KINDS[kind])}
  columns = set(schema.TABLES[kind].c.keys()) | set(lists) | set(rows.HEAD)
  assert columns == fields
  for name, table in lists.items():
    part = typing.get_args(shapes.hints(KINDS[kind])[name])[0]
    names = {field.name for field in dataclasses.fields(part)}
    assert set(table.c.keys()) - {"owner", "position"} == names


def test_sqlite_files_are_durable_and_overwrite_what_is_deleted(tmp_path):
  with Store.open(str(tmp_path / "a.db"), create=True) as store, store.reading() as connection:
    ask = lambda pragma: connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
    assert ask("journal_mode") == "wal"
    assert ask("synchronous") == 2  # FULL
    assert ask("foreign_keys") == 1
    assert ask("secure_delete") == 1
    assert ask("busy_timeout") >= 10_000


@pytest.mark.parametrize(
  ("url", "says"),
  [
    ("sqlite://", "memory"),
    ("sqlite:///:memory:", "memory"),
    ("mysql://x/y", "SQLite or PostgreSQL"),
    ("postgres://x/y", "postgresql://"),
    ("://", "cannot be read"),
    ("/nowhere/at/all.db", "cannot be used|does not exist"),
    ("postgresql://tests@/x?host=/nowhere", "cannot be used"),
  ],
)
def test_databases_that_cannot_hold_records_are_refused(url, says):
  for create in (False, True):
    with pytest.raises(UserError, match=says):
      Store.open(url, create=create)


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
  path = tmp_path / "notes.txt"
  path.write_text("These are my notes, not a database. " * 100)
  before = path.read_bytes()
  with pytest.raises(UserError, match="something else"):
    Store.open(str(path), create=True)
  assert path.read_bytes() == before


def test_the_password_of_a_database_is_in_no_message():
  with pytest.raises(UserError) as raised:
    Store.open("postgresql://ann:hunter2@/x?host=/nowhere")
  assert "hunter2" not in str(raised.value)
