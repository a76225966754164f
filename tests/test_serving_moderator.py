"""A moderator that experiments/moderate.py trained, served by experiments/serve.py as a process.

OpenAI's client gets the verdicts that the moderator gives in this process, the chat page obeys
them, and what a visitor says of a verdict comes back to moderate.py out of the database.
"""

import json
import signal
import types

import numpy as np
import openai
import pytest
import runs
from chat_cases import Visitor
from moderation_cases import EIGHT, LEARNS, arguments, text, write_data

from rlhf_jax import moderation
from rlhf_jax.data.moderation import CATEGORIES
from rlhf_jax.feedback import __main__ as feedback
from rlhf_jax.feedback.records import ChatMessage, Verdict, VerdictReport
from rlhf_jax.feedback.store import Store
from rlhf_jax.serving import server

SIZES = ("--slots=2", "--context=128", "--max_new_tokens=6", "--columns=2")
WORDS = ("wordS", "wordH", "wordV", "wordHR", "wordSH", "wordS3", "wordH2", "wordV2")


def finish(process):
  """Waits for a process that must end well."""
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The data of a moderator, `moderator/`, trained on it, and a policy to serve in `village/`."""
  folder = tmp_path_factory.mktemp("moderated")
  write_data(folder)
  moderate = runs.start("moderate", *arguments(folder, folder / "moderator", **LEARNS), devices=1)
  sft = runs.start("sft", *runs.arguments(folder / "data", folder / "village"), devices=1)
  finish(moderate)
  finish(sft)
  return folder


@pytest.fixture(scope="module")
def moderator(folder):
  return moderation.load(folder / "moderator")


@pytest.fixture(scope="module")
def at(folder):
  """The server: its address, the name of its policy, and its database."""
  db = folder / "feedback.db"
  options = (f"--workdir={folder / 'village'}", f"--db={db}", f"--moderator={folder / 'moderator'}")
  process = runs.start("serve", *options, "--port=0", *SIZES, devices=1)
  try:
    said = {}
    while "metrics" not in said:
      line = process.stdout.readline()
      assert line, process.stderr.read()
      said[line.split(" http")[0].strip()] = line.split()[-1]
    yield types.SimpleNamespace(url=said["chat"].rstrip("/"), model="village-sft", db=str(db))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, process.stderr.read()
  finally:
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def client(at):
  return openai.OpenAI(base_url=f"{at.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def told(moderator):
  """By action, a text about which the moderator says so, and the verdict."""
  rng = np.random.default_rng(1)
  texts = [text(rng, *rng.choice(WORDS, rng.integers(3))) for _ in range(100)]
  return {v.action: (t, v) for t, v in zip(texts, moderator(texts))}


AWKWARD = ["", " ", "wordH2 🦊 \u202e é́\r\n\0", "wordV and the cat " * 99]  # the last in windows


@pytest.mark.parametrize("asked", ["wordH by the old river", ["the cat sat", "wordS3", *AWKWARD]])
def test_openais_client_gets_the_verdicts_that_the_moderator_gives_in_process(
  client, moderator, asked
):
  found = client.moderations.create(input=asked)
  texts = [asked] if isinstance(asked, str) else asked
  assert found.model == "moderator" and len(found.results) == len(texts)
  for result, verdict in zip(found.results, moderator(texts)):
    scores = result.category_scores.model_dump(by_alias=True, exclude_unset=True)
    flags = result.categories.model_dump(by_alias=True, exclude_unset=True)
    assert set(scores) == set(CATEGORIES) and scores == pytest.approx(verdict.scores, abs=1e-5)
    assert flags == {c.category: c.flagged for c in verdict.categories}
    assert result.flagged == verdict.flagged


def test_the_folder_one_stands_in_is_a_moderator_with_a_name(folder, monkeypatch):
  monkeypatch.chdir(folder / "moderator")
  assert server.load_moderator(".").name == "moderator"


def test_a_message_is_warned_of_or_blocked_as_the_thresholds_file_says(at, told):
  warned, blocked = told["warn"], told["block"]
  with Visitor(at.url) as ann:
    answer = ann.say(warned[0]).raise_for_status().json()
    (message,) = answer["messages"]
    assert message["verdict"]["action"] == "warn" and answer["answers"]
    assert message["verdict"]["flagged"] == flagged(warned[1])
    refused = ann.say(blocked[0]).raise_for_status().json()
    assert refused["blocked"]["action"] == "block" and "answers" not in refused
    assert refused["blocked"]["flagged"] == flagged(blocked[1])
    ann.read(answer["answers"][0]["id"])
  with Store.open(at.db) as store:
    assert [m.content for m in store.records(ChatMessage) if m.role == "user"] == [warned[0]]
    verdicts = [v for v in store.records(Verdict) if v.direction == "input"]
  for record, (_, verdict) in zip(verdicts, (warned, blocked), strict=True):
    assert (record.model, record.action) == ("moderator", verdict.action)
    for part, expected in zip(record.scores, verdict.categories, strict=True):
      assert (part.category, part.threshold) == (expected.category, expected.threshold)
      assert part.score == pytest.approx(expected.score, abs=1e-5)


def test_the_api_tells_a_warning_and_draws_nothing_for_what_is_blocked(client, at, told):
  ask = lambda text: client.chat.completions.create(
    model=at.model, messages=[{"role": "user", "content": text}]
  )
  assert ask(told["warn"][0]).filter["input"] == "warn"
  done = ask(told["block"][0])
  assert done.choices[0].finish_reason == "content_filter" and done.usage.total_tokens == 0


def test_a_false_positive_goes_from_the_page_through_the_store_into_the_next_moderator(
  at, told, folder
):
  text, verdict = told["block"]
  category = flagged(verdict)[0]
  with Visitor(at.url) as ann:
    blocked = ann.say(text).raise_for_status().json()["blocked"]
    report = {"mistake": "false_positive", "category": category, "text": "It is harmless."}
    ann.post(f"/chat/verdicts/{blocked['id']}/reports", json=report).raise_for_status()
  with Store.open(at.db) as store:
    (stored,) = store.records(VerdictReport)
  assert (stored.verdict, stored.category) == (blocked["id"], category)
  assert stored.score == pytest.approx(verdict.of(category).score, abs=1e-5)
  reports = folder / "reports.jsonl"
  assert feedback.main(["export", "moderation", str(reports), f"--db={at.db}"]) == 0
  line = {"text": text, "labels": {category: 0}, "source": "feedback/input"}
  assert json.loads(reports.read_text()) == line
  again = arguments(folder, folder / "next", variant="tiny,reports", **EIGHT)
  finish(runs.start("moderate", *again, devices=1, cwd=folder))  # where it finds reports.jsonl
  result = json.loads((folder / "next/evaluation.json").read_text())
  assert result["trained_on"] == {"samples": 120, "reports": 1}


def flagged(verdict):
  """The categories that a verdict flags."""
  return [c.category for c in verdict.categories if c.flagged]
