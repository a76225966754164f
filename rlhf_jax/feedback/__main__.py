"""The database of people's records, from the command line.

  python -m rlhf_jax.feedback init --db=feedback.db
  python -m rlhf_jax.feedback add-labeler ann --db=feedback.db
  python -m rlhf_jax.feedback add-tasks tasks.jsonl --db=feedback.db
  python -m rlhf_jax.feedback export comparisons comparisons.jsonl --db=feedback.db

--db is a file, a sqlite:///FILE or a postgresql://USER@HOST/NAME; without it, the environment
variable RLHF_JAX_FEEDBACK says which. docs/feedback.md has the forms of the files.
"""

import argparse
import os
import sys

import rich.box
import rich.console
import rich.table

from rlhf_jax.feedback import (
  agreement,
  database,
  exchange,
  lineage,
  people,
  tasks,
  training,
  withdrawal,
)
from rlhf_jax.feedback.records import Labeler, Policy
from rlhf_jax.feedback.store import Store
from rlhf_jax.types import UserError

DATABASE = "RLHF_JAX_FEEDBACK"
TABLE_WIDTH = 120  # columns


def say(what) -> None:
  """Writes a line or a table to stdout; texts of people are no markup."""
  console = rich.console.Console(width=TABLE_WIDTH, markup=False, highlight=False, soft_wrap=True)
  console.print(what)


def table(title: str, columns: tuple[str, ...], rows) -> rich.table.Table:
  """A table whose first column is a name and whose others are numbers."""
  made = rich.table.Table(title=title, box=rich.box.SIMPLE)
  for i, name in enumerate(columns):
    made.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
  for row in rows:
    made.add_row(*map(str, row))
  return made


def init(args) -> None:
  with Store.open(args.db, create=True) as store:
    say(f"{database.name_of(store.engine)} stands at revision {database.revision(store.engine)}.")


def migrate(args) -> None:
  engine = database.engine_for(args.db)
  if not database.exists(engine):
    raise UserError(f"{database.name_of(engine)} does not exist; make it with init.")
  before = database.revision(engine)
  database.migrate(engine)
  say(f"from revision {before} to {database.revision(engine)}.")


def stats(args) -> None:
  with Store.open(args.db) as store:
    counts = [(kind, *count.values()) for kind, count in store.counts().items()]
    progress = [
      (work, p.tasks, p.slots, p.done, p.leased, p.skips)
      for work, p in tasks.progress(store).items()
    ]
    unused = [
      ("demonstrations for sft", len(training.demonstrations(store, unused_in="sft"))),
      ("comparisons for reward", len(training.comparisons(store, unused_in="reward"))),
    ]
  say(table("records", ("kind", "stored", "withdrawn"), counts))
  say(table("tasks", ("work", "tasks", "slots", "done", "leased", "skips"), progress))
  say(table("not yet used", ("records", "number"), unused))


def export(args) -> None:
  with Store.open(args.db) as store:
    if args.what == "all":
      records = exchange.dump(store)
      exchange.write(args.file, (record.to_json() for record in records))
      ids = [record.id for record in records]
    elif args.what == "moderation":
      stored = training.moderation_labels(store, unused_in=args.unused_in)
      ids = training.ids_of(exchange.write_reports(args.file, stored))
      if len(ids) < len(stored):
        say(f"{len(stored) - len(ids)} left out: an empty text, or no category of the moderator's.")
    else:
      take = {"demonstrations": training.demonstrations, "comparisons": training.comparisons}
      stored = take[args.what](store, unused_in=args.unused_in)
      exchange.write_training(args.file, stored)
      ids = training.ids_of(stored)
  if args.ids:
    exchange.write(args.ids, ({"record": id} for id in ids))
  say(f"{len(ids)} records in {args.file}.")


def import_(args) -> None:
  records = exchange.read(args.file)
  with Store.open(args.db) as store:
    read = exchange.load(store, records)
  say(table(f"read from {args.file}", ("kind", "records"), read.items()))


def add_tasks(args) -> None:
  new = exchange.read_tasks(args.file, author=args.by)
  with Store.open(args.db) as store:
    store.add_all(new)
  say(f"{len(new)} tasks added, {sum(task.overlap for task in new)} slots.")


def add_labeler(args) -> None:
  with Store.open(args.db) as store:
    labeler, token = people.add_labeler(store, args.name, args.role, author=args.by)
  say(f"{labeler.role} {labeler.name} has the id {labeler.id}.\ntoken, shown only now: {token}")


def new_token(args) -> None:
  with Store.open(args.db) as store:
    token = people.new_token(store, people.find(store, args.name).id)
  say(f"the old token is void.\ntoken, shown only now: {token}")


def set_active(args) -> None:
  with Store.open(args.db) as store:
    labeler = people.find(store, args.name)
    active = args.command == "activate"
    people.set_active(store, labeler.id, active, author=args.by, reason=args.reason)
  say(f"{labeler.name} is {'active' if active else 'no longer active'}.")


def labelers(args) -> None:
  with Store.open(args.db) as store:
    known = store.records(Labeler)
    with store.reading() as connection:
      active = {one.id for one in known if people.is_active(connection, one.id)}
  rows = [(one.name, one.id, one.role, "yes" if one.id in active else "no") for one in known]
  say(table("labelers", ("name", "id", "role", "active"), rows))


def agree(args) -> None:
  with Store.open(args.db) as store:
    found = agreement.report(store)
    names = {labeler.id: labeler.name for labeler in store.records(Labeler)}
  share = lambda s: f"{s.value:.1%} of {s.of}" if s.of else "-"
  figure = lambda x: "-" if x is None or x != x else f"{x:.3f}"
  overall = [
    ("same on a pair of answers", share(found.pairwise)),
    ("same where neither ties", share(found.decided)),
    ("alpha of preferences (ordinal)", figure(found.preference_alpha)),
    ("alpha of quality (ordinal)", figure(found.quality_alpha)),
    *((f"alpha of {flag} (nominal)", figure(alpha)) for flag, alpha in found.flag_alpha.items()),
  ]
  rows = [
    (names.get(id, id), r.comparisons, share(r.with_others), share(r.with_gold))
    + (figure(r.median_seconds),)
    for id, r in found.labelers.items()
  ]
  say(table("agreement", ("of two labelers", "value"), overall))
  columns = ("labeler", "comparisons", "with others", "with gold", "median seconds")
  say(table("labelers", columns, rows))


def withdraw(args) -> None:
  with Store.open(args.db) as store:
    known = {labeler.name: labeler.id for labeler in store.records(Labeler)}
    person = known.get(args.person, args.person)
    found = withdrawal.preview(store, person)
    if args.yes:
      record = withdrawal.withdraw(store, person, author=args.by)
      say(f"{len(record.tombstones)} records withdrawn, see {record.id}.")
    else:
      say(table(f"to withdraw of {args.person}", ("kind", "records"), found.items()))
      say("nothing was deleted; --yes deletes these for good.")


def mark_used(args) -> None:
  with Store.open(args.db) as store:
    ids = [item.get("record") for item in exchange.read_objects(args.ids)]
    policies = [p.id for p in store.records(Policy) if args.policy in (p.id, p.name)]
    if not policies:
      raise UserError(f"there is no policy {args.policy!r}.")
    lineage.mark_used(store, policies[-1], ids, args.stage, author=args.by)
  say(f"{len(ids)} records trained {policies[-1]}.")


def uses(args) -> None:
  with Store.open(args.db) as store:
    names = {policy.id: policy.name for policy in store.records(Policy)}
    rows = [
      (use.record, names.get(use.policy, ""), use.policy, use.stage, use.withdrawn_at or "")
      for use in lineage.uses(store, policy=args.policy, record=args.record)
    ]
  say(table("lineage", ("record", "policy", "policy id", "stage", "withdrawn"), rows))


def parser() -> argparse.ArgumentParser:
  """The command line."""
  base = argparse.ArgumentParser(add_help=False)
  base.add_argument("--db", default=os.environ.get(DATABASE), help="file or URL of the database")
  base.add_argument("--by", default="researcher", help="who does this, for the record")
  top = argparse.ArgumentParser(
    prog="python -m rlhf_jax.feedback",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name, call, help, *arguments):
    made = commands.add_parser(name, parents=[base], help=help, description=help)
    made.set_defaults(call=call)
    for names, options in arguments:
      made.add_argument(*names, **options)

  argument = lambda *names, **options: (names, options)
  file = argument("file", help="a file of JSON, one object a line")
  name = argument("name", help="name or id of the labeler")
  reason = argument("--reason", default="", help="why, for the record")
  role = argument("--role", default="labeler", choices=("labeler", "researcher"))
  what = argument("what", choices=("all", "demonstrations", "comparisons", "moderation"))
  stages = ("sft", "reward", "moderation")
  unused = argument("--unused-in", choices=stages, help="only what trained none there")
  ids = argument("--ids", help="a file for the records' ids, which mark-used reads")
  command("init", init, "make the database, or bring it up to date")
  command("migrate", migrate, "bring a database of an older version up to date")
  command("stats", stats, "how much there is, and how far the tasks have come")
  command("export", export, "write records, or what trains models, to a file", what)
  for names, options in (file, unused, ids):
    commands.choices["export"].add_argument(*names, **options)
  command("import", import_, "read what export all has written", file)
  command("add-tasks", add_tasks, "queue tasks", file)
  command("add-labeler", add_labeler, "add a person and show their token", name, role)
  command("token", new_token, "give a labeler a new token, in place of the old", name)
  command("activate", set_active, "let a labeler work again", name, reason)
  command(
    "deactivate", set_active, "let a labeler work no longer; their records stay", name, reason
  )
  command("labelers", labelers, "who is here")
  command("agreement", agree, "how far labelers agree with each other and with gold ranks")
  person = argument("person", help="name or id of a labeler, or id of a user of the chat")
  yes = argument("--yes", action="store_true", help="delete; without it, only say what would go")
  command("withdraw", withdraw, "delete all that holds words or signals of a person", person, yes)
  policy = argument("policy", help="id of a policy, or a name, of which the newest is meant")
  stage = argument("--stage", required=True, choices=("sft", "reward", "ppo", "moderation"))
  needed = argument("--ids", required=True, help="a file that export --ids wrote")
  command("mark-used", mark_used, "note that records trained a policy", policy, stage, needed)
  of_policy = argument("--policy", help="only what trained this one, by id")
  of_record = argument("--record", help="only what this one trained, by id")
  command("lineage", uses, "which records trained which policies", of_policy, of_record)
  return top


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status, 2 for what the user can mend."""
  args = parser().parse_args(argv)
  try:
    if not args.db:
      raise UserError(f"say which database: --db=feedback.db, or {DATABASE} in the environment.")
    args.call(args)
  except UserError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
