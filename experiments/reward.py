"""Stage 3, the reward model: which of two answers the labelers would prefer.

  python experiments/reward.py --config=configs/village.py --workdir=runs/village

Starts from the SFT policy's trunk and learns from the comparisons of every round so far. Leaves
workdir/round_N/reward/reward_model; its held-out accuracy and calibration, with the longer-answer
baseline beside them, stand in workdir/round_N/reward/done.json. Next: experiments/ppo.py.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

from rlhf_jax import experiment, iterate, standing


def main(config, workdir):
  run = experiment.start(config, workdir)
  now = standing.current_round(run)
  fresh = standing.said(run, f"{now.name}/comparisons")
  done = iterate.refit(run, now.name, [*now.earlier, fresh], now.reference)
  print(f"reward model: {run.workdir / done['reward_model']}")
  print(f"held-out accuracy: {done['heldout']['accuracy']:.3f}")


if __name__ == "__main__":
  launch.run(main)
