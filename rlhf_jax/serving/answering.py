"""One request to OpenAI's API from submission to last byte: whole or as a stream of events.

Whoever hangs up frees the slots at once. What a key has left is charged when the request is taken,
as if every answer took all the tokens it may, and what was not used is given back at the end.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from rlhf_jax.serving import errors
from rlhf_jax.serving.context import Answer, Engine, Request
from rlhf_jax.serving.filtering import NOTICE, Blocked, Filter
from rlhf_jax.serving.forms import Choice, Form
from rlhf_jax.serving.keys import Caller, TooMany, too_many

# How OpenAI names what ended an answer; an answer whose time is up had its length limited too.
FINISH = {"stop": "stop", "length": "length", "deadline": "length"}
FAILED = {
  "error": (500, "the device failed while it answered; try again."),
  "cancelled": (503, "the server ended before it had answered; try again."),
}
Result = TypeVar("Result")


class NoModel(HTTPException):
  """Another model than the one that is served."""

  def __init__(self, message: str):
    super().__init__(404, message)


class Failed(Exception):
  """An answer ended where it should not have; `status` and message are for the client."""

  def __init__(self, reason: str):
    self.status, message = FAILED[reason]
    super().__init__(message)


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a request wants."""

  requests: tuple[Request, ...]  # one a prompt
  n: int  # answers to each
  stream: bool
  usage: bool  # at the end of a stream
  logprobs: bool


@dataclasses.dataclass(frozen=True)
class Work:
  """A request under way."""

  asked: Asked
  filter: Filter
  form: Form
  answers: tuple[Answer, ...]  # () where the request itself was blocked
  id: str
  created: int

  @property
  def usage(self) -> dict[str, int]:
    """Tokens so far. n answers to one prompt count it once, as OpenAI does."""
    read = sum(answer.prompt_tokens for answer in self.answers[:: self.asked.n])
    drawn = sum(answer.completion_tokens for answer in self.answers)
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}

  def body(self, kind: str, choices: list[dict], **more: Any) -> dict:
    """What every response and every event has in common."""
    engine = self.filter.context.engine
    return {
      "id": self.id,
      "object": kind,
      "created": self.created,
      "model": engine.model,
      "system_fingerprint": self.filter.context.policy,
      "choices": choices,
      **more,
      **({"filter": self.filter.actions} if self.filter.is_on else {}),
    }


async def respond(
  asked: Asked, filter: Filter, texts: list[str], form: Form, http: HttpRequest
) -> Response:
  """Answers a request whose fields are right; `texts` are what a person wrote in it."""
  caller: Caller = http.scope["state"]["caller"]
  blocked = await filter.blocks(texts, "input")
  answers = () if blocked else submit(filter.context.engine, asked)
  charged = sum(a.prompt_tokens + a.most for a in answers)
  try:
    caller.take("tokens", charged)
  except TooMany as error:
    _cancel(answers)
    return too_many(error, caller)
  work = Work(asked, filter, form, answers, f"{form.prefix}-{uuid.uuid4().hex}", int(time.time()))
  settle = lambda: caller.give_back("tokens", charged - work.usage["total_tokens"])
  headers = {"x-moderation": filter.actions["input"]} if filter.is_on and texts else {}
  if asked.stream:
    headers |= {
      "cache-control": "no-store",
      "x-accel-buffering": "no",
    }  # proxies pass it on at once
    return EventStream(_events(work, settle), headers=headers, media_type="text/event-stream")
  try:
    found = await unless_gone(http, _whole(work))
  except Failed as error:
    return errors.response(error.status, str(error))
  finally:
    _cancel(answers)
    settle()
  return JSONResponse(found, headers=headers)


def submit(engine: Engine, asked: Asked) -> tuple[Answer, ...]:
  """All answers of a request or none; the k-th to one prompt has the seed + k."""
  answers = []
  try:
    for request in asked.requests:
      for k in range(asked.n):
        seed = None if request.seed is None else request.seed + k
        answers.append(engine.submit(dataclasses.replace(request, seed=seed)))
  except BaseException:
    _cancel(answers)
    raise
  return tuple(answers)


async def _whole(work: Work) -> dict:
  """The response's body, once every answer is there."""
  if not work.answers:
    choices = _blocked(work)
  else:
    choices = await asyncio.gather(*(_read(work, i) for i in range(len(work.answers))))
  written = [choice.write(work.form.choice(choice, work.asked.logprobs)) for choice in choices]
  return work.body(work.form.whole, written, usage=work.usage)


def _blocked(work: Work) -> list[Choice]:
  """What stands in place of answers to a request that must not pass."""
  count = work.asked.n * len(work.asked.requests)
  return [Choice(i, text=NOTICE, finish="content_filter") for i in range(count)]


async def _read(work: Work, index: int) -> Choice:
  parts = [part async for part in _parts(work, index)]
  if parts[-1].finish == "content_filter":
    return Choice(index, work.answers[index].seed, text=NOTICE, finish="content_filter")
  return Choice(
    index,
    work.answers[index].seed,
    text="".join(part.text for part in parts),
    tokens=tuple(token for part in parts for token in part.tokens),
    logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
    finish=parts[-1].finish,
  )


async def _parts(work: Work, index: int) -> AsyncIterator[Choice]:
  """An answer as it comes; the last part says why it is over."""
  answer, offset = work.answers[index], 0
  part = lambda **fields: Choice(index, answer.seed, offset=offset, **fields)
  try:
    async for piece in work.filter.pieces(answer):
      yield part(text=piece.text, tokens=piece.tokens, logprobs=piece.logprobs)
      offset += len(piece.text)
  except Blocked:
    answer.cancel()
    yield part(text="" if offset else NOTICE, finish="content_filter")
    return
  if answer.finish_reason not in FINISH:
    raise Failed(answer.finish_reason)
  yield part(finish=FINISH[answer.finish_reason])


async def _events(work: Work, settle) -> AsyncIterator[str]:
  """A stream as server-sent events, [DONE] at its end; an error is an event too."""
  usage = {"usage": None} if work.asked.usage else {}
  event = lambda choices, **more: _event(work.body(work.form.part, choices, **(usage | more)))
  try:
    first = work.form.first()
    if first is not None:
      for i in range(work.asked.n * len(work.asked.requests)):
        yield event([Choice(i).write(first)])
    async for parts, last in _merged(work):
      written = (part.write(work.form.delta(part, work.asked.logprobs)) for part in parts)
      text = "".join(event([choice]) for choice in written)
      if last:
        text += (event([], usage=work.usage) if work.asked.usage else "") + "data: [DONE]\n\n"
      if text:
        yield text
  except Failed as error:
    yield _event(errors.body(error.status, str(error)))
  finally:
    _cancel(work.answers)
    settle()


def _event(body: dict) -> str:
  return f"data: {json.dumps(body)}\n\n"


async def _merged(work: Work) -> AsyncIterator[tuple[list[Choice], bool]]:
  """The parts of all answers in the order of their coming, and whether these are the last.

  Those that are there together come together, so that they leave in one write.
  """
  if not work.answers:
    yield _blocked(work), True
    return
  arrived: asyncio.Queue[Choice | BaseException | None] = asyncio.Queue()

  async def pump(index: int) -> None:
    try:
      async for part in _parts(work, index):
        arrived.put_nowait(part)
      arrived.put_nowait(None)
    except Exception as error:
      arrived.put_nowait(error)

  pumps = [asyncio.create_task(pump(i)) for i in range(len(work.answers))]
  try:
    left = len(pumps)
    while left:
      found, parts = [await arrived.get()], []
      while not arrived.empty():
        found.append(arrived.get_nowait())
      for part in found:
        if isinstance(part, Exception):
          yield parts, False
          raise part
        if part is None:
          left -= 1
        else:
          parts.append(part)
      yield parts, not left
  finally:
    for task in pumps:
      task.cancel()


async def unless_gone(http: HttpRequest, work: Awaitable[Result]) -> Result:
  """The result, unless the client hangs up before; then the work is cancelled."""
  task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hangs_up(http))
  try:
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise HTTPException(499, "the client hung up.")
    return task.result()
  finally:
    for one in (task, gone):
      one.cancel()
      with contextlib.suppress(BaseException):
        await one


async def _hangs_up(http: HttpRequest) -> None:
  while (await http.receive())["type"] != "http.disconnect":
    pass


def _cancel(answers) -> None:
  for answer in answers:
    answer.cancel()


class EventStream(StreamingResponse):
  """Server-sent events; however the stream ends, its generator is closed with it."""

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      await self.body_iterator.aclose()
