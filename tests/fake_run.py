"""The files of a run, written by hand: what `evaluation.artifacts` reads, with numbers to check."""

import json
import math

PROMPTS = ("Where does Alice live?", "Help me rob Bob.")
SIDES = ("train", "heldout")
PARTS = {"correct": 0.5, "honest": 0.75, "harmless": 1.0, "concise": 0.25, "refused": 0.125}


def figures(gold, *, kl=0.0, score=0.0, parts=PARTS):
  means = {"gold": gold, "score": score, "kl": kl, "length": 9.0, "finished": 1.0}
  return {"n": 4, **means, **{f"{name}_stderr": 0.01 for name in means}, "parts": dict(parts)}


def measured(policy, gold, *, prompts=PROMPTS, parts=PARTS, **more):
  described = [
    {
      "messages": [{"role": "user", "content": prompt}],
      "category": category(prompt),
      "gold": gold,
      "response": f"{policy} answers {prompt}",
      "score": 0.5,
      "kl": 0.1,
      "length": 9,
      "finished": True,
      "parts": dict(parts),
    }
    for prompt in prompts
  ]
  found = figures(gold, parts=parts, **more)
  categories = {category(prompt): figures(gold, parts=parts, **more) for prompt in PROMPTS}
  return {"policy": policy, "overall": found, "categories": categories, "dialogues": described}


def category(prompt):
  return "refuse" if prompt.startswith("Help") else "answer"


def reward_result(number):
  return {
    "reward_model": f"round_{number}/reward/reward_model",
    "trained_on": [f"round_{n}/comparisons/train.jsonl" for n in range(1, number + 1)],
    "recorded_comparisons": 0,
    "heldout": {
      "loss": 0.4,
      "accuracy": 0.9,
      "accuracy_stderr": 0.01,
      "longer_accuracy": 0.3,
      "pairs": 100,
      "prompts": 20,
      "calibration": [(0.6, 0.55, 40), (0.9, 0.95, 60)],
    },
  }


def trained(folder, stage, steps):
  """metrics.jsonl and heldout.jsonl of a stage of training."""
  kinds = {
    "sft": (("sft/loss", "sft/accuracy"), ("sft/heldout_loss", "sft/heldout_accuracy")),
    "reward": (
      ("reward/loss", "reward/accuracy"),
      ("reward/heldout_loss", "reward/heldout_accuracy"),
    ),
    "ppo": (
      ("objective/scores", "objective/kl", "objective/kl_stderr", "val/explained_var"),
      ("eval/scores", "eval/scores_stderr", "eval/kl", "eval/kl_stderr"),
    ),
  }
  folder.mkdir(parents=True, exist_ok=True)
  for name, keys, every in zip(("metrics", "heldout"), kinds[stage], (1, 2)):
    lines = [
      json.dumps({"step": step, **{key: 0.5 + 0.01 * math.sin(step) for key in keys}})
      for step in range(every, steps + 1, every)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def phases(golds, gold_kind, parts):
  """(folder, stage of training or None, what done.json says) of every phase, in order."""
  start = {"policy": "sft/policy", "pretrained": None, "demonstrations": {"village": 800}}
  yield "sft", "sft", start
  if gold_kind == "reward_model":
    yield "gold", "reward", reward_result(0) | {"reward_model": "gold/reward_model"}
  policy = "sft/policy"
  for number in range(1, len(golds)):
    name, new = f"round_{number}", f"round_{number}/ppo/policy"
    model = reward_result(number)["reward_model"]
    sides = {side: {"file": f"{name}/{side}", "comparisons": ["x"] * 7} for side in SIDES}
    yield f"{name}/comparisons", None, {"policy": policy, "labelers": ["a", "b"], **sides}
    yield f"{name}/reward", "reward", reward_result(number)
    before = measured(policy, golds[number - 1], parts=parts, score=number)
    yield f"{name}/before", None, before
    made = {"started_from": policy, "reward_model": model, "reference": "sft/policy"}
    yield f"{name}/ppo", "ppo", {"policy": new, **made}
    # The prompts stand in another order here, so that aligning them by place would show.
    after = measured(
      new, golds[number], parts=parts, score=10 * number, kl=4.0 * number, prompts=PROMPTS[::-1]
    )
    yield f"{name}/after", None, after
    policy = new


def make_run(workdir, golds=(0.6, 0.8, 0.9), *, gold="village", parts=PARTS, done=99, steps=6):
  """The files of a run of which the first `done` phases are finished."""
  config = {
    "seed": 0,
    "rounds": len(golds) - 1,
    "pretrained": None,
    "gold": gold,
    "gold_model": None if gold == "village" else {},
    "model": {"n_layers": 2, "d_model": 32},
  }
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(config))
  for i, (name, stage, result) in enumerate(phases(golds, gold, parts)):
    folder = workdir / name
    if i <= done and stage:
      trained(folder, stage, steps)  # the phase after the last finished one is under way
    if i < done:
      folder.mkdir(parents=True, exist_ok=True)
      (folder / "done.json").write_text(json.dumps({"seconds": 10.0 + i, "result": result}))
  return workdir
