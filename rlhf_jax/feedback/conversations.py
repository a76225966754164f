"""Conversations as trees of messages: every edit and every regeneration stays, beside the first."""

from typing import Literal

import sqlalchemy as sa

from rlhf_jax.feedback import rows, schema
from rlhf_jax.feedback.labels import Answer, Comparison
from rlhf_jax.feedback.records import ChatMessage, Policy
from rlhf_jax.feedback.store import Store, insert, require
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

RANKS = {"first": (0, 1), "second": (1, 0), "tie": (0, 0)}


def branch(store: Store, message: str) -> list[ChatMessage]:
  """The messages from the root of a conversation down to this one.

  Raises:
    UserError: there is no such message, or it was withdrawn.
  """
  with store.reading() as connection:
    return branch_in(connection, message)


def branch_in(connection: sa.Connection, message: str) -> list[ChatMessage]:
  """As `branch`, inside a transaction."""
  require(connection, message, ChatMessage)
  nodes = schema.messages
  columns = (nodes.c.id, nodes.c.parent)
  walk = sa.select(*columns).where(nodes.c.id == message).cte("walk", recursive=True)
  walk = walk.union_all(sa.select(*columns).join(walk, nodes.c.id == walk.c.parent))
  # A parent is stored before its children, so the order of coming is the order of the branch.
  return rows.select(connection, "message", nodes.c.id.in_(sa.select(walk.c.id)))


def conversation(store: Store, message: str) -> Conversation:
  """What was said up to and including this message."""
  return _said(branch(store, message))


def of_person(store: Store, author: str) -> list[str]:
  """A person's conversations, the one with the newest message first."""
  nodes, head = schema.messages, schema.records
  query = (
    sa.select(nodes.c.conversation)
    .join(head, head.c.id == nodes.c.id)
    .where(head.c.author == author)
    .group_by(nodes.c.conversation)
    .order_by(sa.func.max(head.c.serial).desc())
  )
  with store.reading() as connection:
    return list(connection.scalars(query))


def prefer(
  store: Store,
  first: str,
  second: str,
  choice: Literal["first", "second", "tie"],
  *,
  author: str,
  seconds: float | None = None,
  submission: str | None = None,
) -> str:
  """Stores which of two answers in the chat a person prefers, as a comparison with source "chat".

  `first` and `second` are messages of the assistant under one parent, as they were shown.
  `submission` is the id of the record, so that a repeated request stores one.

  Raises:
    UserError: they are not two answers to one message, or there is no such choice.
  """
  if choice not in RANKS:
    raise UserError(f"the choice is first, second or tie, got {choice!r:.80}.")

  def work(connection: sa.Connection) -> str:
    nodes = [require(connection, id, ChatMessage) for id in (first, second)]
    if first == second or nodes[0].parent is None or nodes[0].parent != nodes[1].parent:
      raise UserError(f"{first} and {second} are not two answers to one message.")
    if any(node.role != "assistant" for node in nodes):
      raise UserError(f"{first} and {second} must both be the assistant's.")
    record = Comparison(
      author=author,
      conversation=_said(branch_in(connection, nodes[0].parent)),
      answers=tuple(_answer(connection, n, rank) for n, rank in zip(nodes, RANKS[choice])),
      presented=(0, 1),
      seconds=seconds,
      source="chat",
      message=nodes[0].parent,
      **({"id": submission} if submission else {}),
    )
    return insert(connection, record)

  return store.transact(work)


def _answer(connection: sa.Connection, node: ChatMessage, rank: int) -> Answer:
  """A person's own answer is theirs; one by a policy bears its name."""
  writer = require(connection, node.policy, Policy).name if node.policy else node.author
  return Answer(
    text=node.content,
    writer=writer,
    rank=rank,
    policy=node.policy,
    sampling=node.sampling,
    seed=node.seed,
  )


def _said(messages: list[ChatMessage]) -> Conversation:
  return Conversation.of(*((message.role, message.content) for message in messages))
