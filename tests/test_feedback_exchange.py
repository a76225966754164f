"""Records as JSONL, training data with the ids it comes from, and the command line."""

import json
import pathlib

import feedback_cases as cases
import pytest

from rlhf_jax.data import builders, jsonl, moderation
from rlhf_jax.data import records as data
from rlhf_jax.feedback import __main__ as cli
from rlhf_jax.feedback import exchange, lineage, people, tasks, training
from rlhf_jax.feedback.labels import Candidate, Comparison, Demonstration, Judgment, Task
from rlhf_jax.feedback.records import Feedback, HarmReport
from rlhf_jax.feedback.store import Store
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError


@pytest.fixture
def store(tmp_path):
  with Store.open(str(tmp_path / "feedback.db"), create=True) as opened:
    yield opened


def lines(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_store_goes_out_and_comes_in_as_it_was(store, tmp_path):
  records = cases.one_of_each()
  store.add_all(records)
  exchange.write(tmp_path / "all.jsonl", (r.to_json() for r in exchange.dump(store)))
  with Store.open(str(tmp_path / "copy.db"), create=True) as copy:
    read = exchange.load(copy, exchange.read(tmp_path / "all.jsonl"))
    assert sum(read.values()) == len(records)
    assert exchange.dump(copy) == exchange.dump(store) == records
    exchange.load(copy, exchange.read(tmp_path / "all.jsonl"))  # again: nothing new
    assert exchange.dump(copy) == records


def test_tasks_that_come_in_done_are_not_handed_out_again(store, tmp_path):
  ann, bob = (people.add_labeler(store, n, "labeler", author="lab")[0].id for n in ("a", "b"))
  task = store.add(cases.compare_task(overlap=2))
  tasks.next_task(store, ann, "compare")
  judged = (cases.Answer("A", "x", 0), cases.Answer("B", "x", 1))
  store.add(Comparison(author=ann, conversation=cases.HELLO, answers=judged, task=task))
  with Store.open(str(tmp_path / "copy.db"), create=True) as copy:
    exchange.load(copy, exchange.dump(store))
    assert tasks.next_task(copy, ann, "compare") is None
    assert tasks.next_task(copy, bob, "compare").task.id == task
    assert tasks.progress(copy)["compare"].done == 1


@pytest.mark.parametrize(
  ("bad", "says"),
  [
    ("{", "line 2: not valid JSON"),
    ('{"kind": "gossip"}', "line 2: a record's kind"),
    ('{"kind": "feedback", "author": "a", "thumb": "up"}', "line 2: a feedback has the keys"),
  ],
)
def test_a_file_with_a_wrong_line_is_refused_whole(store, tmp_path, bad, says):
  good = json.dumps(cases.one_of_each()[0].to_json())
  path = tmp_path / "some.jsonl"
  path.write_text(f"{good}\n{bad}\n")
  with pytest.raises(UserError, match=says):
    exchange.load(store, exchange.read(path))
  assert exchange.dump(store) == []


def test_an_import_that_refers_to_nothing_stores_nothing(store):
  records = cases.one_of_each()
  with pytest.raises(UserError, match="there is no message"):
    exchange.load(store, [records[0], records[10]])
  assert exchange.dump(store) == []


def test_training_data_is_what_the_records_say_with_their_ids(store):
  records = {r.id: r for r in cases.one_of_each()}
  store.add_all(records.values())
  (ranking,) = training.comparisons(store)
  record = records[ranking.id]
  assert ranking.item == data.Comparison(
    conversation=cases.HELLO,
    responses=("A", "B", "C"),
    ranks=(1, 0, 1),
    authors=("sft", "human", "human"),
    labeler="bob",
    source="feedback/labeling",
  )
  assert isinstance(record, Comparison)
  written, ideal = training.demonstrations(store)
  assert isinstance(records[written.id], Demonstration)
  assert written.item.conversation == Conversation.of(("user", "Sing."), ("assistant", "La la."))
  assert isinstance(records[ideal.id], Feedback)
  assert ideal.item.conversation == Conversation.of(("user", cases.AWKWARD), ("assistant", "No."))
  assert training.demonstrations(store, ideal_answers=False) == [written]
  (report, harm) = training.moderation_labels(store)
  assert (report.item.text, report.item.labels) == ("Yes.", {"hate": False})
  assert (harm.item.text, harm.item.labels, harm.item.direction) == (
    *("Yes.", {"hate": True}),
    "output",
  )


def test_what_trained_a_policy_is_not_unused(store):
  answers = tuple(cases.Answer(text, "x", rank) for rank, text in enumerate("AB"))
  made = [Comparison(author=a, conversation=cases.HELLO, answers=answers) for a in ("a", "b")]
  store.add_all(made)
  policy = lineage.register(store, "rm", "x", {}, author="lab")
  lineage.mark_used(store, policy, [made[0].id], "reward", author="lab")
  ids = lambda **options: training.ids_of(training.comparisons(store, **options))
  assert ids() == [made[0].id, made[1].id]
  assert ids(unused_in="reward") == [made[1].id]
  assert ids(unused_in="sft") == [made[0].id, made[1].id]


def test_exported_training_data_is_read_by_the_jsonl_source(store, tmp_path):
  store.add_all(cases.one_of_each())
  paths = {name: tmp_path / f"{name}.jsonl" for name in ("comparisons", "demonstrations")}
  exchange.write_training(paths["comparisons"], training.comparisons(store))
  exchange.write_training(paths["demonstrations"], training.demonstrations(store))
  config = jsonl.JsonlConfig(
    demonstrations=(str(paths["demonstrations"]),),
    comparisons=(str(paths["comparisons"]),),
    prompts=(),
    on_malformed="error",
  )
  found = []
  for path in config.paths:
    for _, load in jsonl.Jsonl.items(path, config):
      found += jsonl.Jsonl.parse(load(), "jsonl/x", config)
  stored = training.demonstrations(store) + training.comparisons(store)
  assert found == [one.item for one in stored]
  assert [r.identity for r in found] == [one.item.identity for one in stored]


def test_a_line_of_a_task_file_is_a_task():
  read = lambda item: exchange.task_from_json(item, author="lab")
  ranked = read(
    {"prompt": "Hello?", "responses": ["A", "B"], "authors": ["x", "y"], "gold": [0, 1]}
    | {"overlap": 3, "priority": 2, "instructions": "Be fair."}
  )
  assert ranked == Task(
    author="lab",
    id=ranked.id,
    created_at=ranked.created_at,
    work="compare",
    conversation=cases.HELLO,
    answers=(Candidate("A", "x"), Candidate("B", "y")),
    gold=(0, 1),
    overlap=3,
    priority=2,
    instructions="Be fair.",
  )
  assert read({}).work == "demonstrate"
  assert read({"messages": [{"role": "user", "content": "Hello?"}]}).conversation == cases.HELLO
  for wrong, says in (
    ({"prompts": "x"}, "unknown .'prompts'"),
    ({"prompt": "x", "messages": []}, "not both"),
    ({"prompt": "x", "responses": ["A"]}, "2 to 32"),
    ({"prompt": "x", "responses": "AB"}, "2 to 32"),
    ({"prompt": "x", "responses": ["A", "B"], "authors": ["x"]}, "as many authors"),
    ({"responses": ["A", "B"]}, "needs the conversation"),
    ({"prompt": 3}, "must be text"),
    ([], "JSON object"),
  ):
    with pytest.raises(UserError, match=says):
      read(wrong)


def test_the_task_file_of_the_documentation_is_one():
  page = (pathlib.Path(__file__).parents[1] / "docs/feedback.md").read_text(encoding="utf-8")
  text = page.split("```json\n")[1].split("```")[0].replace(",\n", ", ")
  read = [exchange.task_from_json(json.loads(line), author="a") for line in text.splitlines()]
  assert [task.work for task in read] == ["compare", "demonstrate", "demonstrate"]
  assert read[0].gold == (0, 1)


@pytest.fixture
def run(tmp_path, capsys):
  """Runs a command on one database; returns exit status, stdout and stderr."""

  def call(*arguments, db=None):
    status = cli.main([*map(str, arguments), f"--db={db or tmp_path / 'cli.db'}"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err

  return call


def test_the_command_line_takes_a_project_from_tasks_to_lineage(run, tmp_path):
  assert run("init")[0] == 0
  status, out, _ = run("add-labeler", "Ann", "--role=researcher", "--by=boss")
  assert status == 0
  token = out.split()[-1]
  (tmp_path / "tasks.jsonl").write_text(
    '{"prompt": "Hello?", "responses": ["A", "B"], "gold": [0, 1], "overlap": 2}\n'
    '{"prompt": "Hi"}\n'
  )
  assert run("add-tasks", tmp_path / "tasks.jsonl")[1] == "2 tasks added, 3 slots.\n"
  with Store.open(str(tmp_path / "cli.db")) as store:
    ann = people.authenticate(store, token)
    assert (ann.name, ann.role, ann.author) == ("Ann", "researcher", "boss")
    task = tasks.next_task(store, ann.id, "compare").task.id
    judged = (Judgment(0, 5), Judgment(1, 3))
    tasks.submit_comparison(store, ann.id, task, judged, submission="s1", seconds=7)
    lineage.register(store, "rm-1", "x", {}, author="lab")
  out = tmp_path / "c.jsonl"
  ids = f"--ids={tmp_path / 'ids.jsonl'}"
  assert run("export", "comparisons", out, ids, "--unused-in=reward")[0] == 0
  assert lines(out)[0]["responses"] == ["A", "B"]
  assert run("mark-used", "rm-1", ids, "--stage=reward")[0] == 0
  assert "s1" in run("lineage")[1]
  assert "0 records" in run("export", "comparisons", out, "--unused-in=reward")[1]
  assert "100.0% of 1" in run("agreement")[1]
  assert "comparison" in run("stats")[1]
  assert run("export", "all", tmp_path / "all.jsonl")[0] == 0
  assert token not in (tmp_path / "all.jsonl").read_text()
  copy = tmp_path / "copy.db"
  run("init", db=copy)
  assert run("import", tmp_path / "all.jsonl", db=copy)[0] == 0
  run("export", "all", tmp_path / "again.jsonl", db=copy)
  assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "all.jsonl").read_text()


def test_what_people_said_of_the_filter_is_read_by_the_moderators_source(run, tmp_path):
  out, ids = tmp_path / "reports.jsonl", tmp_path / "ids.jsonl"
  run("init")
  with Store.open(str(tmp_path / "cli.db")) as store:
    store.add_all(cases.one_of_each())
    (answer,) = {report.message for report in store.records(HarmReport)}
    store.add(HarmReport(author="eve", message=answer, category="gossip"))
    lineage.register(store, "moderator-2", "x", {}, author="lab")
  said = run("export", "moderation", out, "--unused-in=moderation", f"--ids={ids}")[1]
  assert said.startswith("1 left out") and "2 records in" in said
  config = builders.FilesConfig(paths=(str(out),), on_malformed="error")
  found = list(moderation.read(config, moderation.parse_report))
  assert [(e.text, dict(e.labels)) for e in found] == [("Yes.", {"hate": 0}), ("Yes.", {"hate": 1})]
  assert {e.source for e in found} == {"feedback/output"}
  assert run("mark-used", "moderator-2", f"--ids={ids}", "--stage=moderation")[0] == 0
  assert "0 records in" in run("export", "moderation", out, "--unused-in=moderation")[1]


def test_withdraw_says_what_would_go_and_deletes_with_yes_only(run, tmp_path):
  run("init")
  run("add-labeler", "Ann")
  assert "--yes deletes" in run("withdraw", "Ann")[1]
  assert "Ann" in run("labelers")[1]
  assert "1 records withdrawn" in run("withdraw", "Ann", "--yes")[1]
  assert "Ann" not in run("labelers")[1]


def test_labelers_leave_and_come_back(run):
  run("init")
  token = run("add-labeler", "Ann")[1].split()[-1]
  assert "no longer" in run("deactivate", "Ann", "--reason=left")[1]
  assert " no" in run("labelers")[1]
  assert run("activate", "Ann")[0] == 0
  assert run("token", "Ann")[1].split()[-1] != token
  assert "from revision 0002 to 0002" in run("migrate")[1]


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (("stats",), "does not exist; make it"),
    (("migrate",), "does not exist"),
  ],
)
def test_commands_on_no_database_say_how_to_make_one(run, tmp_path, arguments, says):
  status, out, err = run(*arguments)
  assert (status, out) == (2, "")
  assert err.startswith("error: ") and says in err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (("withdraw", "nobody", "--yes"), "no record holds anything"),
    (("import", "gone.jsonl"), "gone.jsonl does not exist"),
    (("add-tasks", "gone.jsonl"), "gone.jsonl does not exist"),
    (("token", "nobody"), "no labeler 'nobody'"),
    (("export", "all", "/nowhere/x.jsonl"), "could not be written"),
  ],
)
def test_commands_that_cannot_be_done_say_why(run, arguments, says):
  run("init")
  status, out, err = run(*arguments)
  assert (status, out) == (2, "")
  assert err.startswith("error: ") and says in err


def test_a_command_without_a_database_asks_for_one(capsys, monkeypatch):
  monkeypatch.delenv(cli.DATABASE, raising=False)
  assert cli.main(["stats"]) == 2
  assert cli.DATABASE in capsys.readouterr().err
