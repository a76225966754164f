"""The routes of the chat page: what is said ends as the right record, and stays its person's."""

import concurrent.futures
import json

import httpx
import pytest
import sqlalchemy as sa
from chat_cases import FakeEngine, FakeModerator, Visitor, gated, page, stored
from feedback_cases import AWKWARD
from serving_cases import until

from rlhf_jax.feedback import conversations, shapes, training
from rlhf_jax.feedback.labels import Comparison
from rlhf_jax.feedback.records import (
  ChatMessage,
  Feedback,
  HarmReport,
  Verdict,
  VerdictReport,
  Withdrawal,
)
from rlhf_jax.serving import chat_filter, chat_page, visitors

SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)</script> ${3} {{4}} 'x' \"y\" &amp;"


@pytest.fixture
def at(tmp_path):
  with page(tmp_path) as server:
    yield server


@pytest.fixture
def filtered(tmp_path):
  with page(tmp_path, moderator=FakeModerator()) as server:
    yield server


@pytest.fixture
def ann(at):
  with Visitor(at.url) as visitor:
    yield visitor


def only(store, kind, **equal):
  """The one record of a kind."""
  (record,) = store.records(kind, **equal)
  return record


# -- who somebody is


def test_a_first_visit_gives_a_random_cookie_that_scripts_cannot_read(at):
  cookies = [httpx.get(at.url).headers["set-cookie"] for _ in range(2)]
  assert cookies[0].split(";")[0] != cookies[1].split(";")[0]
  assert {"HttpOnly", "Path=/", "SameSite=strict"} <= {
    part.strip() for part in cookies[0].split(";")
  }


def test_a_second_visit_keeps_the_cookie(ann):
  secret = ann.cookies[visitors.COOKIE]
  ann.get("/")
  assert ann.cookies[visitors.COOKIE] == secret


def test_no_record_holds_the_secret_of_the_cookie(at, ann):
  message, _ = ann.talk("Hi")
  author = at.context.store.get(message["id"]).author
  assert author == visitors.id_of(ann.cookies[visitors.COOKIE])
  assert ann.cookies[visitors.COOKIE] not in author


@pytest.mark.parametrize("secret", ["", "ann", "visitor-1", "x" * 42, "x" * 44, "é" * 43])
def test_a_cookie_that_is_not_ours_is_nobody(at, secret):
  headers = {"cookie": f"{visitors.COOKIE}={secret}".encode()}
  assert httpx.get(f"{at.url}/chat/conversations", headers=headers).status_code == 401


def test_another_persons_things_are_not_there(at, ann):
  message, answer = ann.talk("My secret")
  told = ann.post(f"/chat/messages/{message['id']}/answers", json={"count": 2}).json()
  pair = [ann.read(a["id"])[1]["message"]["id"] for a in told["answers"]]
  conversation = at.context.store.get(message["id"]).conversation
  with Visitor(at.url) as bob:
    assert bob.get("/chat/conversations").json() == {"conversations": []}
    id, thumb = answer["id"], {"thumb": "up"}
    choice = {"id": shapes.new_id(), "first": pair[0], "second": pair[1], "choice": "tie"}
    refused = [
      bob.get(f"/chat/conversations/{conversation}"),
      bob.get(f"/chat/answers/{id}"),
      bob.post(f"/chat/answers/{id}/stop", json={}),
      bob.post(f"/chat/answers/{id}/feedback", json=thumb),
      bob.post(f"/chat/answers/{id}/harm", json={}),
      bob.post(f"/chat/messages/{message['id']}/answers", json={}),
      bob.post("/chat/preferences", json=choice),
      bob.say("Hi", conversation=conversation),
      bob.say("Hi", conversation=conversation, parent=id),
      bob.say("Hi", parent=id),
    ]
    assert [response.status_code for response in refused] == [404] * len(refused)
    assert not any("secret" in response.text for response in refused)
  assert len(at.context.store.records(ChatMessage)) == 4


def test_another_persons_verdicts_cannot_be_reported(filtered):
  with Visitor(filtered.url) as ann, Visitor(filtered.url) as bob:
    message, _ = ann.talk("a fight")
    path = f"/chat/verdicts/{message['verdict']['id']}/reports"
    report = {"mistake": "false_positive", "category": "violence"}
    assert bob.post(path, json=report).status_code == 404
    assert ann.post(path, json=report).status_code == 200


def test_a_request_from_another_site_changes_nothing(at, ann):
  response = ann.post(
    "/chat/data/withdraw", json={"confirm": True}, headers={"Sec-Fetch-Site": "cross-site"}
  )
  assert response.status_code == 403


# -- talking


def test_a_message_and_its_answer_become_records(at, ann):
  sampling = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": str(2**63 - 1)}
  message, answer = ann.talk("Hi", system="Be kind.", sampling=sampling)
  asked, said = (at.context.store.get(m["id"]) for m in (message, answer))
  system = at.context.store.get(asked.parent)
  assert (system.role, system.content, system.parent) == ("system", "Be kind.", None)
  assert (asked.role, asked.content, asked.policy) == ("user", "Hi", None)
  assert (said.role, said.content, said.parent) == ("assistant", "You said: Hi", asked.id)
  assert (said.policy, said.seed, said.stopped) == (at.context.policy, 2**63 - 1, False)
  assert said.sampling == {
    "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "finish_reason": "stop",
  }  # fmt: skip
  assert system.author == asked.author == said.author
  (request,) = at.engine.requests
  assert (request.temperature, request.top_p, request.max_tokens) == (0.5, 0.9, 7)
  assert [m.content for m in request.conversation.messages] == ["Be kind.", "Hi"]


def test_the_pieces_of_a_stream_are_the_answer(ann):
  told = ann.say("one two three").json()
  pieces, end = ann.read(told["answers"][0]["id"])
  assert len(pieces) == 5 and "".join(pieces) == end["message"]["text"] == "You said: one two three"


def test_the_engine_sees_the_branch_and_nothing_beside_it(at, ann):
  first, answer = ann.talk("A")
  conversation = at.context.store.get(first["id"]).conversation
  ann.talk("B", conversation=conversation, parent=answer["id"])
  edited, _ = ann.talk("A again", conversation=conversation)
  ann.talk("C", conversation=conversation, parent=answer["id"])
  said = [[m.content for m in r.conversation.messages] for r in at.engine.requests]
  assert said == [["A"], ["A", "You said: A", "B"], ["A again"], ["A", "You said: A", "C"]]
  parents = {m["text"]: m["parent"] for m in ann.messages(conversation).values()}
  assert parents["A"] is parents["A again"] is None
  assert parents["B"] == parents["C"] == answer["id"]


def test_an_answer_again_is_a_sibling(at, ann):
  message, first = ann.talk("A")
  told = ann.post(f"/chat/messages/{message['id']}/answers", json={}).json()
  second = ann.read(told["answers"][0]["id"])[1]["message"]
  assert second["parent"] == first["parent"] == message["id"] and second["id"] != first["id"]
  assert second["seed"] != first["seed"]


def test_conversations_are_listed_the_newest_first(at, ann):
  ids = [shapes.new_id() for _ in range(3)]
  for id, text in zip(ids, ["first", "  second\nline", "x" * 200]):
    last = ann.talk(text, conversation=id)[1]
  ann.talk("more", conversation=ids[0], parent=at_end(ann, ids[0]))
  listed = ann.get("/chat/conversations").json()["conversations"]
  assert [(c["id"], c["title"]) for c in listed] == [
    (ids[0], "first"), (ids[2], "x" * 80), (ids[1], "second line"),
  ]  # fmt: skip
  assert last["parent"] in ann.messages(ids[2])


def at_end(visitor, conversation):
  return list(visitor.messages(conversation))[-1]


def test_a_message_sent_twice_is_one_message_with_one_answer(at, ann):
  body = {"id": shapes.new_id(), "conversation": shapes.new_id(), "text": "Hi", "system": "S"}
  told = [ann.post("/chat/messages", json=body).json() for _ in range(2)]
  ann.read(told[0]["answers"][0]["id"])
  assert told[1]["messages"] == []
  assert stored(at.context.store) == [
    ("system", "S"),
    ("user", "Hi"),
    ("assistant", "You said: Hi"),
  ]


@pytest.mark.parametrize("text", [SCRIPT, AWKWARD.strip(), "a\r\nb\n\n\n c", "🦊" * 50])
def test_text_comes_back_to_the_letter(at, ann, text):
  message, answer = ann.talk(text)
  shown = ann.messages(at.context.store.get(message["id"]).conversation)
  assert shown[message["id"]]["text"] == text
  assert shown[answer["id"]]["text"] == f"You said: {text}"
  assert ann.get("/chat/conversations").headers["content-type"] == "application/json"


def test_stopping_frees_the_engine_and_keeps_what_was_drawn(tmp_path):
  says, gate = gated("one two three four")
  with page(tmp_path, engine=FakeEngine(says)) as at, Visitor(at.url) as ann:
    id = ann.say("Hi").json()["answers"][0]["id"]
    with ann.stream("GET", f"/chat/answers/{id}") as response:
      lines = response.iter_lines()
      until(lambda: next(lines) == 'data: "two "')
      told = ann.post(f"/chat/answers/{id}/stop", json={}).json()
    assert at.engine.answers[0].cancelled
    assert told["message"]["text"] == "one two " and told["message"]["stopped"]
    record = at.context.store.get(id)
    assert (record.content, record.stopped) == ("one two ", True)
    assert ann.post(f"/chat/answers/{id}/stop", json={}).json() == told  # again changes nothing


def test_who_leaves_stops_the_answer_and_finds_what_was_drawn(tmp_path):
  says, gate = gated("one two three four")
  with page(tmp_path, engine=FakeEngine(says), patience=0.3) as at, Visitor(at.url) as ann:
    id = ann.say("Hi").json()["answers"][0]["id"]
    with ann.stream("GET", f"/chat/answers/{id}") as response:
      next(response.iter_lines())
    until(lambda: at.engine.answers[0].cancelled, 5)
    until(lambda: at.context.store.records(ChatMessage, id=id), 5)
    record = at.context.store.get(id)
    assert (record.content, record.stopped) == ("one two ", True)


def test_who_comes_back_in_time_hears_the_answer_from_its_beginning(tmp_path):
  says, gate = gated("one two three four")
  with page(tmp_path, engine=FakeEngine(says)) as at, Visitor(at.url) as ann:
    id = ann.say("Hi").json()["answers"][0]["id"]
    with ann.stream("GET", f"/chat/answers/{id}") as response:
      next(response.iter_lines())
    conversation = ann.get("/chat/conversations").json()["conversations"][0]["id"]
    assert ann.messages(conversation)[id]["running"]
    gate.set()
    pieces, end = ann.read(id)
    assert "".join(pieces) == end["message"]["text"] == "one two three four"
    assert not end["message"]["stopped"]


def test_an_answer_that_breaks_off_is_kept_and_said_to(tmp_path):
  engine = FakeEngine(lambda request: {"text": "so far", "finish": "raise"})
  with page(tmp_path, engine=engine) as at, Visitor(at.url) as ann:
    _, end = ann.read(ann.say("Hi").json()["answers"][0]["id"])
    assert (end["reason"], end["error"]) == ("error", "The answer broke off.")
    assert at.context.store.get(end["message"]["id"]).content == "so far"
    assert end["message"]["stopped"]


def test_a_full_queue_stores_nothing_and_says_when_to_come_again(at, ann):
  at.engine.room = 0
  response = ann.say("Hi")
  assert (response.status_code, response.headers["retry-after"]) == (503, "7")
  assert at.context.store.records(ChatMessage) == []


def test_one_person_has_few_answers_at_once(tmp_path):
  says, gate = gated("one two")
  with (
    page(tmp_path, engine=FakeEngine(says)) as at,
    Visitor(at.url) as ann,
    Visitor(at.url) as bob,
  ):
    assert [ann.say("Hi").status_code for _ in range(5)] == [200] * 4 + [503]
    assert bob.say("Hi").status_code == 200
    gate.set()


def test_two_answers_draw_together_or_not_at_all(at, ann):
  message, _ = ann.talk("Hi")
  at.engine.room = 2
  response = ann.post(f"/chat/messages/{message['id']}/answers", json={"count": 2})
  assert response.status_code == 503
  assert at.engine.answers[1].cancelled


# -- saying what one thinks


def test_a_thumb_becomes_a_record_and_a_changed_mind_supersedes_it(at, ann):
  _, answer = ann.talk("Hi")
  path = f"/chat/answers/{answer['id']}/feedback"
  full = {"thumb": "down", "tags": ["untrue", "harmful"], "text": SCRIPT, "ideal": "Better."}
  for body in ({"thumb": "up"}, {"thumb": "up"}, full, full):
    assert ann.post(path, json=body).status_code == 200
  first, second = at.context.store.records(Feedback, superseded=True)
  assert (first.thumb, second.supersedes) == ("up", first.id)
  assert only(at.context.store, Feedback) == second
  assert (second.thumb, second.tags, second.text, second.ideal) == (
    "down", ("untrue", "harmful"), SCRIPT, "Better.",
  )  # fmt: skip
  (demonstration,) = training.demonstrations(at.context.store)
  assert demonstration.item.conversation.last.content == "Better."
  conversation = at.context.store.get(answer["id"]).conversation
  shown = ann.messages(conversation)[answer["id"]]["feedback"]
  assert (shown["thumb"], shown["ideal"], shown["text"]) == ("down", "Better.", SCRIPT)


def test_many_clicks_at_once_leave_one_thumb_standing(at, ann):
  _, answer = ann.talk("Hi")
  path = f"/chat/answers/{answer['id']}/feedback"
  thumbs = [{"thumb": "up"}, {"thumb": "down"}] * 6
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    found = list(pool.map(lambda body: ann.post(path, json=body).status_code, thumbs))
  assert found == [200] * 12
  only(at.context.store, Feedback)


def test_a_thumb_is_for_answers(ann):
  message, _ = ann.talk("Hi")
  assert (
    ann.post(f"/chat/answers/{message['id']}/feedback", json={"thumb": "up"}).status_code == 422
  )


def test_a_harmful_answer_is_reported_once(at, ann):
  _, answer = ann.talk("Hi")
  for _ in range(2):
    body = {"category": "violence", "text": "It tells how."}
    assert ann.post(f"/chat/answers/{answer['id']}/harm", json=body).status_code == 200
  report = only(at.context.store, HarmReport)
  assert (report.message, report.category, report.text) == (
    answer["id"],
    "violence",
    "It tells how.",
  )


@pytest.mark.parametrize("choice, ranks", conversations.RANKS.items())
def test_a_choice_between_two_answers_becomes_a_comparison(at, ann, choice, ranks):
  message, _ = ann.talk("Hi")
  told = ann.post(f"/chat/messages/{message['id']}/answers", json={"count": 2}).json()
  first, second = (ann.read(a["id"])[1]["message"]["id"] for a in told["answers"])
  body = {"id": shapes.new_id(), "first": first, "second": second, "choice": choice, "seconds": 2.5}
  for _ in range(2):
    assert ann.post("/chat/preferences", json=body).json() == {"id": body["id"]}
  record = only(at.context.store, Comparison)
  assert tuple(a.rank for a in record.answers) == ranks
  assert (record.source, record.seconds, record.message) == ("chat", 2.5, message["id"])
  assert {a.policy for a in record.answers} == {at.context.policy}
  assert record.conversation.to_json() == [{"role": "user", "content": "Hi"}]


def test_two_answers_to_compare_have_two_seeds(at, ann):
  message, _ = ann.talk("Hi")
  path = f"/chat/messages/{message['id']}/answers"
  told = ann.post(path, json={"count": 2, "sampling": {"seed": 2**63 - 1}}).json()
  for answer in told["answers"]:
    ann.read(answer["id"])
  assert [r.seed for r in at.engine.requests[1:]] == [2**63 - 1, 0]
  greedy = ann.post(path, json={"count": 2, "sampling": {"temperature": 0}})
  assert greedy.status_code == 422 and "temperature" in greedy.text


# -- the filter


def test_every_verdict_is_a_record_and_a_warning_goes_with_its_message(filtered):
  with Visitor(filtered.url) as ann:
    message, answer = ann.talk("a fight")
    assert message["verdict"]["flagged"] == ["violence"] and message["verdict"]["action"] == "warn"
    verdict = only(filtered.context.store, Verdict, direction="input")
    assert (verdict.message, verdict.model, verdict.flagged) == (message["id"], "words-1", True)
    assert [(s.category, s.score, s.threshold) for s in verdict.scores] == [
      ("hate", 0.1, 0.5), ("self-harm", 0.1, 0.5), ("violence", 0.9, 0.5),
    ]  # fmt: skip
    output = only(filtered.context.store, Verdict, direction="output")
    assert (output.message, output.action) == (answer["id"], "warn")
    conversation = filtered.context.store.get(message["id"]).conversation
    shown = ann.messages(conversation)
    assert shown[message["id"]]["verdict"] == message["verdict"]
    assert shown[answer["id"]]["verdict"] == answer["verdict"]
    assert {side for _, side in filtered.context.moderator.asked} == {"input", "output"}


@pytest.mark.parametrize("body", [{"text": "I hate you"}, {"text": "Hi", "system": "hate all"}])
def test_a_blocked_message_is_not_answered_and_only_its_verdict_stays(filtered, body):
  with Visitor(filtered.url) as ann:
    told = ann.say(**body).json()
    assert told["blocked"]["flagged"] == ["hate"] and told["blocked"]["action"] == "block"
    assert filtered.engine.requests == [] and stored(filtered.context.store) == []
    verdict = only(filtered.context.store, Verdict)
    assert (verdict.id, verdict.text) == (told["blocked"]["id"], body.get("system", body["text"]))
    report = {"mistake": "false_positive", "category": "hate", "text": "I do not"}
    assert ann.post(f"/chat/verdicts/{verdict.id}/reports", json=report).status_code == 200
    (told,) = training.moderation_labels(filtered.context.store)
    label = told.item
    assert (label.text, label.direction, label.labels) == (verdict.text, "input", {"hate": False})


def test_a_blocked_answer_is_never_sent_and_replaced_by_a_notice(tmp_path):
  text = "so " * 100 + "I hate you " * 30 + "and more " * 500
  engine = FakeEngine(lambda request: {"text": text, "pause": 0.0})
  with page(tmp_path, engine=engine, moderator=FakeModerator()) as at, Visitor(at.url) as ann:
    id = ann.say("Hi").json()["answers"][0]["id"]
    pieces, end = ann.read(id)
    assert "hate" not in "".join(pieces) and text.startswith("".join(pieces)) and pieces
    assert end["message"]["text"] == chat_filter.WITHHELD and end["message"]["withheld"]
    assert at.engine.answers[0].cancelled
    verdict = only(at.context.store, Verdict, direction="output")
    assert verdict.action == "block" and "hate" in verdict.text and text.startswith(verdict.text)
    conversation = ann.get("/chat/conversations").json()["conversations"][0]["id"]
    shown = ann.messages(conversation)[id]
    assert shown["withheld"] and shown["verdict"]["id"] == verdict.id
    assert "you" not in json.dumps(shown)
    assert ann.post(f"/chat/answers/{id}/feedback", json={"thumb": "up"}).status_code == 422
    report = {"mistake": "false_positive", "category": "hate"}
    assert ann.post(f"/chat/verdicts/{verdict.id}/reports", json=report).status_code == 200


def test_reports_on_the_filter_hold_its_score_and_fit_its_verdict(filtered):
  with Visitor(filtered.url) as ann:
    message, _ = ann.talk("a fight")
    path = f"/chat/verdicts/{message['verdict']['id']}/reports"
    send = lambda mistake, category: ann.post(path, json={"mistake": mistake, "category": category})
    assert send("false_positive", "hate").status_code == 422  # it did not say so
    assert send("false_negative", "violence").status_code == 422  # it did
    assert send("false_negative", "gossip").status_code == 422
    for _ in range(2):
      assert send("false_positive", "violence").status_code == 200
    assert send("false_negative", "self-harm").status_code == 200
    found = filtered.context.store.records(VerdictReport)
    assert [(r.mistake, r.category, r.score, r.threshold) for r in found] == [
      ("false_positive", "violence", 0.9, 0.5), ("false_negative", "self-harm", 0.1, 0.5),
    ]  # fmt: skip
    conversation = filtered.context.store.get(message["id"]).conversation
    shown = ann.messages(conversation)[message["id"]]["verdict"]["reports"]
    assert [r["category"] for r in shown] == ["violence", "self-harm"]


# -- taking it back


def test_withdrawal_deletes_everything_and_makes_a_new_person(filtered):
  with Visitor(filtered.url) as ann, Visitor(filtered.url) as bob:
    bob.talk("mine")
    _, answer = ann.talk("a fight")
    ann.post(f"/chat/answers/{answer['id']}/feedback", json={"thumb": "down", "text": "a fight!"})
    assert ann.post("/chat/data/withdraw", json={}).status_code == 422
    preview = ann.get("/chat/data").json()["records"]
    assert preview == {"message": 2, "verdict": 2, "feedback": 1}
    before = ann.cookies[visitors.COOKIE]
    assert ann.post("/chat/data/withdraw", json={"confirm": True}).json() == {"deleted": 5}
    assert ann.cookies[visitors.COOKIE] != before
    assert stored(filtered.context.store) == [("user", "mine"), ("assistant", "You said: mine")]
    assert only(filtered.context.store, Withdrawal).author == "self"
    with filtered.context.store.engine.connect() as connection:
      author = sa.text("SELECT count(*) FROM people WHERE person = :p")
      assert connection.scalar(author, {"p": visitors.id_of(before)}) == 0
    assert ann.get("/chat/conversations").json() == {"conversations": []}
    assert ann.post("/chat/data/withdraw", json={"confirm": True}).json() == {"deleted": 0}


def test_withdrawal_ends_answers_under_way_and_stores_nothing_of_them(tmp_path):
  says, gate = gated("one two three four")
  with page(tmp_path, engine=FakeEngine(says)) as at, Visitor(at.url) as ann:
    id = ann.say("Hi").json()["answers"][0]["id"]
    with ann.stream("GET", f"/chat/answers/{id}") as response:
      next(response.iter_lines())
      assert ann.post("/chat/data/withdraw", json={"confirm": True}).json() == {"deleted": 1}
    assert at.engine.answers[0].cancelled and stored(at.context.store) == []


# -- what must not get through

LONG = "x" * 20_001
SEND = {"id": "a" * 20, "conversation": "b" * 20, "text": "Hi"}
BAD = [
  ("messages", b"{"),
  ("messages", b"\xff\xfe"),
  ("messages", b"[]"),
  ("messages", {"text": "Hi"}),
  ("messages", {**SEND, "text": ""}),
  ("messages", {**SEND, "text": " \n"}),
  ("messages", {**SEND, "text": LONG}),
  ("messages", {**SEND, "text": "a\0b"}),
  ("messages", {**SEND, "text": "\ud800"}),
  ("messages", {**SEND, "id": "a b"}),
  ("messages", {**SEND, "id": "a" * 20 + "\n"}),
  ("messages", {**SEND, "conversation": "../" * 9}),
  ("messages", {**SEND, "parent": "nobody"}),
  ("messages", {**SEND, "author": "ann"}),
  ("messages", {**SEND, "sampling": {"top_p": 0}}),
  ("messages", {**SEND, "sampling": {"seed": 2**63}}),
  ("messages", {**SEND, "sampling": {"temperature": float("nan")}}),
  ("answers/ANSWER/feedback", {"thumb": "sideways"}),
  ("answers/ANSWER/feedback", {"thumb": "up", "tags": ["untrue", "untrue"]}),
  ("answers/ANSWER/feedback", {"thumb": "up", "text": LONG}),
  ("answers/ANSWER/feedback", {"thumb": "up", "text": "a\0b"}),
  ("answers/ANSWER/harm", {"category": ""}),
  ("answers/%00/harm", {}),
  ("answers/a%20b/stop", {}),
  ("answers/nobody/stop", {}),
  ("messages/ANSWER/answers", {}),
  ("messages/ANSWER/answers", {"count": 3}),
  ("preferences", {"id": "c" * 20, "first": "ANSWER", "second": "ANSWER", "choice": "tie"}),
  ("verdicts/ANSWER/reports", {"mistake": "false_positive", "category": "hate"}),
  ("data/withdraw", {"confirm": False}),
]  # fmt: skip


def test_bad_requests_get_an_explanation_and_store_nothing(at, ann):
  _, answer = ann.talk("Hi")
  before = at.context.store.counts()
  for path, body in BAD:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    content = content.replace(b"ANSWER", answer["id"].encode())
    headers = {"Content-Type": "application/json"}
    url = f"/chat/{path.replace('ANSWER', answer['id'])}"
    response = ann.post(url, content=content, headers=headers)
    assert response.status_code in (404, 422), (path, body, response.text)
    assert response.json()["error"]["message"], (path, body)
  assert at.context.store.counts() == before


def test_a_body_that_is_no_json_by_name_is_refused(ann):
  for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
    response = ann.post(
      "/chat/data/withdraw", content=b'{"confirm": true}', headers={"Content-Type": kind}
    )
    assert response.status_code == 403
  headers = {"Content-Type": "application/json"}
  assert ann.post("/chat/messages", content=b" " * 3_000_000, headers=headers).status_code == 413


# -- the files of the page


def test_the_page_and_its_files_come_with_headers_that_allow_nothing_else(at):
  html = httpx.get(at.url)
  assert html.headers["content-security-policy"].startswith("default-src 'self'")
  assert "style=" not in html.text and "onclick" not in html.text and "<script>" not in html.text
  for name, kind in {"chat.js": "javascript", "chat.css": "text/css", "icon.svg": "svg"}.items():
    assert kind in httpx.get(f"{at.url}/chat/static/{name}").headers["content-type"]


@pytest.mark.parametrize(
  "name", ["nothing.js", "..%2f..%2fchat_page.py", "%2e%2e/chat_page.py", ""]
)
def test_no_other_file_is_served(at, name):
  assert httpx.get(f"{at.url}/chat/static/{name}").status_code == 404


def test_no_script_of_the_page_parses_markup():
  sources = "".join(path.read_text() for path in chat_page.STATIC.glob("*.js"))
  banned = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(")
  assert len(sources) > 10_000 and not [word for word in banned if word in sources]
