"""What the store holds for training, each item with the id of the record that it comes from.

Withdrawn records are never here, and of a corrected one only the correction. Pass the ids of what
trained a policy to `lineage.mark_used`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

import sqlalchemy as sa

from rlhf_jax.data import records as data
from rlhf_jax.feedback import conversations, schema
from rlhf_jax.feedback.labels import Comparison, Demonstration
from rlhf_jax.feedback.records import ChatMessage, Feedback, HarmReport, Verdict, VerdictReport
from rlhf_jax.feedback.store import Store

ItemType = TypeVar("ItemType")


@dataclasses.dataclass(frozen=True)
class Stored(Generic[ItemType]):
  """An item of training data, and the record that it is made of."""

  id: str
  item: ItemType


@dataclasses.dataclass(frozen=True)
class ModerationLabel:
  """What people said of a text, by category; of the other categories nothing is known."""

  text: str
  direction: str  # "input" or "output"
  labels: dict[str, bool]


def demonstrations(
  store: Store, *, unused_in: str | None = None, ideal_answers: bool = True
) -> list[Stored[data.Demonstration]]:
  """The dialogues that labelers wrote, and the ideal answers that people gave in the chat.

  Args:
    unused_in: leave out what a `Use` of this stage ("sft") names already.
    ideal_answers: whether to take those of the chat.
  """
  used = used_ids(store, unused_in)
  found = [
    Stored(record.id, data.Demonstration(record.conversation, f"feedback/{record.source}"))
    for record in store.records(Demonstration)
  ]
  given = [r for r in store.records(Feedback) if r.ideal is not None] if ideal_answers else []
  for record in given:
    dialogue = conversations.conversation(store, record.message)
    dialogue = dialogue.prompt_before(len(dialogue.messages) - 1).with_reply(record.ideal)
    found.append(Stored(record.id, data.Demonstration(dialogue, "feedback/ideal")))
  return [stored for stored in found if stored.id not in used]


def comparisons(store: Store, *, unused_in: str | None = None) -> list[Stored[data.Comparison]]:
  """All rankings, by labelers and in the chat; `unused_in` as for `demonstrations`."""
  used = used_ids(store, unused_in)
  return [
    Stored(record.id, comparison_of(record))
    for record in store.records(Comparison)
    if record.id not in used
  ]


def comparison_of(record: Comparison) -> data.Comparison:
  """A stored ranking as training data."""
  return data.Comparison(
    conversation=record.conversation,
    responses=tuple(answer.text for answer in record.answers),
    ranks=tuple(answer.rank for answer in record.answers),
    authors=tuple(answer.writer for answer in record.answers),
    labeler=record.author,
    source=f"feedback/{record.source}",
  )


def moderation_labels(
  store: Store, *, unused_in: str | None = None
) -> list[Stored[ModerationLabel]]:
  """Where people corrected the filter, or reported harm in a category.

  A false positive says that the category does not hold, a false negative that it does. `unused_in`
  as for `demonstrations`.
  """
  used = used_ids(store, unused_in)
  messages = {message.id: message for message in store.records(ChatMessage, superseded=True)}
  verdicts = {verdict.id: verdict for verdict in store.records(Verdict, superseded=True)}
  found = []
  for report in store.records(VerdictReport):
    verdict = verdicts[report.verdict]
    text = verdict.text if verdict.message is None else messages[verdict.message].content
    labels = {report.category: report.mistake == "false_negative"}
    found.append(Stored(report.id, ModerationLabel(text, verdict.direction, labels)))
  for report in store.records(HarmReport):
    if report.category is not None:
      message = messages[report.message]
      direction = "output" if message.role == "assistant" else "input"
      label = ModerationLabel(message.content, direction, {report.category: True})
      found.append(Stored(report.id, label))
  return [stored for stored in found if stored.id not in used]


def used_ids(store: Store, stage: str | None) -> set[str]:
  """The records that trained some policy in this stage; none of them where `stage` is None."""
  if stage is None:
    return set()
  uses, used = schema.uses, schema.used_records
  query = sa.select(used.c.record).join(uses, uses.c.id == used.c.owner)
  with store.reading() as connection:
    return set(connection.scalars(query.where(uses.c.stage == stage)))


def ids_of(stored: Sequence[Stored]) -> list[str]:
  """The records that these items come from."""
  return [item.id for item in stored]
