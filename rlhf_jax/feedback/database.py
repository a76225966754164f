"""The database itself: where it is, how it is opened, and how its tables come to be.

SQLite keeps everything in one file and needs nothing installed; PostgreSQL serves several machines
(`pip install 'rlhf_jax[postgres]'`). A commit that returned is on the disk in both, so a record
that was acknowledged survives a kill or a power cut.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import alembic.autogenerate
import alembic.command
import alembic.config
import alembic.migration
import alembic.script
import sqlalchemy as sa

from rlhf_jax.feedback import schema
from rlhf_jax.types import UserError

MIGRATIONS = pathlib.Path(__file__).parent / "migrations"
BUSY_SECONDS = 60  # how long a writer waits for the one before it
# Locks of PostgreSQL that belong to no row: a withdrawal waits for all writers, and they for it.
LOCK_WRITES, LOCK_MIGRATION = 7_355_001, 7_355_002


def engine_for(url: str) -> sa.Engine:
  """An engine for a path, a `sqlite:///` URL or a `postgresql://` URL.

  Raises:
    UserError: the URL is none, or of a database that cannot hold records.
  """
  address = _address(url)
  if address.get_backend_name() == "sqlite":
    engine = sa.create_engine(address, pool_size=8, max_overflow=56)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine
  try:
    return sa.create_engine(address, pool_size=8, max_overflow=24, pool_pre_ping=True)
  except ImportError as error:
    raise UserError(
      f"{address.render_as_string()} needs {error.name}: pip install 'rlhf_jax[postgres]'."
    ) from error


def exists(engine: sa.Engine) -> bool:
  """False where the database is a file that is not there yet."""
  path = engine.url.database
  return engine.url.get_backend_name() != "sqlite" or pathlib.Path(path).exists()


def revision(engine: sa.Engine) -> str | None:
  """The migration that the tables stand at; None where there are none."""
  with reading(engine) as connection:
    return alembic.migration.MigrationContext.configure(connection).get_current_revision()


def newest_revision() -> str:
  """The migration that this package needs."""
  return alembic.script.ScriptDirectory(str(MIGRATIONS)).get_current_head()


def migrate(engine: sa.Engine) -> None:
  """Brings the tables to the newest revision, all or nothing; does nothing where they are there.

  Raises:
    UserError: the database is of a newer version of this package.
  """
  config = _config()
  with writing(engine, lock=LOCK_MIGRATION, exclusive=True) as connection:
    config.attributes["connection"] = connection
    try:
      alembic.command.upgrade(config, "head")
    except alembic.command.util.CommandError as error:
      raise UserError(
        f"{name_of(engine)} cannot be migrated: {error}. Was it written by a newer rlhf_jax?"
      ) from error


def new_revision(engine: sa.Engine, message: str) -> None:
  """Writes a migration from the tables there to `schema.metadata`, for a developer to mend."""
  config = _config()
  with reading(engine) as connection:
    config.attributes["connection"] = connection
    alembic.command.revision(config, message, autogenerate=True)


def drift(engine: sa.Engine) -> list:
  """What differs between the tables there and `schema.metadata`; [] where they agree."""
  with reading(engine) as connection:
    options = {"compare_type": True, "compare_server_default": True}
    context = alembic.migration.MigrationContext.configure(connection, opts=options)
    return alembic.autogenerate.compare_metadata(context, schema.metadata)


@contextlib.contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
  """One transaction that sees a single state and changes nothing.

  Raises:
    UserError: the database cannot be reached.
  """
  with _explained(engine), engine.connect() as connection:
    if connection.dialect.name == "postgresql":
      connection = connection.execution_options(
        isolation_level="REPEATABLE READ", postgresql_readonly=True
      )
    with connection.begin():
      yield connection


@contextlib.contextmanager
def writing(
  engine: sa.Engine, lock: int = LOCK_WRITES, exclusive: bool = False
) -> Iterator[sa.Connection]:
  """One transaction that is stored as a whole, or not at all where its block raises.

  SQLite has one writer at a time. In PostgreSQL many write together, but an `exclusive` one (a
  withdrawal, a migration) is alone, so that it misses nothing that is just being written.

  Raises:
    UserError: the database cannot be reached or written; nothing was stored.
  """
  with _explained(engine), engine.connect() as connection:
    connection = connection.execution_options(writes=True)
    with connection.begin():
      if connection.dialect.name == "postgresql":
        call = sa.func.pg_advisory_xact_lock if exclusive else sa.func.pg_advisory_xact_lock_shared
        connection.execute(sa.select(call(lock)))
      yield connection


def name_of(engine: sa.Engine) -> str:
  """Its URL, without the password."""
  return engine.url.render_as_string(hide_password=True)


def _config() -> alembic.config.Config:
  config = alembic.config.Config()
  config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
  return config


def _address(url: str) -> sa.URL:
  if "://" not in url:
    return sa.URL.create("sqlite", database=str(pathlib.Path(url).expanduser().absolute()))
  try:
    address = sa.make_url(url)
  except sa.exc.ArgumentError as error:
    raise UserError("the URL of the database cannot be read; sqlite:///FILE is one.") from error
  backend = address.get_backend_name()
  if backend == "postgres":
    raise UserError("a URL of PostgreSQL begins with postgresql://, not with postgres://.")
  if backend == "postgresql" and "+" not in address.drivername:
    return address.set(drivername="postgresql+psycopg")
  if backend == "sqlite" and address.database in (None, "", ":memory:"):
    raise UserError("a database in memory would lose people's records; give a file.")
  if backend not in ("sqlite", "postgresql"):
    raise UserError(f"records are kept in SQLite or PostgreSQL, not in {backend!r}.")
  return address


def _prepare_sqlite(connection, _) -> None:
  connection.isolation_level = None  # we begin transactions ourselves, see _begin_sqlite
  for pragma in (
    f"busy_timeout = {BUSY_SECONDS * 1000}",
    "journal_mode = WAL",  # readers and the writer do not wait for each other
    "synchronous = FULL",  # a commit that returned is on the disk
    "foreign_keys = ON",
    "secure_delete = ON",  # what a person withdraws is overwritten, not only unlinked
  ):
    connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
  """Writers take the lock at once: two that began by reading could never both go on."""
  writes = connection.get_execution_options().get("writes")
  connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def _explained(engine: sa.Engine) -> Iterator[None]:
  """What can go wrong outside the program, in words."""
  try:
    yield
  except (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.TimeoutError) as error:
    reason = getattr(error, "orig", None) or error
    raise UserError(
      f"{name_of(engine)} cannot be used: {str(reason).strip()}. Nothing was stored."
    ) from error
  except sa.exc.DatabaseError as error:
    if "not a database" not in str(error):
      raise
    raise UserError(
      f"{name_of(engine)} is a file of something else. Nothing was stored."
    ) from error
