"""A chat page with an engine and a filter whose every word is known, and visitors over HTTP."""

import asyncio
import dataclasses
import functools
import json
import pathlib
import tempfile
import threading

import httpx
import serving_cases

from rlhf_jax.feedback import shapes, withdrawal
from rlhf_jax.feedback.records import ChatMessage
from rlhf_jax.feedback.store import Store
from rlhf_jax.serving import chat_page
from rlhf_jax.serving.context import Overloaded, Piece

SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}
CATEGORIES = ("hate", "self-harm", "violence")


class FakeAnswer:
  """The words of a text one by one; with `gate`, the second half waits until it opens."""

  def __init__(self, text, seed, *, pause=0.0, gate=None, finish="stop"):
    self.pieces = [word + " " for word in text.split(" ")]
    self.pieces[-1] = self.pieces[-1][:-1]
    self.seed, self.pause, self.gate, self.finish = seed, pause, gate, finish
    self.prompt_tokens, self.completion_tokens, self.finish_reason = 3, 0, None
    self.cancelled = False

  def cancel(self):
    self.cancelled = self.cancelled or self.finish_reason is None

  async def __aiter__(self):
    for i, piece in enumerate(self.pieces):
      while self.gate is not None and i >= len(self.pieces) // 2 and not self.gate.is_set():
        await asyncio.sleep(0.01)
      await asyncio.sleep(self.pause)
      if self.cancelled:
        self.finish_reason = "cancelled"
        return
      self.completion_tokens += 1
      yield Piece(piece, (piece,), (0.0,))
    if self.finish == "raise":
      raise RuntimeError("the device is on fire")
    self.finish_reason = self.finish


class FakeEngine:
  """Says what `says` makes of a request: a text, or the keywords of a `FakeAnswer`."""

  model = "tiny"

  def __init__(self, says=lambda request: f"You said: {request.conversation.last.content}"):
    self.says, self.requests, self.answers = says, [], []
    self.room = 1000

  def submit(self, request):
    if len(self.answers) >= self.room:
      raise Overloaded(self.room, 7)
    said = self.says(request)
    said = {"text": said} if isinstance(said, str) else said
    seed = 1000 + len(self.answers) if request.seed is None else request.seed
    self.requests.append(request)
    self.answers.append(FakeAnswer(seed=seed, **said))
    return self.answers[-1]


@dataclasses.dataclass(frozen=True)
class Part:
  """As `moderation.CategoryVerdict`."""

  category: str
  score: float
  threshold: float
  flagged: bool
  action: str


@dataclasses.dataclass(frozen=True)
class FakeVerdict:
  """As `moderation.Verdict`."""

  side: str
  categories: tuple[Part, ...]

  @property
  def flagged(self):
    return any(part.flagged for part in self.categories)

  @property
  def action(self):
    return max((p.action for p in self.categories), key=("none", "warn", "block").index)


class FakeModerator:
  """Warns of violence where somebody fights, and blocks hate where somebody hates."""

  name = "words-1"

  def __init__(self):
    self.asked = []

  def __call__(self, texts, side="input"):
    self.asked += [(text, side) for text in texts]
    return [self._judge(text, side) for text in texts]

  def _judge(self, text, side):
    hates, fights = "hate" in text, "fight" in text
    flags = {"hate": (hates, "block"), "self-harm": (False, "none"), "violence": (fights, "warn")}
    return FakeVerdict(
      side,
      tuple(
        Part(name, 0.9 if on else 0.1, 0.5, on, action if on else "none")
        for name, (on, action) in flags.items()
      ),
    )


@functools.cache
def _empty_store():
  """The bytes of a database with all tables; making them takes longer than a test."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "empty.sqlite"
    with Store.open(str(path), create=True) as store:
      withdrawal.empty_log(store.engine)
    return path.read_bytes()


def page(folder, *, engine=None, moderator=None, patience=5.0):
  """A server with the chat page; see `serving_cases.server`."""
  make = lambda context: chat_page.router(context, patience=patience)
  engine = engine or FakeEngine()
  (folder / "feedback.sqlite").write_bytes(_empty_store())
  return serving_cases.server(folder, engine=engine, moderator=moderator, routers=[make])


class Visitor(httpx.Client):
  """A browser without a screen: keeps its cookie and says where its requests come from."""

  def __init__(self, url, **options):
    super().__init__(base_url=url, headers=SAME_ORIGIN, timeout=10.0, **options)

  def __enter__(self):
    entered = super().__enter__()
    self.get("/").raise_for_status()
    return entered

  def say(self, text, **more):
    """Sends a message; a new conversation unless one is given."""
    body = {"id": shapes.new_id(), "conversation": shapes.new_id(), "text": text, **more}
    return self.post("/chat/messages", json=body)

  def talk(self, text, **more):
    """Sends a message and waits for the answer; returns the message and the answer."""
    told = self.say(text, **more).raise_for_status().json()
    return told["messages"][-1], self.read(told["answers"][0]["id"])[1]["message"]

  def read(self, answer):
    """The pieces of an answer, and how it ended."""
    pieces = []
    with self.stream("GET", f"/chat/answers/{answer}") as response:
      response.raise_for_status()
      for name, data in events(response):
        if name == "done":
          return pieces, data
        pieces.append(data)
    raise AssertionError("the stream broke off")

  def messages(self, conversation):
    """A conversation's messages by id."""
    found = self.get(f"/chat/conversations/{conversation}").raise_for_status().json()["messages"]
    return {message["id"]: message for message in found}


def events(response):
  """The server-sent events of a response as (name, data)."""
  name = None
  for line in response.iter_lines():
    if line.startswith("event: "):
      name = line[7:]
    elif line.startswith("data: "):
      yield name, json.loads(line[6:])


def gated(text):
  """A script whose answers wait in the middle, and what lets them go on."""
  gate = threading.Event()
  return (lambda request: {"text": text, "gate": gate}), gate


def stored(store, **equal):
  """The messages of a store as (role, text)."""
  return [(m.role, m.content) for m in store.records(ChatMessage, **equal)]
