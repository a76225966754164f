"""A labeling server with a store of its own and an engine that answers what it is told to."""

import contextlib
import dataclasses
import socket
import threading
import time

import fastapi
import uvicorn

from rlhf_jax.feedback import people
from rlhf_jax.feedback.labels import Candidate, Task
from rlhf_jax.feedback.records import Policy
from rlhf_jax.feedback.store import Store
from rlhf_jax.serving import errors, label_page
from rlhf_jax.serving.context import Context, Piece
from rlhf_jax.serving.guard import Guard
from rlhf_jax.text.messages import Conversation

BODY_LIMIT = 1 << 20


@dataclasses.dataclass
class Said:
  """An answer that is there at once."""

  text: str
  prompt_tokens: int = 1
  most: int = 1
  seed: int = 0
  completion_tokens: int = 1
  finish_reason: str | None = "stop"

  async def __aiter__(self):
    yield Piece(self.text, (self.text,), (0.0,))

  def cancel(self):
    pass


class Engine:
  """Says `text` to everybody and remembers what it was asked."""

  model = "village/sft/policy"

  def __init__(self, text="Of course. The post office opens at nine."):
    self.text, self.asked = text, []

  def submit(self, request):
    self.asked.append(request)
    if isinstance(self.text, Exception):
      raise self.text
    return Said(self.text)


@dataclasses.dataclass
class Server:
  """All there is to a test's server."""

  store: Store
  engine: Engine
  app: fastapi.FastAPI
  policy: str
  tokens: dict[str, str]  # name -> token
  ids: dict[str, str]  # name -> labeler id


def build(path, **options) -> Server:
  """A server with the labelers ann and bob, and the researcher eve."""
  store = Store.open(str(path), create=True)
  tokens, ids = {}, {}
  for name, role in (("ann", "labeler"), ("bob", "labeler"), ("eve", "researcher")):
    labeler, tokens[name] = people.add_labeler(store, name, role, author="lab")
    ids[name] = labeler.id
  policy = store.add(Policy(author="lab", name=Engine.model, checkpoint="runs/v", lineage={}))
  engine = Engine()
  app = app_on(store, engine, policy, **options)
  return Server(store, engine, app, policy, tokens, ids)


def app_on(store, engine, policy, **options) -> fastapi.FastAPI:
  """The labeling page on this store, behind the guard of every server."""
  context = Context(engine=engine, store=store, policy=policy, moderator=None)
  app = fastapi.FastAPI()
  app.include_router(label_page.router(context, **options))
  errors.install(app)
  app.add_middleware(Guard, body_limit=BODY_LIMIT)
  return app


def to_rank(texts=("A", "B", "C", "D"), ask="Where is the mill?", **changes) -> Task:
  """A task to compare, by a policy whose name nobody may see."""
  values = {
    "author": "lab",
    "work": "compare",
    "conversation": Conversation.of(("user", ask)),
    "answers": tuple(Candidate(text, "secret-policy") for text in texts),
  }
  return Task(**values | changes)


def to_write(*turns, **changes) -> Task:
  """A task to demonstrate, going on from these turns."""
  conversation = Conversation.of(*turns) if turns else None
  return Task(**{"author": "lab", "work": "demonstrate", "conversation": conversation} | changes)


@contextlib.contextmanager
def served(app):
  """The app on a port of this machine; yields its address."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  for _ in range(200):
    if server.started:
      break
    time.sleep(0.02)
  try:
    yield f"http://127.0.0.1:{port}"
  finally:
    server.should_exit = True
    thread.join(10)
