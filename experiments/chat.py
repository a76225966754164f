"""Talks to a policy in the terminal, token by token.

  python experiments/chat.py --workdir=runs/village                        the newest policy
  python experiments/chat.py --workdir=runs/village --policy=sft/policy    another one
  python experiments/chat.py --config=configs/hh.py:smollm2                a pretrained model

Model, tokenizer and chat template are those of the run, which its workdir knows. It starts in a few
seconds; the first answer, and each doubling of the dialogue, compiles once. Ctrl-C stops an answer,
Ctrl-D ends; /help lists the commands. Lines may be piped in as well.
"""

import os

from rlhf_jax import launch

if __name__ == "__main__":
  os.environ.setdefault("RLHF_JAX_DEVICES", "1")  # a single answer cannot be split over devices
  launch.prepare()

import sys

import jax

from rlhf_jax import chat
from rlhf_jax.config import build
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.serving import load
from rlhf_jax.types import UserError

OPTIONS = {
  "policy": launch.Option("newest", "which policy of the run, as round_1/ppo/policy"),
  "temperature": launch.Option(1.0, "of sampling; 0 always takes the likeliest token"),
  "top_p": launch.Option(1.0, "samples among the likeliest tokens of this total probability"),
  "max_new_tokens": launch.Option(256, "the longest answer"),
  "context": launch.Option(
    1024, "tokens of dialogue that the policy sees; older turns are dropped"
  ),
  "seed": launch.Option(0, "of the sampling; the same lines get the same answers"),
}


def main(config, workdir, policy, context, seed, **sampling):
  if (config is None) == (workdir is None):
    raise UserError("give --workdir for a policy of a run, or --config for a pretrained model.")
  sampling = build(
    SamplingConfig,
    {"top_k": 0, "stop": None, "compact_to": (), "cache_sizes": 1, **sampling},
    "sampling",
  )
  if workdir is not None:
    loaded = load.of_run(workdir, policy)
  else:
    loaded = load.of_pretrained(config)
  speaker = chat.speaker_of(loaded, sampling, context)
  if sys.stdin.isatty():
    import readline  # noqa: F401, gives input() line editing and a history
  read = lambda: input("> " if sys.stdin.isatty() else "")
  chat.talk(speaker, read, sys.stdout, jax.random.key(seed))


if __name__ == "__main__":
  launch.run(main, options=OPTIONS, needs=())
