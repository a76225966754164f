"""The results of a moderation experiment as Markdown tables and figures."""

from typing import Any

from matplotlib.figure import Figure

from rlhf_jax.moderation.measures import Curve

COLORS = {"before": "#6b7280", "after": "#2563eb"}


def evaluation_table(result: dict[str, Any]) -> str:
  """AUPRC by category with its interval and the prevalence, which is what guessing gets."""
  trained = ", ".join(f"{count:,} of {name}" for name, count in result["trained_on"].items())
  lines = [
    f"Trained on {trained}; {result['folds']}-fold cross-validation on {result['evaluated_on']}.",
    f"Trunk: {result['trunk']}.",
    "",
    f"| category | known | positives | prevalence | AUPRC | {result['level']:.0%} interval "
    "| precision | recall | false-positive rate |",
    "|---|--:|--:|--:|--:|---|--:|--:|--:|",
  ]
  for name, part in result["categories"].items():
    low, high = part["auprc_interval"]
    cells = [
      name,
      f"{part['known']:,}",
      f"{part['positives']:,}",
      fixed(part["prevalence"]),
      fixed(part["auprc"]),
      f"{fixed(low)} to {fixed(high)}",
      *(fixed(part[key]) for key in ("precision", "recall", "false_positive_rate")),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  lines.append(f"| mean | | | | {fixed(result['mean_auprc'])} | | | | |")
  return "\n".join(lines) + "\n"


def reports_table(result: dict[str, Any]) -> str:
  """Before and after the reports, at equal recall and at the threshold 0.5."""
  lines = [
    f"{result['count']} reports of false positives of {result['category']}, the highest-scored "
    f"among {result['pool']:,} texts; {result['trained_on']:,} other texts in training.",
    "",
    "| texts | at | false-positive rate, before | after | precision, before | after |",
    "|---|---|--:|--:|--:|--:|",
  ]
  for name, test in result["tests"].items():
    before, after = test["before"], test["after"]
    auprc = f"AUPRC {fixed(before['auprc'])}, then {fixed(after['auprc'])}"
    title = f"{name}: {test['positives']} of {test['known']:,} positive; {auprc}"
    pairs = [
      (f"recall {b['recall']:.0%}", b, a) for b, a in zip(before["at_recall"], after["at_recall"])
    ]
    half = f"score 0.5; recall {fixed(before['at_half']['recall'])}, then "
    half += fixed(after["at_half"]["recall"])
    for at, b, a in [*pairs, (half, before["at_half"], after["at_half"])]:
      cells = [fixed(x[key]) for key in ("false_positive_rate", "precision") for x in (b, a)]
      lines.append(f"| {title} | {at} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def fixed(value: float | None) -> str:
  """Three decimals, or a dash for what is not defined."""
  return "–" if value is None else f"{value:.3f}"


def evaluation_figure(curves: dict[str, Curve], result: dict[str, Any]) -> Figure:
  """A precision-recall curve for each category; dotted, the prevalence."""
  made = Figure(figsize=(12.0, 5.6), layout="constrained")
  for place, (name, curve) in enumerate(curves.items(), start=1):
    ax, part = made.add_subplot(2, 4, place), result["categories"][name]
    ax.step(curve.recall, curve.precision, where="post", color=COLORS["after"])
    if part["prevalence"] is not None:
      ax.axhline(part["prevalence"], color=COLORS["before"], linestyle=":")
    ax.set_title(f"{name}: {fixed(part['auprc'])}, {part['positives']} positives", fontsize=8.5)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
  return made


def reports_figure(result: dict[str, Any]) -> Figure:
  """What each threshold gives, before and after the reports; a row for each set of texts."""
  made = Figure(figsize=(12.0, 3.2 * len(result["tests"])), layout="constrained")
  for row, (name, test) in enumerate(result["tests"].items()):
    for column, key in enumerate(("precision", "recall", "false_positive_rate")):
      ax = made.add_subplot(len(result["tests"]), 3, 3 * row + column + 1)
      for when, color in COLORS.items():
        ax.step(test[when]["thresholds"], test[when][key], where="pre", color=color, label=when)
      ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold on the score")
      ax.set_ylabel(key.replace("_", " ").replace("false positive", "false-positive"))
      if column == 0:
        ax.set_title(f"{result['category']}, {name}")
      if not row and not column:
        ax.legend()
  return made
