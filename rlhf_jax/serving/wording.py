"""Tokens become text as they come: whole characters only, nothing of a text that ends an answer."""

from collections.abc import Callable, Sequence

from rlhf_jax.generation.stream import REPLACEMENT
from rlhf_jax.serving.context import Piece

WINDOW = 4  # tokens before new ones that are decoded again, as these may depend on them


class Wording:
  """The text of one answer while its tokens arrive.

  Text is held back while it is a part of a character, or may be the beginning of a stop text. New
  tokens are decoded with a few that came before, so that an answer of n tokens costs n and not n^2.
  """

  def __init__(
    self,
    decode: Callable[[Sequence[int]], str],
    stops: Sequence[str] = (),
    before: Sequence[int] = (),
    lead: str = "",
  ):
    self._decode = decode
    self._stops = tuple(stops)
    self._lead = lead  # is left out where the answer begins with it
    self._ids = list(before)[-WINDOW:]
    self._clean = len(self._ids)  # ids whose text ended in whole characters
    self._held: list[tuple[str, float]] = []  # tokens that are not given out yet
    self._begun = False
    self.tokens = 0  # of the answer, up to the end of a stop text
    self.stopped = False  # by a stop text

  def add(self, ids: Sequence[int], logprobs: Sequence[float]) -> Piece | None:
    """What has become certain with these tokens; None where nothing has."""
    for token, logprob in zip(ids, logprobs):
      self.tokens += 1
      self._held.append((self._text_of(token), logprob))
      if self._stops and self._cut():
        return self._give(len(self._held))
    if not self._stops:
      return self._give(len(self._held), only_text=True)
    certain = len("".join(text for text, _ in self._held)) - self._doubtful()
    length, count = 0, 0
    for text, _ in self._held:
      length += len(text)
      if length > certain:
        break
      count += 1
    return self._give(count, only_text=True)

  def finish(self) -> Piece | None:
    """What was held back, once no more tokens come."""
    rest = "" if self.stopped else self._new_text().removeprefix(self._unseen_lead())
    if rest:
      text, logprob = self._held[-1]
      self._held[-1] = (text + rest, logprob)
      self._cut()
    return self._give(len(self._held))

  def _text_of(self, token: int) -> str:
    """The text that one more token makes certain, stop texts aside."""
    self._ids.append(token)
    new = self._new_text()
    if not new or new.endswith(REPLACEMENT):
      return ""
    # A token of the answer that shows nothing, as the lead, must stay in view.
    lead, self._begun = self._unseen_lead(), True
    self._clean = len(self._ids)
    excess = self._clean - WINDOW
    if excess > 0:
      del self._ids[:excess]
      self._clean -= excess
    return new.removeprefix(lead)

  def _new_text(self) -> str:
    """The text of the ids after the clean ones."""
    if self._clean == 0:
      return self._decode(self._ids)
    known = self._decode(self._ids[: self._clean])
    return self._decode(self._ids)[len(known) :]

  def _unseen_lead(self) -> str:
    return "" if self._begun else self._lead

  def _cut(self) -> bool:
    """Whether a stop text stands in the held text; it and all after it are dropped."""
    whole = "".join(text for text, _ in self._held)
    found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
    if not found:
      return False
    left, kept = min(found), []
    for text, logprob in self._held:
      if left <= 0:
        break
      kept.append((text[:left], logprob))
      left -= len(text)
    self._held, self.stopped = kept, True
    return True

  def _doubtful(self) -> int:
    """Characters at the end of the held text that may begin a stop text."""
    whole = "".join(text for text, _ in self._held)
    begins = lambda stop, n: whole.endswith(stop[:n])
    longest = lambda stop: next((n for n in range(len(stop) - 1, 0, -1) if begins(stop, n)), 0)
    return max(map(longest, self._stops))

  def _give(self, count: int, only_text: bool = False) -> Piece | None:
    if only_text:  # tokens that complete no character wait for the one that does
      count = max((i + 1 for i in range(count) if self._held[i][0]), default=0)
    given = self._held[:count]
    if not given:
      return None
    text = "".join(text for text, _ in given)
    del self._held[:count]
    return Piece(text, tuple(text for text, _ in given), tuple(logprob for _, logprob in given))
