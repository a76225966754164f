"""What the labeling page is shown, as JSON; never who wrote an answer or what gold ranks say."""

import collections
import dataclasses
import hashlib
import math
import statistics
from typing import Any

import sqlalchemy as sa

from rlhf_jax.feedback import agreement, people, schema, tasks
from rlhf_jax.feedback.agreement import Share
from rlhf_jax.feedback.labels import Comparison, Demonstration, Skip, Task
from rlhf_jax.feedback.records import Labeler
from rlhf_jax.feedback.store import Store
from rlhf_jax.feedback.tasks import Assignment

OWN = (Comparison, Demonstration, Skip)
RECENT = 50  # records in a labeler's list


def order(task: Task, labeler: str) -> tuple[int, ...]:
  """order[i]: the answer that this labeler sees i-th, by its place in the task.

  A hash decides, so that a page loaded again shows the same order and each labeler another one.
  """
  draw = lambda i: hashlib.sha256(f"{labeler}\n{task.id}\n{i}".encode()).digest()
  return tuple(sorted(range(len(task.answers)), key=draw))


def assignment(found: Assignment, labeler: str) -> dict[str, Any]:
  """A task in a labeler's hands; answers stand in the order in which they are shown."""
  task = found.task
  return {
    "task": task.id,
    "work": task.work,
    "instructions": task.instructions,
    "messages": task.conversation.to_json() if task.conversation else [],
    "answers": [{"place": i, "text": task.answers[i].text} for i in order(task, labeler)],
    "lease_until": found.lease_until,
    "draft": found.draft,
  }


def progress(store: Store, labeler: str) -> dict[str, Any]:
  """What this labeler has done, and how far all have come."""
  head, slots = schema.records.c, schema.slots.c
  query = (
    sa.select(head.kind, sa.func.count())
    .where(head.author == labeler, head.kind.in_([cls.kind for cls in OWN]))
    .group_by(head.kind)
  )
  held = sa.select(slots.work).where(slots.labeler == labeler, slots.record.is_(None))
  with store.reading() as connection:
    mine = {cls.kind: 0 for cls in OWN} | dict(map(tuple, connection.execute(query)))
    open_ = list(connection.scalars(held))
  every = {work: dataclasses.asdict(p) for work, p in tasks.progress(store).items()}
  return {"mine": mine, "open": open_, "all": every}


def own_records(store: Store, labeler: str) -> list[dict[str, Any]]:
  """A labeler's newest records."""
  head = schema.records.c
  query = (
    sa.select(head.id, head.kind, head.created_at)
    .where(head.author == labeler, head.kind.in_([cls.kind for cls in OWN]))
    .order_by(head.serial.desc())
    .limit(RECENT)
  )
  with store.reading() as connection:
    return [dict(row) for row in connection.execute(query).mappings()]


def own_record(store: Store, labeler: str, id: str) -> dict[str, Any] | None:
  """One of a labeler's own records, without what they were not to see when they made it."""
  for cls in OWN:
    for record in store.records(cls, superseded=True, id=id, author=labeler):
      shown = record.to_json()
      hidden = ("writer", "policy", "sampling", "seed")
      for answer in shown.get("answers", ()):
        for name in hidden:
          del answer[name]
      return shown
  return None


def holds(store: Store, labeler: str, task: str) -> bool:
  """Whether a labeler has a place in a task."""
  slots = schema.slots.c
  with store.reading() as connection:
    query = sa.select(slots.task).where(slots.task == task, slots.labeler == labeler)
    return connection.execute(query).first() is not None


def dashboard(store: Store) -> dict[str, Any]:
  """Agreement and speed, of all and of each labeler."""
  report = agreement.report(store)
  demonstrations, skips = store.records(Demonstration), collections.Counter()
  skips.update(record.author for record in store.records(Skip))
  known = store.records(Labeler)
  with store.reading() as connection:
    active = {one.id for one in known if people.is_active(connection, one.id)}
  rows = []
  for one in known:
    theirs = report.labelers.get(one.id)
    written = [record for record in demonstrations if record.author == one.id]
    fractions = [
      turn.edit_fraction for r in written for turn in r.turns if turn.edit_fraction is not None
    ]
    rows.append(
      {
        "id": one.id,
        "name": one.name,
        "role": one.role,
        "active": one.id in active,
        "comparisons": theirs.comparisons if theirs else 0,
        "demonstrations": len(written),
        "skips": skips[one.id],
        "with_others": share(theirs.with_others) if theirs else share(Share(0, 0)),
        "with_gold": share(theirs.with_gold) if theirs else share(Share(0, 0)),
        "seconds_a_comparison": theirs.median_seconds if theirs else None,
        "seconds_a_demonstration": _median([r.seconds for r in written]),
        "edited": _median(fractions),  # of a suggestion, where one was taken
      }
    )
  return {
    "pairwise": share(report.pairwise),
    "decided": share(report.decided),
    "preference_alpha": _number(report.preference_alpha),
    "quality_alpha": _number(report.quality_alpha),
    "flag_alpha": {flag: _number(alpha) for flag, alpha in report.flag_alpha.items()},
    "labelers": rows,
    "all": {work: dataclasses.asdict(p) for work, p in tasks.progress(store).items()},
  }


def share(found: Share) -> dict[str, Any]:
  """A share as JSON, which has no nan."""
  return {"held": found.held, "of": found.of, "value": _number(found.value)}


def _number(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _median(values: list) -> float | None:
  there = [value for value in values if value is not None]
  return statistics.median(there) if there else None
