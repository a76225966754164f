"""The labeling page over HTTP: each action is the right record, and nobody gets at another's."""

import concurrent.futures
import json
import threading
import types

import labeling
import pytest
from fastapi.testclient import TestClient

from rlhf_jax.feedback import exchange, people, withdrawal
from rlhf_jax.feedback.labels import FLAGS, Comparison, Demonstration, Judgment, Skip, Task, Turn
from rlhf_jax.serving import sessions
from rlhf_jax.serving.context import Overloaded
from rlhf_jax.text.dialogue import PLAIN, VILLAGE

HERE = {"origin": "http://testserver"}
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
LEASE = 30.0  # seconds


@pytest.fixture
def server(tmp_path):
  built = labeling.build(tmp_path / "f.db", lease_seconds=LEASE)
  yield built
  built.store.close()


@pytest.fixture
def browser(server):
  """`browser("ann")`: a client that is signed in; without a name, one that is not."""

  def open_(name=None):
    client = TestClient(server.app, headers=HERE, raise_server_exceptions=False)
    if name:
      assert client.post("/label/session", json={"token": server.tokens[name]}).status_code == 200
    return client

  return open_


def take(client, work="compare"):
  return client.post("/label/tasks/next", json={"work": work}).json()["assignment"]


def ranking(ranks=(0, 1, 2, 3), submission="s1", **more):
  return {"submission": submission, "judgments": [{"rank": r} for r in ranks], **more}


def expire(server):
  """Ends every lease, by plain SQL."""
  with server.store.engine.begin() as connection:
    connection.exec_driver_sql("UPDATE slots SET lease_until = '2000-01-01T00:00:00.000000Z'")


# Signing in and out


def test_a_token_opens_a_session_in_a_cookie_that_scripts_cannot_read(server, browser):
  client = browser()
  assert client.get("/label/session").status_code == 401
  answer = client.post("/label/session", json={"token": f" {server.tokens['ann']}\n"})
  assert answer.json()["name"] == "ann" and answer.json()["role"] == "labeler"
  assert answer.json()["flags"] == FLAGS
  cookie = answer.headers["set-cookie"]
  assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/label" in cookie
  assert server.tokens["ann"] not in cookie and server.ids["ann"] not in cookie
  assert client.get("/label/session").json()["id"] == server.ids["ann"]


def test_the_cookie_is_for_https_only_where_the_page_came_by_it(server):
  client = TestClient(server.app, base_url="https://testserver", headers=HERE)
  answer = client.post("/label/session", json={"token": server.tokens["ann"]})
  assert "Secure" in answer.headers["set-cookie"]


@pytest.mark.parametrize("token", ["wrong", "\ud800", "é" * 150])
def test_a_wrong_token_opens_nothing(browser, token):
  client = browser()
  body = json.dumps({"token": token})
  answer = client.post("/label/session", content=body, headers={"content-type": "application/json"})
  assert answer.status_code in (401, 422) and "set-cookie" not in answer.headers


def test_signing_out_makes_the_cookie_worthless_wherever_it_is(browser):
  client = browser("ann")
  stolen = client.cookies[sessions.COOKIE]
  assert client.request("DELETE", "/label/session", json={}).status_code == 200
  other = browser()
  other.cookies.set(sessions.COOKIE, stolen, path="/label")
  assert other.get("/label/session").status_code == 401


def test_who_is_made_inactive_is_out_at_once_and_their_words_stay(server, browser):
  task = server.store.add(labeling.to_rank())
  client = browser("ann")
  assert take(client)["task"] == task
  people.set_active(server.store, server.ids["ann"], False, author="lab")
  for answer in (
    client.get("/label/session"),
    client.get("/label/records"),
    client.post(f"/label/tasks/{task}/comparison", json=ranking()),
  ):
    assert answer.status_code == 401
  people.set_active(server.store, server.ids["ann"], True, author="lab")
  assert client.get("/label/session").status_code == 401  # the session has ended


def test_a_new_token_ends_sessions_of_the_old_one_and_so_does_withdrawing(server, browser):
  ann, bob = browser("ann"), browser("bob")
  people.new_token(server.store, server.ids["ann"])
  assert ann.get("/label/session").status_code == 401
  withdrawal.withdraw(server.store, server.ids["bob"], author="lab")
  assert bob.get("/label/session").status_code == 401


def test_a_session_ends_after_half_a_day_without_use(server):
  now = [0.0]
  opened = sessions.Sessions(server.store, clock=lambda: now[0])

  class Response:
    def set_cookie(self, name, value, **_):
      self.value = value

  class Request:
    url = type("URL", (), {"scheme": "http"})
    cookies: dict = {}

  response, request = Response(), Request()
  opened.sign_in(request, response, server.tokens["ann"])
  request.cookies = {sessions.COOKIE: response.value}
  for now[0] in (40_000.0, 80_000.0):  # in use, it goes on
    assert opened.person(request).name == "ann"
  now[0] += 43_201.0
  with pytest.raises(Exception, match="not signed in"):
    opened.person(request)


@pytest.mark.parametrize(
  "headers", [{}, {"origin": "http://evil"}, {"sec-fetch-site": "same-site"}]
)
def test_another_site_cannot_write_with_a_labelers_cookie(server, browser, headers):
  task = server.store.add(labeling.to_rank())
  cookie = browser("ann").cookies[sessions.COOKIE]
  foreign = TestClient(server.app, headers=headers, cookies={sessions.COOKIE: cookie})
  assert foreign.post(f"/label/tasks/{task}/comparison", json=ranking()).status_code == 403
  assert not server.store.records(Comparison)


ROUTES = [
  ("POST", "tasks/next"),
  ("PUT", "tasks/x/draft"),
  ("POST", "tasks/x/comparison"),
  ("POST", "tasks/x/demonstration"),
  ("POST", "tasks/x/skip"),
  ("POST", "tasks/x/suggestion"),
  ("GET", "progress"),
  ("GET", "records"),
  ("GET", "records/x"),
  ("GET", "dashboard"),
  ("POST", "tasks/import"),
  ("GET", "tasks/export"),
]


def test_nothing_is_open_to_strangers(server, browser):
  listed = {
    (method.upper(), path.removeprefix("/label/"))
    for path, methods in server.app.openapi()["paths"].items()
    for method in methods
  }
  known = {(method, path.replace("/x", "/{task}", 1)) for method, path in ROUTES}
  known = {(m, p.replace("records/{task}", "records/{record}")) for m, p in known}
  assert listed == known | {(m, "session") for m in ("GET", "POST", "DELETE")}
  stranger = browser()
  for method, path in ROUTES:
    bodies = {"tasks/next": {"work": "compare"}}
    body = bodies.get(path, {}) if method != "GET" else None
    assert stranger.request(method, f"/label/{path}", json=body).status_code in (401, 422)
  for method, path in ROUTES[-3:]:
    body = {"lines": "{}"} if method == "POST" else None
    assert browser("ann").request(method, f"/label/{path}", json=body).status_code == 403


# Comparing


def test_a_ranking_is_stored_in_the_tasks_order_with_all_that_was_said(server, browser):
  task = server.store.add(labeling.to_rank(instructions="Look closely.", gold=(0, 1, 2, 3)))
  client = browser("ann")
  given = take(client)
  assert given["task"] == task and given["instructions"] == "Look closely."
  assert given["messages"] == [{"role": "user", "content": "Where is the mill?"}]
  assert sorted(a["place"] for a in given["answers"]) == [0, 1, 2, 3]
  assert {a["place"]: a["text"] for a in given["answers"]} == dict(enumerate("ABCD"))
  judgments = [
    {"rank": 1, "quality": 4, "flags": ["opinion", "hallucination"]},
    {"rank": 0, "quality": 7},
    {"rank": 1},
    {"rank": 2, "quality": 1, "flags": ["harmful_advice"]},
  ]
  body = {"submission": "s1", "judgments": judgments, "note": "C is odd.", "seconds": 61.5}
  answer = client.post(f"/label/tasks/{task}/comparison", json=body)
  assert answer.json() == {"record": "s1"}
  (record,) = server.store.records(Comparison)
  assert [(a.text, a.writer, a.rank, a.quality, a.flags) for a in record.answers] == [
    ("A", "secret-policy", 1, 4, ("opinion", "hallucination")),
    ("B", "secret-policy", 0, 7, ()),
    ("C", "secret-policy", 1, None, ()),
    ("D", "secret-policy", 2, 1, ("harmful_advice",)),
  ]
  assert (record.author, record.task, record.note) == (server.ids["ann"], task, "C is odd.")
  assert record.seconds == 61.5 and record.source == "labeling"
  assert list(record.presented) == [a["place"] for a in given["answers"]]


def test_nobody_sees_who_wrote_an_answer_or_what_is_gold(server, browser):
  server.store.add(labeling.to_rank(gold=(3, 2, 1, 0)))
  client = browser("ann")
  shown = json.dumps(take(client))
  assert "secret" not in shown and "gold" not in shown and "policy" not in shown
  task = json.loads(shown)["task"]
  client.post(f"/label/tasks/{task}/comparison", json=ranking())
  assert "secret" not in client.get("/label/records/s1").text


def test_the_order_of_answers_is_the_labelers_own_and_stays(server, browser):
  server.store.add_all([labeling.to_rank(overlap=2) for _ in range(12)])
  orders = {"ann": [], "bob": []}
  for name, seen in orders.items():
    client = browser(name)
    for i in range(12):
      given = take(client)
      assert take(client)["answers"] == given["answers"]
      seen.append(tuple(a["place"] for a in given["answers"]))
      body = ranking(submission=f"{name}{i}")
      client.post(f"/label/tasks/{given['task']}/comparison", json=body)
  assert orders["ann"] != orders["bob"]
  assert len(set(orders["ann"])) > 4  # of 24
  first = [order[0] for seen in orders.values() for order in seen]
  assert set(first) == {0, 1, 2, 3}


def test_a_double_click_is_one_record(server, browser):
  task = server.store.add(labeling.to_rank())
  client = browser("ann")
  take(client)
  body = ranking(seconds=3.0)
  send = lambda _: client.post(f"/label/tasks/{task}/comparison", json=body)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    answers = list(pool.map(send, range(4)))
  assert [a.status_code for a in answers] == [200] * 4
  assert {a.json()["record"] for a in answers} == {"s1"}
  assert len(server.store.records(Comparison)) == 1
  again = client.post(f"/label/tasks/{task}/comparison", json=ranking(submission="s2"))
  assert again.status_code == 422 and "done task" in again.json()["error"]["message"]


def test_two_labelers_at_once_never_get_the_same_slot(server, browser):
  server.store.add_all([labeling.to_rank() for _ in range(10)])
  done, start = {"ann": [], "bob": []}, threading.Barrier(2)

  def work(name):
    client = browser(name)
    start.wait()
    while given := take(client):
      done[name].append(given["task"])
      body = ranking(submission=f"{name}{len(done[name])}")
      assert client.post(f"/label/tasks/{given['task']}/comparison", json=body).status_code == 200

  threads = [threading.Thread(target=work, args=(name,)) for name in done]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not set(done["ann"]) & set(done["bob"])
  assert len(done["ann"]) + len(done["bob"]) == len(server.store.records(Comparison)) == 10


def test_a_skip_is_stored_once_with_its_reason_and_goes_to_somebody_else(server, browser):
  task = server.store.add(labeling.to_rank())
  ann, bob = browser("ann"), browser("bob")
  take(ann)
  body = {"submission": "k1", "reason": "I do not understand it", "seconds": 5}
  for _ in range(2):
    assert ann.post(f"/label/tasks/{task}/skip", json=body).json() == {"record": "k1"}
  (record,) = server.store.records(Skip)
  assert (record.task, record.reason, record.seconds) == (task, "I do not understand it", 5)
  assert take(ann) is None and take(bob)["task"] == task


# Drafts and leases


def test_a_draft_comes_back_and_renews_the_lease(server, browser):
  task = server.store.add(labeling.to_rank())
  client = browser("ann")
  before = take(client)["lease_until"]
  draft = {"ranks": [1, None, 2, None], "note": "nearly"}
  answer = client.put(f"/label/tasks/{task}/draft", json={"content": draft})
  assert answer.json()["lease_until"] > before
  assert server.store.counts()["comparison"]["stored"] == 0
  assert take(browser("ann"))["draft"] == draft  # another browser
  client.post(f"/label/tasks/{task}/comparison", json=ranking())
  with server.store.engine.connect() as connection:
    assert not list(connection.exec_driver_sql("SELECT * FROM drafts"))


def test_what_comes_after_the_task_went_to_somebody_else_is_refused_and_kept(server, browser):
  task = server.store.add(labeling.to_rank())
  ann, bob = browser("ann"), browser("bob")
  take(ann)
  expire(server)
  assert take(bob)["task"] == task
  late = ann.put(f"/label/tasks/{task}/draft", json={"content": {"note": "mine"}})
  assert late.status_code == 200 and late.json()["lease_until"] is None
  refused = ann.post(f"/label/tasks/{task}/comparison", json=ranking(note="mine still"))
  assert (
    refused.status_code == 409 and "went to somebody else" in refused.json()["error"]["message"]
  )
  assert not server.store.records(Comparison)
  with server.store.engine.connect() as connection:
    query = "SELECT labeler, content FROM drafts"
    ((labeler, content),) = connection.exec_driver_sql(query)
  assert labeler == server.ids["ann"] and "mine still" in content
  assert bob.post(f"/label/tasks/{task}/comparison", json=ranking()).status_code == 200


def test_a_lease_that_is_over_and_that_nobody_took_is_still_theirs(server, browser):
  task = server.store.add(labeling.to_rank())
  client = browser("ann")
  take(client)
  expire(server)
  assert client.put(f"/label/tasks/{task}/draft", json={"content": {}}).json()["lease_until"]
  assert client.post(f"/label/tasks/{task}/comparison", json=ranking()).status_code == 200


# Demonstrating


def test_a_demonstration_records_each_suggestion_and_how_far_it_was_edited(server, browser):
  task = server.store.add(labeling.to_write())
  client = browser("ann")
  assert take(client, "demonstrate")["messages"] == []
  first = {"role": "user", "content": "When does the post office open?"}
  body = {"role": "assistant", "turns": [first]}
  offered = client.post(f"/label/tasks/{task}/suggestion", json=body).json()
  assert offered["text"] == server.engine.text and offered["policy"] == server.policy
  edited = {
    "role": "assistant",
    "content": offered["text"].replace("nine", "ten"),
    "suggestion": offered["text"],
    "suggested_by": offered["policy"],
  }
  body = {"submission": "d1", "turns": [first, edited], "seconds": 80}
  for _ in range(2):
    answer = client.post(f"/label/tasks/{task}/demonstration", json=body)
    assert answer.json() == {"record": "d1"}
  (record,) = server.store.records(Demonstration)
  own, turn = record.turns
  assert (own.content, own.suggestion, own.edit_distance) == (first["content"], None, None)
  assert turn.suggestion == server.engine.text and turn.suggested_by == server.policy
  assert turn.edit_distance == 3  # nine -> ten: drop a letter, change two
  assert turn.edit_fraction == pytest.approx(3 / len(server.engine.text))
  assert record.seconds == 80 and record.task == task


def test_a_dialogue_that_was_begun_is_gone_on_with(server, browser):
  begun = (("user", "Hello!"), ("assistant", "Hello. What is it?"))
  task = server.store.add(labeling.to_write(*begun))
  client = browser("ann")
  assert [m["content"] for m in take(client, "demonstrate")["messages"]] == [c for _, c in begun]
  turns = [{"role": "user", "content": "The mill?"}, {"role": "assistant", "content": "North."}]
  asked = {"role": "assistant", "turns": turns[:1]}
  client.post(f"/label/tasks/{task}/suggestion", json=asked)
  (request,) = server.engine.asked
  said = [m.content for m in request.conversation.messages]
  assert said == [*(content for _, content in begun), "The mill?"]
  body = {"submission": "d1", "turns": turns}
  client.post(f"/label/tasks/{task}/demonstration", json=body)
  (record,) = server.store.records(Demonstration)
  assert [t.content for t in record.turns] == [*said, "North."]


@pytest.mark.parametrize("told_by", ["the caller", "the engine"])
def test_the_users_side_is_asked_as_the_template_writes_it(tmp_path, told_by):
  class Letters:
    """A tokenizer whose ids can be read: special texts as they are, others letter by letter."""

    eos = "<end>"
    encode_special = staticmethod(lambda text: [f"!{text}"] if text else [])
    encode = staticmethod(list)

  server = labeling.build(tmp_path / "f.db", template=VILLAGE, tokenizer=Letters())
  if told_by == "the engine":
    server.engine.loaded = types.SimpleNamespace(template=VILLAGE, tokenizer=Letters())
    server.app = labeling.app_on(server.store, server.engine, server.policy)
  client = TestClient(server.app, headers=HERE)
  client.post("/label/session", json={"token": server.tokens["ann"]})
  task = server.store.add(labeling.to_write(("user", "Hi"), ("assistant", "Yo")))
  take(client, "demonstrate")
  body = {"role": "user", "turns": []}
  assert client.post(f"/label/tasks/{task}/suggestion", json=body).status_code == 200
  (request,) = server.engine.asked
  assert request.conversation == (
    *("!<user>", "H", "i", "!<end>"),
    *("!<assistant>", "Y", "o", "!<end>"),
    "!<user>",
  )
  assert request.stop == ()
  server.store.close()


def test_without_a_template_the_users_side_is_the_next_line_of_a_transcript(server, browser):
  task = server.store.add(labeling.to_write(("user", "Hi"), ("assistant", "Yo")))
  client = browser("ann")
  take(client, "demonstrate")
  client.post(f"/label/tasks/{task}/suggestion", json={"role": "user", "turns": []})
  (request,) = server.engine.asked
  assert request.conversation == "Human: Hi\n\nAssistant: Yo\n\nHuman:"
  assert request.stop == (PLAIN.prefix["assistant"],)


@pytest.mark.parametrize(
  ("body", "fails", "status"),
  [
    ({"role": "assistant", "turns": []}, None, 422),  # nobody has said anything
    ({"role": "system", "turns": []}, None, 422),
    ({"role": "user", "turns": []}, Overloaded(9), 503),
  ],
)
def test_a_suggestion_that_cannot_be_had_says_why(server, browser, body, fails, status):
  task = server.store.add(labeling.to_write())
  client = browser("ann")
  take(client, "demonstrate")
  server.engine.text = fails or server.engine.text
  answer = client.post(f"/label/tasks/{task}/suggestion", json=body)
  assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_suggestion_with_a_character_that_no_record_may_hold_can_be_submitted(server, browser):
  task = server.store.add(labeling.to_write(("user", "Hi")))
  client = browser("ann")
  take(client, "demonstrate")
  server.engine.text = "Good\0 day."
  path, body = f"/label/tasks/{task}", {"role": "assistant", "turns": []}
  given = client.post(f"{path}/suggestion", json=body).json()
  assert given["text"] == "Good\ufffd day."
  turn = {"role": "assistant", "content": "Good day.", "suggestion": given["text"]}
  turn["suggested_by"] = given["policy"]
  body = {"submission": "d", "turns": [turn]}
  assert client.post(f"{path}/demonstration", json=body).status_code == 200


# Whose is what


def test_a_labeler_reads_their_own_records_and_no_others(server, browser):
  server.store.add(labeling.to_rank(overlap=2))
  ann, bob = browser("ann"), browser("bob")
  for name, client in (("ann", ann), ("bob", bob)):
    task = take(client)["task"]
    client.post(f"/label/tasks/{task}/comparison", json=ranking(submission=f"of-{name}"))
  assert [r["id"] for r in ann.get("/label/records").json()["records"]] == ["of-ann"]
  assert ann.get("/label/records/of-ann").json()["author"] == server.ids["ann"]
  assert ann.get("/label/records/of-bob").status_code == 404
  assert browser("eve").get("/label/records/of-bob").status_code == 404
  assert ann.get(f"/label/records/{server.ids['bob']}").status_code == 404  # nor other kinds


def test_a_task_of_somebody_else_gives_no_suggestion(server, browser):
  task = server.store.add(labeling.to_write(("user", "private"), ("assistant", "words")))
  take(browser("ann"), "demonstrate")
  body = {"role": "user", "turns": []}
  answer = browser("bob").post(f"/label/tasks/{task}/suggestion", json=body)
  assert answer.status_code == 404 and not server.engine.asked


def test_progress_counts_ones_own_work_and_everybodys(server, browser):
  server.store.add_all([labeling.to_rank(overlap=2), labeling.to_rank(), labeling.to_write()])
  ann, bob = browser("ann"), browser("bob")
  for name, client in (("ann", ann), ("bob", bob)):
    task = take(client)["task"]
    client.post(f"/label/tasks/{task}/comparison", json=ranking(submission=name))
  take(ann, "demonstrate")
  found = ann.get("/label/progress").json()
  assert found["mine"] == {"comparison": 1, "demonstration": 0, "skip": 0}
  assert found["open"] == ["demonstrate"]
  assert found["all"]["compare"] == {"tasks": 2, "slots": 3, "done": 2, "leased": 0, "skips": 0}
  assert found["all"]["demonstrate"]["leased"] == 1


# Researchers


def test_the_dashboard_says_what_a_table_worked_by_hand_says(server, browser):
  """Three pairs of A, B, C. Ann: A > B > C; Bob: A > C > B; gold A > B = C."""
  server.store.add(labeling.to_rank("ABC", overlap=2, gold=(0, 1, 1)))
  for name, ranks, seconds in (("ann", (0, 1, 2), 30), ("bob", (0, 2, 1), 50)):
    client = browser(name)
    task = take(client)["task"]
    body = ranking(ranks, submission=name, seconds=seconds)
    client.post(f"/label/tasks/{task}/comparison", json=body)
  written = [Turn("user", "a"), Turn("assistant", "abcd", suggestion="abcx")]
  server.store.add(Demonstration(author=server.ids["bob"], turns=written, seconds=9))
  found = browser("eve").get("/label/dashboard").json()
  assert found["pairwise"] == {"held": 2, "of": 3, "value": pytest.approx(2 / 3)}
  rows = {row["name"]: row for row in found["labelers"]}
  assert rows["ann"]["with_others"]["value"] == pytest.approx(2 / 3)
  assert rows["ann"]["with_gold"]["value"] == pytest.approx(2 / 3)
  assert rows["ann"]["seconds_a_comparison"] == 30 and rows["bob"]["seconds_a_comparison"] == 50
  assert rows["bob"]["demonstrations"] == 1 and rows["bob"]["seconds_a_demonstration"] == 9
  assert rows["bob"]["edited"] == pytest.approx(0.25)
  assert rows["eve"]["comparisons"] == 0 and rows["eve"]["with_gold"]["value"] is None
  # Signs of the three pairs: +, +, + and +, +, -. Values n+ = 5, n- = 1; observed disagreement
  # 2 of 6, expected 2 * 5 * 1 / (6 - 1) = 2 of 6, so alpha is 0.
  assert found["preference_alpha"] == pytest.approx(0.0)
  assert found["quality_alpha"] is None


def test_tasks_come_in_and_go_out_as_they_were(server, browser):
  client = browser("eve")
  lines = [
    {"prompt": "Hi!", "responses": ["a\u2028b", "c"], "gold": [0, 1], "overlap": 2},
    {"messages": [{"role": "user", "content": "x"}], "instructions": "Go on.", "priority": 3},
    {},
  ]
  text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
  assert client.post("/label/tasks/import", json={"lines": text}).json() == {"tasks": 3, "slots": 4}
  answer = client.get("/label/tasks/export")
  assert "attachment" in answer.headers["content-disposition"]
  again = exchange.parse_tasks(answer.text, author=server.ids["eve"])
  told = lambda task: exchange.task_to_json(task)
  assert list(map(told, again)) == list(map(told, server.store.records(Task)))
  assert again[0].gold == (0, 1) and again[0].answers[0].text == "a\u2028b"


@pytest.mark.parametrize("line", ["{", '{"prompt": 1}', "[]", '{"responses": ["a"]}', "\n", "NaN"])
def test_a_file_with_one_bad_line_stores_nothing(server, browser, line):
  good = json.dumps({"prompt": "Hi!"}) if line.strip() else ""
  answer = browser("eve").post("/label/tasks/import", json={"lines": f"{good}\n{line}"})
  assert answer.status_code == 422 and not server.store.records(Task)
  if line.strip():
    assert "line 2" in answer.json()["error"]["message"]


# Bad input


BAD_RANKINGS = [
  {},
  {"submission": "s", "judgments": []},
  ranking((0, 1)),
  ranking((0, 2, 3, 4)),
  ranking((1, 2, 3, 4)),
  ranking((0, 1, 2, -1)),
  ranking((0, 1, 2, 10**30)),
  ranking((0, 1, 2, 3), submission=""),
  ranking((0, 1, 2, 3), submission="a b"),
  ranking((0, 1, 2, 3), submission="x" * 65),
  ranking((0, 1, 2, 3), seconds=-1),
  ranking((0, 1, 2, 3), seconds="soon"),
  ranking((0, 1, 2, 3), note="\0"),
  ranking((0, 1, 2, 3), note="x" * 100_001),
  ranking((0, 1, 2, 3), extra=1),
  {"submission": "s", "judgments": [{"rank": 0, "quality": 8}] * 4},
  {"submission": "s", "judgments": [{"rank": True}] * 4},
  {"submission": "s", "judgments": [{"rank": 0, "flags": ["rude"]}] * 4},
  {"submission": "s", "judgments": [{"rank": 0, "flags": ["opinion"] * 2}] * 4},
  {"submission": "s", "judgments": [{"rank": 0, "flags": [1]}] * 4},
  {"submission": "s", "judgments": [None] * 4},
]


@pytest.mark.parametrize("body", BAD_RANKINGS)
def test_a_bad_ranking_is_refused_in_words_and_the_task_stays(server, browser, body):
  task = server.store.add(labeling.to_rank())
  client = browser("ann")
  take(client)
  answer = client.post(f"/label/tasks/{task}/comparison", json=body)
  assert answer.status_code == 422 and answer.json()["error"]["message"]
  assert not server.store.records(Comparison) and take(client)["task"] == task


@pytest.mark.parametrize(
  "raw",
  [
    "",
    "{",
    "null",
    "[]",
    '{"content": NaN}',
    '{"content": {"x": NaN}}',
    '{"content": {"x": "\\ud800"}}',
    '{"content": {"x": "\\u0000"}}',
    '{"content": {"x": "' + "x" * 70_000 + '"}}',
    '{"content": ' + "[" * 5_000 + "]" * 5_000 + "}",
  ],
)
def test_a_bad_draft_is_refused_and_the_last_one_kept(server, browser, raw):
  task = server.store.add(labeling.to_rank())
  client = browser("ann")
  take(client)
  client.put(f"/label/tasks/{task}/draft", json={"content": {"note": "good"}})
  headers = {"content-type": "application/json"}
  answer = client.put(f"/label/tasks/{task}/draft", content=raw, headers=headers)
  assert answer.status_code == 422
  assert take(client)["draft"] == {"note": "good"}


@pytest.mark.parametrize(
  "turns",
  [
    [],
    [{"role": "user", "content": "only a question"}],
    [{"role": "assistant", "content": "  "}],
    [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}],
    [{"role": "assistant", "content": "y", "suggested_by": "nobody"}],
    [{"role": "assistant", "content": "y", "suggestion": "z", "suggested_by": "nobody"}],
    [{"role": "assistant", "content": "\ud800"}],
    [{"role": "assistant", "content": "y"}] * 201,
  ],
)
def test_a_bad_demonstration_is_refused(server, browser, turns):
  task = server.store.add(labeling.to_write())
  client = browser("ann")
  take(client, "demonstrate")
  body = json.dumps({"submission": "d", "turns": turns})
  headers = {"content-type": "application/json"}
  answer = client.post(f"/label/tasks/{task}/demonstration", content=body, headers=headers)
  assert answer.status_code == 422 and not server.store.records(Demonstration)


def test_tasks_that_are_not_there_or_of_the_other_kind_are_said_to_be(server, browser):
  task = server.store.add(labeling.to_write())
  client = browser("ann")
  take(client, "demonstrate")
  assert client.post("/label/tasks/none/comparison", json=ranking()).status_code == 404
  assert client.post(f"/label/tasks/{task}/comparison", json=ranking()).status_code == 422
  assert client.post("/label/tasks/%00/comparison", json=ranking()).status_code in (404, 422)
  assert client.get(f"/label/records/{'x' * 300}").status_code == 422
  assert client.get("/label/static/..%2f..%2flabel_page.py").status_code == 404


def test_a_body_without_end_is_cut_off(server, browser):
  answer = browser("ann").post("/label/tasks/next", json={"work": "x" * labeling.BODY_LIMIT})
  assert answer.status_code == 413


# The page


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(browser):
  client = browser()
  page = client.get("/label")
  assert "default-src 'self'" in page.headers["content-security-policy"]
  assert "onclick" not in page.text and "style=" not in page.text
  from rlhf_jax.serving.label_page import STATIC

  for path in STATIC.iterdir():
    found = client.get(f"/label/static/{path.name}")
    assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
    links = found.text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in links and "https://" not in links
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
      assert unsafe not in found.text


def test_a_script_in_anybodys_text_stays_text(server, browser):
  task = server.store.add(labeling.to_rank((SCRIPT, "b", "c", "d"), ask=SCRIPT))
  client = browser("ann")
  answer = client.post("/label/tasks/next", json={"work": "compare"})
  assert answer.headers["content-type"] == "application/json"
  assert answer.headers["x-content-type-options"] == "nosniff"
  client.post(f"/label/tasks/{task}/comparison", json=ranking(note=SCRIPT))
  assert client.get("/label/records/s1").json()["note"] == SCRIPT


def test_a_round_of_a_run_and_the_page_meet_in_the_store(server, browser):
  """What `asking` files is what the page hands out, and what the page stores is what it takes."""
  from rlhf_jax.feedback import rounds

  filed = [labeling.to_rank(ask=f"{i}?") for i in range(3)]
  server.store.add_all(filed)
  client = browser("ann")
  while given := take(client):
    i = [task.id for task in filed].index(given["task"])
    body = ranking((0, 1, 1, 2), submission=f"r{i}")
    client.post(f"/label/tasks/{given['task']}/comparison", json=body)
  ids = [task.id for task in filed]
  assert rounds.standing(server.store, ids) == rounds.Standing(3, 3, 0, 0)
  taken = rounds.of_tasks(server.store, ids)
  assert [one.id for one in taken] == ["r0", "r1", "r2"]
  assert {one.item.ranks for one in taken} == {(0, 1, 1, 2)}
  assert [one.item.conversation for one in taken] == [task.conversation for task in filed]


def test_a_draft_that_came_too_late_opens_again_with_the_task(server, browser):
  """As the store keeps it, which `compare.js` reads."""
  task = server.store.add(labeling.to_rank(overlap=2))
  ann, bob = browser("ann"), browser("bob")
  take(ann)
  expire(server)
  take(bob)
  expire(server)
  late = ranking((3, 2, 1, 0))
  assert ann.post(f"/label/tasks/{task}/comparison", json=late).status_code == 409
  bob.post(f"/label/tasks/{task}/skip", json={"submission": "k", "reason": "no"})
  draft = take(ann)["draft"]
  assert [one["rank"] for one in draft["judgments"]] == [3, 2, 1, 0]
  assert Judgment(**draft["judgments"][0]) == Judgment(3)
