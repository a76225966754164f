"""What the chat page is shown of the records: conversations, messages, what was said of them."""

from typing import Any

import sqlalchemy as sa
from fastapi import HTTPException

from rlhf_jax.feedback import conversations, rows, schema
from rlhf_jax.feedback.base import Record
from rlhf_jax.feedback.records import ChatMessage, Feedback, Verdict, VerdictReport
from rlhf_jax.feedback.store import RecordType, Store
from rlhf_jax.serving import chat_filter
from rlhf_jax.types import UserError

TITLE = 80  # characters
CHUNK = 500  # ids in one statement


def own(store: Store, id: str, kind: type[RecordType], person: str) -> RecordType:
  """A person's record.

  Raises:
    HTTPException: 404, there is none of this kind or it is another's; which of both is not said.
  """
  try:
    record: Record = store.get(id)
  except UserError:
    record = None
  if not isinstance(record, kind) or record.author != person:
    raise HTTPException(404, f"you have no {kind.kind.replace('_', ' ')} with this id.")
  return record


def require_own_conversation(store: Store, id: str, person: str) -> None:
  """Raises HTTPException 404 where a conversation holds another's messages."""
  if any(message.author != person for message in store.records(ChatMessage, conversation=id)):
    raise HTTPException(404, "you have no conversation with this id.")


def listing(store: Store, person: str) -> list[dict[str, Any]]:
  """A person's conversations with their titles, the one with the newest message first."""
  nodes, head = schema.messages, schema.records
  source = nodes.join(head, head.c.id == nodes.c.id)
  theirs = sa.and_(head.c.author == person, nodes.c.role == "user")
  first = sa.select(sa.func.min(head.c.serial)).select_from(source).where(theirs)
  first = first.group_by(nodes.c.conversation)
  query = (
    sa.select(nodes.c.conversation, sa.func.substr(nodes.c.content, 1, TITLE), head.c.created_at)
    .select_from(source)
    .where(head.c.serial.in_(first))
  )
  with store.reading() as connection:
    found = {row[0]: row for row in connection.execute(query)}
  order = [id for id in conversations.of_person(store, person) if id in found]
  return [
    {"id": id, "title": " ".join(found[id][1].split()), "created_at": found[id][2]} for id in order
  ]


def conversation(store: Store, id: str, person: str) -> list[dict[str, Any]]:
  """All messages of a conversation, in the order of their coming; none where it is another's."""
  nodes, head = schema.messages, schema.records
  with store.reading() as connection:
    mine = (nodes.c.conversation == id, head.c.author == person)
    messages = rows.select(connection, "message", *mine)
    ids = [message.id for message in messages]
    about = lambda kind, column, keys: _select(connection, kind, column, keys, person)
    verdicts = about("verdict", schema.verdicts.c.message, ids)
    verdicts += about("verdict", schema.verdicts.c.id, list(map(chat_filter.withheld_id, ids)))
    feedback = about("feedback", schema.feedback.c.message, ids)
    harm = about("harm_report", schema.harm_reports.c.message, ids)
    keys = [verdict.id for verdict in verdicts]
    reports = about("verdict_report", schema.verdict_reports.c.verdict, keys)
  by_message = {v.message or v.id: v for v in verdicts}
  views = []
  for message in messages:
    verdict = by_message.get(message.id) or by_message.get(chat_filter.withheld_id(message.id))
    view = of_message(message, verdict)
    said = [f for f in feedback if f.message == message.id]  # the last one stands
    view["feedback"] = of_feedback(said[-1]) if said else None
    view["harm_reported"] = any(h.message == message.id for h in harm)
    if verdict:
      its = [r for r in reports if r.verdict == verdict.id]
      view["verdict"]["reports"] = [of_report(r) for r in its]
    views.append(view)
  return views


def of_message(message: ChatMessage, verdict: Verdict | None) -> dict[str, Any]:
  """A message as the page knows it, without what was said of it later."""
  return {
    "id": message.id,
    "parent": message.parent,
    "role": message.role,
    "text": message.content,
    "stopped": message.stopped,
    "finish_reason": message.sampling.get("finish_reason"),
    "seed": None if message.seed is None else str(message.seed),  # a browser has 53 bits
    "created_at": message.created_at,
    "running": False,
    "withheld": verdict is not None and verdict.id == chat_filter.withheld_id(message.id),
    "verdict": verdict and of_verdict(verdict),
    "feedback": None,
    "harm_reported": False,
  }


def of_running(id: str, parent: ChatMessage) -> dict[str, Any]:
  """An answer on its way; its text comes as a stream."""
  answer = ChatMessage(
    author=parent.author,
    id=id,
    conversation=parent.conversation,
    parent=parent.id,
    role="assistant",
    content="",
  )
  return of_message(answer, None) | {"running": True}


def of_verdict(verdict: Verdict) -> dict[str, Any]:
  """What the filter said; `flagged` are the categories it warns of."""
  return {
    "id": verdict.id,
    "action": verdict.action,
    "flagged": [score.category for score in verdict.scores if score.is_flagged],
    "categories": [score.category for score in verdict.scores],
    "reports": [],
  }


def of_feedback(feedback: Feedback) -> dict[str, Any]:
  """A thumb and what came with it."""
  names = ("id", "thumb", "tags", "text", "ideal")
  return {name: getattr(feedback, name) for name in names}


def of_report(report: VerdictReport) -> dict[str, Any]:
  """A mistake of the filter that was reported."""
  return {"id": report.id, "mistake": report.mistake, "category": report.category}


def _select(connection: sa.Connection, kind: str, column, keys: list[str], person: str) -> list:
  found = []
  for start in range(0, len(keys), CHUNK):
    among = column.in_(keys[start : start + CHUNK])
    found += rows.select(connection, kind, among, schema.records.c.author == person)
  return found
