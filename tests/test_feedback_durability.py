"""A writer that is killed at any moment loses nothing that it was told is stored.

RLHF_JAX_KILLS says how often (default 3).
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import feedback_cases as cases
import pytest

from rlhf_jax.feedback import exchange
from rlhf_jax.feedback.store import Store

KILLS = int(os.environ.get("RLHF_JAX_KILLS", "3"))
ROOT = pathlib.Path(__file__).parents[1]

# Stores comparisons of nine answers and says each id once the store has it.
WRITER = """
import sys
from rlhf_jax.feedback.labels import Answer, Comparison
from rlhf_jax.feedback.store import Store
from rlhf_jax.text.messages import Conversation
store = Store.open(sys.argv[1])
hello = Conversation.of(("user", "Hello? " * 200))
answers = tuple(Answer(f"{i} " * 500, "sft", i) for i in range(9))
while True:
  record = Comparison(author="ann", conversation=hello, answers=answers)
  sys.stdout.write(store.add(record) + "\\n")
  sys.stdout.flush()
"""


@pytest.fixture(scope="module", params=cases.BACKENDS)
def place(request, tmp_path_factory):
  """A kind of database, and the folder where it is made."""
  if request.param == "sqlite":
    yield "sqlite", tmp_path_factory.mktemp("sqlite")
  else:
    with cases.postgres_server() as folder:
      yield "postgresql", folder


def test_every_acknowledged_record_survives_kill_9_and_none_is_half_written(place):
  url = cases.new_database(*place)
  rng = random.Random(0)
  acknowledged = []
  with Store.open(url, create=True) as store:
    for kill in range(KILLS):
      writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, url],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
      )
      acknowledged.append(writer.stdout.readline().strip())  # it is at work
      time.sleep(rng.uniform(0.0, 0.3))
      writer.send_signal(signal.SIGKILL)
      rest, _ = writer.communicate()
      acknowledged += rest.split()
      assert writer.returncode == -signal.SIGKILL, kill
    stored = {record.id: record for record in exchange.dump(store)}
    assert len(acknowledged) >= KILLS
    assert not set(acknowledged) - set(stored)
    assert all(len(record.answers) == 9 for record in stored.values())
    # A record that was being written when its writer died is there or not; never more than one.
    assert len(stored) <= len(acknowledged) + KILLS
    heads, answers = cases.rows_of(store, "records"), cases.rows_of(store, "answers")
    assert len(answers) == 9 * len(heads) == 9 * len(stored)
    if place[0] == "sqlite":
      with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
