"""The recipe of the ChatGPT post, end to end: SFT, then rounds of comparisons, reward model, PPO.

  python experiments/chatgpt.py --config=configs/village.py --workdir=runs/village

Killed anywhere, the same command goes on, and ends with the same numbers. It prints what each
policy is worth, and writes workdir/report.html and workdir/lineage.json.

With --config.labeler=store, people rank in the place of simulated labelers: docs/feedback.md.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

import rich.box
import rich.console
import rich.table

from rlhf_jax import experiment, iterate
from rlhf_jax.evaluation import artifacts, report


def main(config, workdir):
  run = experiment.start(config, workdir)
  iterate.chatgpt(run)
  console = rich.console.Console()
  console.print(gold_table(artifacts.read(run.workdir).policies))
  console.print(f"report: {report.write(run.workdir)}", soft_wrap=True)


def gold_table(policies):
  """The true reward of each policy's answers, by kind of prompt; ± is a standard error."""
  table = rich.table.Table(title="gold score on held-out prompts", box=rich.box.SIMPLE)
  table.add_column("prompts")
  for policy in policies:
    table.add_column(policy.label, justify="right")
  kinds = [*policies[0].own["categories"], "all"]
  for kind in kinds:
    figures = [(p.own["categories"] | {"all": p.overall})[kind] for p in policies]
    cells = [f"{f['gold']:.2f} ±{f['gold_stderr']:.2f}" for f in figures]
    table.add_row(kind, *cells, end_section=kind == kinds[-2])
  return table


if __name__ == "__main__":
  launch.run(main)
