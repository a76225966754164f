"""Schemathesis on the whole application: nothing breaks it, and every response is as declared.

The routes of both pages and of the API are asked as /openapi.json describes them: by a labeler and
a researcher, who both chat as well, and by a stranger. Where a request names something it often
names what is there, as a made-up id gets no further than a 404.
"""

import collections
import contextlib
import dataclasses

import httpx
import hypothesis
import pytest
import schemathesis
import serving_cases
from chat_cases import SAME_ORIGIN, FakeModerator, Visitor
from hypothesis import strategies as st
from labeling import to_rank, to_write
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from rlhf_jax.feedback import people
from rlhf_jax.serving import chat_page, label_page

AS_DECLARED = [
  checks.status_code_conformance,
  checks.content_type_conformance,
  checks.response_schema_conformance,
]
HEADERS = SAME_ORIGIN | {"Content-Type": "application/json"}
# After these there is less to ask for.
LAST = ("POST /chat/data/withdraw", "POST /label/session", "DELETE /label/session")
OPEN = ("/v1/", "/health", "/metrics", "/chat/session", "/label/session")  # to strangers
ROOM = dataclasses.replace(serving_cases.ROOM, queue=500)


@dataclasses.dataclass(frozen=True)
class Person:
  """Somebody with cookies, and what they can name, by the field that names it."""

  cookies: dict[str, str]
  known: dict[str, list]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The URL of the whole application, and a person of each role."""
  pages = [lambda context: chat_page.router(context, patience=0.1), label_page.router]
  folder, moderator = tmp_path_factory.mktemp("site"), FakeModerator()
  with serving_cases.server(folder, room=ROOM, moderator=moderator, routers=pages) as at:
    store, found = at.context.store, {"stranger": Person({}, {})}
    tasks = store.add_all([to_rank(overlap=9, gold=(0, 1, 2, 3)), to_write(overlap=9)])
    for role in ("labeler", "researcher"):
      _, token = people.add_labeler(store, role, role, author="lab")
      with Visitor(at.url) as visitor:
        visitor.post("/label/session", json={"token": token}).raise_for_status()
        for work in ("compare", "demonstrate"):
          visitor.post("/label/tasks/next", json={"work": work}).raise_for_status()
        known = {"task": tasks, "token": [token], **things_of(visitor, role, at)}
        found[role] = Person(dict(visitor.cookies), known)
    yield at.url, found
    assert httpx.get(f"{at.url}/health").status_code == 200


def things_of(visitor, role, at):
  """Values by the fields that hold them: of a conversation with two answers and a warning, too."""
  message, answer = visitor.talk("a fight", sampling={"seed": 1})
  again = visitor.post(f"/chat/messages/{message['id']}/answers", json={"sampling": {"seed": 2}})
  other = visitor.read(again.json()["answers"][0]["id"])[1]["message"]
  conversation = at.context.store.get(message["id"]).conversation
  said, records = {"role": "user", "content": "the cat?"}, [f"{role}-{i}" for i in range(5)]
  return {
    "{id}": [message["id"], answer["id"], message["verdict"]["id"], conversation],
    "conversation": [conversation],
    "parent": [answer["id"], None],
    "first": [answer["id"]],
    "second": [other["id"]],
    "category": ["violence", "hate"],
    "suggested_by": [at.context.policy],
    "model": [at.context.engine.model],
    "messages": [[said]],
    "prompt": ["the cat"],
    "judgments": [[{"rank": 0}] * 4],
    "turns": [[said], [said, {"role": "assistant", "content": "the mat"}]],
    "submission": records,
    "record": records,
    "lines": ["{}", '{"prompt": "Hi!"}'],
  }


def ask_for_everything(url, person, count):
  """`count` well-formed and as many malformed requests to each route; the statuses by route."""
  statuses = collections.defaultdict(set)

  def ask(case, draw):
    for values, mark in ((case.path_parameters, "{id}"), (case.body, "id")):
      for name in sorted(values) if isinstance(values, dict) else ():
        there = person.known.get(mark if name == "id" else name)
        if there and draw(st.integers(0, 3)):
          values[name] = draw(st.sampled_from(there))
    answer = case.call(headers=HEADERS, cookies=person.cookies, timeout=60)
    assert answer.status_code != 500, (case, answer.text)
    case.validate_response(answer, checks=AS_DECLARED)
    statuses[case.operation.label].add(answer.status_code)

  schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
  operations = [found.ok() for found in schema.get_all_operations()]
  for operation in sorted(operations, key=lambda one: one.label in LAST):
    for mode in GenerationMode:
      with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be malformed
        ask_often(ask, operation.as_strategy(mode), count)
  return statuses


def ask_often(ask, cases, count):
  """The same requests in every run."""

  @hypothesis.given(case=cases, data=st.data())
  @hypothesis.settings(
    max_examples=count,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  def check(case, data):
    ask(case, data.draw)

  check()


def test_the_schema_tells_every_errors_shape_and_what_streams(site):
  described = httpx.get(f"{site[0]}/openapi.json").json()
  routes = {(m, p): one for p, methods in described["paths"].items() for m, one in methods.items()}
  for route, one in routes.items():
    own = {"200", "503"} if route[1] == "/health" else {"200"}
    errors = {k: v for k, v in one["responses"].items() if k not in own}
    assert {"403", "413", "500"} <= set(errors), route
    assert all("Error" in str(v["content"]["application/json"]) for v in errors.values()), route
  kinds = lambda method, path: set(routes[method, path]["responses"]["200"]["content"])
  assert kinds("get", "/chat/answers/{id}") == {"text/event-stream"}
  assert kinds("post", "/v1/chat/completions") == {"application/json", "text/event-stream"}
  assert kinds("get", "/label/tasks/export") == {"application/x-ndjson"}
  assert kinds("get", "/metrics") == {"text/plain"}


def test_no_request_of_who_is_signed_in_breaks_anything_and_every_response_is_declared(site):
  url, people_there = site
  found = [ask_for_everything(url, people_there[role], 10) for role in ("labeler", "researcher")]
  routes = found[0] | found[1]
  never = [label for label in routes if not any(200 in statuses[label] for statuses in found)]
  assert len(routes) > 30
  assert len(never) <= 3, f"hardly anything was asked of {never}; tell `things_of` what they need."


def test_no_request_of_a_stranger_breaks_anything_or_gets_in(site):
  statuses = ask_for_everything(site[0], site[1]["stranger"], 4)
  inside = {k: v for k, v in statuses.items() if not k.partition(" ")[2].startswith(OPEN)}
  assert len(inside) > 20 and all(found <= {401, 413, 422} for found in inside.values()), inside
