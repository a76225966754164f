"""The server: every route, and what stands before them."""

import dataclasses
from collections.abc import Iterable

import fastapi

import rlhf_jax
from rlhf_jax.serving import errors, monitoring, openai_api
from rlhf_jax.serving.context import Context
from rlhf_jax.serving.guard import Guard
from rlhf_jax.serving.keys import KeyFile, RequireKey


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a server allows."""

  keys: KeyFile | None = None  # None: everybody may ask
  body_limit: int = 1 << 20  # bytes of a request's body
  hosts: tuple[str, ...] | None = None  # names it goes by; None: any
  seconds: float | None = 600.0  # that an answer of the API may take; None: any


def create_app(
  context: Context, settings: Settings, routers: Iterable[fastapi.APIRouter] = ()
) -> fastapi.FastAPI:
  """The API with these pages beside it.

  The engine is the caller's to start and stop. /openapi.json describes all routes; there is no page
  that shows it, as those of FastAPI load scripts from elsewhere.
  """
  app = fastapi.FastAPI(
    title="rlhf_jax",
    version=rlhf_jax.__version__,
    docs_url=None,
    redoc_url=None,
    responses=errors.described(403, 413, 500),  # of the guard, and of a bug
  )
  metrics = monitoring.Metrics()
  if isinstance(context.engine, monitoring.Watched):
    metrics.watch(context.engine)
  app.include_router(openai_api.router(context, settings.seconds))
  app.include_router(monitoring.router(context.engine, metrics))
  for router in routers:
    app.include_router(router)
  errors.install(app)
  # The last one added is the first to see a request.
  app.add_middleware(RequireKey, keys=settings.keys)
  app.add_middleware(Guard, body_limit=settings.body_limit, hosts=settings.hosts)
  app.add_middleware(monitoring.Counting, metrics=metrics)
  return app
