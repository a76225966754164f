"""What every page and route is given: who answers, who warns, and where records go."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Literal, Protocol

from rlhf_jax.feedback.store import Store
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Overloaded(Exception):
  """The queue is full; `retry_after` is in seconds."""

  def __init__(self, waiting: int, retry_after: int = 1):
    super().__init__(f"{waiting} requests are waiting, which is all there is room for.")
    self.retry_after = retry_after


class Unavailable(Overloaded):
  """Nothing can be answered for now: the device fails, or the server is about to end."""

  def __init__(self, why: str, retry_after: int = 5):
    Exception.__init__(self, why)
    self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Request:
  """What to answer and how."""

  # A dialogue, or bare text to continue, or its ids.
  conversation: Conversation | str | tuple[int, ...]
  max_tokens: int | None = None  # None: as many as the engine allows
  temperature: float = 1.0  # 0 is greedy
  top_p: float = 1.0  # 1 keeps all
  seed: int | None = (
    None  # None: drawn; the same seed gives the same answer, whoever else is served
  )
  stop: tuple[str, ...] = ()  # texts that end the answer, and are not part of it
  seconds: float | None = None  # after which it ends unfinished; None: never


@dataclasses.dataclass(frozen=True)
class Piece:
  """Text that has just become certain, with the tokens it is made of."""

  text: str
  tokens: tuple[str, ...]  # joined, they are the text; one that completes no character is ""
  logprobs: tuple[float, ...]  # nats, of each token


class Answer(Protocol):
  """An answer on its way. Iterate once; whoever stops iterating calls `cancel`."""

  prompt_tokens: int
  most: int  # tokens that it may have
  seed: int
  completion_tokens: int  # so far
  finish_reason: FinishReason | None  # None while it goes on

  def __aiter__(self) -> AsyncIterator[Piece]: ...

  def cancel(self) -> None:
    """Frees the slot; may be called at any time and more than once."""
    ...


class Engine(Protocol):
  """Whoever answers; `serving/engine.py` is the one."""

  model: str  # name of the policy that is served

  def submit(self, request: Request) -> Answer:
    """Queues a request and returns at once.

    Raises:
      Overloaded: the queue is full, or nothing can be answered (Unavailable).
      UserError: the request cannot be answered, say because the last message alone is too long.
    """
    ...


class Moderator(Protocol):
  """Judges texts; `moderation/` has the one."""

  name: str

  def __call__(self, texts: list[str], side: Literal["input", "output"] = "input") -> list:
    """A verdict on each text, with `flagged`, `action` ("none", "warn" or "block") and
    `categories`, each of these with `category`, `score`, `threshold` and `flagged`."""
    ...


@dataclasses.dataclass(frozen=True)
class Context:
  """The parts of a running server."""

  engine: Engine
  store: Store
  policy: str | None  # the served policy's id in the store; None where it is not registered
  moderator: Moderator | None  # None: nothing is filtered


async def complete(answer: Answer) -> str:
  """The whole text of an answer."""
  return "".join([piece.text async for piece in answer])


def check_text(text: str, name: str, most: int) -> str:
  """`text`, stripped; a UserError where it is empty or longer than `most` characters."""
  text = text.strip()
  if not 1 <= len(text) <= most:
    raise UserError(f"{name} has {len(text)} characters; 1 to {most} are allowed.")
  return text
