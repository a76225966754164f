"""What the moderator has to say about what goes in and what comes out, off the event loop.

A text whose verdict is "block" is not shown: NOTICE stands in its place, or in that of the answer.
A stream is judged before it is shown, SEGMENT characters at a time together with all before them;
what was shown already stays. "warn" changes nothing but is told. Verdicts that flag something are
records, with the text.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from rlhf_jax.feedback.records import CategoryScore, Verdict
from rlhf_jax.serving.context import Context, Piece

Side = Literal["input", "output"]
NOTICE = "This was blocked by the content filter."
SEGMENT = 200  # characters of a stream that are held back until they are judged
LONGEST = 100_000  # characters of a record's text
SEVERITY = ("none", "warn", "block")


@dataclasses.dataclass
class Filter:
  """The moderator on one request; without a moderator, nothing is filtered."""

  context: Context
  author: str  # of the records
  actions: dict[Side, str] = dataclasses.field(default_factory=dict)  # so far, the most severe

  @property
  def is_on(self) -> bool:
    return self.context.moderator is not None

  async def blocks(self, texts: Sequence[str], side: Side) -> bool:
    """Whether one of these texts must not pass."""
    if not self.is_on or not texts:
      return False
    verdicts = await asyncio.to_thread(self._judge, list(texts), side)
    actions = [verdict.action for verdict in verdicts]
    worst = max([self.actions.get(side, "none"), *actions], key=SEVERITY.index)
    self.actions[side] = worst
    return "block" in actions

  def _judge(self, texts: list[str], side: Side) -> list[Any]:
    verdicts = self.context.moderator(texts, side)
    model = self.context.moderator.name
    flagged = [(v, text) for v, text in zip(verdicts, texts) if v.flagged]
    self.context.store.add_all(record(v, side, self.author, model, text) for v, text in flagged)
    return verdicts

  async def pieces(self, answer: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The pieces of an answer that may be shown; raises Blocked before one that may not."""
    held, text, judged = [], "", 0
    async for piece in answer:
      if not self.is_on:
        yield piece
        continue
      held.append(piece)
      text += piece.text
      if len(text) - judged >= SEGMENT:
        await self._require_harmless(text)
        judged = len(text)
        for one in held:
          yield one
        held = []
    if held:
      await self._require_harmless(text)
    for one in held:
      yield one

  async def _require_harmless(self, text: str) -> None:
    if await self.blocks([text], "output"):
      raise Blocked


class Blocked(Exception):
  """An answer must not go on."""


def record(
  verdict: Any, side: Side, author: str, model: str, text: str | None = None, **more: Any
) -> Verdict:
  """A moderator's verdict as a record, on a text or on a `message=` of the store."""
  scores = tuple(CategoryScore(c.category, c.score, c.threshold) for c in verdict.categories)
  return Verdict(
    author=author,
    text=None if text is None else text[:LONGEST].replace("\0", " "),
    direction=side,
    scores=scores,
    flagged=verdict.flagged,
    action=verdict.action,
    model=model,
    **more,
  )
