"""The queue of tasks: overlap, leases, drafts, and many labelers at once."""

import collections
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading

import feedback_cases as cases
import pytest
import sqlalchemy as sa

from rlhf_jax.feedback import people, tasks
from rlhf_jax.feedback.labels import (
  Candidate,
  Comparison,
  Demonstration,
  Judgment,
  Skip,
  Task,
  Turn,
)
from rlhf_jax.feedback.store import Store
from rlhf_jax.types import UserError

FIRST = (Judgment(0, 6), Judgment(1, 2, ("opinion",)))
TIE = (Judgment(0), Judgment(0))
LABELERS = 20
ROOT = pathlib.Path(__file__).parents[1]


place, store = cases.place, cases.store  # fixtures: every test runs on each database


def take(store, labeler, **options):
  """The id of the labeler's next task to compare, or None."""
  assignment = tasks.next_task(store, labeler, "compare", **options)
  return assignment and assignment.task.id


def test_a_page_that_is_loaded_again_gets_the_same_task_and_its_draft(store):
  ann, bob = cases.labelers(store, 2)
  first, second = store.add_all([cases.compare_task(), cases.compare_task()])
  assert take(store, ann) == take(store, ann) == first
  assert take(store, bob) == second
  for draft in ({"ranks": [0, None]}, {"ranks": [0, 1], "note": cases.AWKWARD}):
    assert tasks.save_draft(store, ann, first, draft)
    assert tasks.next_task(store, ann, "compare").draft == draft
  assert tasks.next_task(store, bob, "compare").draft is None


def test_gold_ranks_are_not_shown_and_are_kept(store):
  (ann,) = cases.labelers(store, 1)
  task = cases.compare_task(gold=(0, 1))
  store.add(task)
  assert tasks.next_task(store, ann, "compare").task == dataclasses.replace(task, gold=None)
  assert store.get(task.id).gold == (0, 1)


def test_a_task_goes_to_as_many_different_labelers_as_its_overlap(store):
  names = cases.labelers(store, 4)
  task = store.add(cases.compare_task(overlap=3))
  for i, name in enumerate(names[:3]):
    assert take(store, name) == task
    tasks.submit_comparison(store, name, task, FIRST, submission=f"s{i}")
    assert take(store, name) is None  # nobody does it twice
  assert take(store, names[3]) is None
  assert {record.author for record in store.records(Comparison)} == set(names[:3])
  assert tasks.progress(store)["compare"] == tasks.Progress(1, 3, 3, 0, 0)


def test_the_next_task_is_found_without_a_look_at_all_that_wait_or_are_done(tmp_path):
  """Counted in instructions of SQLite's machine."""
  with Store.open(str(tmp_path / "a.db"), create=True) as store:
    ann, *others = cases.labelers(store, 4)
    counted = []
    count = lambda connection, *_: connection.set_progress_handler(lambda: counted.append(1), 1)
    sa.event.listen(store.engine, "checkout", count)

    def cost():
      counted.clear()
      assert take(store, others.pop()) is not None
      return len(counted)

    store.add_all(cases.compare_task() for _ in range(10))
    few = cost()
    store.add_all(cases.compare_task() for _ in range(400))
    many = cost()
    for number in range(200):
      tasks.submit_comparison(store, ann, take(store, ann), TIE, submission=f"s{number}")
    assert few > 100 and max(many, cost()) < 1.5 * few


def test_higher_priority_goes_first_then_what_came_first(store):
  (ann,) = cases.labelers(store, 1)
  made = [cases.compare_task(priority=p) for p in (0, 5, 5, -1)]
  store.add_all(made)
  order = []
  while task := take(store, ann):
    order.append(task)
    tasks.submit_comparison(store, ann, task, FIRST, submission=f"s{len(order)}")
  assert order == [made[i].id for i in (1, 2, 0, 3)]


def test_a_submission_becomes_a_comparison_with_the_tasks_texts(store):
  (ann,) = cases.labelers(store, 1)
  task = cases.compare_task(
    answers=(Candidate("A", "sft", None, {"temperature": 1.0}, 5), Candidate("B", "human"))
  )
  store.add(task)
  take(store, ann)
  options = {"seconds": 31.5, "presented": [1, 0], "note": "close"}
  id = tasks.submit_comparison(store, ann, task.id, FIRST, submission="s", **options)
  found = store.get(id)
  assert (found.conversation, found.author, found.task) == (cases.HELLO, ann, task.id)
  assert (found.seconds, found.presented, found.note) == (31.5, (1, 0), "close")
  better, worse = found.answers
  assert (better.text, better.writer, better.rank, better.quality) == ("A", "sft", 0, 6)
  assert (better.sampling, better.seed) == ({"temperature": 1.0}, 5)
  assert (worse.text, worse.rank, worse.flags) == ("B", 1, ("opinion",))


def test_a_tie_is_a_tie(store):
  (ann,) = cases.labelers(store, 1)
  task = store.add(cases.compare_task())
  take(store, ann)
  id = tasks.submit_comparison(store, ann, task, TIE, submission="s")
  assert [answer.rank for answer in store.get(id).answers] == [0, 0]


def test_the_same_submission_twice_is_one_record(store):
  (ann,) = cases.labelers(store, 1)
  task = store.add(cases.compare_task())
  take(store, ann)
  send = lambda judgments, id: tasks.submit_comparison(store, ann, task, judgments, submission=id)
  assert send(FIRST, "s") == send(FIRST, "s") == "s"
  assert len(store.records(Comparison)) == 1
  with pytest.raises(UserError, match="is taken"):
    send(TIE, "s")
  with pytest.raises(UserError, match="already"):
    send(TIE, "other")
  assert len(store.records(Comparison)) == 1


def test_a_demonstration_goes_on_from_the_dialogue_of_its_task(store):
  (ann,) = cases.labelers(store, 1)
  task = store.add(Task(author="lab", work="demonstrate", conversation=cases.HELLO))
  assert take(store, ann) is None
  assert tasks.next_task(store, ann, "demonstrate").task.id == task
  send = lambda *turns: tasks.submit_demonstration(
    store, ann, task, turns, submission="s", seconds=9
  )
  with pytest.raises(UserError, match="of the labeler's own"):
    send(Turn("user", "More?"))
  send(Turn("assistant", "Hi there!", suggestion="Hi!"))
  (record,) = store.records(Demonstration)
  assert record.conversation == cases.HELLO.with_reply("Hi there!")
  assert [turn.edit_distance for turn in record.turns] == [None, 6]
  assert record.turns[1].edit_fraction == 6 / 9


def test_a_skipped_task_goes_to_others_and_never_back(store):
  ann, bob = cases.labelers(store, 2)
  task = store.add(cases.compare_task())
  take(store, ann)
  for _ in range(2):
    tasks.skip(store, ann, task, "I know no French", submission="s")
  assert [(r.author, r.task, r.reason) for r in store.records(Skip)] == [
    (ann, task, "I know no French")
  ]
  assert take(store, ann) is None
  assert take(store, bob) == task


def test_a_lease_that_is_over_returns_to_the_pool(store):
  ann, bob, eve = cases.labelers(store, 3)
  task = store.add(cases.compare_task())
  assert take(store, ann, lease_seconds=-1) == task
  assert take(store, bob) == task
  assert take(store, eve) is None  # bob's lease is not over


def test_a_lease_that_is_over_and_that_nobody_took_is_still_the_labelers(store):
  (ann,) = cases.labelers(store, 1)
  task = store.add(cases.compare_task())
  take(store, ann, lease_seconds=-1)
  tasks.submit_comparison(store, ann, task, FIRST, submission="s")
  assert len(store.records(Comparison)) == 1


def test_a_submission_after_the_task_went_to_somebody_else_is_refused_and_kept_as_a_draft(store):
  ann, bob = cases.labelers(store, 2)
  task = store.add(cases.compare_task(overlap=1))
  take(store, ann, lease_seconds=-1)
  tasks.save_draft(store, ann, task, {"old": True})
  take(store, bob)
  with pytest.raises(tasks.LeaseLost, match="went to somebody else.*kept as your draft"):
    tasks.submit_comparison(store, ann, task, FIRST, submission="s", note="mine")
  assert store.records(Comparison) == []
  (draft,) = [row for row in cases.rows_of(store, "drafts") if row[1] == ann]
  assert "mine" in str(draft) and "opinion" in str(draft)
  assert not tasks.save_draft(store, ann, task, {"still": "kept"})
  tasks.submit_comparison(store, bob, task, TIE, submission="t")
  assert [record.author for record in store.records(Comparison)] == [bob]


def test_wrong_submissions_store_nothing_and_leave_the_assignment(store):
  ann, bob = cases.labelers(store, 2)
  task = store.add(cases.compare_task())
  take(store, ann)
  tasks.save_draft(store, ann, task, {"ranks": [0, 1]})
  for labeler, judgments, says in (
    (ann, FIRST[:1], "has 2 answers"),
    (ann, (Judgment(1), Judgment(2)), "begin at 0"),
    ("nobody", FIRST, "no active labeler"),
  ):
    with pytest.raises(UserError, match=says):
      tasks.submit_comparison(store, labeler, task, judgments, submission="s")
  with pytest.raises(UserError, match="is to compare"):
    tasks.submit_demonstration(store, ann, task, [Turn("assistant", "x")], submission="s")
  with pytest.raises(UserError, match="there is no task"):
    tasks.submit_comparison(store, ann, "gone", FIRST, submission="s")
  with pytest.raises(UserError, match="object of JSON"):
    tasks.save_draft(store, ann, task, [1])
  assert store.records(Comparison) == []
  assert tasks.next_task(store, ann, "compare").draft == {"ranks": [0, 1]}
  people.set_active(store, bob, False, author="lab")
  with pytest.raises(UserError, match="no active labeler"):
    take(store, bob)


def in_threads(works):
  """Runs all of these at once; raises what the first of them raised."""
  problems, start = [], threading.Barrier(len(works))

  def run(work):
    try:
      start.wait()
      work()
    except Exception as error:
      problems.append(error)

  threads = [threading.Thread(target=run, args=(work,)) for work in works]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if problems:
    raise problems[0]


def check_overlap(store, names, overlap):
  """Every task was done as often as it wanted, each time by somebody else."""
  done = collections.defaultdict(list)
  for record in store.records(Comparison):
    done[record.task].append(record.author)
  assert all(len(set(who)) == len(who) == overlap for who in done.values())
  assert {name for who in done.values() for name in who} <= set(names)
  return len(done)


def work_off(store, labeler):
  """Does tasks until none is left, loading each page twice."""
  count = 0
  while task := take(store, labeler):
    assert take(store, labeler) == task
    count += 1
    tasks.submit_comparison(store, labeler, task, TIE, submission=f"{labeler}-{count}")


def test_twenty_labelers_at_once_never_get_the_same_slot(store):
  names = cases.labelers(store, LABELERS)
  store.add_all([cases.compare_task(overlap=2) for _ in range(20)])
  in_threads([lambda name=name: work_off(store, name) for name in names])
  assert check_overlap(store, names, overlap=2) == 20
  slots = cases.rows_of(store, "slots")
  assert len(slots) == 40 and all(record for *_, record in slots)


def test_one_labeler_in_many_tabs_holds_one_assignment(store):
  (ann,) = cases.labelers(store, 1)
  store.add_all([cases.compare_task() for _ in range(8)])
  seen = []
  in_threads([lambda: seen.append(take(store, ann))] * 8)
  assert len(seen) == 8 and len(set(seen)) == 1


def test_twenty_labelers_who_want_one_slot_get_it_once(store):
  names = cases.labelers(store, LABELERS)
  store.add(cases.compare_task())
  seen = []
  in_threads([lambda name=name: seen.append(take(store, name)) for name in names])
  assert len([task for task in seen if task]) == 1


def test_drafts_saved_at_once_are_one_of_them(store):
  (ann,) = cases.labelers(store, 1)
  task = store.add(cases.compare_task())
  take(store, ann)
  in_threads([lambda i=i: tasks.save_draft(store, ann, task, {"i": i}) for i in range(8)])
  assert tasks.next_task(store, ann, "compare").draft["i"] in range(8)


WORKER = """
import sys
from rlhf_jax.feedback import tasks
from rlhf_jax.feedback.labels import Judgment
from rlhf_jax.feedback.store import Store
url, *names = sys.argv[1:]
sys.stdin.readline()
with Store.open(url) as store:
  count, left = 0, list(names)
  while left:
    for name in list(left):
      assignment = tasks.next_task(store, name, "compare")
      if assignment is None:
        left.remove(name)
        continue
      count += 1
      tasks.submit_comparison(
        store, name, assignment.task.id, (Judgment(0), Judgment(0)), submission=f"{name}-{count}"
      )
"""


def test_labelers_in_several_processes_never_get_the_same_slot(place):
  url = cases.new_database(*place)
  with Store.open(url, create=True) as store:
    names = cases.labelers(store, LABELERS)
    store.add_all([cases.compare_task(overlap=2) for _ in range(15)])
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    workers = [
      subprocess.Popen(
        [sys.executable, "-c", WORKER, url, *names[i::3]],
        env=environ,
        text=True,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
      for i in range(3)
    ]
    for worker in workers:
      worker.stdin.write("go\n")
      worker.stdin.flush()
    for worker in workers:
      _, said = worker.communicate(timeout=120)
      assert worker.returncode == 0, said
    assert check_overlap(store, names, overlap=2) == 15
