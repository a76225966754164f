"""The content filter in the chat: texts are judged, and the verdicts become records."""

import asyncio
from typing import Literal

from rlhf_jax.feedback.records import CategoryScore, Verdict
from rlhf_jax.serving.context import Moderator

WITHHELD = "This answer was withheld by the content filter."


async def judge(moderator: Moderator | None, text: str, direction: Literal["input", "output"]):
  """The moderator's verdict on one text, found in a thread of its own; None where nobody judges."""
  if moderator is None or not text.strip():
    return None
  (verdict,) = await asyncio.to_thread(moderator, [text], direction)
  return verdict


def record(
  verdict, moderator: Moderator, direction: Literal["input", "output"], author: str, **about: str
) -> Verdict:
  """The record of a verdict; `about` is `message=ID`, or `text=...` of what became no message."""
  return Verdict(
    author=author,
    direction=direction,
    scores=tuple(CategoryScore(c.category, c.score, c.threshold) for c in verdict.categories),
    flagged=verdict.flagged,
    action=verdict.action,
    model=moderator.name,
    **about,
  )


def withheld_id(message: str) -> str:
  """The id of the verdict on what a policy said where `message` now says that it is withheld."""
  return f"{message}.withheld"
