"""Dialogues to be read: demonstrations, ranked comparisons, and policies side by side."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.data.records import Comparison, Demonstration
from rlhf_jax.evaluation.artifacts import Artifacts
from rlhf_jax.evaluation.page import Html, View, h
from rlhf_jax.evaluation.tables import color, fixed
from rlhf_jax.labelers.gold import Gold

NO_BREAK = "\u00a0"  # a space that keeps a figure on one line


def of_policies(run: Artifacts) -> list[Html]:
  """A card a prompt, with what each policy answered to it; prompts as the first policy had them."""
  by_prompt = {}
  for policy in run.policies:
    for found in policy.own["dialogues"]:
      by_prompt.setdefault(json.dumps(found["messages"]), {})[policy.index] = found
  made = []
  for found in by_prompt.values():
    some = next(iter(found.values()))
    replies = [reply(p.label, p.index, found[p.index]) for p in run.policies if p.index in found]
    made.append(card(some["category"], some["messages"], replies))
  return made


def reply(label: str, index: int, found: dict[str, Any]) -> Html:
  """What one policy said, and what it is worth."""
  figures = [f"gold {fixed(found['gold'], 2)}", f"score {fixed(found['score'], 2)}"]
  figures += lost(found["parts"])
  if not found["finished"]:
    figures.append("cut off at the length limit")
  return answer(label, index, found["response"], figures)


def lost(parts: dict[str, float]) -> list[str]:
  """The parts of a gold score that are not full; to refuse may be right or wrong, so it is none."""
  names = [name for name in parts if name not in ("total", "refused")]
  return [f"{name} {fixed(parts[name], 1)}" for name in names if parts[name] < 1]


def demonstrations(records: Sequence[Demonstration], gold: Gold) -> View:
  """Trainers' dialogues, each last answer with its gold score."""
  made = []
  for record in records:
    turn = record.conversation.assistant_turns[-1]
    prompt = record.conversation.prompt_before(turn)
    text = record.conversation.messages[turn].content
    parts = gold.judge(prompt, [text])[0]
    figures = [f"gold {fixed(parts['total'], 2)}", *lost(parts)]
    shown = answer(record.source, 0, text, figures)
    made.append(card(gold.category(prompt), prompt.to_json(), [shown]))
  return View(made, height=440)


def comparisons(records: Iterable[Comparison]) -> View:
  """Ranked answers, the best (rank 0) first."""
  made = []
  for record in records:
    ranked = sorted(zip(record.ranks, record.responses), key=lambda pair: pair[0])
    shown = [answer(f"rank {rank}", int(rank == 0), text, []) for rank, text in ranked]
    made.append(card(f"ranked by {record.labeler}", record.conversation.to_json(), shown))
  return View(made, height=440)


def card(kind: str, messages: Sequence[dict[str, str]], answers: Sequence[Html]) -> Html:
  """A prompt with answers under it."""
  said = [
    h("div", h("span", message["role"]), h("span", message["content"]), class_="says")
    for message in messages
  ]
  label, answers = h("div", kind, class_="kind"), h("div", answers, class_="answers")
  return h("div", label, said, answers, class_="card dialogue")


def answer(label: str, index: int, text: str, figures: Sequence[str]) -> Html:
  """A text with who wrote it, in the colour `index`, and figures about it."""
  return h(
    "div",
    h("div", label, class_="who"),
    h("div", text or "(nothing)", class_="text"),
    h("div", " · ".join(f.replace(" ", NO_BREAK) for f in figures), class_="figures"),
    class_="answer",
    style=f"color: {color(index)}",
  )
