"""Stores to test on, SQLite and PostgreSQL, and one record of each kind to put into them."""

import contextlib
import itertools
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import tempfile
import time

import pytest
import sqlalchemy as sa

from rlhf_jax.feedback import people
from rlhf_jax.feedback.labels import Answer, Candidate, Comparison, Demonstration, Skip, Task, Turn
from rlhf_jax.feedback.records import (
  Activation,
  CategoryScore,
  ChatMessage,
  Feedback,
  HarmReport,
  Labeler,
  Policy,
  Use,
  UsedRecord,
  Verdict,
  VerdictReport,
)
from rlhf_jax.feedback.store import Store
from rlhf_jax.text.messages import Conversation

BACKENDS = ("sqlite", "postgresql")
HELLO = Conversation.of(("user", "Hello?"))
# What breaks stores that paste texts into statements, or count bytes for characters.
AWKWARD = "'; DROP TABLE records; -- \" %s :x {0} \\ \x1a \u202e 🦊 é́ \r\n\t </script>"
_names = itertools.count()


def find_postgres() -> pathlib.Path | None:
  """The folder of PostgreSQL's programs: that on the path, or the newest that Debian installed."""
  on_path = shutil.which("initdb")
  places = [pathlib.Path(on_path).resolve().parent] if on_path else []
  places += sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
  complete = (p for p in places if (p / "postgres").exists() and (p / "initdb").exists())
  return next(complete, None)


@contextlib.contextmanager
def postgres_server():
  """A server of our own on a socket in a temporary folder; yields the folder of the socket.

  It forgets what a power cut would cost, which makes tests fast.
  """
  programs = find_postgres()
  if programs is None:
    pytest.skip("PostgreSQL's initdb and postgres are not installed")
  as_user = {}
  folder = pathlib.Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # sockets have short paths
  if os.getuid() == 0:  # as whom PostgreSQL refuses to run
    try:
      entry = pwd.getpwnam("postgres")
    except KeyError:
      pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_user}
  data = folder / "data"
  subprocess.run(
    [programs / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync"],
    check=True,
    **quiet,
  )
  settings = ["fsync=off", "listen_addresses=", f"unix_socket_directories={folder}"]
  settings += ["max_connections=80"]
  arguments = [part for setting in settings for part in ("-c", setting)]
  server = subprocess.Popen([programs / "postgres", "-D", data, *arguments], **quiet)
  try:
    _wait_for(folder)
    yield folder
  finally:
    server.send_signal(signal.SIGINT)  # fast: it does not wait for connections to end
    server.wait(20)
    shutil.rmtree(folder)


def _wait_for(folder: pathlib.Path) -> None:
  engine = sa.create_engine(f"postgresql+psycopg://tests@/postgres?host={folder}")
  for _ in range(400):
    try:
      engine.connect().close()
      break
    except sa.exc.OperationalError:
      time.sleep(0.05)
  engine.dispose()


def new_database(backend: str, folder: pathlib.Path) -> str:
  """The URL of an empty database: a file in `folder`, or one of the server whose folder it is."""
  name = f"test_{next(_names)}"
  if backend == "sqlite":
    return f"sqlite:///{folder}/{name}.db"
  engine = sa.create_engine(f"postgresql+psycopg://tests@/postgres?host={folder}")
  with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
    connection.execute(sa.text(f"CREATE DATABASE {name}"))
  engine.dispose()
  return f"postgresql://tests@/{name}?host={folder}"


def one_of_each(author="ann", other="bob") -> list:
  """A record of every kind but `Withdrawal`, later ones refer to earlier ones."""
  policy = Policy(author="lab", name="sft", checkpoint="runs/x/sft", lineage={"round": 0, "é": [1]})
  labeler = Labeler(author="lab", id=author, name="Ann", role="labeler")
  active = Activation(author="lab", labeler=author, active=True, reason="passed screening")
  ask = ChatMessage(author=author, conversation="c1", role="user", content=AWKWARD)
  reply = ChatMessage(
    author=author,
    conversation="c1",
    parent=ask.id,
    role="assistant",
    content="Yes.",
    policy=policy.id,
    sampling={"temperature": 0.7, "top_p": 1},
    seed=2**63 - 1,
    stopped=True,
  )
  task = Task(
    author="lab",
    work="compare",
    conversation=HELLO,
    answers=(Candidate("A", "sft", policy.id, {"temperature": 1.0}, 3), Candidate("B", "human")),
    instructions=AWKWARD,
    overlap=3,
    gold=(0, 0),
    priority=-2,
    message=ask.id,
  )
  begun = Task(author="lab", work="demonstrate")
  written = Demonstration(
    author=author,
    turns=(
      Turn("user", "Sing."),
      Turn("assistant", "La la.", suggestion="La.", suggested_by=policy.id),
    ),
    task=begun.id,
    seconds=12.25,
  )
  ranked = Comparison(
    author=other,
    conversation=HELLO,
    answers=(
      Answer("A", "sft", 1, 3, ("hallucination", "opinion"), policy.id, {"temperature": 1.0}, 3),
      Answer("B", "human", 0, 7),
      Answer("C", "human", 1),
    ),
    presented=(2, 0, 1),
    seconds=0.1 + 0.2,
    note=AWKWARD,
    task=task.id,
    message=ask.id,
  )
  verdict = Verdict(
    author=author,
    message=reply.id,
    direction="output",
    scores=(CategoryScore("violence", 0.1, 0.5), CategoryScore("hate", 1 / 3, 0.25)),
    flagged=True,
    action="warn",
    model="moderation-1",
  )
  feedback = Feedback(
    author=other, message=reply.id, thumb="down", tags=("untrue",), text=AWKWARD, ideal="No."
  )
  return [
    *(policy, labeler, active, ask, reply, task, begun, written, ranked, verdict, feedback),
    Verdict(
      author=other,
      text=AWKWARD,
      direction="input",
      scores=(CategoryScore("hate", 0.0, 1.0),),
      flagged=False,
      action="none",
      model="moderation-1",
    ),
    VerdictReport(
      author=other,
      verdict=verdict.id,
      mistake="false_positive",
      category="hate",
      score=1 / 3,
      threshold=0.25,
      text="it is not",
    ),
    HarmReport(author=other, message=reply.id, category="hate", text=AWKWARD),
    Skip(author=other, task=task.id, reason=AWKWARD, seconds=3),
    Use(
      author="lab",
      policy=policy.id,
      stage="reward",
      records=(UsedRecord(ranked.id), UsedRecord(feedback.id)),
    ),
  ]


def compare_task(**changes) -> Task:
  """A task to rank two answers."""
  values = {
    "author": "lab",
    "work": "compare",
    "conversation": HELLO,
    "answers": (Candidate("A", "sft"), Candidate("B", "sft")),
  }
  return Task(**values | changes)


def labelers(store: Store, number: int) -> list[str]:
  """The ids of so many new labelers."""
  return [
    people.add_labeler(store, f"labeler-{i}", "labeler", author="lab")[0].id for i in range(number)
  ]


def rows_of(store: Store, table: str) -> list[tuple]:
  """A table as it stands in the database, read by plain SQL."""
  with store.engine.connect() as connection:
    return [tuple(row) for row in connection.execute(sa.text(f"SELECT * FROM {table}"))]


@pytest.fixture(scope="module", params=BACKENDS)
def place(request, tmp_path_factory):
  """A kind of database, and the folder where it is made."""
  if request.param == "sqlite":
    yield "sqlite", tmp_path_factory.mktemp("sqlite")
  else:
    with postgres_server() as folder:
      yield "postgresql", folder


@pytest.fixture
def store(place):
  with Store.open(new_database(*place), create=True) as opened:
    yield opened
