"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, /v1/moderations."""

import asyncio
import time

import fastapi
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rlhf_jax.feedback.shapes import new_id
from rlhf_jax.serving import answering, errors
from rlhf_jax.serving.answering import Asked
from rlhf_jax.serving.context import Context, Request
from rlhf_jax.serving.filtering import Filter
from rlhf_jax.serving.forms import CHAT, TEXT
from rlhf_jax.serving.keys import Caller
from rlhf_jax.serving.openai_types import ChatBody, CompletionBody, ModerationBody, Sampling
from rlhf_jax.text.messages import check_text
from rlhf_jax.types import UserError

MOST_AT_ONCE = 64  # answers of one request

ERRORS = (401, 404, 422, 429)
ANSWERS = {  # to what is asked for at once and as a stream
  200: {"content": {"text/event-stream": {}}},
  **errors.described(503),
}


def router(context: Context, seconds: float | None = None) -> fastapi.APIRouter:
  """The routes; an answer ends, as with "length", after so many seconds."""
  routes = fastapi.APIRouter(prefix="/v1", responses=errors.described(*ERRORS))
  _add_answers(routes, context, seconds)
  _add_models(routes, context.engine.model)
  _add_moderations(routes, context)
  return routes


def _add_answers(routes: fastapi.APIRouter, context: Context, seconds: float | None) -> None:
  @routes.post("/chat/completions", tags=["chat"], responses=ANSWERS)
  async def chat(body: ChatBody, http: HttpRequest) -> Response:
    """Answers a dialogue."""
    _check(context, body)
    conversation = body.conversation()
    most = body.max_completion_tokens or body.max_tokens
    texts = [m.content for m in conversation.messages if m.role != "assistant"]
    asked = _asked(body, [_request(conversation, body, most, seconds)], bool(body.logprobs))
    return await answering.respond(asked, _filter(context, http), texts, CHAT, http)

  @routes.post("/completions", tags=["completions"], responses=ANSWERS)
  async def completions(body: CompletionBody, http: HttpRequest) -> Response:
    """Goes on from a text."""
    _check(context, body)
    prompts = body.prompts()
    requests = [_request(prompt, body, body.max_tokens or 16, seconds) for prompt in prompts]
    asked = _asked(body, requests, body.logprobs is not None)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    return await answering.respond(asked, _filter(context, http), texts, TEXT, http)


def _add_models(routes: fastapi.APIRouter, name: str) -> None:
  served = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "rlhf_jax"}

  @routes.get("/models", tags=["models"])
  def models() -> dict:
    """The policy that is served."""
    return {"object": "list", "data": [served]}

  @routes.get("/models/{model:path}", tags=["models"])
  def model(model: str) -> dict:
    """The same, by its name."""
    _check_model(name, model)
    return served


def _add_moderations(routes: fastapi.APIRouter, context: Context) -> None:
  @routes.post("/moderations", tags=["moderations"])
  async def moderations(body: ModerationBody) -> Response:
    """What kinds of undesired content texts hold."""
    if context.moderator is None:
      return errors.response(404, "this server has no moderator.", code="model_not_found")
    texts = body.texts()
    for text in texts:
      check_text(text, "the input")
    verdicts = await asyncio.to_thread(context.moderator, texts, "input")
    return JSONResponse(
      {
        "id": f"modr-{new_id()}",
        "model": context.moderator.name,
        "results": [_result(verdict) for verdict in verdicts],
      }
    )


def _result(verdict) -> dict:
  """A verdict as OpenAI writes it."""
  return {
    "flagged": verdict.flagged,
    "categories": {c.category: c.flagged for c in verdict.categories},
    "category_scores": {c.category: c.score for c in verdict.categories},
  }


def _check_model(served: str, asked: str) -> None:
  if asked != served:
    raise answering.NoModel(f"there is no model {asked!r:.200}; this server has {served!r}.")


def _check(context: Context, body: Sampling) -> None:
  _check_model(context.engine.model, body.model)
  body.check()


def _request(conversation, body: Sampling, most: int | None, seconds: float | None) -> Request:
  return Request(
    conversation,
    max_tokens=most,
    temperature=1.0 if body.temperature is None else body.temperature,
    top_p=1.0 if body.top_p is None else body.top_p,
    seed=body.seed,
    stop=body.stops,
    seconds=seconds,
  )


def _asked(body: Sampling, requests: list[Request], logprobs: bool) -> Asked:
  n = body.n or 1
  if n * len(requests) > MOST_AT_ONCE:
    raise UserError(
      f"{len(requests)} prompts with n={n} are {n * len(requests)} answers; at most {MOST_AT_ONCE} "
      "may be asked for at once."
    )
  return Asked(tuple(requests), n, bool(body.stream), body.wants_usage, logprobs)


def _filter(context: Context, http: HttpRequest) -> Filter:
  caller: Caller = http.scope["state"]["caller"]
  return Filter(context, caller.name)
