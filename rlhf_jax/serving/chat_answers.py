"""Answers on their way in the chat: drawn, listened to, stopped, judged and stored.

An answer is drawn by a task of its own, so it does not depend on one connection: a page that is
loaded again listens from the beginning. Once nobody has listened for a while it is stopped. However
it ends, what was drawn is stored.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator

from fastapi import HTTPException

from rlhf_jax.feedback import shapes
from rlhf_jax.feedback.records import ChatMessage, Verdict
from rlhf_jax.serving import chat_filter, filtering
from rlhf_jax.serving.context import Answer, Context, Overloaded, Request
from rlhf_jax.types import UserError

MOST_AT_ONCE = 4  # answers of one person
KEPT = 60.0  # seconds that a finished answer can still be listened to
HEARTBEAT = 15.0  # seconds without an event

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ending:
  """How an answer ended."""

  message: ChatMessage | None  # None: nothing was drawn
  verdict: Verdict | None
  reason: str  # as `context.FinishReason`
  error: str | None = None  # what to tell the person


class Drawing:
  """One answer while it is drawn."""

  def __init__(self, context: Context, parent: ChatMessage, answer: Answer, sampling: dict):
    self.id, self.parent, self.sampling = shapes.new_id(), parent, sampling
    self.text = ""  # so far
    self.listeners = 0
    self.ending: Ending | None = None
    self.is_forgotten = False  # its author withdraws: nothing is stored
    self._context, self._answer = context, answer
    self._pieces: list[str] = []
    self._shown = 0  # characters that are in the pieces
    self._verdict, self._judged = None, 0  # the last verdict, and on how many characters
    self._failed = False
    self._news = asyncio.Event()
    self._state = "new"  # then reading, concluding
    self.task = asyncio.create_task(self._run())

  @property
  def author(self) -> str:
    return self.parent.author

  def stop(self) -> None:
    """Ends it as far as it came; may be called at any time and more than once."""
    if self._state == "reading":
      self.task.cancel()
    if self._state == "new":  # cancelled now, the task would not even begin
      self._state = "stopped"

  async def listen(self) -> AsyncIterator[str | Ending | None]:
    """Its pieces from the beginning, then its ending; None now and then where nothing happens."""
    self.listeners += 1
    try:
      seen = 0
      while True:
        news, ended = self._news, self.ending
        for piece in self._pieces[seen:]:
          seen += 1
          yield piece
        if ended is not None:
          yield ended
          return
        with contextlib.suppress(TimeoutError):
          await asyncio.wait_for(news.wait(), HEARTBEAT)
          continue
        yield None
    finally:
      self.listeners -= 1

  def _tell(self) -> None:
    self._news.set()
    self._news = asyncio.Event()

  async def _run(self) -> None:
    try:
      if self._state == "new":
        self._state = "reading"
        await self._read()
    except asyncio.CancelledError:
      pass  # stopped, or the server ends: what is there is stored all the same
    except Exception:
      logger.exception("an answer broke off")
      self._failed = True
    self._state = "concluding"
    self._answer.cancel()
    reason = "error" if self._failed else self._answer.finish_reason or "cancelled"
    error = "The answer broke off." if reason == "error" else None
    try:
      self.ending = await self._conclude(reason, error)
    except Exception as failure:
      logger.exception("an answer could not be stored")
      said = str(failure) if isinstance(failure, UserError) else "The answer could not be stored."
      self.ending = Ending(None, None, "error", said)
    self._tell()

  async def _read(self) -> None:
    """Reads the engine's pieces; with a filter, what is not judged yet is not shown."""
    async for piece in self._answer:
      self.text += piece.text.replace("\0", "\ufffd")  # which no database keeps
      if self._context.moderator is not None:
        if len(self.text) - self._judged < filtering.SEGMENT:
          continue
        if await self._judge() == "block":
          return
      self._show()

  def _show(self) -> None:
    if self._shown < len(self.text):
      self._pieces.append(self.text[self._shown :])
      self._shown = len(self.text)
      self._tell()

  async def _judge(self) -> str:
    """Judges what is there, unless that was done already; returns the action."""
    if self._judged < len(self.text):
      text = self.text
      self._verdict = await chat_filter.judge(self._context.moderator, text, "output")
      self._judged = len(text)
    return "none" if self._verdict is None else self._verdict.action

  async def _conclude(self, reason: str, error: str | None) -> Ending:
    if not self.text and reason not in ("stop", "length"):
      return Ending(None, None, reason, error)
    action = await self._judge()
    if action != "block":
      self._show()
    message = ChatMessage(
      author=self.author,
      id=self.id,
      conversation=self.parent.conversation,
      parent=self.parent.id,
      role="assistant",
      content=chat_filter.WITHHELD if action == "block" else self.text,
      policy=None if action == "block" else self._context.policy,
      sampling=self.sampling | {"finish_reason": reason},
      seed=self._answer.seed,
      stopped=reason not in ("stop", "length") and action != "block",
    )
    records: list = [message]
    if self._verdict is not None:
      about = {"message": self.id}
      if action == "block":
        about = {"text": self.text, "id": chat_filter.withheld_id(self.id)}
      name = self._context.moderator.name
      records.append(filtering.record(self._verdict, "output", self.author, name, **about))
    if self.is_forgotten:
      return Ending(None, None, reason, error)
    await asyncio.to_thread(self._context.store.add_all, records)
    return Ending(message, records[1] if records[1:] else None, reason, error)


class Answers:
  """All answers that are being drawn, and those that have just ended."""

  def __init__(self, context: Context, patience: float):
    self.context = context
    self.patience = patience  # seconds that an answer goes on with nobody listening
    self._drawings: dict[str, Drawing] = {}
    self._watchers: set[asyncio.Task] = set()  # the loop itself holds tasks weakly

  def submit(self, author: str, requests: list[Request]) -> list[Answer]:
    """Asks the engine for all of these answers or none.

    Raises:
      Overloaded: there is no room, or this person has too many on their way.
      UserError: a request cannot be answered.
    """
    under_way = sum(d.author == author and d.ending is None for d in self._drawings.values())
    if under_way + len(requests) > MOST_AT_ONCE:
      raise Overloaded(under_way)
    answers: list[Answer] = []
    try:
      for request in requests:
        answers.append(self.context.engine.submit(request))
    except BaseException:
      for answer in answers:
        answer.cancel()
      raise
    return answers

  def begin(self, parent: ChatMessage, answer: Answer, sampling: dict) -> Drawing:
    """Draws an answer to a message that is stored."""
    drawing = Drawing(self.context, parent, answer, sampling)
    self._drawings[drawing.id] = drawing
    watcher = asyncio.create_task(self._watch(drawing))
    self._watchers.add(watcher)
    watcher.add_done_callback(self._watchers.discard)
    return drawing

  def get(self, id: str, author: str) -> Drawing:
    """A person's answer by the id that its message has or will have.

    Raises:
      HTTPException: 404, there is none; one that ended a while ago is in the store only.
    """
    drawing = self._drawings.get(id)
    if drawing is None or drawing.author != author:
      raise HTTPException(404, "no answer with this id is on its way to you.")
    return drawing

  def under_way(self, **equal: str) -> list[Drawing]:
    """Those that have not ended, with these values in their parent."""
    matches = lambda d: all(getattr(d.parent, name) == value for name, value in equal.items())
    return [d for d in self._drawings.values() if d.ending is None and matches(d)]

  async def forget(self, author: str) -> None:
    """Stops all that a person is waiting for; nothing of it is stored."""
    theirs = self.under_way(author=author)
    for drawing in theirs:
      drawing.is_forgotten = True
      drawing.stop()
    if theirs:
      await asyncio.wait([drawing.task for drawing in theirs])
    self._drawings = {id: d for id, d in self._drawings.items() if d.author != author}

  async def _watch(self, drawing: Drawing) -> None:
    """Stops an answer that nobody listens to, and lets go of one that has ended."""
    alone = 0.0
    step = min(self.patience, 1.0) / 2
    while drawing.ending is None:
      await asyncio.wait({drawing.task}, timeout=step)
      alone = 0.0 if drawing.listeners else alone + step
      if alone >= self.patience:
        drawing.stop()
    await asyncio.sleep(KEPT)
    self._drawings.pop(drawing.id, None)
