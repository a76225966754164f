"""The chat page: a conversation with the policy, and whatever a person says of it as records.

Everything is a record at once: messages, thumbs, choices between two answers, reports, verdicts of
the filter. The page is `static/chat`; it reads and writes through the routes under `/chat`.
"""

import asyncio
import dataclasses
import json
import pathlib
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Path
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from rlhf_jax.feedback import conversations, rows, schema, withdrawal
from rlhf_jax.feedback.records import ChatMessage, Feedback, HarmReport, Verdict, VerdictReport
from rlhf_jax.feedback.store import insert
from rlhf_jax.serving import chat_filter, chat_view, errors, visitors
from rlhf_jax.serving.chat_answers import Answers, Drawing, Ending
from rlhf_jax.serving.chat_bodies import (
  MOST,
  Draw,
  Harm,
  Mistake,
  Preference,
  Send,
  Stop,
  Thumb,
  Withdraw,
)
from rlhf_jax.serving.chat_talk import Talk
from rlhf_jax.serving.context import Context
from rlhf_jax.types import UserError

STATIC = pathlib.Path(__file__).parent / "static" / "chat"
Person = Annotated[str, Depends(visitors.person_of)]
PathId = Annotated[str, Path(pattern=r"^[0-9A-Za-z._:@-]{1,64}$")]
FULL = errors.described(503)
EVENTS = {200: {"content": {"text/event-stream": {}}}}


def router(context: Context, *, patience: float = 10.0) -> APIRouter:
  """The routes of the chat page; an answer nobody listens to goes on for `patience` seconds."""
  routes = APIRouter(tags=["chat"], responses=errors.described(401, 404, 422))
  answers = Answers(context, patience)
  _add_page(routes, context)
  _add_reading(routes, context, answers)
  _add_talking(routes, Talk(context, answers), answers)
  _add_saying(routes, context)
  _add_withdrawal(routes, context, answers)
  return routes


def _add_page(routes: APIRouter, context: Context) -> None:
  files = {path.name: path for path in STATIC.iterdir()}

  @routes.get("/", include_in_schema=False)
  def page(request: HttpRequest) -> FileResponse:
    """The page, and a cookie for who is here for the first time."""
    response = FileResponse(files["index.html"], headers={"Cache-Control": "no-cache"})
    visitors.greet(request, response)
    return response

  @routes.get("/chat/static/{name}", include_in_schema=False)
  def file(name: str) -> FileResponse:
    """A file of the page."""
    if name not in files:
      raise HTTPException(404, "there is no such file.")
    return FileResponse(files[name], headers={"Cache-Control": "no-cache"})

  @routes.get("/chat/session")
  def session(request: HttpRequest) -> JSONResponse:
    """What the page must know of the server; gives the cookie where it is missing."""
    facts = {"model": context.engine.model, "filter": context.moderator is not None, "most": MOST}
    response = JSONResponse(facts, headers={"Cache-Control": "no-store"})
    visitors.greet(request, response)
    return response


def _add_reading(routes: APIRouter, context: Context, answers: Answers) -> None:
  @routes.get("/chat/conversations")
  def listing(person: Person) -> JSONResponse:
    """The visitor's conversations, the newest first."""
    return _json({"conversations": chat_view.listing(context.store, person)})

  @routes.get("/chat/conversations/{id}")
  async def conversation(id: PathId, person: Person) -> JSONResponse:
    """All messages of a conversation, also those on their way."""
    running = answers.under_way(conversation=id, author=person)  # before the store is read
    messages = await asyncio.to_thread(chat_view.conversation, context.store, id, person)
    if not messages:
      raise HTTPException(404, "you have no conversation with this id.")
    there = {message["id"] for message in messages}
    messages += [chat_view.of_running(d.id, d.parent) for d in running if d.id not in there]
    return _json({"id": id, "messages": messages})


def _add_talking(routes: APIRouter, talk: Talk, answers: Answers) -> None:
  @routes.post("/chat/messages", responses=FULL)
  async def send(body: Send, person: Person) -> JSONResponse:
    """Stores a message and begins to answer it, unless the filter blocks it."""
    return _json(await talk.send(body, person))

  @routes.post("/chat/messages/{id}/answers", responses=FULL)
  async def draw(id: PathId, body: Draw, person: Person) -> JSONResponse:
    """Begins one more answer to a message, or two to compare."""
    return _json(await talk.draw(id, body, person))

  @routes.get("/chat/answers/{id}", response_class=StreamingResponse, responses=EVENTS)
  async def listen(id: PathId, person: Person) -> StreamingResponse:
    """An answer as server-sent events from its beginning: `text` for each piece, then `done`."""
    drawing = answers.get(id, person)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(drawing), headers=headers, media_type="text/event-stream")

  @routes.post("/chat/answers/{id}/stop")
  async def stop(id: PathId, body: Stop, person: Person) -> JSONResponse:
    """Stops an answer; what was drawn is stored."""
    drawing = answers.get(id, person)
    drawing.stop()
    await asyncio.wait({drawing.task})
    return _json(_ended(drawing.ending))


def _add_saying(routes: APIRouter, context: Context) -> None:
  store = context.store

  @routes.post("/chat/answers/{id}/feedback")
  def feedback(id: PathId, body: Thumb, person: Person) -> JSONResponse:
    """Stores a thumb; a second one supersedes the first, the same again is none."""
    answer = _own_answer(store, id, person)
    ideal = body.ideal if body.ideal and body.ideal.strip() else None
    said = {"thumb": body.thumb, "tags": tuple(body.tags), "text": body.text, "ideal": ideal}
    new = Feedback(author=person, message=answer.id, **said)
    return _json(chat_view.of_feedback(store.transact(lambda c: _stand(c, new))))

  @routes.post("/chat/answers/{id}/harm")
  def harm(id: PathId, body: Harm, person: Person) -> JSONResponse:
    """Stores the report of a harmful answer; said twice, it is one report."""
    answer = _own_answer(store, id, person)
    report = HarmReport(author=person, message=answer.id, **body.model_dump())
    same = {"message": report.message, "category": report.category, "text": report.text}
    old = store.records(HarmReport, author=person, **same)
    if not old:
      store.add(report)
    return _json({"id": old[0].id if old else report.id})

  @routes.post("/chat/preferences")
  def prefer(body: Preference, person: Person) -> JSONResponse:
    """Stores which of two answers is better."""
    for id in (body.first, body.second):
      _own_answer(store, id, person)
    about = {"author": person, "seconds": body.seconds, "submission": body.id}
    return _json({"id": conversations.prefer(store, body.first, body.second, body.choice, **about)})

  @routes.post("/chat/verdicts/{id}/reports")
  def report(id: PathId, body: Mistake, person: Person) -> JSONResponse:
    """Stores that the filter was wrong; said twice, it is one report."""
    verdict = chat_view.own(store, id, Verdict, person)
    flagged = {score.category for score in verdict.scores if score.is_flagged}
    if (body.category in flagged) != (body.mistake == "false_positive"):
      wrong = "flag" if body.mistake == "false_positive" else "miss"
      raise UserError(f"the filter did not {wrong} {body.category!r:.80} here.")
    made = VerdictReport(author=person, verdict=verdict.id, **body.model_dump())
    same = {"verdict": made.verdict, "category": made.category, "text": made.text}
    old = store.records(VerdictReport, author=person, **same)
    if not old:
      store.add(made)
    return _json(chat_view.of_report(old[0] if old else made))


def _add_withdrawal(routes: APIRouter, context: Context, answers: Answers) -> None:
  @routes.get("/chat/data")
  def preview(person: Person) -> JSONResponse:
    """How many records of each kind are the visitor's."""
    return _json({"records": withdrawal.preview(context.store, person)})

  @routes.post("/chat/data/withdraw")
  async def withdraw(body: Withdraw, request: HttpRequest, person: Person) -> JSONResponse:
    """Deletes all that the visitor said; they are a new person from then on."""
    await answers.forget(person)
    counted = await asyncio.to_thread(_withdraw, context, person)
    response = _json({"deleted": counted})
    visitors.part(request, response)
    return response


def _withdraw(context: Context, person: str) -> int:
  if not withdrawal.preview(context.store, person):
    return 0
  return len(withdrawal.withdraw(context.store, person, author=person).tombstones)


def _stand(connection: sa.Connection, new: Feedback) -> Feedback:
  """What a person thinks of an answer from now on; two clicks at once come one after the other."""
  theirs = (schema.feedback.c.message == new.message, schema.records.c.author == new.author)
  *_, old = (None, *rows.select(connection, "feedback", *theirs))
  if old is not None:
    # The same again is no new record.
    if dataclasses.replace(new, id=old.id, supersedes=old.supersedes).says_the_same(old):
      return old
    new = dataclasses.replace(new, supersedes=old.id)
  insert(connection, new)
  return new


def _own_answer(store, id: str, person: str) -> ChatMessage:
  """An answer that a policy gave to this person; what the filter withheld is none."""
  message = chat_view.own(store, id, ChatMessage, person)
  if message.role != "assistant" or store.records(Verdict, id=chat_filter.withheld_id(id)):
    raise UserError("only an answer that you have seen can be judged.")
  return message


async def _events(drawing: Drawing):
  async for event in drawing.listen():
    if event is None:
      yield ": still here\n\n"
    elif isinstance(event, Ending):
      yield f"event: done\ndata: {json.dumps(_ended(event))}\n\n"
    else:
      yield f"event: text\ndata: {json.dumps(event)}\n\n"


def _ended(ending: Ending) -> dict[str, Any]:
  message = ending.message and chat_view.of_message(ending.message, ending.verdict)
  return {"message": message, "reason": ending.reason, "error": ending.error}


def _json(content: Any) -> JSONResponse:
  return JSONResponse(content, headers={"Cache-Control": "no-store"})
