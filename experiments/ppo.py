"""Stage 4, PPO: the policy gains what the reward model likes, and stays near the SFT policy.

  python experiments/ppo.py --config=configs/village.py --workdir=runs/village

Leaves workdir/round_N/ppo/policy (its moving average, where `ppo.ema_decay` is set) and
workdir/round_N/ppo/policy_last, and writes workdir/lineage.json. That ends round N; the next round
begins with experiments/label.py, or experiments/chatgpt.py does all that is left. Curves are in
workdir/round_N/ppo/{metrics,heldout}.jsonl; experiments/evaluate.py measures what has come of it.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

from rlhf_jax import experiment, iterate, standing


def main(config, workdir):
  run = experiment.start(config, workdir)
  now = standing.current_round(run)
  model = standing.said(run, f"{now.name}/reward")["reward_model"]
  done = iterate.improve(run, now.name, now.policy, model, now.reference)
  iterate.write_lineage(run)
  print(f"policy: {run.workdir / done['policy']}")


if __name__ == "__main__":
  launch.run(main)
