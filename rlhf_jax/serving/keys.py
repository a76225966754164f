"""API keys: a file of their hashes, and how much each may ask.

  python -m rlhf_jax.serving.keys add NAME --file=keys.json [--requests=60] [--tokens=100000]
  python -m rlhf_jax.serving.keys list --file=keys.json
  python -m rlhf_jax.serving.keys remove NAME --file=keys.json

`add` shows the key, once. A running server sees changes of the file at once. People who label have
tokens of their own (`python -m rlhf_jax.feedback`): those say who somebody is, a key which program.
"""

import argparse
import dataclasses
import hashlib
import hmac
import os
import pathlib
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.feedback import shapes
from rlhf_jax.serving import errors
from rlhf_jax.training import files
from rlhf_jax.types import UserError

PREFIX = "sk-"  # as clients that look at keys expect
NAME = re.compile(r"[0-9A-Za-z._-]{1,50}")


@dataclasses.dataclass(frozen=True)
class Key:
  """Who may ask, and how much; 0 is without limit."""

  name: str
  sha256: str  # of the key; 256 random bits need no slow hash
  created_at: str
  requests: int  # a minute
  tokens: int  # a minute, of prompts and answers together

  def __post_init__(self):
    if not NAME.fullmatch(self.name):
      raise UserError(f"a key's name has 1 to 50 letters, digits or ._-, got {self.name!r:.80}.")
    if self.requests < 0 or self.tokens < 0:
      raise UserError(f"the limits of a key are at least 0: {self.requests}, {self.tokens}.")


class KeyFile:
  """The keys of a server; read again when the file changes."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._read_at: tuple[int, int] | None = None
    self._keys: tuple[Key, ...] = ()
    self._lock = threading.Lock()

  def keys(self) -> tuple[Key, ...]:
    """All keys; none where there is no file.

    Raises:
      UserError: the file is no list of keys.
    """
    with self._lock:
      try:
        stat = self.path.stat()
      except FileNotFoundError:
        return ()
      stamp = (stat.st_mtime_ns, stat.st_ino)
      if stamp != self._read_at:
        self._keys, self._read_at = self._load(), stamp
      return self._keys

  def _load(self) -> tuple[Key, ...]:
    try:
      return tuple(Key(**item) for item in files.read_json(self.path))
    except TypeError as error:
      raise UserError(f"{self.path} is no list of API keys: {error}.") from error

  def find(self, presented: str) -> Key | None:
    """The key that was presented; how long this takes does not depend on it."""
    digest, found = _digest(presented), None
    for key in self.keys():
      if hmac.compare_digest(key.sha256, digest):
        found = key
    return found

  def add(self, name: str, requests: int = 0, tokens: int = 0) -> str:
    """Adds a key and returns it; it cannot be shown again.

    Raises:
      UserError: the name is taken or no name, or a limit is below 0.
    """
    if any(key.name == name for key in self.keys()):
      raise UserError(f"{self.path} has a key {name!r} already; remove it first.")
    secret = PREFIX + secrets.token_urlsafe(32)
    self._write((*self.keys(), Key(name, _digest(secret), shapes.now(), requests, tokens)))
    return secret

  def remove(self, name: str) -> None:
    """Takes a key's rights away.

    Raises:
      UserError: there is no such key.
    """
    left = tuple(key for key in self.keys() if key.name != name)
    if len(left) == len(self.keys()):
      known = ", ".join(key.name for key in left) or "none"
      raise UserError(f"{self.path} has no key {name!r}; there are: {known}.")
    self._write(left)

  def _write(self, keys: tuple[Key, ...]) -> None:
    files.write_json_atomic(self.path, [dataclasses.asdict(key) for key in keys])
    os.chmod(self.path, 0o600)


def _digest(secret: str) -> str:
  return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Bucket:
  """So much a minute: fills up steadily, and never holds more than one minute's worth."""

  def __init__(self, per_minute: int, now: float):
    self.size, self._level, self._at = per_minute, float(per_minute), now

  def take(self, amount: float, now: float) -> float:
    """Takes `amount` if it is there and returns 0, else the seconds until it will be.

    More than a minute's worth is taken as a minute's worth.
    """
    amount = min(amount, self.size)
    level = self.level(now)
    if level < amount:
      return (amount - level) * 60.0 / self.size
    self._level, self._at = level - amount, now
    return 0.0

  def give_back(self, amount: float, now: float) -> None:
    """What was taken and not used."""
    self._level, self._at = min(self.size, self.level(now) + amount), now

  def level(self, now: float) -> float:
    """What it holds."""
    return min(self.size, self._level + max(0.0, now - self._at) * self.size / 60.0)


class TooMany(Exception):
  """A key has used up what it may ask in a minute."""

  def __init__(self, what: str, limit: int, seconds: float):
    super().__init__(f"this key may use {limit} {what} a minute; try again in {seconds:.1f} s.")
    self.seconds = seconds


class Caller:
  """Who makes a request, and what is left to them; from one thread only."""

  def __init__(self, key: Key | None, clock: Callable[[], float] = time.monotonic):
    self.key, self._clock = key, clock
    limits = {} if key is None else {"requests": key.requests, "tokens": key.tokens}
    self.buckets = {name: Bucket(n, clock()) for name, n in limits.items() if n}

  @property
  def name(self) -> str:
    """As records call them."""
    return "api" if self.key is None else f"api:{self.key.name}"

  def take(self, what: str, amount: float) -> None:
    """Raises TooMany unless there is so much left."""
    if what in self.buckets:
      seconds = self.buckets[what].take(amount, self._clock())
      if seconds > 0:
        raise TooMany(what, self.buckets[what].size, seconds)

  def give_back(self, what: str, amount: float) -> None:
    if what in self.buckets:
      self.buckets[what].give_back(amount, self._clock())

  def headers(self) -> dict[str, str]:
    """What is left, as OpenAI's headers say it."""
    found, now = {}, self._clock()
    for what, bucket in self.buckets.items():
      level = bucket.level(now)
      found[f"x-ratelimit-limit-{what}"] = str(bucket.size)
      found[f"x-ratelimit-remaining-{what}"] = str(max(0, int(level)))
      found[f"x-ratelimit-reset-{what}"] = f"{(bucket.size - level) * 60.0 / bucket.size:.2f}s"
    return found


class RequireKey:
  """ASGI middleware: requests below /v1 and /metrics come with a key, and not too often.

  Puts the `Caller` into the request's state. Without a file of keys everybody may ask.
  """

  def __init__(self, app: ASGIApp, keys: KeyFile | None):
    self.app, self.keys = app, keys
    self._callers: dict[str, Caller] = {}  # by hash
    self._anybody = Caller(None)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http" or not scope["path"].startswith(("/v1/", "/metrics")):
      return await self.app(scope, receive, send)
    caller = self._anybody if self.keys is None else self._caller(Headers(scope=scope))
    if caller is None:
      message = "this server wants an API key: Authorization: Bearer KEY."
      response = errors.response(401, message, headers={"www-authenticate": "Bearer"})
      return await response(scope, receive, send)
    if scope["path"].startswith("/v1/"):
      try:
        caller.take("requests", 1)
      except TooMany as error:
        return await too_many(error, caller)(scope, receive, send)
    scope.setdefault("state", {})["caller"] = caller
    await self.app(scope, receive, _with_headers(send, caller))

  def _caller(self, headers: Headers) -> Caller | None:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    key = self.keys.find(secret.strip()) if kind.lower() == "bearer" else None
    if key is None:
      return None
    known = self._callers.get(key.sha256)
    if known is None or known.key != key:
      known = self._callers[key.sha256] = Caller(key)
    return known


def too_many(error: TooMany, caller: Caller):
  """The 429 response."""
  headers = {"retry-after": str(int(error.seconds) + 1), **caller.headers()}
  return errors.response(429, str(error), headers=headers)


def _with_headers(send: Send, caller: Caller) -> Send:
  async def sending(message: Message) -> None:
    if message["type"] == "http.response.start":
      MutableHeaders(scope=message).update(caller.headers())
    await send(message)

  return sending


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m rlhf_jax.serving.keys", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name in ("add", "remove", "list"):
    command = commands.add_parser(name)
    command.add_argument("--file", required=True, type=pathlib.Path, help="where the hashes are")
    if name != "list":
      command.add_argument("name")
    if name == "add":
      command.add_argument("--requests", type=int, default=0, help="a minute; 0: no limit")
      command.add_argument("--tokens", type=int, default=0, help="a minute; 0: no limit")
  given = parser.parse_args(argv)
  known = KeyFile(given.file)
  try:
    if given.command == "add":
      sys.stdout.write(known.add(given.name, given.requests, given.tokens) + "\n")
    elif given.command == "remove":
      known.remove(given.name)
    else:
      for key in known.keys():
        sys.stdout.write(f"{key.name}\t{key.created_at}\t{key.requests}\t{key.tokens}\n")
  except UserError as error:
    parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
  main()
