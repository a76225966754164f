"""The recipe of the ChatGPT post, end to end: SFT, then rounds of comparisons, reward model, PPO.

  python experiments/chatgpt.py --config=configs/village.py --workdir=runs/village

Killed anywhere, the same command goes on. Ends with workdir/report.html.
"""

from rlhf_jax import launch

if __name__ == "__main__":
  launch.prepare()

from rlhf_jax import experiment, iterate


def main(config, workdir):
  run = experiment.start(config, workdir)
  iterate.chatgpt(run)


if __name__ == "__main__":
  launch.run(main)
