"""Scripted people: they sign in to the labeling page and rank what it shows them, as labelers do.

All that they know of a task is in the page's JSON: the conversation, and the answers in the order
in which this labeler sees them.
"""

import secrets
import threading
import time

import httpx

from rlhf_jax.feedback import people
from rlhf_jax.feedback.records import Labeler
from rlhf_jax.feedback.store import Store
from rlhf_jax.labelers import simulated
from rlhf_jax.text.messages import Conversation

POLL = 1.0  # seconds between two looks of somebody who has nothing to do


def tokens(url: str, count: int) -> list[str]:
  """Makes the store, and gives each of so many people a token."""
  with Store.open(url, create=True) as store:
    known = {labeler.name: labeler.id for labeler in store.records(Labeler)}
    issued = []
    for name in (f"person-{i}" for i in range(count)):
      if name in known:
        issued.append(people.new_token(store, known[name]))
      else:
        issued.append(people.add_labeler(store, name, "labeler", author="study")[1])
  return issued


def rank(url: str, token: str, labeler: simulated.SimulatedLabeler, over: threading.Event) -> None:
  """Somebody who signs in and ranks whatever they are given until it is over."""
  with httpx.Client(base_url=url, headers={"origin": url}, timeout=None) as page:
    post(page, "session", token=token)
    while not over.is_set():
      given = post(page, "tasks/next", work="compare")["assignment"]
      if given is None:
        over.wait(POLL)
        continue
      began = time.perf_counter()
      ranks = labeler.rank(
        Conversation.from_json(given["messages"]), [answer["text"] for answer in given["answers"]]
      )
      places = [answer["place"] for answer in given["answers"]]
      judgments = [{"rank": rank} for _, rank in sorted(zip(places, ranks))]
      seconds = time.perf_counter() - began
      body = {"submission": secrets.token_hex(16), "judgments": judgments, "seconds": seconds}
      post(page, f"tasks/{given['task']}/comparison", **body)


def post(page: httpx.Client, path: str, **body) -> dict:
  """What the page's server answers; asks again, as browsers do, where it has just hung up.

  Nothing is done twice by that: a ranking that comes again is the same record.
  """
  try:
    answer = page.post(f"/label/{path}", json=body)
  except (httpx.RemoteProtocolError, httpx.NetworkError):  # it was closed as it was used again
    answer = page.post(f"/label/{path}", json=body)
  if answer.status_code != 200:
    raise RuntimeError(f"POST /label/{path}: {answer.status_code} {answer.text}")
  return answer.json()
