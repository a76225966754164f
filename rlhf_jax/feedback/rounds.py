"""A round's comparisons by people: tasks go into the store, rankings come out of it.

What is filed twice is there once, what is noted twice is noted once, and nothing else is kept about
how far a round has come; so whoever asks may be killed at any point and simply begin again.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import sqlalchemy as sa

from rlhf_jax.config import Positive, PositiveInt
from rlhf_jax.data import records as data
from rlhf_jax.feedback import lineage, people, schema, shapes, training
from rlhf_jax.feedback.labels import Comparison, Overlap, Task
from rlhf_jax.feedback.store import CHUNK, Store
from rlhf_jax.feedback.training import Stored

AUTHOR = "rlhf_jax"  # of what a run writes into the store by itself
T = TypeVar("T")
Stage = Literal["sft", "reward", "ppo", "moderation"]


@dataclasses.dataclass(frozen=True)
class StoreConfig:
  """How a run asks people; all of it may change while a run is under way."""

  url: str  # a file, or postgresql://USER@HOST/NAME
  overlap: Overlap  # how many different people rank the same answers
  wait: Literal["wait", "take"]  # until all is ranked, or take what is there
  earlier: bool  # train on rankings that no reward model has seen, those of the chat included
  fewest: PositiveInt  # rankings to train on; a round with less does not go on
  poll_seconds: Positive  # between two looks into the store
  timeout_hours: Positive | None  # then a round goes on with what is there; None: never


@dataclasses.dataclass(frozen=True)
class Standing:
  """How far people have come with some tasks."""

  rankings: int
  wanted: int
  open: int  # tasks that somebody may still rank
  at_work: int  # people who hold one of them just now


def file(store: Store, tasks: Sequence[Task]) -> None:
  """Puts tasks into the queue, some at a time; those that are there already stay as they are.

  One transaction for all would keep everybody else from writing for as long as thousands take.
  """
  for some in _chunks(tasks):
    store.add_all(some)


def standing(store: Store, tasks: Sequence[str]) -> Standing:
  """How far people have come with these tasks.

  A task is over when it has its rankings, and when it was skipped and nobody is left who has
  neither done nor skipped it: a question that makes no sense holds up no run.
  """
  slots, skips, head = schema.slots.c, schema.skips.c, schema.records
  ended, wanted, holding = collections.defaultdict(set), 0, set()
  open_slots: collections.Counter[str] = collections.Counter()
  skipped: set[str] = set()
  with store.reading() as connection:
    known = list(connection.scalars(sa.select(schema.labelers.c.id)))
    active = {id for id in known if people.is_active(connection, id)}
    for some in _chunks(tasks):
      rows = sa.select(slots.task, slots.labeler, slots.record, slots.lease_until)
      for task, labeler, record, until in connection.execute(rows.where(slots.task.in_(some))):
        wanted += 1
        if record is not None:
          ended[task].add(labeler)
          continue
        open_slots[task] += 1
        if labeler is not None and until >= shapes.now():
          holding.add(labeler)
      left = sa.select(skips.task, head.c.author).join(head, head.c.id == skips.id)
      for task, labeler in connection.execute(left.where(skips.task.in_(some))):
        ended[task].add(labeler)
        skipped.add(task)
  over = {task for task in open_slots if task in skipped and not active - ended[task]}
  return Standing(
    rankings=wanted - open_slots.total(),
    wanted=wanted,
    open=len(open_slots) - len(over),
    at_work=len(holding),
  )


def of_tasks(store: Store, tasks: Iterable[str]) -> list[Stored[data.Comparison]]:
  """The rankings of these tasks, in the tasks' order and then that of their coming."""
  place = {task: i for i, task in enumerate(tasks)}
  found = [record for record in store.records(Comparison) if record.task in place]
  return [_stored(record) for record in sorted(found, key=lambda record: place[record.task])]


def elsewhere(
  store: Store, tasks: Iterable[str], known: Iterable[str]
) -> list[Stored[data.Comparison]]:
  """Rankings that no reward model has seen: not of these tasks, nor among the ids in `known`."""
  tasks, known = set(tasks), set(known) | training.used_ids(store, "reward")
  return [
    _stored(record)
    for record in store.records(Comparison)
    if record.id not in known and record.task not in tasks
  ]


def mark(store: Store, policy: str, records: Sequence[str], stage: Stage) -> None:
  """Notes that these records trained a policy; what is noted already is not noted again."""
  noted = {use.record for use in lineage.uses(store, policy=policy) if use.stage == stage}
  fresh = [id for id in dict.fromkeys(records) if id not in noted]
  for some in _chunks(fresh, shapes.MAX_ITEMS):
    lineage.mark_used(store, policy, some, stage, author=AUTHOR)


def _stored(record: Comparison) -> Stored[data.Comparison]:
  """A ranking as training data that says which record it is."""
  item = training.comparison_of(record)
  return Stored(record.id, dataclasses.replace(item, source=f"{item.source}/{record.id}"))


def _chunks(items: Sequence[T], size: int = CHUNK) -> Iterable[Sequence[T]]:
  return (items[start : start + size] for start in range(0, len(items), size))
