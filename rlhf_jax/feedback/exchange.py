"""Records as JSONL: the whole store out and in, what trains models out, tasks in.

The forms are in docs/feedback.md.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import sqlalchemy as sa

from rlhf_jax.data import files, moderation
from rlhf_jax.data import records as data
from rlhf_jax.feedback import rows, schema, tasks, withdrawal
from rlhf_jax.feedback.base import Record
from rlhf_jax.feedback.labels import Comparison, Demonstration, Task
from rlhf_jax.feedback.records import KINDS, Withdrawal, from_json
from rlhf_jax.feedback.store import Store, insert
from rlhf_jax.feedback.training import ModerationLabel, Stored
from rlhf_jax.training.files import write_text_atomic
from rlhf_jax.types import UserError

T = TypeVar("T")
TASK_KEYS = {"prompt", "messages", "responses", "authors", "gold"}  # and those of records.Task
TASK_KEYS |= {"instructions", "overlap", "priority"}


def dump(store: Store) -> list[Record]:
  """All records that are not withdrawn, each after those that it refers to.

  Withdrawals come first, so that who reads this withdraws too. Tokens, drafts and leases are left
  out.
  """
  head = schema.records.c
  with store.reading() as connection:
    place = {id: serial for id, serial in connection.execute(sa.select(head.id, head.serial))}
    found = [record for kind in KINDS for record in rows.select(connection, kind)]
  return sorted(found, key=lambda record: (record.kind != Withdrawal.kind, place[record.id]))


def load(store: Store, records: Iterable[Record]) -> dict[str, int]:
  """Stores what `dump` gave, ids and times included: all of it, or nothing.

  Records that are here already are left alone; those that a withdrawal names are withdrawn here,
  too. Returns how many of each kind were read.

  Raises:
    UserError: an id is taken by something else, or a record refers to one that is nowhere.
  """
  read: dict[str, int] = {}
  with store.writing(exclusive=True) as connection:
    for record in records:
      if isinstance(record, Withdrawal):
        _withdraw(connection, record)
      else:
        insert(connection, record)
      if isinstance(record, Comparison | Demonstration) and record.task and not record.supersedes:
        tasks.occupy(connection, record)
      read[record.kind] = read.get(record.kind, 0) + 1
  if Withdrawal.kind in read:
    withdrawal.empty_log(store.engine)
  return read


def write(path: str | pathlib.Path, items: Iterable[dict]) -> None:
  """Writes one JSON object a line; the file is whole or absent."""
  write_text_atomic(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def write_training(path: str | pathlib.Path, stored: Iterable[Stored]) -> None:
  """Writes demonstrations or comparisons in the form that the data source `jsonl` reads."""
  write(path, (data.to_json(one.item) for one in stored))


def write_reports(
  path: str | pathlib.Path, stored: Iterable[Stored[ModerationLabel]]
) -> list[Stored[ModerationLabel]]:
  """Writes what people said of the filter in the form of the moderation data source `reports`.

  Returns what was written: a moderator learns nothing from an empty text, nor from a category that
  is none of its own, which a person may name when they report harm.
  """
  known = set(moderation.CATEGORIES)
  kept = [s for s in stored if s.item.text.strip() and known.issuperset(s.item.labels)]
  labels = lambda item: {category: int(label) for category, label in item.labels.items()}
  examples = (
    moderation.ModerationExample(s.item.text, labels(s.item), f"feedback/{s.item.direction}")
    for s in kept
  )
  write_text_atomic(path, moderation.write_jsonl(examples))
  return kept


def read(path: str | pathlib.Path) -> list[Record]:
  """The records of a file that holds `record.to_json()` a line.

  Raises:
    UserError: the file cannot be read, or a line holds no record; names the line.
  """
  return list(_parsed(path, from_json))


def read_tasks(path: str | pathlib.Path, *, author: str) -> list[Task]:
  """Tasks from a file: with "responses" to compare, without to demonstrate.

  Raises:
    UserError: the file cannot be read, or a line is no task; names the line.
  """
  return list(_parsed(path, lambda item: task_from_json(item, author=author)))


def parse_tasks(text: str, *, author: str) -> list[Task]:
  """Tasks from the text of such a file.

  Raises:
    UserError: there is none, or a line is no task; names the line.
  """
  found = []
  for number, line in enumerate(text.split("\n"), start=1):
    if line.strip():
      try:
        found.append(task_from_json(json.loads(line), author=author))
      except UserError as error:
        raise UserError(f"line {number}: {error} Nothing was stored.") from error
      except (ValueError, RecursionError) as error:
        raise UserError(f"line {number} is no JSON: {error}. Nothing was stored.") from error
  if not found:
    raise UserError("there is no task in it; give one JSON object a line.")
  return found


def read_objects(path: str | pathlib.Path) -> list[dict]:
  """The JSON objects of a file.

  Raises:
    UserError: the file cannot be read, or a line is no object; names the line.
  """

  def parse(item: Any) -> dict:
    if not isinstance(item, dict):
      raise UserError(f"expected a JSON object, got {type(item).__name__}.")
    return item

  return list(_parsed(path, parse))


def task_from_json(item: Any, *, author: str) -> Task:
  """One line of a file of tasks."""
  if not isinstance(item, dict):
    raise UserError(f"a task must be a JSON object, got {type(item).__name__}.")
  unknown = sorted(set(item) - TASK_KEYS)
  if unknown or {"prompt", "messages"} <= set(item):
    raise UserError(
      f"a task has the keys {', '.join(sorted(TASK_KEYS))}, and not both prompt and messages; "
      f"unknown {unknown}."
    )
  fields = {
    key: item[key] for key in ("instructions", "overlap", "priority", "gold") if key in item
  }
  if "prompt" in item:
    fields["conversation"] = [{"role": "user", "content": item["prompt"]}]
  elif "messages" in item:
    fields["conversation"] = item["messages"]
  if "responses" not in item:
    return Task(author=author, work="demonstrate", **fields)
  texts = item["responses"] if isinstance(item["responses"], list) else []
  writers = item.get("authors", ["unknown"] * len(texts))
  if not isinstance(writers, list) or len(writers) != len(texts):
    raise UserError(f"{len(texts)} responses need a list of as many authors, got {writers!r:.80}.")
  fields["answers"] = [{"text": text, "writer": writer} for text, writer in zip(texts, writers)]
  return Task(author=author, work="compare", **fields)


def task_to_json(task: Task) -> dict:
  """One line of a file of tasks; `task_from_json` is the inverse but for ids and sampling."""
  item = {"instructions": task.instructions, "overlap": task.overlap, "priority": task.priority}
  if task.conversation is not None:
    item["messages"] = task.conversation.to_json()
  if task.work == "compare":
    item["responses"] = [answer.text for answer in task.answers]
    item["authors"] = [answer.writer for answer in task.answers]
    if task.gold is not None:
      item["gold"] = list(task.gold)
  return item


def _parsed(path: str | pathlib.Path, parse: Callable[[Any], T]) -> Iterator[T]:
  files.require([str(path)], "Give a file of JSON, one object a line.")
  for where, item in files.items(str(path)):
    try:
      yield parse(item())
    except UserError as error:
      raise UserError(f"{where}: {error} Nothing was stored.") from error


def _withdraw(connection: sa.Connection, record: Withdrawal) -> None:
  """Of a record that was never here only the tombstone is written."""
  for stone in record.tombstones:
    if rows.find(connection, stone.record) is None:
      head = {"id": stone.record, "kind": stone.of, "created_at": stone.was_created_at}
      connection.execute(sa.insert(schema.records).values(head))
  insert(connection, record)
  withdrawal.bury(connection, record)
