"""A server of the smallest size on loopback, and answers of its policy one at a time.

  with serving_cases.server() as at:   # an engine, a store and the API in a thread
    httpx.get(f"{at.url}/health")

The policy has random weights and a tokenizer of bytes, so its answers are half characters, special
tokens and noise: what a server has to get right whatever is said.
"""

import asyncio
import contextlib
import dataclasses
import functools
import pathlib
import threading
import time

import jax
import tiny
import uvicorn

from rlhf_jax.feedback import lineage
from rlhf_jax.feedback.store import Store
from rlhf_jax.generation import stream
from rlhf_jax.networks import heads
from rlhf_jax.serving import engine as engine_lib
from rlhf_jax.serving.app import Settings, create_app
from rlhf_jax.serving.context import Context, Request
from rlhf_jax.serving.load import Loaded
from rlhf_jax.text import dialogue
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text.messages import Conversation

ROOM = engine_lib.Room(slots=4, queue=60, columns=3, context=48, max_new_tokens=24)
HELLO = Conversation.of(("user", "the cat?"))


@functools.cache
def loaded() -> Loaded:
  """A policy of random weights that ends one answer in a few by itself."""
  texts = ["the cat sat on the mat", "\n\nHuman: the cat?", "\n\nAssistant: the mat"] * 9
  specials = ("<|pad|>", "<|endoftext|>")
  tokenizer = tokenizer_lib.train_bpe(texts, 300, specials, eos=specials[1], pad=specials[0])
  policy = heads.Policy(tiny.changed(tiny.MODEL, vocab_size=tokenizer.vocab_size))
  params = tiny.params(policy, 0)
  kernel = params["lm_head"]["kernel"]  # of the EOS, whose chance shall vary a lot
  params["lm_head"]["kernel"] = kernel.at[:, tokenizer.eos_id].multiply(2.0)
  return Loaded("tiny", pathlib.Path("tiny"), policy, params, tokenizer, dialogue.PLAIN)


def start(room=ROOM, of=None) -> engine_lib.SlotEngine:
  """An engine on one device; the caller stops it."""
  return engine_lib.start(of or loaded(), room)


@functools.cache
def streamer(temperature: float, top_p: float, room=ROOM) -> stream.Streamer:
  """Answers one prompt at a time, as long as `room` allows."""
  how = tiny.changed(
    tiny.SAMPLING, max_new_tokens=room.max_new_tokens, temperature=temperature, top_p=top_p
  )
  return stream.Streamer(loaded().policy, how, loaded().stops(how), loaded().tokenizer.pad_id)


@dataclasses.dataclass(frozen=True)
class Alone:
  """What a request gets when nobody else is there."""

  prompt: tuple[int, ...]
  ids: list[int]

  @property
  def text(self) -> str:
    return loaded().reply(self.ids)

  @property
  def finish_reason(self) -> str:
    return "stop" if self.ids[-1] == loaded().tokenizer.eos_id else "length"


def alone(request: Request, room=ROOM) -> Alone:
  """The answer to a dialogue by `stream.Streamer`, stop texts aside."""
  prompt = loaded().prompt(request.conversation, room.context)
  alone = streamer(request.temperature, request.top_p, room)
  ids = list(alone.ids(loaded().params, prompt, jax.random.key(request.seed)))
  return Alone(prompt, ids[: request.max_tokens])


def until(condition, seconds=20.0):
  """Waits for something that happens in another thread."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.005)


@dataclasses.dataclass(frozen=True)
class Server:
  """A server under way."""

  url: str
  context: Context

  @property
  def engine(self) -> engine_lib.SlotEngine:
    return self.context.engine

  @property
  def is_idle(self) -> bool:
    status = self.engine.status()
    return status.busy == status.waiting == 0


@contextlib.contextmanager
def server(folder, *, room=ROOM, settings=None, moderator=None, routers=(), engine=None):
  """A server in a thread, with a store in `folder`; `routers` are functions of the context."""
  mine = engine or start(room)
  with Store.open(str(folder / "feedback.sqlite"), create=True) as store:
    policy = lineage.register(store, mine.model, "checkpoint", {}, author="test")
    context = Context(mine, store, policy, moderator)
    app = create_app(context, settings or Settings(), [make(context) for make in routers])
    with listening(app) as url:
      yield Server(url, context)
    if engine is None:
      mine.stop(grace=0.0)


@contextlib.contextmanager
def listening(app):
  """Serves an app on a free port of loopback; yields its URL."""
  config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
  running = uvicorn.Server(config)
  thread = threading.Thread(target=lambda: asyncio.run(running.serve()), daemon=True)
  thread.start()
  until(lambda: running.started)
  try:
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
  finally:
    running.should_exit = True
    thread.join(10.0)
