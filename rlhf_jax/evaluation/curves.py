"""How the curves of a run are drawn: functions `draw(axes, artifacts)` on matplotlib axes.

One that finds no data leaves the axes empty. Colour means the round everywhere, grey SFT.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rlhf_jax.evaluation import artifacts
from rlhf_jax.evaluation.artifacts import Artifacts, Phase

# By number of the round; they stand in the report's style sheet too, with a dark variant.
COLORS = ("#6b7280", "#2563eb", "#c2570c", "#0f8a5f", "#8b3fd1", "#be185d")
INK, FAINT = "#1f2328", "#c9ced6"  # text and axes; grids and reference lines
MOST_POINTS = 300  # a longer curve is averaged over stretches of equal length
MOST_MARKS = 60  # the same for points


@dataclasses.dataclass(frozen=True)
class Curve:
  """A metric of a stage over its steps, the rounds one after another."""

  stage: str  # "sft", "reward" or "ppo"
  metric: str  # in metrics.jsonl; with a band of one standard error where that is recorded
  label: str  # of the y axis, with the unit
  heldout: str | None = None  # the same in heldout.jsonl
  floor: float | None = None  # the y axis shows this value
  reference: float | None = None  # a dotted line

  def __call__(self, ax: Axes, run: Artifacts) -> None:
    start, names = 0, []
    for index, phase in stages(run, self.stage):
      self.draw_phase(ax, phase, start, COLORS[index % len(COLORS)])
      names.append((start, f"round {index}" if index else ""))
      start += max((r["step"] for r in phase.metrics), default=0)
    if not ax.has_data():
      return
    if self.reference is not None:
      ax.axhline(self.reference, color=INK, linewidth=0.8, linestyle=":")
    if self.floor is not None:
      ax.set_ylim(bottom=min(self.floor, ax.dataLim.y0))
    mark_rounds(ax, names)
    ax.set_xlabel(f"{'PPO' if self.stage == 'ppo' else 'optimiser'} step")
    ax.set_ylabel(self.label)
    if self.heldout:
      key(ax, [("-", "training"), ("o", "held out")])

  def draw_phase(self, ax: Axes, phase: Phase, start: int, color: str) -> None:
    steps, values = thin(*artifacts.series(phase.metrics, self.metric))
    ax.plot([start + s for s in steps], values, color=color, alpha=0.75 if self.heldout else 1)
    _, errors = thin(*artifacts.series(phase.metrics, f"{self.metric}_stderr"))
    if errors:
      low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
      ax.fill_between([start + s for s in steps], low, high, color=color, alpha=0.2, linewidth=0)
    if self.heldout:
      steps, values = thin(*artifacts.series(phase.heldout, self.heldout), MOST_MARKS)
      _, errors = thin(*artifacts.series(phase.heldout, f"{self.heldout}_stderr"), MOST_MARKS)
      # Drawn with a rim, so that points stand out from the curve of the same colour.
      point = dict(fmt="o", color=color, markersize=5, markeredgecolor="white", elinewidth=1)
      ax.errorbar([start + s for s in steps], values, yerr=errors or None, **point)


def stages(run: Artifacts, stage: str) -> list[tuple[int, Phase]]:
  """The phases of a stage that have begun, with the number of their round; 0 for SFT."""
  phases = [(0, run.sft)] if stage == "sft" else [(r.number, getattr(r, stage)) for r in run.rounds]
  return [(index, phase) for index, phase in phases if phase.begun]


def thin(
  steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[float], list[float]]:
  """A curve as the means of equal stretches of it, `most` at most."""
  width = math.ceil(len(steps) / most) or 1
  mean = lambda some: sum(some) / len(some)
  pick = lambda some: [mean(some[i : i + width]) for i in range(0, len(some), width)]
  return pick(steps), pick(values)


def mark_rounds(ax: Axes, names: Iterable[tuple[int, str]]) -> None:
  """Names each round above its stretch of the x axis, and parts it from the one before."""
  ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  for number, (start, name) in enumerate(names, start=1):
    ax.axvline(start, color=FAINT, linewidth=1, visible=number > 1)
    place = dict(xy=(start, 1.0), xycoords=ax.get_xaxis_transform(), xytext=(2, 3))
    color = COLORS[number % len(COLORS)]
    ax.annotate(name, textcoords="offset points", fontsize=8.5, color=color, **place)


def key(ax: Axes, entries: Iterable[tuple[str, str]]) -> None:
  """A legend for what line styles and markers mean, since colour means the round."""
  for style, name in entries:
    marker = style if style == "o" else ""
    ax.plot([], [], color=INK, linestyle="" if marker else style, marker=marker, ms=4, label=name)
  ax.legend(loc="best", handlelength=1.6)


def reward_accuracy(ax: Axes, run: Artifacts) -> None:
  """Share of pairs in the right order, with what the longer answer would have scored."""
  curve = Curve("reward", "reward/accuracy", "share of pairs", "reward/heldout_accuracy")
  curve(ax, run)
  start = 0
  for _, phase in stages(run, "reward"):
    end = start + max((r["step"] for r in phase.metrics), default=0)
    if phase.result is not None and phase.result["heldout"]["pairs"]:
      longer = phase.result["heldout"]["longer_accuracy"]
      ax.plot([start, end], [longer, longer], color=INK, linestyle="--", linewidth=1)
    start = end
  if ax.has_data():
    ax.set_ylim(0, 1.03)
    key(ax, [("--", "“longer is better”")])


def calibration(ax: Axes, run: Artifacts) -> None:
  """Predicted against actual share of pairs in the right order (Bai et al. 2022, figure 9)."""
  for index, phase in stages(run, "reward"):
    bins = phase.result["heldout"]["calibration"] if phase.result is not None else []
    if not bins:
      continue
    predicted, right, pairs = zip(*bins)
    color, most = COLORS[index % len(COLORS)], max(pairs)
    ax.plot(predicted, right, color=color, linewidth=1, label=f"round {index}")
    ax.scatter(predicted, right, [8 + 90 * n / most for n in pairs], color=color, alpha=0.6)
  if ax.has_data():
    ax.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=":", label="calibrated")
    ax.set(xlabel="predicted probability", ylabel="share in the right order")
    ax.legend(loc="lower right")


def gold_against_kl(ax: Axes, run: Artifacts) -> None:
  """Gold score over the square root of the KL to SFT (Gao et al. 2022, figure 1)."""
  found = [(math.sqrt(max(p.overall["kl"], 0.0)), p) for p in run.policies]
  if not found:
    return
  distances, golds = [d for d, _ in found], [p.overall["gold"] for _, p in found]
  ax.plot(distances, golds, color=FAINT, zorder=1)
  for distance, policy in found:
    gold, error = policy.overall["gold"], policy.overall["gold_stderr"]
    color = COLORS[policy.index % len(COLORS)]
    ax.errorbar([distance], [gold], yerr=[error], fmt="o", color=color, markersize=6, capsize=3)
    place = dict(textcoords="offset points", color=color)
    place["xytext"] = (7, 6 if policy.index % 2 else -13)  # close neighbours stay readable
    ax.annotate(policy.label, (distance, gold), **place)
  ax.margins(x=0.25, y=0.15)
  ax.set_xlim(left=-0.06 * (max(distances) or 1.0))  # no distance is below 0
  if run.maximum is not None:
    ax.axhline(run.maximum, color=INK, linewidth=0.8, linestyle=":")
    place = dict(xycoords=ax.get_yaxis_transform(), textcoords="offset points", fontsize=8.5)
    ax.annotate("maximum", (0, run.maximum), xytext=(4, -12), color=INK, **place)
  ax.set(xlabel="√KL to SFT [√nats a response]", ylabel="gold score")
