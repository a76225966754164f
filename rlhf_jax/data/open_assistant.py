"""OpenAssistant Conversations: message trees in which volunteers ranked sibling replies.

Köpf et al. 2023. Two forms are read, one JSON object a line:

  {"message_tree_id": ..., "prompt": {"role": "prompter", "text": ..., "replies": [...]}}
  {"messages": [{"role", "content"}, ...], "replies_best_first": [...]}

The first is the project's own export (`..._ready.trees.jsonl.gz`). Siblings with ranks yield a
`Comparison` of K answers. A `Demonstration` follows the best-ranked reply to each prompt and every
further question to it; replies that lost a ranking demonstrate nothing. The second is a list of
rankings alone. Reading both forms of the same data would count the comparisons twice.
"""

import collections.abc
from typing import Any

import tensorflow_datasets as tfds

from rlhf_jax.data import builders
from rlhf_jax.data.records import Comparison, Demonstration, Record
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

LABELER = "open-assistant volunteers"  # their votes, merged by ranked pairs
_ROLES = {"prompter": "user", "assistant": "assistant"}
_UNRANKED = 10**9


class OpenAssistant(builders.RecordBuilder, skip_registration=True):
  """K-way comparisons and, from message trees, demonstrations."""

  VERSION = tfds.core.Version("1.0.0")
  OBTAIN = (
    "Get 2023-04-12_oasst_ready.trees.jsonl.gz from the data set OpenAssistant/oasst1 on "
    "huggingface.co; see docs/data.md."
  )

  @classmethod
  def parse(
    cls, item: Any, source: str, config: builders.FilesConfig
  ) -> collections.abc.Iterator[Record]:
    if isinstance(item, dict) and "replies_best_first" in item:
      return parse_ranking(item, source)
    return parse_tree(item, source)


def parse_ranking(item: Any, source: str) -> collections.abc.Iterator[Record]:
  """The `Comparison` in a list of replies, best first."""
  replies = item["replies_best_first"]
  if "messages" not in item or not isinstance(replies, list):
    raise UserError(f"a ranking must have lists 'messages' and 'replies_best_first': {item!r:.200}")
  yield Comparison(
    conversation=Conversation.from_json(item["messages"]),
    responses=tuple(replies),
    ranks=tuple(range(len(replies))),
    authors=("volunteer",) * len(replies),
    labeler=LABELER,
    source=source,
  )


def parse_tree(item: Any, source: str) -> collections.abc.Iterator[Record]:
  """Comparisons and demonstrations of one message tree, depth first."""
  if not isinstance(item, dict) or not isinstance(item.get("prompt"), dict):
    raise UserError(f"a message tree must have an object 'prompt', got {item!r:.200}.")
  yield from _walk(item["prompt"], (), True, source)


def _walk(
  node: dict, before: tuple, demonstrates: bool, source: str
) -> collections.abc.Iterator[Record]:
  turns = (*before, (_role(node), _text(node)))
  replies = _replies(node)
  ranked = [reply for reply in replies if type(reply.get("rank")) is int]
  if len(ranked) >= 2 and turns[-1][0] == "user":
    ranked.sort(key=lambda reply: reply["rank"])
    yield Comparison(
      conversation=Conversation.of(*turns),
      responses=tuple(_text(reply) for reply in ranked),
      ranks=_dense(reply["rank"] for reply in ranked),
      authors=tuple(reply.get("model_name") or "volunteer" for reply in ranked),
      labeler=LABELER,
      source=source,
    )
  best = min(replies, key=_rank, default=None) if turns[-1][0] == "user" else None
  for reply in replies:
    yield from _walk(reply, turns, demonstrates and (best is None or reply is best), source)
  if demonstrates and turns[-1][0] == "assistant" and not any(map(_replies, replies)):
    yield Demonstration(Conversation.of(*turns), source)


def _rank(reply: dict) -> int:
  return reply["rank"] if type(reply.get("rank")) is int else _UNRANKED


def _dense(ranks: collections.abc.Iterable[int]) -> tuple[int, ...]:
  """Ranks from 0 without gaps, which deleted replies leave behind."""
  ranks = tuple(ranks)
  order = sorted(set(ranks))
  return tuple(order.index(rank) for rank in ranks)


def _role(node: dict) -> str:
  if node.get("role") not in _ROLES:
    raise UserError(f"role {node.get('role')!r} of a tree is not one of {', '.join(_ROLES)}.")
  return _ROLES[node["role"]]


def _text(node: dict) -> str:
  if not isinstance(node.get("text"), str):
    raise UserError(f"a message of a tree must have a text, got {node!r:.200}.")
  return node["text"]


def _replies(node: dict) -> list[dict]:
  """The replies that were not deleted."""
  replies = node.get("replies", [])
  if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
    raise UserError(f"replies of a message must be a list of objects, got {replies!r:.200}.")
  return [reply for reply in replies if not reply.get("deleted", False)]
