"""Which policies there are, and which people's records trained them."""

import dataclasses

import sqlalchemy as sa

from rlhf_jax.feedback import schema
from rlhf_jax.feedback.records import Policy, Use, UsedRecord
from rlhf_jax.feedback.shapes import Json
from rlhf_jax.feedback.store import Store


@dataclasses.dataclass(frozen=True)
class Trained:
  """One record's part in one policy."""

  record: str
  policy: str
  stage: str  # sft, reward, ppo or moderation
  withdrawn_at: str | None  # when the record was withdrawn, if it was


def register(store: Store, name: str, checkpoint: str, lineage: Json, *, author: str) -> str:
  """The id of this policy; the same name, checkpoint and lineage are the same policy."""
  record = Policy(author=author, name=name, checkpoint=checkpoint, lineage=lineage)
  for known in store.records(Policy, name=name):
    if (known.checkpoint, known.lineage) == (record.checkpoint, record.lineage):
      return known.id
  return store.add(record)


def mark_used(store: Store, policy: str, records: list[str], stage: str, *, author: str) -> str:
  """Notes that these records trained a policy; returns the id of the note.

  Raises:
    UserError: there is no such policy, stage or record, or the list is empty.
  """
  used = tuple(map(UsedRecord, records))
  return store.add(Use(author=author, policy=policy, stage=stage, records=used))


def uses(store: Store, *, policy: str | None = None, record: str | None = None) -> list[Trained]:
  """What trained this policy, or which policies this record trained; all there is by default.

  A record that was withdrawn since is still named, with the time of its withdrawal.
  """
  use, used, head = schema.uses, schema.used_records, schema.records
  withdrawal = head.alias("withdrawal")
  query = (
    sa.select(used.c.record, use.c.policy, use.c.stage, withdrawal.c.created_at)
    .join(use, use.c.id == used.c.owner)
    .join(head, head.c.id == used.c.record)
    .outerjoin(withdrawal, withdrawal.c.id == head.c.withdrawal)
    .order_by(head.c.serial)
  )
  if policy is not None:
    query = query.where(use.c.policy == policy)
  if record is not None:
    query = query.where(used.c.record == record)
  with store.reading() as connection:
    return [Trained(*row) for row in connection.execute(query)]
