"""Stage 2, comparisons: answers of the newest policy, ranked by the panel of labelers.

  python experiments/label.py --config=configs/village.py --workdir=runs/village

Takes dialogues, picks one assistant turn of each at random, samples `comparisons.responses`
alternatives to it, and has them ranked. They go to workdir/round_N/comparisons/train.jsonl and
heldout.jsonl, one record a line, where N is the first round without a PPO policy; who ranked and
which policy wrote stands in each. Next: experiments/reward.py.

With --config.labeler=store people rank, on the labeling page, and this waits for them.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

from rlhf_jax import experiment, iterate, standing


def main(config, workdir):
  run = experiment.start(config, workdir)
  now = standing.current_round(run)
  done = iterate.compare(run, now.name, now.policy, iterate.gold(run))
  for side in ("train", "heldout"):
    ranked = done[side]
    print(f"{len(ranked['comparisons'])} comparisons: {run.workdir / ranked['file']}")


if __name__ == "__main__":
  launch.run(main)
