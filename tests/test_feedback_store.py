"""The store: what goes in comes out, nothing is changed, and what is wrong is refused."""

import dataclasses
import re
import threading

import feedback_cases as cases
import pytest
import sqlalchemy as sa

from rlhf_jax.feedback import conversations, lineage, people, tasks
from rlhf_jax.feedback.labels import Answer, Comparison, Demonstration, Judgment, Task, Turn
from rlhf_jax.feedback.records import (
  KINDS,
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
  from_json,
)
from rlhf_jax.feedback.store import Store
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

place, store = cases.place, cases.store  # fixtures: every test runs on each database


@pytest.fixture
def file_store(tmp_path):
  with Store.open(str(tmp_path / "feedback.db"), create=True) as opened:
    yield opened


def everything(store):
  return {t: cases.rows_of(store, t) for t in sa.inspect(store.engine).get_table_names()}


def test_a_record_of_every_kind_comes_back_as_it_went_in(store):
  records = cases.one_of_each()
  assert {record.kind for record in records} == set(KINDS) - {"withdrawal"}
  assert store.add_all(records) == [record.id for record in records]
  for record in records:
    assert store.get(record.id) == record
    assert record in store.records(type(record))


def test_a_record_is_there_for_who_opens_the_store_next(place):
  url = cases.new_database(*place)
  record = cases.one_of_each()[0]
  with Store.open(url, create=True) as store:
    store.add(record)
  with Store.open(url) as store:
    assert store.get(record.id) == record


def test_texts_that_look_like_sql_are_stored_verbatim(store):
  ask = ChatMessage(author="ann", conversation="c", role="user", content=cases.AWKWARD)
  store.add(ask)
  found = [row for row in cases.rows_of(store, "messages") if cases.AWKWARD in row]
  assert len(found) == 1
  assert store.records(ChatMessage, content=cases.AWKWARD) == [ask]
  assert store.records(ChatMessage, author="' OR 1=1 --") == []


@pytest.mark.parametrize("kind", [record.kind for record in cases.one_of_each()])
def test_json_of_a_record_is_the_record(kind):
  for record in cases.one_of_each():
    if record.kind == kind:
      assert from_json(record.to_json()) == record


def test_the_same_record_twice_is_one_record(store):
  record = Policy(author="lab", name="p", checkpoint="x", lineage={})
  later = dataclasses.replace(record, created_at="2030-01-01T00:00:00.000000Z")
  assert store.add(record) == store.add(record) == store.add(later)
  assert store.records(Policy) == [record]


def test_the_same_record_from_many_threads_is_one_record(store):
  record = Policy(author="lab", name="p", checkpoint="x", lineage={})
  problems = []

  def add():
    try:
      store.add(record)
    except Exception as error:
      problems.append(error)

  threads = [threading.Thread(target=add) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not problems
  assert store.records(Policy) == [record]


def test_an_id_that_is_taken_is_refused_and_the_first_record_stays(store):
  record = Policy(author="lab", name="p", checkpoint="x", lineage={})
  store.add(record)
  before = everything(store)
  for other in (
    dataclasses.replace(record, checkpoint="y"),
    Labeler(author="lab", id=record.id, name="Ann", role="labeler"),
  ):
    with pytest.raises(UserError, match="is taken"):
      store.add(other)
  assert everything(store) == before


def test_of_several_records_all_are_stored_or_none(store):
  good = Policy(author="lab", name="p", checkpoint="x", lineage={})
  bad = ChatMessage(author="ann", conversation="c", parent="gone", role="user", content="x")
  before = everything(store)
  with pytest.raises(UserError, match="there is no message"):
    store.add_all([good, bad])
  assert everything(store) == before


def test_a_correction_takes_the_place_of_what_it_supersedes(store):
  ask, reply = tree(store)
  first = Feedback(author="ann", message=reply, thumb="up")
  second = Feedback(author="ann", message=reply, thumb="down", supersedes=first.id)
  store.add_all([first, second])
  assert store.records(Feedback) == [second]
  assert store.records(Feedback, superseded=True) == [first, second]
  assert store.get(first.id) == first
  with pytest.raises(UserError, match=f"supersede {second.id}"):
    store.add(Feedback(author="ann", message=reply, thumb="up", supersedes=first.id))
  third = Feedback(author="ann", message=reply, thumb="up", supersedes=second.id)
  store.add(third)
  assert store.records(Feedback) == [third]
  with pytest.raises(UserError, match="a feedback is needed"):
    store.add(Feedback(author="ann", message=reply, thumb="up", supersedes=ask))


def test_records_are_corrected_by_their_author_or_a_researcher_only(store):
  _, reply = tree(store)
  first = Feedback(author="ann", message=reply, thumb="up")
  eve = people.add_labeler(store, "eve", "labeler", author="lab")[0].id
  boss = people.add_labeler(store, "boss", "researcher", author="lab")[0].id
  store.add(first)
  correction = Feedback(author=eve, message=reply, thumb="down", supersedes=first.id)
  with pytest.raises(UserError, match="by its author or by a researcher"):
    store.add(correction)
  store.add(dataclasses.replace(correction, author=boss))
  assert [record.author for record in store.records(Feedback)] == [boss]


def tree(store):
  """A question and its answer, as ids."""
  ask = ChatMessage(author="ann", conversation="c", role="user", content="Hello?")
  reply = ChatMessage(
    author="ann", conversation="c", parent=ask.id, role="assistant", content="Hi."
  )
  store.add_all([ask, reply])
  return ask.id, reply.id


def test_nothing_but_drafts_and_slots_is_ever_updated_or_deleted(store):
  seen = []
  sa.event.listen(
    store.engine,
    "before_cursor_execute",
    lambda _, __, statement, *___: seen.append(" ".join(statement.split())),
  )
  store.add_all(cases.one_of_each(author="zoe"))
  ask, reply = tree(store)
  first = Feedback(author="ann", message=reply, thumb="up")
  store.add_all([first, Feedback(author="ann", message=reply, thumb="down", supersedes=first.id)])
  again = ChatMessage(author="ann", conversation="c", parent=ask, role="assistant", content="Yo.")
  store.add(again)
  conversations.prefer(store, reply, again.id, "tie", author="ann")
  (one, two) = cases.labelers(store, 2)
  people.set_active(store, two, False, author="lab")
  people.new_token(store, one)
  for _ in range(2):
    store.add(cases.compare_task(priority=5))
  task = tasks.next_task(store, one, "compare").task.id
  tasks.save_draft(store, one, task, {"a": 1})
  tasks.save_draft(store, one, task, {"a": 2})
  tasks.submit_comparison(store, one, task, (Judgment(0), Judgment(1)), submission="s1")
  task = tasks.next_task(store, one, "compare").task.id
  tasks.skip(store, one, task, "no idea", submission="s2")
  changes = [s for s in seen if not re.match(r"SELECT|INSERT|WITH|BEGIN|PRAGMA|SHOW", s)]
  assert {re.match(r"(UPDATE|DELETE FROM) (\w+)", s)[2] for s in changes} == {"slots", "drafts"}
  assert any(s.startswith("INSERT INTO comparisons") for s in seen)


def test_edits_and_regenerations_are_siblings_and_a_branch_is_its_path(store):
  say = lambda parent, role, content: store.add(
    ChatMessage(author="ann", conversation="c", parent=parent, role=role, content=content)
  )
  system = say(None, "system", "Be kind.")
  ask = say(system, "user", "Hi")
  edited = say(system, "user", "Hello")
  hey, ho = say(ask, "assistant", "Hey"), say(ask, "assistant", "Ho")
  more = say(ho, "user", "Go on")
  texts = lambda id: [m.content for m in conversations.branch(store, id)]
  assert texts(more) == ["Be kind.", "Hi", "Ho", "Go on"]
  assert texts(hey) == ["Be kind.", "Hi", "Hey"]
  assert texts(edited) == ["Be kind.", "Hello"]
  assert conversations.conversation(store, edited) == Conversation.of(
    ("system", "Be kind."), ("user", "Hello")
  )
  assert [m.content for m in store.records(ChatMessage, parent=ask)] == ["Hey", "Ho"]
  assert len(store.records(ChatMessage, conversation="c")) == 6


def test_a_person_sees_their_conversations_newest_first(store):
  for conversation in ("a", "b", "a"):
    store.add(ChatMessage(author="ann", conversation=conversation, role="user", content="x"))
  store.add(ChatMessage(author="bob", conversation="z", role="user", content="x"))
  assert conversations.of_person(store, "ann") == ["a", "b"]


@pytest.mark.parametrize(
  ("choice", "ranks"), [("first", (0, 1)), ("second", (1, 0)), ("tie", (0, 0))]
)
def test_a_preference_in_the_chat_is_a_comparison(store, choice, ranks):
  policy = lineage.register(store, "ppo", "x", {}, author="lab")
  ask, reply = tree(store)
  again = ChatMessage(
    author="ann",
    conversation="c",
    parent=ask,
    role="assistant",
    content="Yo.",
    policy=policy,
    seed=4,
    sampling={"temperature": 1.0},
  )
  store.add(again)
  ids = {
    conversations.prefer(store, reply, again.id, choice, author="ann", submission="one")
    for _ in range(2)
  }
  (record,) = store.records(Comparison)
  assert ids == {record.id} == {"one"}
  assert (record.source, record.message, record.conversation) == ("chat", ask, cases.HELLO)
  assert tuple(answer.rank for answer in record.answers) == ranks
  assert [answer.writer for answer in record.answers] == ["ann", "ppo"]
  assert (record.answers[1].policy, record.answers[1].seed) == (policy, 4)
  for pair in ((ask, reply), (reply, reply)):
    with pytest.raises(UserError, match="not two answers"):
      conversations.prefer(store, *pair, choice, author="ann")


def test_only_the_newest_token_of_an_active_labeler_opens_the_door(store):
  labeler, token = people.add_labeler(store, "Ann", "labeler", author="lab")
  assert people.authenticate(store, token) == labeler
  for wrong in ("", token[:-1], token + "x", labeler.id, "\ud800"):
    assert people.authenticate(store, wrong) is None
  newer = people.new_token(store, labeler.id)
  assert people.authenticate(store, token) is None
  assert people.authenticate(store, newer) == labeler
  people.set_active(store, labeler.id, False, author="lab", reason="left")
  assert people.authenticate(store, newer) is None
  people.set_active(store, labeler.id, True, author="lab")
  assert people.authenticate(store, newer) == labeler
  assert not any(token in str(row) or newer in str(row) for row in cases.rows_of(store, "tokens"))
  with pytest.raises(UserError, match="already"):
    people.add_labeler(store, "Ann", "labeler", author="lab")
  assert people.find(store, "Ann") == people.find(store, labeler.id) == labeler
  with pytest.raises(UserError, match="there are: Ann"):
    people.find(store, "Bob")


def test_lineage_names_what_trained_a_policy(store):
  records = cases.one_of_each()
  store.add_all(records[:-1])
  ids = [record.id for record in records if record.kind in ("comparison", "feedback")]
  first, second = (
    lineage.register(store, name, "x", {"round": 1}, author="lab") for name in ("one", "two")
  )
  assert lineage.register(store, "one", "x", {"round": 1}, author="lab") == first != second
  lineage.mark_used(store, first, ids, "reward", author="lab")
  lineage.mark_used(store, second, ids[:1], "ppo", author="lab")
  parts = [(u.record, u.policy, u.stage, u.withdrawn_at) for u in lineage.uses(store)]
  assert sorted(parts) == sorted(
    [(id, first, "reward", None) for id in ids] + [(ids[0], second, "ppo", None)]
  )
  assert {u.policy for u in lineage.uses(store, record=ids[1])} == {first}
  assert [u.record for u in lineage.uses(store, policy=second)] == ids[:1]


@pytest.mark.conformance("A67")
def test_a_report_on_the_filter_holds_verdict_category_score_and_threshold(store):
  records = [record for record in cases.one_of_each() if record.kind != "verdict_report"]
  store.add_all(records)
  verdict = next(r for r in records if r.kind == "verdict" and r.message)
  report = VerdictReport(
    author="ann", verdict=verdict.id, mistake="false_negative", category="violence"
  )
  stored = store.get(store.add(report))
  assert (stored.verdict, stored.mistake) == (verdict.id, "false_negative")
  assert (stored.category, stored.score, stored.threshold) == ("violence", 0.1, 0.5)
  store.add(report)  # sent twice
  assert store.records(VerdictReport) == [stored]
  for change, says in (
    ({"category": "sloth"}, "it has: violence, hate"),
    ({"score": 0.9, "threshold": 0.5}, "the score 0.1 at"),
  ):
    with pytest.raises(UserError, match=says):
      store.add(dataclasses.replace(report, id="other", **change))


A, B = (Answer(text, "x", rank) for rank, text in enumerate("ab"))
GOOD = {"author": "ann"}
COMPARED = GOOD | {"conversation": cases.HELLO}
SCORED = (CategoryScore("hate", 0.5, 0.5),)
VERDICT = {"direction": "input", "flagged": False, "action": "none", "model": "m", **GOOD}
WRONG = [
  (lambda: Comparison(**COMPARED, answers=(A,)), "2 to 32 answers"),
  (lambda: Comparison(**COMPARED, answers=(B, B)), "begin at 0"),
  (lambda: Comparison(**COMPARED, answers=(A, Answer("b", "x", 2))), "leave none out"),
  (lambda: Comparison(**COMPARED, answers=(A, B), presented=(0, 0)), "each of the 2 answers"),
  (lambda: Comparison(**COMPARED, answers=(A, B), seconds=-1), "outside"),
  (lambda: Comparison(**COMPARED, answers=(A, B), seconds=float("nan")), "finite"),
  (
    lambda: Comparison(**GOOD, answers=(A, B), conversation=cases.HELLO.with_reply("Hi")),
    "end with the user's",
  ),
  (lambda: Answer("a", "x", 0, quality=8), r"outside \[1, 7\]"),
  (lambda: Answer("a", "x", 0, quality=True), "int"),
  (lambda: Answer("a", "x", -1), "outside"),
  (lambda: Answer("a", "x", 0, flags=("rude",)), "fails_task"),
  (lambda: Judgment(0, flags=("opinion", "opinion")), "once"),
  (lambda: Answer("a" * 100_001, "x", 0), "100001 characters"),
  (lambda: Answer("half \ud83e", "x", 0), "surrogate"),
  (lambda: Answer("nul \0", "x", 0), "NUL"),
  (lambda: Answer(None, "x", 0), "must be text"),
  (lambda: Feedback(**GOOD, message="m", thumb="sideways"), "up, down"),
  (lambda: Feedback(**GOOD, message="m", thumb="up", tags=("harmful", "harmful")), "once"),
  (lambda: Feedback(**GOOD, message="m", thumb="up", ideal="  "), "ideal"),
  (lambda: Feedback(author="a b", message="m", thumb="up"), "letters"),
  (lambda: Feedback(author="", message="m", thumb="up"), "letters"),
  (lambda: HarmReport(author="ann", message="m", created_at="yesterday"), "UTC"),
  (lambda: ChatMessage(**GOOD, conversation="c", role="robot", content="x"), "assistant"),
  (
    lambda: ChatMessage(**GOOD, conversation="c", role="user", content="x", sampling={"t": 1e999}),
    "JSON",
  ),
  (
    lambda: ChatMessage(
      **GOOD, conversation="c", role="user", content="x", sampling={"t": "a" * 70_000}
    ),
    "characters as JSON",
  ),
  (
    lambda: ChatMessage(**GOOD, conversation="c", role="assistant", content="x", seed=2**63),
    "outside",
  ),
  (
    lambda: ChatMessage(**GOOD, conversation="c", role="user", content="x", policy="p"),
    "by the user",
  ),
  (lambda: Demonstration(**GOOD, turns=(Turn("user", "Hi"),)), "assistant's turn"),
  (lambda: Demonstration(**GOOD, turns=(Turn("assistant", " "),)), "assistant's turn"),
  (
    lambda: Demonstration(**GOOD, turns=(Turn("assistant", "a"), Turn("system", "b"))),
    "only the first",
  ),
  (lambda: Turn("user", "a", edit_distance=3), "without a suggestion"),
  (lambda: Verdict(**VERDICT, scores=SCORED), "exactly one"),
  (lambda: Verdict(**VERDICT, scores=SCORED, text="a", message="b"), "exactly one"),
  (lambda: Verdict(**VERDICT, scores=SCORED * 2, text="a"), "each category"),
  (lambda: Verdict(**VERDICT, scores=(), text="a"), "each category"),
  (lambda: CategoryScore("hate", 1.5, 0.5), "outside"),
  (lambda: Task(**GOOD, work="compare"), "needs the conversation"),
  (lambda: Task(**GOOD, work="demonstrate", gold=(0,)), "no answers"),
  (lambda: cases.compare_task(gold=(0,)), "gold"),
  (lambda: cases.compare_task(gold=(1, 2)), "begin at 0"),
  (lambda: cases.compare_task(overlap=0), "outside"),
  (lambda: Use(**GOOD, policy="p", stage="sft", records=()), "at least one"),
  (lambda: Use(**GOOD, policy="p", stage="sft", records=(UsedRecord("r"),) * 2), "twice"),
  (lambda: Policy(**GOOD, name="", checkpoint="x", lineage={}), "1 to 400"),
  (lambda: Policy(**GOOD, name="x", checkpoint="x", lineage=[1]), "object of JSON"),
  (lambda: from_json({"kind": "gossip"}), "a record's kind"),
  (lambda: from_json([1]), "a record's kind"),
  (lambda: from_json({"kind": "feedback", "author": "a", "thumb": "up"}), "missing .'message'"),
  (
    lambda: from_json({"kind": "feedback", "author": "a", "thumb": "up", "message": "m", "x": 1}),
    "unknown .'x'",
  ),
]


@pytest.mark.parametrize(("make", "says"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_make_no_record(make, says):
  with pytest.raises(UserError, match=says):
    make()


def test_records_that_do_not_fit_the_store_leave_it_as_it_was(store):
  ask, reply = tree(store)
  before = everything(store)
  child = {"author": "ann", "role": "user", "content": "x"}
  for record, says in (
    (Feedback(author="ann", message="gone", thumb="up"), "there is no message"),
    (Feedback(author="ann", message=ask, thumb="up"), "answer of the assistant"),
    (ChatMessage(**child, conversation="other", parent=ask), "is of conversation"),
    (HarmReport(author="ann", message=reply, supersedes=ask), "is a message"),
    (
      ChatMessage(author="a", conversation="c", role="assistant", content="x", policy=ask),
      "where a policy is needed",
    ),
    (Comparison(**COMPARED, answers=(A, Answer("b", "x", 1, policy="gone"))), "no policy"),
  ):
    with pytest.raises(UserError, match=says):
      store.add(record)
    assert everything(store) == before
  with pytest.raises(UserError, match="does not exist"):
    store.get("gone")
  with pytest.raises(UserError, match="not found by 'colour'"):
    store.records(Feedback, colour="red")
  policy = lineage.register(store, "p", "x", {}, author="lab")
  with pytest.raises(UserError, match="1 of the records used are not here"):
    lineage.mark_used(store, policy, [reply, "gone"], "sft", author="lab")


def test_a_disk_that_cannot_be_written_is_told_and_reading_goes_on(file_store):
  record = Policy(author="lab", name="p", checkpoint="x", lineage={})
  file_store.add(record)
  with file_store.engine.connect() as connection:
    pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

  def limit(connection, _):
    connection.execute(f"PRAGMA max_page_count = {pages}")

  file_store.engine.dispose()
  sa.event.listen(file_store.engine, "connect", limit)
  big = dataclasses.replace(record, id="big", checkpoint="x" * 90_000)
  with pytest.raises(UserError, match="full.*Nothing was stored"):
    file_store.add(big)
  assert file_store.records(Policy) == [record]
