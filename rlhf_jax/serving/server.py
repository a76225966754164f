"""What one command starts: the engine, the store, the pages and the API on one address."""

import dataclasses
import ipaddress
import math
import pathlib
import socket
import sys
from collections.abc import Callable

import fastapi
import uvicorn

from rlhf_jax import asking, moderation
from rlhf_jax.feedback.store import Store
from rlhf_jax.serving import chat_page, label_page, load
from rlhf_jax.serving.app import Settings, create_app
from rlhf_jax.serving.context import Context
from rlhf_jax.serving.engine import SlotEngine
from rlhf_jax.serving.keys import KeyFile
from rlhf_jax.serving.load import Loaded
from rlhf_jax.training import preemption
from rlhf_jax.types import UserError

BACKLOG = 2_048  # connections that the system holds until they are taken
# After which Python's interpreter changes threads. The engine's has a device to keep busy and asks
# for little; with the default of 5 ms it would wait that long for the one that speaks HTTP.
SWITCH_SECONDS = 5e-4


@dataclasses.dataclass(frozen=True)
class Access:
  """Where to listen, and who may ask.

  Raises:
    UserError: others can reach the address and no keys are asked for, without a word that this is
      meant; or the file of keys is wrong or empty.
  """

  host: str
  port: int
  keys: str  # a file, or "none"
  auth: str  # "auto", or "off" where an address that others reach needs no key

  def __post_init__(self):
    if self.auth not in ("auto", "off"):
      raise UserError(f"--auth is auto or off, got {self.auth!r:.40}.")
    if self.keys == "none" and self.auth == "auto" and not self.is_loopback:
      raise UserError(
        f"others can reach {self.host}: make a key (python -m rlhf_jax.serving.keys add NAME "
        "--file=keys.json) and give --keys=keys.json, or say --auth=off."
      )
    if self.keys != "none" and not KeyFile(pathlib.Path(self.keys)).keys():
      raise UserError(
        f"{self.keys} holds no key; make one: python -m rlhf_jax.serving.keys add NAME "
        f"--file={self.keys}"
      )

  @property
  def is_loopback(self) -> bool:
    """Whether only this machine reaches the address."""
    try:
      return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
    except ValueError:
      return False

  @property
  def settings(self) -> Settings:
    """As the API has them."""
    here = ("localhost", "127.0.0.1", "::1", self.host.lower())
    keys = None if self.keys == "none" else KeyFile(pathlib.Path(self.keys))
    return Settings(keys=keys, hosts=here if self.is_loopback else None)

  def listen(self) -> socket.socket:
    """The socket, before anything that takes long.

    Raises:
      UserError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
    try:
      return socket.create_server((self.host, self.port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
      raise UserError(
        f"cannot listen at {self.host}, port {self.port}: {error}. Choose another --port or --host."
      ) from error


@dataclasses.dataclass(frozen=True)
class Named:
  """A moderator under the name that records call it."""

  name: str
  judge: moderation.Moderator

  def compile(self) -> None:
    """So that no text waits for it later."""
    self.judge.compile()

  def __call__(self, texts: list[str], side: str = "input") -> list:
    """See `context.Moderator`."""
    return self.judge(texts, side)


def load_moderator(folder: str) -> Named | None:
  """The moderator of a folder, under the folder's name; None for "none".

  Raises:
    UserError: there is none.
  """
  if folder == "none":
    return None
  name = pathlib.Path(folder).expanduser().resolve().name  # of "." too
  return Named(name, moderation.load(folder))


def register(
  engine: SlotEngine, loaded: Loaded, workdir: pathlib.Path, store: Store, moderator
) -> Context:
  """What the routes are given; the policy is in the store from now on."""
  workdir = workdir.expanduser().absolute()
  config = load.config_of(workdir)
  path = str(loaded.checkpoint.relative_to(workdir))
  policy = asking.register_at(store, config, workdir, path)
  return Context(engine, store, policy, moderator)


def pages(context: Context) -> list[fastapi.APIRouter]:
  """The chat page and the labelling page."""
  return [chat_page.router(context), label_page.router(context)]


def serve(
  context: Context, access: Access, listener: socket.socket, grace: float, say: Callable
) -> None:
  """Serves until SIGINT or SIGTERM; then answers may still take `grace` seconds."""
  app = create_app(context, access.settings, pages(context))
  port = listener.getsockname()[1]
  host = f"[{access.host}]" if ":" in access.host else access.host
  for what, path in {
    "chat": "/",
    "labelling": "/label",
    f"API of {context.engine.model}": "/v1",
    "health": "/health",
    "metrics": "/metrics",
  }.items():
    say(f"{what:24} http://{host}:{port}{path}\n")
  sys.setswitchinterval(SWITCH_SECONDS)
  config = uvicorn.Config(
    app,
    log_level="warning",  # requests are in the metrics, and what people write is in no log
    access_log=False,
    server_header=False,
    timeout_graceful_shutdown=max(1, math.ceil(grace)),
  )
  try:
    uvicorn.Server(config).run(sockets=[listener])
  except (KeyboardInterrupt, preemption.Preempted):  # which uvicorn passes on when it is done
    say("stopped.\n")
  finally:
    context.engine.stop(grace=0.0)
