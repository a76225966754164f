"""What a policy is like: true reward, reward-model score, KL and length on held-out prompts."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import rollout
from rlhf_jax.experiment import Run
from rlhf_jax.labelers.gold import Gold
from rlhf_jax.parallel import hosts
from rlhf_jax.phases import sampler
from rlhf_jax.types import Params, Rollout


def measure(run: Run, policy: Params, judges: rollout.Judges, gold: Gold) -> dict[str, Any]:
  """Answers held-out prompts once each, at the sampling temperature of the rollouts.

  The prompts and the randomness are the same for every policy of a run, so that differences are
  the policies' own.

  Returns:
    {"overall": figures, "categories": {category: figures}, "dialogues": [...]}, where figures
    are "n", means "gold", "score", "kl", "length", "finished" with standard errors "gold_stderr",
    ..., and the "parts" of the gold score. KL is to the SFT policy, in nats a response.
  """
  responder, sample = sampler(run, 0)
  prompts = [p.conversation for p in run.data.prompts("heldout")]
  prompts = list(filter(responder.fits, prompts))[: run.config.evaluation.prompts]
  answers, key = [], run.key("evaluation")
  for i, batch in enumerate(responder.prompt_batches(prompts)):
    seen = sample(policy, judges.reward, judges, batch, jax.random.fold_in(key, i))
    answers += rows_of(seen, responder.decode(seen.responses, seen.mask, seen.finished))
  described = []
  for conversation, answer in zip(prompts, answers):
    parts = gold.judge(conversation, [answer["response"]])[0]
    described.append(
      {
        "messages": conversation.to_json(),
        "category": gold.category(conversation),
        "gold": parts.pop("total"),
        **answer,
        "parts": parts,
      }
    )
  categories = sorted({d["category"] for d in described})
  return {
    "overall": figures(described),
    "categories": {c: figures([d for d in described if d["category"] == c]) for c in categories},
    "dialogues": spread(described, categories, run.config.evaluation.examples),
  }


def rows_of(seen: Rollout, replies: Sequence) -> list[dict[str, Any]]:
  """Each row of a rollout as text and numbers."""
  seen = hosts.whole(seen.replace(stream=None))
  kl = np.sum(np.where(seen.mask > 0, seen.logprobs - seen.ref_logprobs, 0.0), axis=1)
  return [
    {
      "response": reply.text,
      "score": float(score),
      "kl": float(nats),
      "length": reply.length,
      "finished": reply.finished,
    }
    for reply, score, nats in zip(replies, seen.scores, kl)
  ]


def figures(described: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Means with standard errors over answers, and the means of the gold score's parts."""
  found = {"n": len(described)}
  for name in ("gold", "score", "kl", "length", "finished"):
    values = np.array([d[name] for d in described], np.float64)
    found[name] = float(values.mean())
    # A single answer says nothing about its spread; its error is given as 0.
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    found[f"{name}_stderr"] = float(deviation / np.sqrt(len(values)))
  names = described[0]["parts"]
  found["parts"] = {n: float(np.mean([d["parts"][n] for d in described])) for n in names}
  return found


def spread(
  described: Sequence[dict[str, Any]], categories: Sequence[str], count: int
) -> list[dict[str, Any]]:
  """`count` of the answers, each category in turn, the first ones first."""
  by_category = [[d for d in described if d["category"] == c] for c in categories]
  longest = max(map(len, by_category))
  in_turn = [group[i] for i in range(longest) for group in by_category if i < len(group)]
  return in_turn[:count]
