"""How a server is doing: /health for whoever restarts it, /metrics for Prometheus."""

import time
from typing import Protocol, runtime_checkable

import fastapi
import prometheus_client as prometheus
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.serving import errors
from rlhf_jax.serving.answers import SlotAnswer
from rlhf_jax.serving.context import FinishReason
from rlhf_jax.serving.engine import Status

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


@runtime_checkable
class Watched(Protocol):
  """An engine that says how it is doing, as `SlotEngine` does."""

  on_end: list
  failures: int

  def status(self) -> Status: ...


class Metrics:
  """The figures of one server, in a registry of its own."""

  def __init__(self):
    self.registry = prometheus.CollectorRegistry()
    made = {"registry": self.registry}
    self.requests = prometheus.Counter(
      "rlhf_requests", "Requests by route and status.", ("method", "route", "status"), **made
    )
    self.answers = prometheus.Counter(
      "rlhf_answers", "Answers by what ended them.", ("finish_reason",), **made
    )
    self.prompt_tokens = prometheus.Counter("rlhf_prompt_tokens", "Tokens read.", **made)
    self.tokens = prometheus.Counter("rlhf_generated_tokens", "Tokens drawn for answers.", **made)
    histogram = lambda name, text, buckets: prometheus.Histogram(
      name, text, buckets=buckets, **made
    )
    self.queue_wait = histogram("rlhf_queue_wait_seconds", "From request to slot.", SECONDS)
    self.first_token = histogram(
      "rlhf_time_to_first_token_seconds", "From request to first token.", SECONDS
    )
    self.per_token = histogram(
      "rlhf_time_per_token_seconds", "Between tokens of an answer, its mean.", TOKEN_SECONDS
    )

  def watch(self, engine: Watched) -> None:
    """Follows an engine from now on."""
    engine.on_end.append(self._ended)
    gauge = lambda name, text: prometheus.Gauge(name, text, registry=self.registry)
    status = engine.status
    gauge("rlhf_slots", "Answers that can be under way.").set_function(lambda: status().slots)
    gauge("rlhf_slots_in_use", "Answers under way.").set_function(lambda: status().busy)
    gauge("rlhf_queue_length", "Requests that wait.").set_function(lambda: status().waiting)
    gauge("rlhf_queue_limit", "Requests that may wait.").set_function(lambda: status().queue)
    gauge("rlhf_healthy", "1 where it answers.").set_function(lambda: float(status().healthy))
    gauge("rlhf_device_failures", "Device calls that raised.").set_function(lambda: engine.failures)

  def _ended(self, answer: SlotAnswer, reason: FinishReason) -> None:
    """Called in the engine's thread, once an answer."""
    self.answers.labels(reason).inc()
    self.tokens.inc(answer.drawn)
    if answer.admitted_at is not None:
      self.prompt_tokens.inc(answer.prompt_tokens)
      self.queue_wait.observe(answer.admitted_at - answer.submitted_at)
    if answer.first_token_at is not None:
      self.first_token.observe(answer.first_token_at - answer.submitted_at)
      if answer.drawn > 1:
        self.per_token.observe((answer.ended_at - answer.first_token_at) / (answer.drawn - 1))


class Counting:
  """ASGI middleware that counts requests by the route they took; texts of paths are no labels."""

  def __init__(self, app: ASGIApp, metrics: Metrics):
    self.app, self.metrics = app, metrics

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    status = 500

    async def noting(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      await self.app(scope, receive, noting)
    finally:
      route = getattr(scope.get("route"), "path", "none")
      known = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
      method = scope["method"] if scope["method"] in known else "other"
      self.metrics.requests.labels(method, route, str(status)).inc()


def router(engine: object, metrics: Metrics) -> fastapi.APIRouter:
  """/health and /metrics."""
  routes, began = fastapi.APIRouter(tags=["monitoring"]), time.monotonic()

  @routes.get("/health", responses={503: {"description": "It cannot answer for now."}})
  def health() -> Response:
    """200 where the server can answer, else 503 and why not."""
    found = {"status": "ok", "model": engine.model, "uptime": round(time.monotonic() - began, 1)}
    if not isinstance(engine, Watched):
      return JSONResponse(found)
    now = engine.status()
    found |= {"slots": {"busy": now.busy, "all": now.slots}}
    found |= {"queue": {"waiting": now.waiting, "limit": now.queue}}
    if not now.healthy:
      found |= {"status": "unavailable", "why": now.why}
    return JSONResponse(found, 200 if now.healthy else 503)

  text = {"content": {"text/plain": {}}}

  @routes.get("/metrics", response_class=Response, responses={200: text, **errors.described(401)})
  def figures() -> Response:
    """In Prometheus' text format."""
    text = prometheus.generate_latest(metrics.registry)
    return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

  return routes
