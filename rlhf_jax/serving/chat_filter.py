"""The content filter in the chat: what it says of one text, and what stands where it blocks."""

import asyncio
from typing import Any

from rlhf_jax.serving.context import Moderator
from rlhf_jax.serving.filtering import Side

WITHHELD = "This answer was withheld by the content filter."


async def judge(moderator: Moderator | None, text: str, side: Side) -> Any | None:
  """The moderator's verdict on a text, found in a thread; None where nobody judges."""
  if moderator is None or not text.strip():
    return None
  (verdict,) = await asyncio.to_thread(moderator, [text], side)
  return verdict


def withheld_id(message: str) -> str:
  """The id of the verdict on what a policy said where `message` now says that it is withheld."""
  return f"{message}.withheld"
