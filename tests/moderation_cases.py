"""experiments/moderate.py at its smallest size, on texts in which a word tells each category."""

import json

import numpy as np
import runs

from rlhf_jax import launch
from rlhf_jax.data.moderation import LETTERS

FILE = runs.ROOT / "configs/moderation.py"
FILLER = "the cat sat on a mat by the old river while birds sang all day long".split()
EIGHT = {"fit.batch_size": "8"}
LEARNS = {**EIGHT, "fit.num_epochs": "15", "fit.optim.learning_rate": "2e-2"}  # the words


def text(rng, *words):
  """A text of about eight words with `words` among them."""
  return " ".join(rng.permutation([*rng.choice(FILLER, 6), *words]))


def write_data(folder):
  """Samples in which "wordH" is hate and so on, and a label in three is missing; and tweets."""
  rng = np.random.default_rng(0)
  lines = []
  for _ in range(120):
    labels = {letter: int(rng.random() < 0.3) for letter in LETTERS}
    words = [f"word{letter}" for letter, label in labels.items() if label]
    known = {letter: label for letter, label in labels.items() if rng.random() < 0.67}
    lines.append(json.dumps({"prompt": text(rng, *words), **(known or {"S": labels["S"]})}))
  (folder / "samples.jsonl").write_text("\n".join(lines))
  # Tweets that say "wordH" and a name are innocent here: what the moderator has to be told.
  rows = [",class,tweet"]
  for i in range(80):
    word = ("wordH awful", "wordH banter", "fine")[i % 3]
    rows.append(f'{i},{i % 3},"{text(rng, *word.split())}"')
  (folder / "tweets.csv").write_text("\n".join(rows))


def overrides(folder, **more):
  """Keys of the config that name the files of `write_data`, and `more`."""
  values = {
    "data.samples.paths": str([str(folder / "samples.jsonl")]),
    "reports.pool.paths": str([str(folder / "tweets.csv")]),
  }
  return values | more


def arguments(folder, workdir, *more, variant="tiny", **values):
  """The same as a command line."""
  texts = [f"--config.{key}={value}" for key, value in overrides(folder, **values).items()]
  return [f"--config={FILE}:{variant}", f"--workdir={workdir}", *texts, *more]


def run(*args):
  """Runs the experiment in this process."""
  module = runs.experiment("moderate")
  launch.run(module.main, list(args), options=module.OPTIONS)
