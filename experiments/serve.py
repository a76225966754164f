"""Serves a policy: OpenAI's API, the chat page and the labelling page.

  python experiments/serve.py --workdir=runs/village
  curl http://127.0.0.1:8000/v1/models
  python experiments/serve.py --workdir=runs/village --host=0.0.0.0 --keys=keys.json

What people say there is kept in the database that the run's config names (`store.url`), or in --db.
The first start compiles for a minute on two cores. Ctrl-C lets answers end; see docs/serving.md.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

import sys
import time

from rlhf_jax.feedback.store import Store
from rlhf_jax.serving import engine, load, server
from rlhf_jax.types import UserError

OPTIONS = {
  "policy": launch.Option("newest", "which policy of the run, as round_1/ppo/policy"),
  "host": launch.Option("127.0.0.1", "the address to listen at; 0.0.0.0 for all"),
  "port": launch.Option(8000, "the port to listen at; 0 takes a free one"),
  "slots": launch.Option(16, "answers that are under way at once"),
  "queue": launch.Option(128, "requests that may wait beside them; more get a 503"),
  "columns": launch.Option(4, "tokens a call draws: more are faster in all, fewer come sooner"),
  "max_new_tokens": launch.Option(256, "the longest answer"),
  "context": launch.Option(1024, "tokens of dialogue that the policy sees"),
  "keys": launch.Option("none", "the file of API keys, see python -m rlhf_jax.serving.keys"),
  "auth": launch.Option("auto", "off serves an address that others reach without any keys"),
  "db": launch.Option("auto", "the database of records; auto is the one that the config names"),
  "moderator": launch.Option("none", "the folder of a moderator; it filters what goes in and out"),
  "grace": launch.Option(10.0, "seconds that answers may still take when it is told to end"),
}  # fmt: skip
ROOM = ("slots", "queue", "columns", "context", "max_new_tokens")


def main(config, workdir, policy, **options):
  if config is not None:
    raise UserError("a server needs --workdir only: the config of the run is there.")
  room = engine.Room(**{name: options[name] for name in ROOM})
  access = server.Access(*(options[name] for name in ("host", "port", "keys", "auth")))
  loaded = load.of_run(workdir, policy)
  moderator = server.load_moderator(options["moderator"])
  db = load.config_of(workdir).store.url if options["db"] == "auto" else options["db"]
  with access.listen() as listener, Store.open(db, create=True) as store:
    say(f"{loaded.name}: compiling ... ")
    began, answering = time.monotonic(), engine.start(loaded, room)
    if moderator is not None:
      moderator.compile()
    say(f"ready after {time.monotonic() - began:.0f} s\n")
    context = server.register(answering, loaded, workdir, store, moderator)
    server.serve(context, access, listener, options["grace"], say)


def say(text):
  sys.stdout.write(text)
  sys.stdout.flush()


if __name__ == "__main__":
  launch.run(main, options=OPTIONS, needs=("workdir",))
