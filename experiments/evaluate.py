"""Measures a policy of a run: true reward, reward-model score, KL, length, by kind of prompt.

  python experiments/evaluate.py --config=configs/village.py --workdir=runs/village
  python experiments/evaluate.py --config=... --workdir=... --policy=sft/policy

Answers `evaluation.prompts` held-out prompts once each; all policies of a run get the same prompts
and the same random numbers. The score is that of the newest reward model. Prints a table and keeps
it, with sampled dialogues, in workdir/evaluation/POLICY.json.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

import rich.box
import rich.console
import rich.table

from rlhf_jax import experiment, iterate, rollout, standing
from rlhf_jax.evaluation import measure
from rlhf_jax.training import files

OPTIONS = {"policy": launch.Option("newest", "which policy, as sft/policy or round_1/ppo/policy")}


def main(config, workdir, policy):
  run = experiment.start(config, workdir)
  policy = standing.find_policy(run.workdir, policy)
  reference = standing.said(run, "sft")["policy"]
  reward_model = standing.newest_reward_model(run)
  judges = rollout.Judges(iterate.load(run, reference), iterate.load(run, reward_model))
  found = measure.measure(run, iterate.load(run, policy), judges, iterate.gold(run))
  kept = run.workdir / "evaluation" / f"{policy.replace('/', '_')}.json"
  files.ensure_writable(kept.parent)
  files.write_json_atomic(kept, {"policy": policy, "reward_model": reward_model, **found})
  rich.console.Console().print(table(f"{policy}, scored by {reward_model}", found))


def table(title, found):
  """A row for each kind of prompt and one for all; ± is a standard error."""
  shown = rich.table.Table(title=title, box=rich.box.SIMPLE, collapse_padding=True)
  shown.add_column("prompts", no_wrap=True)
  for name in ("n", "gold", "score", "kl", "length", "finished"):
    shown.add_column(name, justify="right", no_wrap=True)
  for kind, figures in [*found["categories"].items(), ("all", found["overall"])]:
    means = [f"{figures[k]:z.2f} ±{figures[f'{k}_stderr']:.2f}" for k in ("gold", "score", "kl")]
    rest = [f"{figures['length']:.1f}", f"{figures['finished']:.0%}"]
    shown.add_row(kind, str(figures["n"]), *means, *rest)
  shown.caption = ", ".join(f"{k} {v:.2f}" for k, v in found["overall"]["parts"].items())
  return shown


if __name__ == "__main__":
  launch.run(main, options=OPTIONS)
