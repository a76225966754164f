"""A round asks people through the store: once, resumably, and with every record accounted for."""

import contextlib
import dataclasses
import json
import signal
import threading
import time

import labeling
import pytest
import runs
import sqlalchemy as sa
from fastapi.testclient import TestClient

from rlhf_jax import asking, experiment, iterate, launch
from rlhf_jax.data import records as data
from rlhf_jax.feedback import exchange, lineage, people, rounds, tasks, withdrawal
from rlhf_jax.feedback.labels import Answer, Comparison, Judgment, Task
from rlhf_jax.feedback.records import Policy
from rlhf_jax.feedback.store import CHUNK, Store
from rlhf_jax.labelers.base import dense_ranks
from rlhf_jax.text.messages import Conversation
from rlhf_jax.training import preemption
from rlhf_jax.types import UserError

PROMPTS, HELDOUT = 16, 8
SMALL = {
  "labeler": "store",
  "store__poll_seconds": 0.05,
  "comparisons__prompts": PROMPTS,
  "comparisons__heldout_prompts": HELDOUT,
  "comparisons__batch_size": 16,
  "sft__num_steps": 4,
  "sft__eval_every": 4,
  "ppo__num_steps": 1,
  "evaluation__prompts": 8,
}
HELLO = Conversation.of(("user", "Where does Alice live?"))


def chat_preference(**changes):
  """What somebody who chatted preferred of two regenerations."""
  values = {
    "author": "visitor",
    "conversation": HELLO,
    "answers": (Answer("In the mill.", "chat", 0), Answer("Who knows?", "chat", 1)),
    "source": "chat",
  }
  return Comparison(**values | changes)


def by_gold(truth, given):
  """Ranks of the answers of an assignment, in the order in which they are shown."""
  texts = [answer["text"] for answer in given["answers"]]
  ranks = dense_ranks(truth.totals(Conversation.from_json(given["messages"]), texts), 0.0)
  # A policy of four steps writes nothing of worth; longer is better where the truth is silent.
  return ranks if len(set(ranks)) > 1 else dense_ranks([float(len(text)) for text in texts], 0.0)


@contextlib.contextmanager
def person(url, truth, token):
  """Somebody who ranks on the labeling page until the body ends; yields the tasks they did."""
  done, is_over = [], threading.Event()

  def work():
    with Store.open(url) as store:
      app = labeling.app_on(store, labeling.Engine(), None)
      page = TestClient(app, headers={"origin": "http://testserver"})
      page.post("/label/session", json={"token": token})
      given = None
      while not is_over.wait(0.0 if given else 0.2):
        given = page.post("/label/tasks/next", json={"work": "compare"}).json()["assignment"]
        if given is None:
          continue
        judgments = [None] * len(given["answers"])
        for answer, rank in zip(given["answers"], by_gold(truth, given)):
          judgments[answer["place"]] = {"rank": rank}
        body = {"submission": f"by-ann-{len(done)}", "judgments": judgments, "seconds": 1.0}
        sent = page.post(f"/label/tasks/{given['task']}/comparison", json=body)
        assert sent.status_code == 200, sent.text
        done.append(given["task"])

  thread = threading.Thread(target=work)
  thread.start()
  try:
    yield done
  finally:
    is_over.set()
    thread.join()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("store") / "feedback.db")
  with Store.open(path, create=True) as store:
    store.add(chat_preference())
    store.add(chat_preference(answers=tuple(Answer("x " * 9, "chat", i) for i in range(9))))
  return path


@pytest.fixture(scope="module")
def token(url):
  """Ann's."""
  with Store.open(url) as store:
    return people.add_labeler(store, "ann", "labeler", author="lab")[1]


@pytest.fixture(scope="module")
def run(data_dir, url, tmp_path_factory):
  """Two rounds with SFT done."""
  config = runs.tiny(data_dir, rounds=2, store__url=url, **SMALL)
  started = experiment.start(config, tmp_path_factory.mktemp("runs") / "village")
  iterate.sft(started)
  return started


@pytest.fixture(scope="module")
def killed(run, data_dir, url):
  """The same run, killed while it waits, started again, and told to end; (status, said)."""
  overrides = SMALL | {"rounds": 2, "store__url": url}
  counted = []
  for how in (signal.SIGKILL, signal.SIGTERM):
    process = runs.start("chatgpt", *runs.arguments(data_dir, run.workdir, **overrides))
    began = time.monotonic()
    while not (count := count_tasks(url)) or (how is signal.SIGTERM and not waits(process)):
      assert process.poll() is None and time.monotonic() - began < 120, process.stderr.read()
      time.sleep(0.1)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    counted.append(count)
  return process.returncode, said, counted


def waits(process):
  """Whether the process has said that people are ranking."""
  return "people are ranking: 0 of 24 rankings" in process.stderr.readline()


def count_tasks(url):
  with Store.open(url) as store:
    return len(store.records(Task))


@pytest.fixture(scope="module")
def finished(run, killed, url, token):
  """The whole run, with ann ranking beside it; returns the lineage and what she did."""
  with person(url, iterate.gold(run), token) as done:
    found = iterate.chatgpt(run)
  return found, done


def read(run, path):
  return iterate.read_comparisons(run, path)


@pytest.mark.slow
def test_a_run_killed_while_people_rank_asks_nothing_twice(killed):
  _, _, counted = killed
  assert counted == [PROMPTS + HELDOUT] * 2


@pytest.mark.slow
def test_a_run_that_waits_for_people_ends_on_sigterm_and_asks_to_be_started_again(killed):
  status, said, _ = killed
  assert status == launch.REQUEUE
  assert "SIGTERM: stopped while people were ranking" in said


@pytest.mark.slow
def test_two_rounds_train_on_what_a_person_said(run, finished, url):
  found, done = finished
  assert len(found["rounds"]) == 2 and len(done) == len(set(done)) == 2 * (PROMPTS + HELDOUT)
  with Store.open(url) as store:
    by_id = {record.id: record for record in store.records(Comparison)}
    policies = {p.id: p for p in store.records(Policy)}
  for number, entry in enumerate(found["rounds"], start=1):
    made = entry["comparisons"]
    for side, count in (("train", PROMPTS), ("heldout", HELDOUT)):
      own = [by_id[id] for id in made[side]["records"] if by_id[id].task]
      assert len(own) == count
      texts = read(run, made[side]["file"])
      for item, id in zip(texts, made[side]["records"], strict=True):
        assert item.source.endswith(f"/{id}")
        assert item.ranks == tuple(answer.rank for answer in by_id[id].answers)
        assert item.labeler == by_id[id].author
      for record in own:
        names = {policies[answer.policy].lineage["round"] for answer in record.answers}
        assert names == {number - 1}


@pytest.mark.slow
def test_a_preference_of_the_chat_is_trained_on_once_and_one_too_long_is_left_out(finished):
  first, second = (entry["comparisons"] for entry in finished[0]["rounds"])
  assert (first["from_elsewhere"], first["left_out"]) == (1, 1)
  assert (second["from_elsewhere"], second["left_out"]) == (0, 1)
  assert "visitor" in first["labelers"] and "visitor" not in second["labelers"]


@pytest.mark.slow
def test_the_store_names_each_record_that_trained_each_model(run, finished, url):
  found, _ = finished
  with Store.open(url) as store:
    ids = {p.name: p.id for p in store.records(Policy)}
    trained = lambda path, stage: [
      use.record for use in lineage.uses(store, policy=ids[f"village/{path}"]) if use.stage == stage
    ]
    first, second = (entry["comparisons"]["train"]["records"] for entry in found["rounds"])
    for number, expected in ((1, first), (2, first + second)):
      for path, stage in (("reward/reward_model", "reward"), ("ppo/policy", "ppo")):
        assert sorted(trained(f"round_{number}/{path}", stage)) == sorted(expected)
    origin = {p.name: p.lineage for p in store.records(Policy)}["village/round_2/ppo/policy"]
  assert origin["parents"] == ["round_1/ppo/policy", "round_2/reward/reward_model"]
  assert origin["round"] == 2 and origin["run"] == "village"


@pytest.mark.slow
def test_held_out_rankings_train_nothing(finished, url):
  heldout = {i for r in finished[0]["rounds"] for i in r["comparisons"]["heldout"]["records"]}
  with Store.open(url) as store:
    assert heldout and not heldout & {use.record for use in lineage.uses(store)}


@pytest.mark.slow
def test_a_model_fitted_again_notes_nothing_twice(run, finished, url):
  with Store.open(url) as store:
    before = store.counts()
  for stage in ("round_1/reward", "round_2/reward", "round_2/ppo"):
    (run.workdir / stage / "done.json").unlink()
  again = iterate.chatgpt(run)
  assert again == finished[0]
  with Store.open(url) as store:
    assert store.counts() == before


# What follows needs no training: `asking` with answers written by hand.


@pytest.fixture
def bench(run, tmp_path):
  """`bench(**store)`: a fresh run that asks a store of its own, and the store."""
  stores = []

  def build(**changes):
    path = str(tmp_path / "own.db")
    stores.append(Store.open(path, create=True))
    values = {"url": path, "poll_seconds": 0.02, **changes}
    store = dataclasses.replace(run.config.store, **values)
    config = dataclasses.replace(run.config, store=store)
    return dataclasses.replace(run, config=config, workdir=tmp_path / "w"), stores[-1]

  yield build
  for store in stores:
    store.close()


def unranked(side, count=2):
  from rlhf_jax.comparisons import Unranked

  ask = lambda i: Conversation.of(("user", f"{side} {i}?"))
  return [Unranked(ask(i), (f"a{i}", f"b{i}"), ("sft/policy",) * 2) for i in range(count)]


def ask(bench_run, earlier=()):
  folder = bench_run.workdir / "round_1/comparisons"
  folder.mkdir(parents=True, exist_ok=True)
  return asking.ask(bench_run, folder, "sft/policy", unranked, earlier)


def rank_all(store, labeler):
  while found := tasks.next_task(store, labeler, "compare"):
    tasks.submit_comparison(
      store, labeler, found.task.id, [Judgment(1), Judgment(0)], submission=f"s{found.task.id}"
    )


def test_taking_what_is_there_needs_enough_of_it_and_files_once(bench):
  own, store = bench(wait="take", fewest=2)
  labeler, _ = people.add_labeler(store, "ann", "labeler", author="lab")
  for _ in range(2):
    with pytest.raises(UserError, match=r"0 rankings to train on .* asks for 2.*4 tasks wait"):
      ask(own)
  assert len(store.records(Task)) == 4
  rank_all(store, labeler.id)
  result = ask(own)
  assert [len(result[side]["records"]) for side in ("train", "heldout")] == [2, 2]
  lines = (own.workdir / result["train"]["file"]).read_text().splitlines()
  assert [json.loads(line)["ranks"] for line in lines] == [[1, 0], [1, 0]]


def test_what_was_filed_is_what_was_written_down_before(bench):
  own, store = bench(wait="take")
  with pytest.raises(UserError):
    ask(own)
  folder = own.workdir / "round_1/comparisons"
  written = [r for side in asking.SIDES for r in exchange.read(folder / f"{side}_tasks.jsonl")]
  assert store.records(Task) == written


def test_a_killed_start_files_what_the_file_says_although_answers_differ_now(bench):
  own, store = bench(wait="take")
  with pytest.raises(UserError):
    ask(own)
  before = store.records(Task)
  folder = own.workdir / "round_1/comparisons"
  with pytest.raises(UserError):
    asking.ask(own, folder, "sft/policy", lambda side: unranked("other"), ())
  assert store.records(Task) == before


def test_after_the_timeout_a_round_goes_on_with_what_is_there(bench):
  own, store = bench(timeout_hours=0.3 / 3600, fewest=1)
  labeler, _ = people.add_labeler(store, "ann", "labeler", author="lab")
  began = time.monotonic()
  with pytest.raises(UserError, match="0 rankings"):
    ask(own)
  assert 0.3 < time.monotonic() - began < 5
  for _ in range(3):  # train 0, train 1, heldout 0
    found = tasks.next_task(store, labeler.id, "compare").task
    done = [Judgment(0), Judgment(0)]
    tasks.submit_comparison(store, labeler.id, found.id, done, submission=f"s{found.id}")
  result = ask(own)
  assert [len(result[side]["records"]) for side in ("train", "heldout")] == [2, 1]


def test_many_tasks_are_filed_in_parts_and_once(bench):
  _, store = bench()
  new = [labeling.to_rank(ask=f"{number}?") for number in range(CHUNK + 1)]
  parts = []
  sa.event.listen(store.engine, "commit", lambda connection: parts.append(len(parts)))
  rounds.file(store, new)
  assert len(parts) == 2 and [task.id for task in store.records(Task)] == [t.id for t in new]
  rounds.file(store, new)
  assert len(store.records(Task)) == len(new)


def test_a_task_that_everybody_skipped_holds_up_nothing(bench):
  own, store = bench(wait="take", overlap=2)
  with pytest.raises(UserError):
    ask(own)
  ids = [task.id for task in store.records(Task)]
  assert rounds.standing(store, ids) == rounds.Standing(0, 8, 4, 0)  # nobody is there yet
  ann, _ = people.add_labeler(store, "ann", "labeler", author="lab")
  bob, _ = people.add_labeler(store, "bob", "labeler", author="lab")
  first = tasks.next_task(store, ann.id, "compare").task.id
  assert rounds.standing(store, ids) == rounds.Standing(0, 8, 4, 1)
  tasks.skip(store, ann.id, first, "no sense", submission="skip-1")
  assert rounds.standing(store, ids).open == 4  # bob may still do it
  assert tasks.next_task(store, bob.id, "compare").task.id == first
  tasks.skip(store, bob.id, first, "no sense", submission="skip-2")
  assert rounds.standing(store, ids) == rounds.Standing(0, 8, 3, 0)
  people.add_labeler(store, "eve", "labeler", author="lab")
  assert rounds.standing(store, ids).open == 4


def test_a_round_takes_late_rankings_of_the_last_and_none_twice(bench):
  own, store = bench(wait="take", fewest=1)
  labeler, _ = people.add_labeler(store, "ann", "labeler", author="lab")
  late = store.add(chat_preference(author=labeler.id))
  held = chat_preference(conversation=Conversation.of(("user", "heldout 0?")))
  with pytest.raises(UserError):
    ask(own)
  rank_all(store, labeler.id)
  first = ask(own)
  assert late in first["train"]["records"] + first["heldout"]["records"]
  store.add(held)
  own = dataclasses.replace(own, workdir=own.workdir / "again")
  with pytest.raises(UserError):  # its own tasks are not ranked, and nothing is left to hold out
    ask(own, [first])


def test_a_withdrawn_ranking_is_not_taken(bench):
  own, store = bench(wait="take")
  labeler, _ = people.add_labeler(store, "ann", "labeler", author="lab")
  gone, _ = people.add_labeler(store, "gone", "labeler", author="lab")
  store.add(chat_preference(author=gone.id))
  with pytest.raises(UserError):
    ask(own)
  rank_all(store, labeler.id)
  withdrawal.withdraw(store, gone.id, author="lab")
  result = ask(own)
  assert result["from_elsewhere"] == 0 and result["labelers"] == [labeler.id]


def test_prompts_that_are_held_out_stay_held_out(run):
  held = {"x"}
  made = data.Comparison(HELLO, ("a", "b"), (0, 1), ("p", "p"), "ann", "feedback/chat")
  assert asking.side_of(run, made, held | {made.prompt_key}) == "heldout"
  expected = data.split_of(made.prompt_key, 0.1, 0)
  assert asking.side_of(run, made, held) == expected


def test_a_store_that_is_not_there_is_named_before_anything_is_trained(data_dir, tmp_path):
  config = runs.tiny(data_dir, store__url=str(tmp_path / "none.db"), **SMALL)
  fresh = experiment.start(config, tmp_path / "w")
  with pytest.raises(UserError, match="none.db does not exist; make it"):
    iterate.chatgpt(fresh)
  assert not (tmp_path / "w/sft").exists()


def test_how_people_are_asked_may_change_while_a_run_is_under_way(run):
  store = dataclasses.replace(run.config.store, wait="take", timeout_hours=2.0)
  assert not experiment.differs(dataclasses.replace(run.config, store=store), run.workdir)
  assert experiment.differs(dataclasses.replace(run.config, labeler="simulated"), run.workdir)


def test_waiting_ends_in_preempted_and_not_in_a_broken_wait(bench, monkeypatch):
  own, _ = bench()
  monkeypatch.setattr(preemption, "is_due", lambda tick: tick >= 3)
  with pytest.raises(preemption.Preempted, match="while people were ranking"):
    ask(own)
