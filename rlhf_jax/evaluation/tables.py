"""The tables of the report, and how its numbers are written."""

import math
from typing import Any

from rlhf_jax.evaluation.artifacts import Artifacts, Phase, Round
from rlhf_jax.evaluation.curves import COLORS
from rlhf_jax.evaluation.page import Html, h, table

Figures = dict[str, Any]  # as `measure.figures` makes them


def fixed(value: float, digits: int, sign: bool = False) -> str:
  """A number with a true minus, and without one where it rounds to zero."""
  text = f"{abs(value):,.{digits}f}"
  zero = not text.strip("0.,")
  return ("−" if value < 0 and not zero else "+" if sign and not zero else "") + text


def with_error(figures: Figures, name: str, digits: int, unit: float = 1.0) -> list[str | Html]:
  """A mean and its standard error, times `unit`."""
  error = fixed(figures[f"{name}_stderr"] * unit, digits)
  return [fixed(figures[name] * unit, digits), " ", h("span", f"± {error}", class_="error")]


def difference(first: Figures, last: Figures) -> tuple[float, float]:
  """Change of the gold score, and its standard error as of independent samples.

  The prompts are shared, so the error of the change is rather smaller.
  """
  error = math.hypot(first["gold_stderr"], last["gold_stderr"])
  return last["gold"] - first["gold"], error


def closed(first: Figures, last: Figures, maximum: float) -> tuple[float, float]:
  """Share of the distance to the maximum that was closed, (g1 - g0) / (m - g0).

  Its standard error is to first order in the errors of the two means, taken as independent.
  """
  room = maximum - first["gold"]
  if room <= 0:
    return 0.0, 0.0
  error = math.hypot(
    last["gold_stderr"] / room,
    (maximum - last["gold"]) / room**2 * first["gold_stderr"],
  )
  return (last["gold"] - first["gold"]) / room, error


def color(index: int) -> str:
  """The colour of a round, as the style sheet names it."""
  return f"var(--c{index % len(COLORS)})"


def row(name: str, cells: list, **attributes: str) -> list[Html]:
  """A named row of numbers; None is a dash."""
  values = [h("td", "–" if cell is None else cell, **attributes) for cell in cells]
  return [h("th", name, scope="row", **attributes), *values]


def of_policies(run: Artifacts) -> Html:
  """A column a policy, a row a figure."""
  overall = [policy.overall for policy in run.policies]
  gold = "gold score" if run.maximum is None else f"gold score (at most {run.maximum:g})"
  rows = [row(gold, [with_error(o, "gold", 3) for o in overall], class_="main")]
  for part in overall[0]["parts"]:
    name = "refused (share of answers)" if part == "refused" else part
    rows.append(row(name, [fixed(o["parts"][part], 3) for o in overall], class_="sub"))
  for r in run.rounds:
    judged = [policy.measured.get(r.number) for policy in run.policies]
    cells = [with_error(m["overall"], "score", 2) if m else None for m in judged]
    if any(cells):
      rows.append(row(f"score, reward model of {r.label}", cells))
  rows += [
    row("KL to SFT [nats a response]", [with_error(o, "kl", 2) for o in overall]),
    row("length [tokens]", [with_error(o, "length", 1) for o in overall]),
    row("ended by itself [%]", [with_error(o, "finished", 1, 100) for o in overall]),
  ]
  return table(["", *(policy.label for policy in run.policies)], rows)


def of_behaviours(run: Artifacts) -> Html:
  """A row a category of prompts: gold by policy, its change, and how often answers refuse."""
  policies = run.policies
  golds = [f["gold"] for p in policies for f in p.own["categories"].values()]
  low, high = (min(golds), max(golds)) if run.maximum is None else (0.0, run.maximum)
  refusals = "refused" in policies[0].overall["parts"]
  head = ["behaviour", "n", *(p.label for p in policies)]
  head += ["change"] * (len(policies) > 1)
  head += [f"refused, {p.label}" for p in policies] if refusals else []
  rows = []
  for name in policies[0].own["categories"]:
    found = [p.own["categories"][name] for p in policies]
    cells = [h("th", name, scope="row"), h("td", f"{found[0]['n']:,}", class_="error")]
    for figures in found:
      shade = min(max((figures["gold"] - low) / ((high - low) or 1.0), 0.0), 1.0)
      cells.append(
        h("td", with_error(figures, "gold", 2), class_="shade", style=f"--v: {shade:.3f}")
      )
    if len(policies) > 1:
      change, error = difference(found[0], found[-1])
      text = [fixed(change, 2, sign=True), " ", h("span", f"± {fixed(error, 2)}", class_="error")]
      cells.append(h("td", text))
    if refusals:
      shares = [f"{fixed(100 * figures['parts']['refused'], 0)}%" for figures in found]
      cells += [h("td", s, class_="gap" if i == 0 else "") for i, s in enumerate(shares)]
    rows.append(cells)
  return table(head, rows)


def of_reward_models(run: Artifacts) -> Html | str:
  """What each reward model gets right on held-out comparisons."""
  fitted = [("gold", run.gold)] if run.gold else []
  fitted += [(r.label, r.reward) for r in run.rounds]
  fitted = [(name, phase.result["heldout"]) for name, phase in fitted if phase.result is not None]
  if not fitted:
    return ""
  rows = []
  for name, figures in fitted:
    if not figures["pairs"]:
      rows.append(row(name, ["0", "all answers are tied", None, None]))
      continue
    accuracy = with_error(figures, "accuracy", 3)
    others = [fixed(figures["longer_accuracy"], 3), fixed(figures["loss"], 3)]
    rows.append(row(name, [f"{figures['pairs']:,}", accuracy, *others]))
  head = ["reward model", "held-out pairs", "accuracy", "accuracy of “longer is better”"]
  return table([*head, "loss [nats a pair]"], rows)


def of_costs(run: Artifacts) -> Html:
  """Seconds by phase."""
  done = [phase for phase in run.phases if phase.seconds is not None]
  total, most = sum(p.seconds for p in done), max(p.seconds for p in done) or 1.0
  rows = []
  for phase in run.phases:
    if phase.seconds is None:
      rows.append(row(phase.name, [None, "not done", ""]))
      continue
    bar = h("i", class_="bar", style=f"width: {100 * phase.seconds / most:.1f}%")
    share = f"{fixed(100 * phase.seconds / (total or 1.0), 0)}%"
    cells = [h("td", bar, class_="fill"), h("td", fixed(phase.seconds, 1)), h("td", share)]
    rows.append([h("th", phase.name, scope="row"), *cells])
  minutes = h("td", f"{fixed(total / 60, 1)} minutes", style="text-align: left")
  cells = [minutes, h("td", fixed(total, 1)), h("td", "100%")]
  rows.append([h("th", "total", scope="row", class_="main"), *cells])
  return table(["phase", "", "seconds", "share"], rows)


def chains(run: Artifacts) -> list[Html]:
  """SFT, then a row a round: who answered, what was learnt from the answers, what came of it."""
  counts = run.sft.result["demonstrations"]
  shown = ", ".join(f"{count:,} demonstrations of {name}" for name, count in counts.items())
  start = run.sft.result["pretrained"] or "random parameters"
  first = [node("Start", str(start)), node("SFT", shown), node("Policy", "sft/policy")]
  found = [("", chain(first, 0))]
  found += [(r.label.capitalize(), chain(nodes, r.number)) for r in run.rounds if (nodes := of(r))]
  return [h("div", h("h3", name) if name else "", row) for name, row in found]


def of(r: Round) -> list[Html]:
  """The nodes of a round, as far as it has come."""
  nodes = []
  if (made := r.comparisons.result) is not None:
    train, heldout = (len(made[side]["comparisons"]) for side in ("train", "heldout"))
    people = len(made["labelers"])
    nodes.append(node("Policy", made["policy"], "answers"))
    ranked = f"{train:,} to train on, {heldout:,} held out, ranked by {people} labelers"
    nodes.append(node("Comparisons", ranked))
  if (made := r.reward.result) is not None:
    nodes.append(node("Reward model", made["reward_model"], trained_on(r.reward)))
  if (made := r.ppo.result) is not None:
    about = f"from {made['started_from']}, against {made['reward_model']}, held near "
    nodes += [node("PPO", about + made["reference"]), node("Policy", made["policy"])]
  return nodes


def trained_on(phase: Phase) -> str:
  """Which comparisons a reward model has seen."""
  parts = [str(path) for path in phase.result["trained_on"]]
  if phase.result["recorded_comparisons"]:
    parts.append(f"{phase.result['recorded_comparisons']:,} recorded comparisons")
  return "trained on " + ", ".join(parts)


def node(name: str, *texts: str) -> Html:
  return h("div", h("b", name), [h("div", text) for text in texts], class_="node")


def chain(nodes: list[Html], index: int) -> Html:
  """Nodes with arrows between them, the last in the colour of the round."""
  linked = [[h("div", "→", class_="arrow"), each] for each in nodes]
  linked[0] = linked[0][1:]
  last = Html(nodes[-1].replace("<div", f'<div style="border-top-color: {color(index)}"', 1))
  linked[-1][-1] = last
  return h("div", linked, class_="chain")
