"""Who is signed in to the labeling page: a random secret in a cookie, a token in this process.

The cookie says nothing by itself. With every request the token that was given is checked again, so
whoever is made inactive, withdraws or gets another token is out at once; whoever loses a laptop
signs out elsewhere by asking for a new token. Restarting the server signs everybody out.
"""

import dataclasses
import hashlib
import secrets
import threading
import time
from collections.abc import Callable

from fastapi import HTTPException, Request, Response

from rlhf_jax.feedback import people
from rlhf_jax.feedback.records import Labeler
from rlhf_jax.feedback.store import Store

COOKIE = "rlhf_jax_labeler"
PATH = "/label"
IDLE_SECONDS = 12 * 3600.0
MOST = 10_000  # sessions; then the one that has been idle longest ends


@dataclasses.dataclass
class _Session:
  token: str
  seen_at: float


class Sessions:
  """The sessions of one server; safe to share between threads."""

  def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic):
    self.store, self._clock = store, clock
    self._open: dict[str, _Session] = {}  # by the hash of the cookie, oldest use first
    self._lock = threading.Lock()

  def sign_in(self, request: Request, response: Response, token: str) -> Labeler:
    """Begins a session for whoever has this token, and ends the one that this browser had.

    Raises:
      HTTPException: 401, it is nobody's token, an old one, or of somebody who is not active.
    """
    labeler = people.authenticate(self.store, token)
    if labeler is None:
      raise HTTPException(
        401, "this token opens nothing; a researcher can give you a new one, or activate you."
      )
    self._end(request)
    secret = secrets.token_urlsafe(32)
    with self._lock:
      while len(self._open) >= MOST:
        del self._open[next(iter(self._open))]
      self._open[_digest(secret)] = _Session(token, self._clock())
    response.set_cookie(
      COOKIE,
      secret,
      path=PATH,
      secure=request.url.scheme == "https",
      httponly=True,
      samesite="strict",
    )
    return labeler

  def sign_out(self, request: Request, response: Response) -> None:
    """Ends this browser's session; the cookie is worth nothing from now on, wherever it is."""
    self._end(request)
    response.delete_cookie(COOKIE, path=PATH, httponly=True, samesite="strict")

  def person(self, request: Request) -> Labeler:
    """Who makes a request.

    Raises:
      HTTPException: 401, nobody who is signed in and active.
    """
    key = _digest(request.cookies.get(COOKIE, ""))
    with self._lock:
      session = self._open.pop(key, None)
      if session is not None and self._clock() - session.seen_at <= IDLE_SECONDS:
        session.seen_at = self._clock()
        self._open[key] = session
      else:
        session = None
    labeler = people.authenticate(self.store, session.token) if session else None
    if labeler is None:
      with self._lock:
        self._open.pop(key, None)
      raise HTTPException(401, "you are not signed in, or no longer; sign in with your token.")
    return labeler

  def researcher(self, request: Request) -> Labeler:
    """Who makes a request that only researchers may make.

    Raises:
      HTTPException: 401 as `person`, 403 for a labeler.
    """
    labeler = self.person(request)
    if labeler.role != "researcher":
      raise HTTPException(403, "this is for researchers; you are signed in as a labeler.")
    return labeler

  def _end(self, request: Request) -> None:
    with self._lock:
      self._open.pop(_digest(request.cookies.get(COOKIE, "")), None)


def _digest(secret: str) -> str:
  """So that what is in memory opens nothing."""
  return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
