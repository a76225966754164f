"""OpenAI's own client is satisfied, and so are curl and Prometheus."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import httpx
import openai
import prometheus_client.parser
import pytest
import serving_cases
from serving_cases import HELLO, ROOM, alone, loaded

from rlhf_jax.feedback import records
from rlhf_jax.serving import keys as keys_lib
from rlhf_jax.serving.app import Settings
from rlhf_jax.serving.context import Request
from rlhf_jax.serving.filtering import NOTICE
from rlhf_jax.types import UserError

MESSAGES = HELLO.to_json()
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def engine():
  made = serving_cases.start()
  yield made
  made.stop(grace=0.0)


@pytest.fixture(scope="module")
def at(engine, tmp_path_factory):
  with serving_cases.server(tmp_path_factory.mktemp("plain"), engine=engine) as server:
    yield server


def client_of(server, key="none"):
  return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def client(at):
  return client_of(at)


def chat(client, **fields):
  return client.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | fields))


def endless():
  """A seed whose answer takes all the room there is."""
  seeds = range(100)
  return next(s for s in seeds if alone(Request(HELLO, seed=s)).finish_reason == "length")


def test_a_chat_completion_is_the_policys_answer_with_its_usage(client, at):
  expected = alone(Request(HELLO, seed=7))
  done = chat(client, seed=7)
  (choice,) = done.choices
  assert done.object == "chat.completion" and done.model == "tiny"
  assert done.system_fingerprint == at.context.policy
  assert choice.message.content == expected.text and choice.message.role == "assistant"
  assert choice.finish_reason == expected.finish_reason
  assert done.usage.prompt_tokens == len(expected.prompt)
  assert done.usage.completion_tokens == len(expected.ids)
  assert done.usage.total_tokens == len(expected.prompt) + len(expected.ids)


def test_a_stream_is_the_same_answer_in_pieces_with_usage_at_the_end(client):
  seed = endless()
  chunks = list(chat(client, seed=seed, stream=True, stream_options={"include_usage": True}))
  *parts, last = chunks
  assert parts[0].choices[0].delta.role == "assistant"
  whole = chat(client, seed=seed)
  assert (
    "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
  )
  assert [p.choices[0].finish_reason for p in parts if p.choices[0].finish_reason] == ["length"]
  assert last.choices == [] and last.usage == whole.usage
  assert all(part.usage is None for part in parts)
  assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_have_seeds_that_count_up_and_share_the_prompts_tokens(client):
  done = chat(client, seed=3, n=3)
  expected = [alone(Request(HELLO, seed=3 + k)) for k in range(3)]
  assert [c.message.content for c in done.choices] == [one.text for one in expected]
  assert [c.seed for c in done.choices] == [3, 4, 5]
  assert done.usage.prompt_tokens == len(expected[0].prompt)
  assert done.usage.completion_tokens == sum(len(one.ids) for one in expected)
  texts = ["", "", ""]
  for chunk in chat(client, seed=3, n=3, stream=True):
    for choice in chunk.choices:
      texts[choice.index] += choice.delta.content or ""
  assert texts == [one.text for one in expected]


def test_logprobs_come_with_every_token_of_the_text(client):
  done = chat(client, seed=endless(), logprobs=True)
  content = done.choices[0].logprobs.content
  assert "".join(one.token for one in content) == done.choices[0].message.content
  assert len(content) == done.usage.completion_tokens
  assert all(one.logprob <= 0 and bytes(one.bytes).decode() == one.token for one in content)


def test_a_completion_goes_on_from_texts_and_from_ids(client):
  create = client.completions.create
  ids = loaded().tokenizer.encode("the cat")
  by_text = create(model="tiny", prompt="the cat", seed=2, logprobs=0, max_tokens=9)
  by_ids = create(model="tiny", prompt=ids, seed=2, max_tokens=9)
  assert by_text.object == "text_completion" and by_text.choices[0].text == by_ids.choices[0].text
  found, text = by_text.choices[0].logprobs, by_text.choices[0].text
  for token, offset in zip(found.tokens, found.text_offset):
    assert text[offset : offset + len(token)] == token
  both = create(model="tiny", prompt=["the cat", "on"], seed=2, n=2, max_tokens=9)
  assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
  assert both.choices[0].text == text
  assert both.usage.prompt_tokens == len(ids) + len(loaded().tokenizer.encode("on"))
  parts = list(create(model="tiny", prompt="the cat", seed=2, max_tokens=9, stream=True))
  assert "".join(part.choices[0].text for part in parts) == text


def test_stop_texts_end_an_answer_and_max_tokens_limits_it(client):
  seed = endless()
  whole = alone(Request(HELLO, seed=seed)).text
  stop = next(c for c in whole[2:] if c.isprintable() and c != "\ufffd")
  done = chat(client, seed=seed, stop=[stop, "never"])
  assert done.choices[0].message.content == whole[: whole.index(stop)]
  assert done.choices[0].finish_reason == "stop"
  for name in ("max_tokens", "max_completion_tokens"):
    assert chat(client, seed=seed, **{name: 2}).usage.completion_tokens == 2
  assert chat(client, seed=seed, max_tokens=10**9).usage.completion_tokens == ROOM.max_new_tokens


def test_messages_may_be_lists_of_texts_and_harmless_fields_are_passed_over(client):
  parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat?"}]
  harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "tools": [], "logit_bias": {}}
  done = chat(client, seed=7, messages=[{"role": "user", "content": parts}], extra_body=harmless)
  assert done.choices[0].message.content == alone(Request(HELLO, seed=7)).text


def test_the_model_is_listed_and_found_by_name(client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").owned_by == "rlhf_jax"
  with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
    client.models.retrieve("gpt/4")
  with pytest.raises(openai.NotFoundError):
    chat(client, model="gpt-4")


@pytest.mark.parametrize(
  ("fields", "param"),
  [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"extra_body": {"top_k": 5}}, "top_k"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
  ],
)
def test_a_field_that_cannot_be_obeyed_is_refused_by_its_name(client, fields, param):
  with pytest.raises(openai.UnprocessableEntityError) as refused:
    chat(client, **fields)
  body = refused.value.body
  assert (body["param"] or "").startswith(param) and body["type"] == "invalid_request_error"
  assert body["message"]


@pytest.mark.parametrize(
  ("messages", "says"),
  [
    ([{"role": "user", "content": "x" * 99}], "max_tokens is 48"),
    ([*MESSAGES, {"role": "system", "content": "no"}], "only the first message"),
    ([*MESSAGES, {"role": "assistant", "content": "the"}], "end with the user's message"),
    ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ([{"role": "tool", "content": "x"}], "role"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "text"),
  ],
)
def test_dialogues_that_cannot_be_answered_say_why(at, messages, says):
  body = json.dumps({"model": "tiny", "messages": messages})  # ASCII, as the client cannot
  answer = httpx.post(f"{at.url}/v1/chat/completions", content=body, headers=JSON)
  assert answer.status_code == 422 and says in answer.json()["error"]["message"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'{"model": 1e999}', b"[" * 9_000, b"\xff"])
def test_a_body_that_is_no_json_of_ours_is_a_422_in_openais_shape(at, body):
  answer = httpx.post(f"{at.url}/v1/chat/completions", content=body, headers=JSON)
  assert answer.status_code == 422
  assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def sse(text):
  """The data of every event; anything that is no event fails."""
  *events, rest = text.split("\n\n")
  assert rest == "" and all(event.startswith("data: ") for event in events)
  return [event.removeprefix("data: ") for event in events]


def test_every_event_of_a_stream_parses_and_the_last_is_done(at):
  body = {"model": "tiny", "messages": MESSAGES, "stream": True, "n": 2, "logprobs": True}
  answer = httpx.post(f"{at.url}/v1/chat/completions", json=body)
  assert answer.headers["content-type"].startswith("text/event-stream")
  *events, done = sse(answer.text)
  assert done == "[DONE]"
  assert {json.loads(event)["object"] for event in events} == {"chat.completion.chunk"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_gets_a_stream(at):
  body = json.dumps({"model": "tiny", "prompt": "the cat", "stream": True})
  command = ["curl", "-sN", f"{at.url}/v1/completions", "-H", "Content-Type: application/json"]
  done = subprocess.run([*command, "-d", body], capture_output=True, text=True, timeout=30)
  assert sse(done.stdout)[-1] == "[DONE]"


@contextlib.contextmanager
def slow(engine, monkeypatch, seconds=0.1):
  """A device that takes its time."""
  advance = engine.decoder.advance
  slowly = lambda *args: (time.sleep(seconds), advance(*args))[1]
  with monkeypatch.context() as patched:
    patched.setitem(engine.decoder.__dict__, "advance", slowly)
    yield


def test_closing_a_stream_frees_the_slot(client, at, monkeypatch):
  ended = []
  at.engine.on_end.append(note := lambda answer, reason: ended.append(answer))
  with slow(at.engine, monkeypatch):
    stream = chat(client, seed=endless(), stream=True)
    next(part for part in stream if part.choices[0].delta.content)
    assert at.engine.status().busy == 1
    stream.close()
    serving_cases.until(lambda: at.is_idle)
  at.engine.on_end.remove(note)
  assert [answer.reason for answer in ended] == ["cancelled"]
  assert ended[0].drawn < ROOM.max_new_tokens


def test_hanging_up_on_a_whole_answer_frees_the_slots(at, monkeypatch):
  ended = []
  at.engine.on_end.append(note := lambda answer, reason: ended.append(answer))
  body = {"model": "tiny", "messages": MESSAGES, "seed": endless()}
  with slow(at.engine, monkeypatch), pytest.raises(httpx.ReadTimeout):
    httpx.post(f"{at.url}/v1/chat/completions", json=body, timeout=0.25)
  serving_cases.until(lambda: at.is_idle)
  at.engine.on_end.remove(note)
  assert [answer.reason for answer in ended] == ["cancelled"]


def test_a_full_queue_is_a_503_that_says_when_to_come_back(tmp_path, monkeypatch):
  room = dataclasses.replace(ROOM, slots=2, queue=1)
  with serving_cases.server(tmp_path, room=room) as at, slow(at.engine, monkeypatch):
    full = []
    for _ in range(2):
      full.append(at.engine.submit(Request(HELLO, seed=endless())))
      serving_cases.until(lambda: at.engine.status().busy == len(full))
    with pytest.raises(openai.InternalServerError) as refused:
      chat(client_of(at), n=3)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1
    serving_cases.until(lambda: len([a for a in full if a.reason]) == 2)
    assert chat(client_of(at), seed=1).choices[0].message.content is not None


def test_a_device_that_fails_is_an_error_of_the_server_whole_or_in_a_stream(
  client, at, monkeypatch
):
  def fail(*args):
    raise RuntimeError("secret detail")

  monkeypatch.setitem(at.engine.decoder.__dict__, "admit", fail)
  with pytest.raises(openai.InternalServerError, match="the device failed") as failed:
    chat(client)
  assert "secret" not in str(failed.value)
  with pytest.raises(openai.APIError, match="the device failed"):
    list(chat(client, stream=True))


def test_an_answer_whose_time_is_up_ends_as_one_too_long(engine, tmp_path, monkeypatch):
  settings = Settings(seconds=0.15)
  with serving_cases.server(tmp_path, settings=settings, engine=engine) as at:
    with slow(engine, monkeypatch, 0.1):
      done = chat(client_of(at), seed=endless())
  assert done.choices[0].finish_reason == "length"
  assert 1 <= done.usage.completion_tokens < ROOM.max_new_tokens


# Keys and limits.


@pytest.fixture(scope="module")
def guarded(engine, tmp_path_factory):
  folder = tmp_path_factory.mktemp("guarded")
  known = keys_lib.KeyFile(folder / "keys.json")
  secrets = {"free": known.add("free"), "few": known.add("few", requests=3)}
  secrets["short"] = known.add("short", tokens=60)
  settings = Settings(keys=known, body_limit=2_000)
  with serving_cases.server(folder, settings=settings, engine=engine) as server:
    yield server, secrets, known


def test_a_missing_or_wrong_key_is_a_401_before_anything_is_read(guarded):
  server, secrets, _ = guarded
  for key in ("none", "", secrets["free"] + "x", "é"):
    with pytest.raises((openai.AuthenticationError, UnicodeEncodeError, openai.APIConnectionError)):
      client_of(server, key or " ").models.list()
  assert httpx.post(f"{server.url}/v1/chat/completions", content=b"{").status_code == 401
  assert httpx.get(f"{server.url}/metrics").status_code == 401
  assert httpx.get(f"{server.url}/health").status_code == 200
  assert client_of(server, secrets["free"]).models.list().data


def test_the_file_of_keys_holds_no_key_and_takes_effect_at_once(guarded):
  server, secrets, known = guarded
  text = known.path.read_text()
  assert not any(secret in text for secret in secrets.values())
  assert known.path.stat().st_mode & 0o077 == 0
  fresh = known.add("fresh")
  assert client_of(server, fresh).models.list().data
  known.remove("fresh")
  with pytest.raises(openai.AuthenticationError):
    client_of(server, fresh).models.list()
  with pytest.raises(UserError, match="has a key 'free' already"):
    known.add("free")


def test_too_many_requests_are_a_429_that_says_when_to_come_back(guarded):
  server, secrets, _ = guarded
  client = client_of(server, secrets["few"])
  first = client.models.with_raw_response.list().headers
  assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == (
    "3",
    "2",
  )
  client.models.list(), client.models.list()
  with pytest.raises(openai.RateLimitError) as refused:
    client.models.list()
  assert 1 <= int(refused.value.response.headers["retry-after"]) <= 21
  assert client_of(server, secrets["free"]).models.list().data  # others go on


def test_tokens_are_charged_as_used_and_too_many_are_a_429(guarded):
  server, secrets, _ = guarded
  client = client_of(server, secrets["short"])
  done = client.chat.completions.with_raw_response.create(
    model="tiny", messages=MESSAGES, max_tokens=2
  )
  used = done.parse().usage.total_tokens
  after = client.models.with_raw_response.list().headers
  left = int(after["x-ratelimit-remaining-tokens"])
  assert 60 - used <= left <= 60 - used + 3  # what was not used came back; a second is a token
  with pytest.raises(openai.RateLimitError, match="60 tokens a minute"):
    chat(client, n=3)
  serving_cases.until(lambda: server.is_idle)


def test_a_bucket_fills_steadily_and_holds_one_minutes_worth():
  bucket = keys_lib.Bucket(60, now=0.0)
  assert [bucket.take(20, now=0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
  assert bucket.take(20, now=5.0) == 15.0  # 5 of 20 are there, one a second comes
  assert bucket.take(20, now=20.0) == 0.0
  assert bucket.level(1_000.0) == 60.0
  assert bucket.take(10**6, now=1_000.0) == 0.0  # more than a minute's worth is a minute's worth
  bucket.give_back(25, now=1_000.0)
  assert bucket.level(1_000.0) == 25.0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_a_413(guarded, chunked):
  server, secrets, _ = guarded
  body = json.dumps({"model": "tiny", "prompt": "x" * 3_000}).encode()
  headers = JSON | {"authorization": f"Bearer {secrets['free']}"}
  content = iter([body[:1_000], body[1_000:]]) if chunked else body
  answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
  assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"]["message"]
  with pytest.raises(openai.APIStatusError) as refused:
    client_of(server, secrets["free"]).completions.create(model="tiny", prompt="x" * 3_000)
  assert refused.value.status_code == 413


def test_the_command_adds_lists_and_removes_keys(tmp_path, capsys):
  path = tmp_path / "keys.json"
  command = [sys.executable, "-m", "rlhf_jax.serving.keys", "add", "ann", "--requests=5"]
  added = subprocess.run([*command, f"--file={path}"], capture_output=True, text=True, cwd=ROOT)
  secret = added.stdout.strip()
  assert keys_lib.KeyFile(path).find(secret).requests == 5
  keys_lib.main(["list", f"--file={path}"])
  assert capsys.readouterr().out.startswith("ann\t")
  with pytest.raises(SystemExit) as ended:
    keys_lib.main(["add", "ann", f"--file={path}"])
  assert ended.value.code == 2 and "remove it first" in capsys.readouterr().err
  keys_lib.main(["remove", "ann", f"--file={path}"])
  assert keys_lib.KeyFile(path).find(secret) is None


# What stands before every route.


def test_every_response_forbids_foreign_scripts_frames_and_guessing(at):
  for path in ("/health", "/v1/models", "/nowhere"):
    headers = httpx.get(f"{at.url}{path}").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
  ("headers", "status"),
  [
    ({}, 403),
    ({"sec-fetch-site": "cross-site"}, 403),
    ({"sec-fetch-site": "same-site"}, 403),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"sec-fetch-site": "same-origin"}, 200),
    ({"origin": "SELF"}, 200),
    ({"origin": "SELF", "content-type": "text/plain"}, 403),
  ],
)
def test_a_request_with_a_cookie_must_come_from_a_page_of_this_server(at, headers, status):
  headers = JSON | {"cookie": "a=b"} | headers
  headers = {name: value.replace("SELF", at.url) for name, value in headers.items()}
  body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 1})
  answer = httpx.post(f"{at.url}/v1/completions", content=body, headers=headers)
  assert answer.status_code == status


def test_a_server_of_this_machine_goes_by_its_own_names_only(engine, tmp_path):
  settings = Settings(hosts=("localhost", "127.0.0.1"))
  with serving_cases.server(tmp_path, settings=settings, engine=engine) as at:
    port = at.url.rpartition(":")[2]
    ask = lambda host: httpx.get(f"{at.url}/health", headers={"host": host}).status_code
    assert ask(f"localhost:{port}") == ask("127.0.0.1") == 200
    assert ask("evil.example") == ask(f"127.0.0.1.evil.example:{port}") == ask("[x") == 403


def test_requests_that_are_no_http_do_not_end_the_server(at):
  host, port = at.url.removeprefix("http://").split(":")
  for junk in (b"\0\xff\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
    with socket.create_connection((host, int(port))) as connection:
      connection.sendall(junk)
      connection.settimeout(5)
      with contextlib.suppress(TimeoutError):
        assert connection.recv(99)[:13] in (b"", b"HTTP/1.1 400 ")
  assert httpx.get(f"{at.url}/health").json()["status"] == "ok"


# Figures.


def figures(at):
  text = httpx.get(f"{at.url}/metrics").text
  families = prometheus_client.parser.text_string_to_metric_families(text)
  return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}


def test_the_figures_count_what_happened(tmp_path, monkeypatch):
  room = dataclasses.replace(ROOM, slots=2)
  with serving_cases.server(tmp_path, room=room) as at:
    client = client_of(at)
    used = [chat(client, seed=seed).usage for seed in range(3)]
    with pytest.raises(openai.UnprocessableEntityError):
      chat(client, n=0)
    serving_cases.until(lambda: figures(at)["rlhf_time_to_first_token_seconds_count",] == 3)
    found = figures(at)
    assert found["rlhf_requests_total", "/v1/chat/completions", "200", "POST"] == 3
    assert found["rlhf_requests_total", "/v1/chat/completions", "422", "POST"] == 1
    assert found["rlhf_generated_tokens_total",] == sum(u.completion_tokens for u in used)
    assert found["rlhf_prompt_tokens_total",] == sum(u.prompt_tokens for u in used)
    assert found["rlhf_queue_wait_seconds_count",] == 3
    with slow(at.engine, monkeypatch):
      running = [at.engine.submit(Request(HELLO, seed=endless())) for _ in range(3)]
      serving_cases.until(lambda: at.engine.status().busy == 2)
      found, health = figures(at), httpx.get(f"{at.url}/health").json()
      assert (found["rlhf_slots_in_use",], found["rlhf_queue_length",]) == (2, 1)
      assert health["slots"] == {"busy": 2, "all": 2} and health["queue"]["waiting"] == 1
      [answer.cancel() for answer in running]
    at.engine.stop(grace=5.0)
    health = httpx.get(f"{at.url}/health")
    assert health.status_code == 503 and health.json()["why"] == "it is about to end."


# The filter.


@dataclasses.dataclass(frozen=True)
class Category:
  category: str
  score: float
  threshold: float
  flagged: bool


@dataclasses.dataclass(frozen=True)
class FakeVerdict:
  categories: tuple
  flagged: bool
  action: str


class FakeModerator:
  """Flags texts with one of its words."""

  name = "fake"

  def __init__(self, **words):
    self.words, self.judged = words, []  # action by word

  def __call__(self, texts, side="input"):
    self.judged += [(side, text) for text in texts]
    return [self.judge(text) for text in texts]

  def judge(self, text):
    action = next((a for word, a in self.words.items() if word in text), "none")
    flagged = action != "none"
    return FakeVerdict((Category("hate", 0.9 if flagged else 0.1, 0.5, flagged),), flagged, action)


@contextlib.contextmanager
def filtered(engine, folder, **words):
  moderator = FakeModerator(**words)
  with serving_cases.server(folder, engine=engine, moderator=moderator) as at:
    yield at, client_of(at), moderator


def test_a_blocked_message_is_not_answered_and_its_verdict_is_stored(engine, tmp_path):
  with filtered(engine, tmp_path, mat="block") as (at, client, _):
    drawn = []
    engine.on_end.append(note := lambda answer, reason: drawn.append(answer))
    say = [{"role": "user", "content": "the mat"}]
    done = chat(client, messages=say)
    assert done.choices[0].message.content == NOTICE
    assert done.choices[0].finish_reason == "content_filter" and done.usage.total_tokens == 0
    parts = list(chat(client, messages=say, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == NOTICE
    assert parts[-1].choices[0].finish_reason == "content_filter"
    engine.on_end.remove(note)
    assert not drawn
    verdict = at.context.store.records(records.Verdict)[0]
    assert (verdict.text, verdict.direction, verdict.action) == ("the mat", "input", "block")
    assert (verdict.author, verdict.model) == ("api", "fake")
    assert verdict.scores[0].score == 0.9 and verdict.flagged


def test_a_blocked_answer_is_never_shown(engine, tmp_path):
  seed = endless()
  text = alone(Request(HELLO, seed=seed)).text
  with filtered(engine, tmp_path, **{text[5:8]: "block"}) as (at, client, moderator):
    done = chat(client, seed=seed)
    assert done.choices[0].message.content == NOTICE
    assert done.choices[0].finish_reason == "content_filter"
    parts = list(chat(client, seed=seed, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == NOTICE
    assert ("output", text) in moderator.judged
    assert {v.direction for v in at.context.store.records(records.Verdict)} == {"output"}


def test_a_warning_changes_nothing_but_is_told(engine, tmp_path):
  with filtered(engine, tmp_path, cat="warn") as (at, client, _):
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, seed=7)
    assert raw.headers["x-moderation"] == "warn"
    done = raw.parse()
    assert done.choices[0].message.content == alone(Request(HELLO, seed=7)).text
    assert done.filter == {"input": "warn", "output": "none"}
    assert [v.action for v in at.context.store.records(records.Verdict)] == ["warn"]


def test_moderations_are_openais(engine, tmp_path, client):
  with filtered(engine, tmp_path, mat="block") as (_, filtering, _):
    one = filtering.moderations.create(input="the mat")
    assert one.model == "fake" and one.results[0].flagged
    two = filtering.moderations.create(input=["the cat", "the mat"])
    assert [result.flagged for result in two.results] == [False, True]
    assert two.results[1].categories.hate is True and two.results[1].category_scores.hate == 0.9
    with pytest.raises(openai.UnprocessableEntityError, match="at least 1 item"):
      filtering.moderations.create(input=[])
    with pytest.raises(openai.UnprocessableEntityError) as refused:
      filtering.moderations.create(input=[{"type": "image_url", "image_url": {"url": "x"}}])
    assert refused.value.body["param"] == "input.0.type"
  with pytest.raises(openai.NotFoundError, match="no moderator"):
    client.moderations.create(input="x")
