"""Withdrawal: what a person said is gone from every place, and what is left says so."""

import threading

import feedback_cases as cases
import pytest
import sqlalchemy as sa

from rlhf_jax.feedback import conversations, exchange, lineage, people, tasks, training, withdrawal
from rlhf_jax.feedback.labels import Answer, Candidate, Comparison, Demonstration, Judgment, Turn
from rlhf_jax.feedback.records import ChatMessage, Feedback, HarmReport, Labeler
from rlhf_jax.feedback.store import Store, insert
from rlhf_jax.types import UserError

SECRET = "my sister Xanthippe lives at 7 Rue Morgue"


place, store = cases.place, cases.store  # fixtures: every test runs on each database


def everywhere(store):
  """Every value in the database, as one text."""
  tables = sa.inspect(store.engine).get_table_names()
  return "\n".join(str(cases.rows_of(store, table)) for table in tables)


def life_of(store, person):
  """What a person leaves behind, and what others say of it; returns their ids, and others'."""
  theirs = [
    ask := ChatMessage(author=person, conversation="c", role="user", content=SECRET),
    reply := ChatMessage(
      author=person, conversation="c", parent=ask.id, role="assistant", content=SECRET
    ),
    Feedback(author=person, message=reply.id, thumb="up", text=SECRET),
    Demonstration(author=person, turns=(Turn("user", SECRET), Turn("assistant", "Oh."))),
    # Others on their words:
    Feedback(author="bob", message=reply.id, thumb="down", ideal=SECRET),
    HarmReport(author="bob", message=reply.id, text=SECRET),
    task := cases.compare_task(message=ask.id, instructions=SECRET),
    Comparison(author="bob", conversation=cases.HELLO, answers=ranked(), task=task.id),
    Comparison(author="bob", conversation=cases.HELLO, answers=ranked(), message=ask.id),
    Comparison(author="bob", conversation=cases.HELLO, answers=ranked(person)),
    cases.compare_task(answers=(Candidate(SECRET, person), Candidate("B", "sft"))),
  ]
  others = [
    mine := ChatMessage(author="bob", conversation="d", role="user", content="Hello?"),
    ChatMessage(author="bob", conversation="d", parent=mine.id, role="assistant", content="Hi."),
    cases.compare_task(),
    Comparison(author="bob", conversation=cases.HELLO, answers=ranked("bob")),
  ]
  store.add_all(theirs + others)
  return [r.id for r in theirs], [r.id for r in others]


def ranked(writer="bob"):
  return (Answer(SECRET if writer != "bob" else "A", writer, 0), Answer("B", writer, 1))


def test_nothing_of_a_person_is_left_and_everything_of_others(store):
  theirs, others = life_of(store, "ann")
  kept = [store.get(id) for id in others]
  assert sum(withdrawal.preview(store, "ann").values()) == len(theirs)
  record = withdrawal.withdraw(store, "ann", author="lab")
  assert [stone.record for stone in record.tombstones] == theirs
  assert SECRET not in everywhere(store)
  assert "ann" not in everywhere(store)
  assert [store.get(id) for id in others] == kept
  for id in theirs:
    with pytest.raises(UserError, match="was withdrawn"):
      store.get(id)


def test_later_reads_and_exports_never_return_what_was_withdrawn(store, tmp_path):
  life_of(store, "ann")
  withdrawal.withdraw(store, "ann", author="lab")
  exchange.write(tmp_path / "all.jsonl", (r.to_json() for r in exchange.dump(store)))
  exchange.write_training(tmp_path / "c.jsonl", training.comparisons(store))
  exchange.write_training(tmp_path / "d.jsonl", training.demonstrations(store))
  for name in ("all.jsonl", "c.jsonl", "d.jsonl"):
    assert SECRET not in (tmp_path / name).read_text()
  assert len(training.comparisons(store)) == 1
  assert training.demonstrations(store) == []
  assert conversations.of_person(store, "ann") == []


def test_lineage_still_says_that_a_withdrawn_record_trained_a_policy(store):
  theirs, others = life_of(store, "ann")
  policy = lineage.register(store, "rm", "x", {}, author="lab")
  ids = [theirs[7], others[3]]
  lineage.mark_used(store, policy, ids, "reward", author="lab")
  record = withdrawal.withdraw(store, "ann", author="lab")
  found = {use.record: use.withdrawn_at for use in lineage.uses(store, policy=policy)}
  assert found == {ids[0]: record.created_at, ids[1]: None}
  (stone,) = [s for s in record.tombstones if s.record == ids[0]]
  assert (stone.of, record.author) == ("comparison", "lab")


def test_a_labelers_name_token_drafts_and_places_go_too(store):
  ann, token = people.add_labeler(store, "Xanthippe", "labeler", author="lab")
  (bob,) = cases.labelers(store, 1)
  people.set_active(store, ann.id, True, author="lab", reason="Xanthippe is back")
  done, open_one = store.add_all([cases.compare_task(), cases.compare_task()])
  tasks.next_task(store, ann.id, "compare")
  judged = (Judgment(0), Judgment(1))
  tasks.submit_comparison(store, ann.id, done, judged, submission="s")
  tasks.next_task(store, ann.id, "compare")
  tasks.save_draft(store, ann.id, open_one, {"note": SECRET})
  withdrawal.withdraw(store, ann.id, author=ann.id)
  assert people.authenticate(store, token) is None
  assert "Xanthippe" not in everywhere(store) and SECRET not in everywhere(store)
  slots = cases.rows_of(store, "slots") + cases.rows_of(store, "tokens")
  assert ann.id not in str(slots)
  assert [labeler.id for labeler in store.records(Labeler)] == [bob]
  for task in (done, open_one):  # both are free again
    assert tasks.next_task(store, bob, "compare").task.id == task
    tasks.submit_comparison(store, bob, task, judged, submission=f"of-{task}")


def test_what_was_withdrawn_cannot_be_stored_again_nor_referred_to(store):
  ask = ChatMessage(author="ann", conversation="c", role="user", content=SECRET)
  store.add(ask)
  withdrawal.withdraw(store, "ann", author="lab")
  with pytest.raises(UserError, match="withdrawn"):
    store.add(ask)
  with pytest.raises(UserError, match="withdrawn"):
    store.add(ChatMessage(author="ann", conversation="c", parent=ask.id, role="user", content="x"))
  assert SECRET not in everywhere(store)


def test_withdrawing_nobody_is_an_error_and_changes_nothing(store):
  life_of(store, "ann")
  before = everywhere(store)
  for nobody in ("carl", "", "' OR 1=1 --"):
    with pytest.raises(UserError, match="no record holds anything"):
      withdrawal.withdraw(store, nobody, author="lab")
  assert everywhere(store) == before


def test_a_withdrawal_waits_for_what_is_just_being_written_and_takes_it_too(store):
  ask = ChatMessage(author="ann", conversation="c", role="user", content="Hello?")
  reply = ChatMessage(author="ann", conversation="c", parent=ask.id, role="assistant", content="Hi")
  store.add_all([ask, reply])
  late = Feedback(author="bob", message=reply.id, thumb="down", text=SECRET)
  withdrawn = []
  work = lambda: withdrawn.append(withdrawal.withdraw(store, "ann", author="lab"))
  thread = threading.Thread(target=work)
  with store.writing() as connection:
    insert(connection, late)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
  thread.join(30)
  assert late.id in [stone.record for stone in withdrawn[0].tombstones]
  assert SECRET not in everywhere(store)


def test_a_withdrawal_reaches_a_store_that_imports_it(store, place):
  theirs, others = life_of(store, "ann")
  with Store.open(cases.new_database(*place), create=True) as copy:
    exchange.load(copy, exchange.dump(store))
    assert SECRET in everywhere(copy)
    withdrawal.withdraw(store, "ann", author="lab")
    exchange.load(copy, exchange.dump(store))
    assert SECRET not in everywhere(copy)
    assert exchange.dump(copy) == exchange.dump(store)
    assert copy.get(others[0]) == store.get(others[0])


def test_the_bytes_of_a_withdrawn_text_leave_the_sqlite_file(tmp_path):
  path = tmp_path / "feedback.db"
  files = lambda: b"".join(p.read_bytes() for p in sorted(tmp_path.iterdir()))
  with Store.open(str(path), create=True) as store:
    life_of(store, "ann")
    assert SECRET.encode() in files()
    withdrawal.withdraw(store, "ann", author="lab")
    assert SECRET.encode() not in files()
    assert b"Hello?" in files()
