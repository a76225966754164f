"""Everybody gets the answer they would get alone, in time or not at all."""

import asyncio
import dataclasses
import random
import threading

import jax
import numpy as np
import pytest
import serving_cases
from serving_cases import HELLO, ROOM, alone, loaded

from rlhf_jax.serving import engine as engine_lib
from rlhf_jax.serving.context import Overloaded, Request, Unavailable
from rlhf_jax.serving.wording import Wording
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

SETTINGS = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.0, 1.0)]  # temperature, top_p
WORDS = "the cat sat on mat é 🦊 Zoë Human".split()


@pytest.fixture(scope="module")
def engine():
  made = serving_cases.start()
  yield made
  made.stop(grace=0.0)


@dataclasses.dataclass
class Read:
  text: str
  pieces: list
  finish_reason: str
  prompt_tokens: int
  completion_tokens: int
  tokens: list
  logprobs: list


async def read(answer) -> Read:
  pieces = [piece async for piece in answer]
  return Read(
    "".join(piece.text for piece in pieces),
    pieces,
    answer.finish_reason,
    answer.prompt_tokens,
    answer.completion_tokens,
    [token for piece in pieces for token in piece.tokens],
    [logprob for piece in pieces for logprob in piece.logprobs],
  )


def answer_all(engine, requests) -> list[Read]:
  """All at once, in one event loop."""

  async def work():
    return await asyncio.gather(*(read(engine.submit(request)) for request in requests))

  return asyncio.run(work())


def mixed(count, seed=0):
  """Dialogues of one to three turns, each with settings of its own."""
  chance = random.Random(seed)
  say = lambda: " ".join(chance.choices(WORDS, k=chance.randint(1, 4)))
  for number in range(count):
    temperature, top_p = SETTINGS[number % len(SETTINGS)]
    turns = [("user", say()), ("assistant", say())] * chance.randint(0, 1) + [("user", say())]
    most = chance.choice([None, 1, 5, 23])
    yield Request(Conversation.of(*turns), most, temperature, top_p, number)


def test_forty_at_once_get_what_each_gets_alone(engine):
  requests = list(mixed(40))
  found = answer_all(engine, requests)
  for request, answer in zip(requests, found):
    expected = alone(request)
    assert answer.text == expected.text
    assert answer.finish_reason == expected.finish_reason
    assert answer.prompt_tokens == len(expected.prompt)
    assert answer.completion_tokens == len(expected.ids)
  assert {answer.finish_reason for answer in found} == {"stop", "length"}


def test_tokens_join_to_the_text_and_logprobs_are_those_of_a_fresh_forward_pass(engine):
  request = next(r for r in mixed(9) if r.temperature == 1.0 == r.top_p and r.max_tokens != 1)
  (answer,), expected = answer_all(engine, [request]), alone(request)
  assert "".join(answer.tokens) == answer.text
  shown = [i for i in expected.ids if i != loaded().tokenizer.eos_id]
  row = np.array([[*expected.prompt, *shown]])
  ones = np.ones_like(row)
  logits = loaded().policy.apply({"params": loaded().params}, row, np.cumsum(ones) - ones, ones)
  fresh = jax.nn.log_softmax(logits[0])
  columns = len(expected.prompt) - 1 + np.arange(len(shown))
  np.testing.assert_allclose(answer.logprobs, fresh[columns, shown], atol=1e-4)


def test_nothing_is_compiled_in_service(engine):
  compiled = []
  listen = lambda event, seconds, **_: compiled.append(event)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    answer_all(engine, mixed(12, seed=1))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert not [event for event in compiled if "backend_compile" in event]


def test_an_answer_without_a_seed_says_the_seed_that_draws_it_again(engine):
  (first, second), seeds = [None, None], []

  async def work():
    answers = [engine.submit(Request(HELLO)) for _ in range(2)]
    seeds.extend(answer.seed for answer in answers)
    return [await read(answer) for answer in answers]

  first, second = asyncio.run(work())
  assert first.text != second.text
  assert alone(Request(HELLO, seed=seeds[0])).text == first.text


def test_the_oldest_turns_are_dropped_and_a_last_message_too_long_is_refused(engine):
  old = [("user", "the cat sat on the mat " * 2), ("assistant", "the mat")] * 3
  request = Request(Conversation.of(*old, ("user", "the cat?")), seed=3)
  assert answer_all(engine, [request])[0].text == alone(request).text
  with pytest.raises(UserError, match="max_tokens is 48"):
    engine.submit(Request(Conversation.of(("user", "x" * 60))))
  with pytest.raises(UserError, match="1 to 48 tokens here, this one has 60"):
    engine.submit(Request("x" * 60))


def test_bare_text_goes_on_where_it_ends_and_ids_are_the_same(engine):
  ids = tuple(loaded().tokenizer.encode("the cat"))
  first, second = answer_all(engine, [Request("the cat", seed=1), Request(ids, seed=1)])
  assert first.text == second.text and first.prompt_tokens == len(ids)
  drawn = list(serving_cases.streamer(1.0, 1.0).ids(loaded().params, ids, jax.random.key(1)))
  whole, before = loaded().tokenizer.decode([*ids, *drawn]), loaded().tokenizer.decode(ids)
  assert before + first.text == whole


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"temperature": -0.1}, "temperature is 0"),
    ({"temperature": float("nan")}, "temperature is 0"),
    ({"top_p": 0.0}, "top_p is above 0"),
    ({"max_tokens": 0}, "max_tokens is at least 1"),
    ({"stop": ("",)}, "stop texts of 1 to"),
    ({"seconds": 0.0}, "seconds"),
    ({"conversation": ""}, "1 to 48 tokens"),
    ({"conversation": (1, 10**6)}, "ids of a prompt lie in"),
    ({"conversation": HELLO.with_reply("x")}, "must end with the user's message"),
  ],
)
def test_what_cannot_be_drawn_is_refused_with_the_rule(engine, fields, message):
  with pytest.raises(UserError, match=message):
    engine.submit(Request(**({"conversation": HELLO} | fields)))


def test_temperatures_that_would_overflow_are_greedy(engine):
  cold, greedy = answer_all(engine, [Request(HELLO, temperature=t, seed=1) for t in (1e-30, 0.0)])
  assert cold.text == greedy.text


class Gate:
  """Holds the decoder's `advance` until it is opened."""

  def __init__(self, engine, monkeypatch):
    self.open, self.held = threading.Event(), threading.Event()
    advance = engine.decoder.advance

    def wait(*args):
      self.held.set()
      assert self.open.wait(30)
      return advance(*args)

    monkeypatch.setitem(engine.decoder.__dict__, "advance", wait)


@pytest.fixture
def gate(engine, monkeypatch):
  made = Gate(engine, monkeypatch)
  yield made
  made.open.set()
  serving_cases.until(lambda: engine.status().busy == engine.status().waiting == 0)


def endless():
  """A request whose answer does not end by itself."""
  requests = (Request(HELLO, seed=seed) for seed in range(100))
  return next(request for request in requests if alone(request).finish_reason == "length")


def test_a_full_queue_refuses_at_once_and_the_order_is_that_of_coming(engine, gate):
  ended = []
  engine.on_end.append(note := lambda answer, reason: ended.append(answer))
  first = engine.submit(endless())
  assert gate.held.wait(30)  # it has a slot, and the device is busy
  waiting = [engine.submit(Request(HELLO, 1, seed=i)) for i in range(ROOM.queue)]
  with pytest.raises(Overloaded, match=f"{ROOM.queue} requests are waiting") as refused:
    engine.submit(Request(HELLO))
  assert 1 <= refused.value.retry_after <= 60
  gate.open.set()
  serving_cases.until(lambda: len(ended) == ROOM.queue + 1)
  ended.remove(first)
  assert ended == waiting
  engine.on_end.remove(note)


def test_cancelling_frees_the_slot_and_the_place_in_the_queue(engine, gate):
  running = [engine.submit(endless()) for _ in range(ROOM.slots)]
  gate.held.wait(30)
  serving_cases.until(lambda: engine.status().busy >= 1)
  waiting = engine.submit(Request(HELLO))
  before = engine.status().waiting
  waiting.cancel()
  waiting.cancel()
  assert engine.status().waiting == before - 1 and waiting.reason == "cancelled"
  for answer in running:
    answer.cancel()
  gate.open.set()
  serving_cases.until(lambda: engine.status().busy == 0)
  assert {answer.reason for answer in running} == {"cancelled"}
  assert all(answer.drawn < ROOM.max_new_tokens for answer in running)


def test_whoever_stops_reading_frees_the_slot(engine):
  async def work():
    answer = engine.submit(endless())
    pieces = aiter(answer)
    await anext(pieces)
    await pieces.aclose()
    return answer

  answer = asyncio.run(work())
  serving_cases.until(lambda: answer.reason is not None)
  assert answer.finish_reason == "cancelled" or answer.drawn == ROOM.max_new_tokens


def test_whoever_waits_is_read_into_every_free_slot_before_more_is_drawn(monkeypatch):
  monkeypatch.setattr(engine_lib, "GROUP", 1)
  engine = serving_cases.start()
  gate = Gate(engine, monkeypatch)
  busy, gated = [], engine.decoder.advance

  def advance(*args):
    busy.append(engine.status().busy)
    return gated(*args)

  monkeypatch.setitem(engine.decoder.__dict__, "advance", advance)
  engine.submit(endless())
  assert gate.held.wait(30)
  for _ in range(3):
    engine.submit(endless())
  gate.open.set()
  serving_cases.until(lambda: len(busy) >= 2)
  engine.stop(grace=0.0)
  assert busy[:2] == [1, 4]


def test_a_deadline_ends_answers_that_run_and_those_that_wait(engine, gate):
  hurried = dataclasses.replace(endless(), seconds=0.05)
  answers = [engine.submit(hurried) for _ in range(ROOM.slots + 3)]
  gate.held.wait(30)
  threading.Event().wait(0.1)
  gate.open.set()
  serving_cases.until(lambda: all(answer.reason for answer in answers))
  assert {answer.reason for answer in answers} == {"deadline"}
  assert answers[-1].admitted_at is None


def test_a_failing_device_ends_the_answers_under_way_and_serves_the_next(monkeypatch):
  engine = serving_cases.start(dataclasses.replace(ROOM, slots=2))
  advance, left = engine.decoder.advance, [1]

  def fail_once(*args):
    if left:
      left.pop()
      raise RuntimeError("the device is gone")
    return advance(*args)

  monkeypatch.setitem(engine.decoder.__dict__, "advance", fail_once)
  try:
    (broken,) = answer_all(engine, [endless()])
    assert broken.finish_reason == "error"
    (after,) = answer_all(engine, [Request(HELLO, seed=2)])
    assert after.text == alone(Request(HELLO, seed=2)).text
    assert engine.status().healthy and engine.failures == 1
  finally:
    engine.stop(grace=0.0)


def test_a_dead_device_is_told_and_heals(monkeypatch):
  monkeypatch.setattr(engine_lib, "RETRY_SECONDS", 0.05)
  engine = serving_cases.start(dataclasses.replace(ROOM, slots=2))
  broken = threading.Event()
  broken.set()
  for name in ("empty", "advance"):
    real = getattr(engine.decoder, name)

    def call(*args, real=real):
      if broken.is_set():
        raise RuntimeError("no device")
      return real(*args)

    monkeypatch.setitem(engine.decoder.__dict__, name, call)
  try:
    answers = answer_all(engine, [endless() for _ in range(3)])
    assert {answer.finish_reason for answer in answers} == {"error"}
    serving_cases.until(lambda: not engine.status().healthy)
    assert "RuntimeError" in engine.status().why
    with pytest.raises(Unavailable, match="the device fails"):
      engine.submit(Request(HELLO))
    broken.clear()
    serving_cases.until(lambda: engine.status().healthy)
    assert answer_all(engine, [Request(HELLO, seed=2)])[0].text
  finally:
    engine.stop(grace=0.0)


@pytest.mark.parametrize(("grace", "reason"), [(20.0, "length"), (0.0, "cancelled")])
def test_stopping_lets_answers_end_for_a_while(grace, reason):
  engine = serving_cases.start(dataclasses.replace(ROOM, slots=2, columns=1))
  answers = [engine.submit(endless()) for _ in range(40)]
  engine.stop(grace)
  assert answers[-1].reason == reason and all(answer.reason for answer in answers)
  assert not engine.status().healthy
  with pytest.raises(Unavailable, match="about to end"):
    engine.submit(Request(HELLO))


def test_a_stop_text_ends_the_answer_before_it_wherever_tokens_part(engine):
  request = endless()
  whole = alone(request).text
  checked = 0
  for start in range(1, len(whole) - 3):
    stop = whole[start : start + 3]
    if whole.find(stop) != start or "\ufffd" in stop:
      continue
    (answer,) = answer_all(engine, [dataclasses.replace(request, stop=(stop, "never"))])
    assert answer.text == whole[:start] and answer.finish_reason == "stop"
    assert "".join(answer.tokens) == answer.text
    assert answer.completion_tokens <= ROOM.max_new_tokens
    checked += 1
  assert checked > 3


def words(text_of, stops=()):
  """A Wording over letters that are tokens of their own."""
  return Wording(lambda ids: "".join(text_of[i] for i in ids), stops)


def test_no_part_of_a_stop_text_is_given_out_before_it_is_clear_that_it_is_none():
  wording = words({1: "ab", 2: "c", 3: "d", 4: "END"}, stops=("cd!", "bcX"))
  given = [wording.add([token], [0.0]) for token in (1, 2, 3, 4)]
  assert [piece and piece.text for piece in given] == [None, None, "ab", "cdEND"]
  # "ab" is held while "bc" may go on as "bcX", and "cd" while it may go on as "cd!".
  wording = words({1: "ab", 2: "c", 3: "d!z"}, stops=("cd!",))
  given = [wording.add([token], [-1.0]) for token in (1, 2, 3)]
  assert [piece and piece.text for piece in given] == ["ab", None, None]
  assert wording.stopped and wording.finish() is None and wording.tokens == 3


def test_what_looked_like_a_stop_text_is_given_out_at_the_end():
  wording = words({1: "ab", 2: "c"}, stops=("cd",))
  assert wording.add([1, 2], [-1.0, -2.0]).text == "ab"
  rest = wording.finish()
  assert (rest.text, rest.logprobs) == ("c", (-2.0,)) and not wording.stopped


@pytest.mark.parametrize("stops", [(), ("never seen",)])
def test_random_bytes_are_worded_as_they_decode_at_once_and_in_whole_characters(stops):
  tokenizer, chance = loaded().tokenizer, random.Random(0)
  fox = tokenizer.encode("🦊 é")
  for _ in range(200):
    ids = [chance.randrange(tokenizer.vocab_size) for _ in range(chance.randint(1, 14))]
    ids += fox * chance.randint(0, 1)
    wording = Wording(tokenizer.decode, stops, lead=" ")
    pieces = [wording.add([i], [0.0]) for i in ids] + [wording.finish()]
    text = "".join(piece.text for piece in pieces if piece)
    assert text == tokenizer.decode(ids).removeprefix(" ")
    assert "".join(t for piece in pieces if piece for t in piece.tokens) == text
    assert sum(len(piece.tokens) for piece in pieces if piece) == len(ids)
  wording = Wording(tokenizer.decode)
  shown = [piece.text for i in fox if (piece := wording.add([i], [0.0]))]
  assert shown == ["🦊", " ", "é"] or "".join(shown) == "🦊 é" and "\ufffd" not in "".join(shown)
