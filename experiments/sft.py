"""Stage 1, supervised fine-tuning: a policy that talks as the trainers' demonstrations do.

  python experiments/sft.py --config=configs/village.py --workdir=runs/village

Leaves the policy with the lowest held-out loss in workdir/sft/policy, and the losses in
workdir/sft/{metrics,heldout}.jsonl and workdir/sft/tensorboard. It is the first stage of
experiments/chatgpt.py, which goes on from here, as experiments/label.py does.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

from rlhf_jax import experiment, iterate


def main(config, workdir):
  run = experiment.start(config, workdir)
  done = iterate.sft(run)
  print(f"policy: {run.workdir / done['policy']}")


if __name__ == "__main__":
  launch.run(main)
