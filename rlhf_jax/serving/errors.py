"""Errors in OpenAI's shape, for every route: {"error": {"message", "type", "param", "code"}}."""

import json
import re
from typing import Any

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rlhf_jax.serving.context import Overloaded
from rlhf_jax.types import UserError

TYPES = {
  401: "authentication_error",
  403: "permission_error",
  429: "rate_limit_error",
  500: "server_error",
  503: "server_error",
}
CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}
MEANINGS = {  # of each status, in /openapi.json
  401: "It is not known who asks: a key, a token or a visitor's cookie is missing or wrong.",
  403: "Not from here, under this name, or in this role.",
  404: "There is no such thing, or not for whoever asks.",
  409: "Somebody else was faster.",
  413: "The body is too large.",
  422: "A field is wrong or not supported, or the body is no JSON.",
  429: "The key has used up its requests or tokens of this minute.",
  500: "The device failed, or the server made a mistake.",
  503: "As many wait as may, or nothing can be answered for now; see Retry-After.",
}
# What pydantic puts between the names of fields.
UNION_MEMBER = re.compile(r"str|int|TextPart|.*[\[(].*")


class Told(pydantic.BaseModel):
  """What is wrong, in words and by name."""

  message: str
  type: str
  param: str | None  # the field that is wrong
  code: str | None


class Error(pydantic.BaseModel):
  """The body of every error."""

  error: Told


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
  """How /openapi.json describes these errors: the `responses` of an app, a router or a route."""
  return {status: {"model": Error, "description": MEANINGS[status]} for status in statuses}


class BadField(UserError):
  """A field of a request that cannot be; `param` is its name."""

  def __init__(self, param: str, message: str, code: str | None = None):
    super().__init__(message)
    self.param, self.code = param, code


def body(
  status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
  """What stands in an error response."""
  kind = TYPES.get(status, "invalid_request_error")
  code = code or CODES.get(status)
  return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(
  status: int,
  message: str,
  *,
  param: str | None = None,
  code: str | None = None,
  headers: dict[str, str] | None = None,
) -> Response:
  """An error response; pure ASCII, since a message may quote half a character."""
  text = json.dumps(body(status, message, param, code))
  return Response(text, status, headers, "application/json")


def install(app: fastapi.FastAPI) -> None:
  """Makes every error of an app look like this."""
  app.add_exception_handler(UserError, _user_error)
  app.add_exception_handler(RequestValidationError, _bad_request)
  app.add_exception_handler(HTTPException, _http_error)
  app.add_exception_handler(Overloaded, _overloaded)
  app.add_exception_handler(Exception, _bug)


async def _user_error(request, error: UserError) -> Response:
  return response(
    422, str(error), param=getattr(error, "param", None), code=getattr(error, "code", None)
  )


async def _bad_request(request, error: RequestValidationError) -> Response:
  """One of the fields that are wrong: the innermost, as of a union each member has complained.

  Of these, what is of the right kind but cannot be tells more than what should be of another kind.
  """
  tells = lambda one: (len(one["loc"]), not one["type"].endswith("_type"))
  first = max(error.errors(), key=tells)
  place = [str(part) for part in first["loc"][1:] if not UNION_MEMBER.fullmatch(str(part))]
  if first["type"] == "json_invalid":
    return _no_json()
  param = ".".join(place) or None
  return response(422, f"{param or 'the request'}: {first['msg']}.", param=param)


def _no_json() -> Response:
  return response(422, "the body is no JSON.", code="invalid_json")


async def _http_error(request, error: HTTPException) -> Response:
  if error.status_code == 400:  # FastAPI's, of half characters and of brackets without end
    return _no_json()
  return response(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _overloaded(request, error: Overloaded) -> Response:
  headers = {"retry-after": str(error.retry_after)}
  return response(503, str(error), code="overloaded", headers=headers)


async def _bug(request, error: Exception) -> Response:
  """What went wrong stands in the log, not in the answer."""
  return response(500, "the server made a mistake; its log says which.")
