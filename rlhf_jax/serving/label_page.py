"""The labeling page: people rank answers and write demonstrations, signed in with their token.

Each action is a record at once, or a draft that survives the page. A labeler reads their own
records and the tasks they hold, nothing else; agreement, import and export are for researchers. The
page is `static/label`; it reads and writes through the routes under `/label`.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from rlhf_jax.feedback import exchange, labels, tasks
from rlhf_jax.feedback.records import Labeler
from rlhf_jax.feedback.tasks import LeaseLost
from rlhf_jax.serving import errors, label_view, suggestions
from rlhf_jax.serving.context import Context
from rlhf_jax.serving.label_bodies import (
  Dialogue,
  Draft,
  Import,
  Next,
  Ranking,
  Refusal,
  SignIn,
  Wanted,
)
from rlhf_jax.serving.sessions import Sessions
from rlhf_jax.text.dialogue import ChatTemplate
from rlhf_jax.text.messages import Message
from rlhf_jax.text.tokenizer import Tokenizer

STATIC = pathlib.Path(__file__).parent / "static" / "label"
LATE = errors.described(409)
LINES = {200: {"content": {"application/x-ndjson": {}}}}
Id = Annotated[str, Path(pattern=r"^[0-9A-Za-z._:@-]{1,64}$")]


def router(
  context: Context,
  *,
  template: ChatTemplate | None = None,
  tokenizer: Tokenizer | None = None,
  lease_seconds: float = tasks.LEASE_SECONDS,
) -> APIRouter:
  """The routes of the labeling page.

  Args:
    context: the store, and who makes suggestions.
    template: of the served policy, with `tokenizer`: how it is asked to write as the user. Without
      them the engine is asked for those of what it has loaded.
    tokenizer: see `template`.
    lease_seconds: how long a task stays with somebody whose page is closed.
  """
  loaded = getattr(context.engine, "loaded", None)  # not every engine tells
  if template is None and loaded is not None:
    template, tokenizer = loaded.template, loaded.tokenizer
  responses = errors.described(401, 404, 422)
  routes = APIRouter(prefix="/label", tags=["label"], responses=responses)
  sessions = Sessions(context.store)
  _add_page(routes)
  _add_session(routes, sessions, context)
  _add_tasks(routes, sessions, context, lease_seconds)
  _add_submissions(routes, sessions, context)
  _add_suggestions(routes, sessions, context, template, tokenizer)
  _add_own(routes, sessions, context)
  _add_research(routes, sessions, context)
  return routes


def _add_page(routes: APIRouter) -> None:
  files = {path.name: path for path in STATIC.iterdir()}

  @routes.get("", include_in_schema=False)
  def page() -> FileResponse:
    """The page."""
    return FileResponse(files["index.html"], headers={"Cache-Control": "no-cache"})

  @routes.get("/static/{name}", include_in_schema=False)
  def file(name: str) -> FileResponse:
    """A file of the page."""
    if name not in files:
      raise HTTPException(404, "there is no such file.")
    return FileResponse(files[name], headers={"Cache-Control": "no-cache"})


def _add_session(routes: APIRouter, sessions: Sessions, context: Context) -> None:
  def shown(labeler: Labeler) -> dict[str, Any]:
    return {
      "id": labeler.id,
      "name": labeler.name,
      "role": labeler.role,
      "model": context.engine.model,
      "flags": labels.FLAGS,
    }

  @routes.post("/session")
  def sign_in(body: SignIn, request: Request, response: Response) -> dict[str, Any]:
    """Signs a labeler in."""
    response.headers["Cache-Control"] = "no-store"
    return shown(sessions.sign_in(request, response, body.token.strip()))

  @routes.get("/session")
  def session(labeler: Annotated[Labeler, Depends(sessions.person)], response: Response):
    """Who is signed in, and what the page must know."""
    response.headers["Cache-Control"] = "no-store"
    return shown(labeler)

  @routes.delete("/session")
  def sign_out(request: Request, response: Response) -> dict[str, Any]:
    """Signs this browser out."""
    sessions.sign_out(request, response)
    return {}


def _add_tasks(
  routes: APIRouter, sessions: Sessions, context: Context, lease_seconds: float
) -> None:
  store, Person = context.store, Annotated[Labeler, Depends(sessions.person)]

  @routes.post("/tasks/next")
  def next_task(body: Next, person: Person) -> dict[str, Any]:
    """The task in this labeler's hands, or the next one; null where nothing is left."""
    found = tasks.next_task(store, person.id, body.work, lease_seconds=lease_seconds)
    return {"assignment": found and label_view.assignment(found, person.id)}

  @routes.put("/tasks/{task}/draft")
  def save(task: Id, body: Draft, person: Person) -> dict[str, Any]:
    """Keeps a draft and renews the lease; `lease_until` is null where the task is gone."""
    _find(context, task)
    tasks.save_draft(store, person.id, task, body.content)
    return {"lease_until": tasks.renew(store, person.id, task, lease_seconds=lease_seconds)}


def _add_submissions(routes: APIRouter, sessions: Sessions, context: Context) -> None:
  store, Person = context.store, Annotated[Labeler, Depends(sessions.person)]

  @routes.post("/tasks/{task}/comparison", responses=LATE)
  def compare(task: Id, body: Ranking, person: Person) -> dict[str, Any]:
    """Stores a ranking. Sent twice with one submission, it is one record."""
    found = _find(context, task)
    judgments = [labels.Judgment(j.rank, j.quality, tuple(j.flags)) for j in body.judgments]
    return _submitted(
      lambda: tasks.submit_comparison(
        store,
        person.id,
        task,
        judgments,
        submission=body.submission,
        seconds=body.seconds,
        presented=label_view.order(found, person.id),
        note=body.note,
      )
    )

  @routes.post("/tasks/{task}/demonstration", responses=LATE)
  def demonstrate(task: Id, body: Dialogue, person: Person) -> dict[str, Any]:
    """Stores a dialogue, each turn with its edit distance from what was suggested."""
    _find(context, task)
    turns = [labels.Turn(t.role, t.content, t.suggestion, t.suggested_by) for t in body.turns]
    return _submitted(
      lambda: tasks.submit_demonstration(
        store, person.id, task, turns, submission=body.submission, seconds=body.seconds
      )
    )

  @routes.post("/tasks/{task}/skip", responses=LATE)
  def skip(task: Id, body: Refusal, person: Person) -> dict[str, Any]:
    """Stores why somebody does not do a task, which goes to others."""
    _find(context, task)
    return _submitted(
      lambda: tasks.skip(
        store,
        person.id,
        task,
        body.reason,
        submission=body.submission,
        seconds=body.seconds,
      )
    )


def _add_suggestions(
  routes: APIRouter,
  sessions: Sessions,
  context: Context,
  template: ChatTemplate | None,
  tokenizer: Tokenizer | None,
) -> None:
  Person = Annotated[Labeler, Depends(sessions.person)]

  @routes.post("/tasks/{task}/suggestion", responses=errors.described(503))
  async def suggest(task: Id, body: Wanted, person: Person) -> dict[str, Any]:
    """What the policy would write next, for either side."""
    found = await run_in_threadpool(_require_held, context, person, task)
    given = found.conversation.messages if found.conversation else ()
    written = tuple(Message(turn.role, turn.content) for turn in body.turns)
    text = await suggestions.suggest(
      context.engine, (*given, *written), body.role, template, tokenizer
    )
    return {"text": text, "policy": context.policy, "model": context.engine.model}


def _add_own(routes: APIRouter, sessions: Sessions, context: Context) -> None:
  store, Person = context.store, Annotated[Labeler, Depends(sessions.person)]

  @routes.get("/progress")
  def progress(person: Person) -> dict[str, Any]:
    """What this labeler has done, and how far all have come."""
    return label_view.progress(store, person.id)

  @routes.get("/records")
  def records(person: Person) -> dict[str, Any]:
    """This labeler's newest records."""
    return {"records": label_view.own_records(store, person.id)}

  @routes.get("/records/{record}")
  def record(record: Id, person: Person) -> dict[str, Any]:
    """One of this labeler's records; those of others do not exist for them."""
    found = label_view.own_record(store, person.id, record)
    if found is None:
      raise HTTPException(404, "you have no such record.")
    return found


def _add_research(routes: APIRouter, sessions: Sessions, context: Context) -> None:
  store, Researcher = context.store, Annotated[Labeler, Depends(sessions.researcher)]

  @routes.get("/dashboard")
  def dashboard(person: Researcher) -> dict[str, Any]:
    """Agreement and speed, of all and of each labeler."""
    return label_view.dashboard(store)

  @routes.post("/tasks/import")
  def import_tasks(body: Import, person: Researcher) -> dict[str, Any]:
    """Stores the tasks of a file, all or none."""
    new = exchange.parse_tasks(body.lines, author=person.id)
    store.add_all(new)
    return {"tasks": len(new), "slots": sum(task.overlap for task in new)}

  @routes.get("/tasks/export", response_class=Response, responses=LINES)
  def export_tasks(person: Researcher) -> Response:
    """All tasks, in the form that import reads."""
    every = map(exchange.task_to_json, store.records(labels.Task))
    lines = "".join(json.dumps(item) + "\n" for item in every)
    headers = {"Content-Disposition": 'attachment; filename="tasks.jsonl"'}
    return Response(lines, media_type="application/x-ndjson", headers=headers)


def _find(context: Context, task: str) -> labels.Task:
  found = context.store.records(labels.Task, superseded=True, id=task)
  if not found:
    raise HTTPException(404, "there is no such task.")
  return found[0]


def _require_held(context: Context, person: Labeler, task: str) -> labels.Task:
  """A task that a labeler does not hold does not exist for them."""
  if not label_view.holds(context.store, person.id, task):
    raise HTTPException(404, "you have no such task.")
  return _find(context, task)


def _submitted(store_it: Callable[[], str]) -> dict[str, Any]:
  try:
    return {"record": store_it()}
  except LeaseLost as error:
    raise HTTPException(409, str(error)) from error
