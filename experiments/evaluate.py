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
  rich.console.Console().print(table(f"{policy}, scored by {reward_model}", found), soft_wrap=True)


def table(title, found):
  """A row for each kind of prompt and one for all; means with their standard errors."""
  shown = rich.table.Table("prompts", "n", title=title)
  names = ("gold", "score", "kl", "length", "finished")
  for name in names:
    shown.add_column(name, justify="right")
  for kind, figures in [*found["categories"].items(), ("all", found["overall"])]:
    cells = [f"{figures[name]:.2f} ± {figures[f'{name}_stderr']:.2f}" for name in names]
    shown.add_row(kind, str(figures["n"]), *cells)
  return shown


if __name__ == "__main__":
  launch.run(main, options=OPTIONS)
