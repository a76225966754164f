"""An answer on its way from the engine's thread to whoever reads it in asyncio."""

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Callable, Iterable

from rlhf_jax.serving.context import FinishReason, Piece, Request
from rlhf_jax.serving.wording import Wording
from rlhf_jax.types import UserError

COLDEST, HOTTEST = 1e-6, 100.0  # temperatures below the first are greedy
MOST_STOPS, LONGEST_STOP = 16, 1_000  # stop texts, and characters of one


class SlotAnswer:
  """One answer; see `context.Answer`.

  The engine's thread calls `take` and at last sets `reason`; the reader iterates. Ids cross over in
  a deque, whose ends are safe from two threads, and `wake` says that there are new ones. Times are
  those of `time.monotonic`; None until they come.
  """

  def __init__(
    self,
    request: Request,
    prompt: tuple[int, ...],
    most: int,
    seed: int,
    wording: Wording,
    on_cancel: Callable[[], None],
  ):
    self.request, self.prompt, self.most, self.seed = request, prompt, most, seed
    # Logits divided by less would overflow.
    self.temperature = 0.0 if request.temperature < COLDEST else request.temperature
    self.prompt_tokens = len(prompt)
    self.finish_reason: FinishReason | None = None
    self.cancelled = False
    self.drawn = 0  # tokens handed over by the engine, those after a stop text included
    self.submitted_at = time.monotonic()
    self.deadline = None if request.seconds is None else self.submitted_at + request.seconds
    self.admitted_at: float | None = None
    self.first_token_at: float | None = None
    self.ended_at: float | None = None
    self._wording, self._on_cancel = wording, on_cancel
    self._arrived: collections.deque[tuple[list[int], list[float], int]] = collections.deque()
    self.reason: FinishReason | None = None  # the engine's; the reader may be behind it
    self._final_token = 0  # 1 once the token that ends the answer, which shows nothing, is read
    self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

  @property
  def completion_tokens(self) -> int:
    """Tokens of the answer that were read so far, with the EOS that ended it."""
    return self._wording.tokens + self._final_token

  def cancel(self) -> None:
    """Frees the slot; may be called at any time and more than once."""
    if self.reason is None and not self.cancelled:
      self.cancelled = True
      self._on_cancel()

  def take(self, ids: list[int], logprobs: list[float], ended_by_token: bool) -> None:
    """The engine hands over tokens; the last one may be what ends the answer."""
    if self.first_token_at is None:
      self.first_token_at = time.monotonic()
    self.drawn += len(ids)
    shown = len(ids) - ended_by_token
    self._arrived.append((ids[:shown], logprobs[:shown], int(ended_by_token)))

  async def __aiter__(self) -> AsyncIterator[Piece]:
    event = asyncio.Event()
    self._reader = asyncio.get_running_loop(), event
    try:
      while self.finish_reason is None:
        event.clear()
        over = self.reason  # before the tokens are read, as those of its end come first
        for piece in self._read():
          yield piece
        if self.finish_reason is None and over is not None:
          rest = self._wording.finish()
          self.finish_reason = "stop" if self._wording.stopped else over
          if rest is not None:
            yield rest
        elif self.finish_reason is None:
          await event.wait()
    finally:
      self.cancel()
      self.finish_reason = self.finish_reason or "cancelled"

  def _read(self) -> list[Piece]:
    """The pieces that what has arrived makes certain, as few as possible."""
    pieces = []
    while self._arrived and self.finish_reason is None:
      ids, logprobs, final = self._arrived.popleft()
      piece = self._wording.add(ids, logprobs)
      if piece is not None:
        pieces.append(piece)
      if self._wording.stopped:
        self.finish_reason = "stop"
      else:
        self._final_token += final
    return [_joined(pieces)] if pieces else []


def _joined(pieces: list[Piece]) -> Piece:
  tokens = tuple(token for piece in pieces for token in piece.tokens)
  logprobs = tuple(logprob for piece in pieces for logprob in piece.logprobs)
  return Piece("".join(piece.text for piece in pieces), tokens, logprobs)


def wake(answers: Iterable[SlotAnswer]) -> None:
  """Lets the readers of these answers go on; one call into each event loop."""
  by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
  for answer in answers:
    if answer._reader is not None:
      loop, event = answer._reader
      by_loop.setdefault(loop, []).append(event)
  for loop, events in by_loop.items():
    try:
      loop.call_soon_threadsafe(_set_all, events)
    except RuntimeError:  # the loop is closed, so nobody reads any more
      for answer in answers:
        if answer._reader is not None and answer._reader[0] is loop:
          answer.cancelled = True


def _set_all(events: list[asyncio.Event]) -> None:
  for event in events:
    event.set()


def check(request: Request) -> None:
  """Raises a UserError for settings that no answer can be drawn with."""
  if not 0.0 <= request.temperature <= HOTTEST:
    raise UserError(f"temperature is 0 (greedy) to {HOTTEST:g}, got {request.temperature}.")
  if not 0.0 < request.top_p <= 1.0:
    raise UserError(
      f"top_p is above 0 and at most 1, got {request.top_p}; use temperature 0 for greedy."
    )
  if request.max_tokens is not None and request.max_tokens < 1:
    raise UserError(f"max_tokens is at least 1, got {request.max_tokens}.")
  if len(request.stop) > MOST_STOPS or not all(1 <= len(t) <= LONGEST_STOP for t in request.stop):
    raise UserError(
      f"there may be {MOST_STOPS} stop texts of 1 to {LONGEST_STOP} characters each; got "
      f"{len(request.stop)}, of {[len(text) for text in request.stop]} characters."
    )
  if request.seconds is not None and not request.seconds > 0:
    raise UserError(f"the seconds that an answer may take are above 0, got {request.seconds}.")
