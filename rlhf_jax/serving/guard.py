"""What stands before every route: headers, limits, and no writing on behalf of other sites.

Pages of this server come with their own scripts and styles and nothing else, may not be framed, and
a request that changes something and carries a cookie must come from such a page: browsers send
cookies along with requests that any other site makes.
"""

import dataclasses
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.serving import errors

SECURITY = {
  "content-security-policy": (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'"
  ),
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-resource-policy": "same-origin",
  "permissions-policy": "camera=(), geolocation=(), microphone=()",
  "referrer-policy": "same-origin",
  "x-content-type-options": "nosniff",
  "x-frame-options": "DENY",
}
SAFE = {"GET", "HEAD", "OPTIONS"}


@dataclasses.dataclass(frozen=True)
class Guard:
  """ASGI middleware."""

  app: ASGIApp
  body_limit: int  # bytes of a request's body
  hosts: Iterable[str] | None = None  # names that this server goes by; None: any

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    headers, send = Headers(scope=scope), _with_security(send)
    problem = self._problem(scope["method"], headers)
    if problem is not None:
      status, message = problem
      return await errors.response(status, message)(scope, receive, send)
    await self.app(scope, self._limited(receive), send)

  def _problem(self, method: str, headers: Headers) -> tuple[int, str] | None:
    """Why a request is turned away at once, as (status, message)."""
    host = headers.get("host", "")
    if self.hosts is not None and _name(host) not in self.hosts:
      # A site whose name was made to point here could read what it likes in the visitor's browser.
      return 403, "this server does not go by that name; give it with --host."
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > self.body_limit:
      return 413, self._too_large()
    if method in SAFE or "cookie" not in headers:
      return None
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
      return 403, "a request that changes something needs Content-Type: application/json."
    if not same_origin(headers):
      return 403, "a request that changes something must come from a page of this server."
    return None

  def _too_large(self) -> str:
    return f"the body of a request may have {self.body_limit} bytes."

  def _limited(self, receive: Receive) -> Receive:
    """Bodies without a length are counted as they come."""
    seen = 0

    async def counted() -> Message:
      nonlocal seen
      message = await receive()
      seen += len(message.get("body", b""))
      if seen > self.body_limit:
        raise HTTPException(413, self._too_large())
      return message

    return counted


def same_origin(headers: Headers) -> bool:
  """Whether a browser says that a request comes from a page of this very server."""
  site, origin = headers.get("sec-fetch-site"), headers.get("origin")
  if site is not None:
    return site == "same-origin"
  return origin is not None and urlsplit(origin).netloc == headers.get("host")


def _name(host: str) -> str:
  """The host without its port: "[::1]:8000" -> "::1"."""
  try:
    return urlsplit(f"//{host}").hostname or ""
  except ValueError:
    return ""


def _with_security(send: Send) -> Send:
  async def sending(message: Message) -> None:
    if message["type"] == "http.response.start":
      headers = MutableHeaders(scope=message)
      for name, value in SECURITY.items():
        headers.setdefault(name, value)
      headers.setdefault("cache-control", "no-cache")
    await send(message)

  return sending
