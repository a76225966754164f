"""Who a visitor of the chat is: a random secret in a cookie, and the id that is made of it.

Records bear the id. It is a hash of the secret, so whoever reads an export cannot pass for the
people in it, and no cookie can be made for the id of a labeler.
"""

import hashlib
import re
import secrets

from fastapi import HTTPException, Request, Response

COOKIE = "rlhf_jax_visitor"
LASTS = 365 * 24 * 3600  # seconds
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)  # 32 random bytes in base64


def person_of(request: Request) -> str:
  """The visitor's id, as records name them.

  Raises:
    HTTPException: 401, the request carries no cookie of ours.
  """
  secret = request.cookies.get(COOKIE, "")
  if not _SECRET.fullmatch(secret):
    raise HTTPException(401, "this browser is not known here yet; load the page again.")
  return id_of(secret)


def id_of(secret: str) -> str:
  """The id of whoever holds this secret."""
  return f"visitor-{hashlib.sha256(secret.encode()).hexdigest()[:40]}"


def greet(request: Request, response: Response) -> None:
  """Gives a cookie to a visitor who has none, and renews that of one who has."""
  secret = request.cookies.get(COOKIE, "")
  if not _SECRET.fullmatch(secret):
    secret = secrets.token_urlsafe(32)
  _give(request, response, secret)


def part(request: Request, response: Response) -> None:
  """Makes a stranger of a visitor: their next request is a new person's."""
  _give(request, response, secrets.token_urlsafe(32))


def _give(request: Request, response: Response, secret: str) -> None:
  response.set_cookie(
    COOKIE,
    secret,
    max_age=LASTS,
    path="/",
    secure=request.url.scheme == "https",
    httponly=True,
    samesite="strict",
  )
