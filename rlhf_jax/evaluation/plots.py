"""The pictures of a run, for the report and for notebooks.

A `Panel` has a title, one sentence on what is seen, and how it is drawn. `figure` puts panels side
by side in a notebook, `svg` makes each a picture that follows the colours of a web page.
"""

import dataclasses
import io
import math
import re
import zlib
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.evaluation import curves
from rlhf_jax.evaluation.artifacts import Artifacts
from rlhf_jax.evaluation.curves import COLORS, FAINT, INK, Curve

STYLE = {
  "axes.edgecolor": FAINT,
  "axes.formatter.limits": (-9, 9),  # a power of ten above the axis would cover the rounds' names
  "axes.grid": True,
  "axes.labelcolor": INK,
  "axes.labelsize": 9,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 10,
  "font.size": 9,
  "grid.color": FAINT,
  "grid.linewidth": 0.5,
  "legend.fontsize": 8.5,
  "legend.frameon": False,
  "lines.linewidth": 1.5,
  "svg.hashsalt": "rlhf_jax",  # else ids are random, and no two files the same
  "svg.fonttype": "none",  # text stays text: it can be searched, and follows the page's font
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
}


@dataclasses.dataclass(frozen=True)
class Panel:
  """One plot."""

  title: str
  note: str  # one sentence: what is seen
  draw: Callable[[Axes, Artifacts], None]


SFT = (
  Panel(
    "Loss",
    "Cross-entropy of the trainers' last answers; the checkpoint with the lowest held-out loss "
    "becomes the SFT policy.",
    Curve("sft", "sft/loss", "nats a token", "sft/heldout_loss"),
  ),
  Panel(
    "Accuracy",
    "How often the most likely token is the trainer's.",
    Curve("sft", "sft/accuracy", "share of tokens", "sft/heldout_accuracy"),
  ),
)

REWARD = (
  Panel(
    "Loss",
    "Mean −log σ(score of the better − score of the worse) over the pairs of a prompt; guessing "
    "costs log 2 = 0.69 (dotted).",
    Curve(
      "reward",
      "reward/loss",
      "nats a pair",
      "reward/heldout_loss",
      floor=0.0,
      reference=math.log(2),
    ),
  ),
  Panel(
    "Accuracy",
    "Share of ranked pairs that the model puts in the right order; dashed, what choosing the "
    "longer answer would get.",
    curves.reward_accuracy,
  ),
  Panel(
    "Calibration",
    "When the model is p sure of which answer is better, is it right p of the time? On the dotted "
    "line it is; larger points hold more held-out pairs.",
    curves.calibration,
  ),
)

PPO = (
  Panel(
    "Reward model's score",
    "Mean score of sampled answers; each round has its own model, 0 is the trainers' average.",
    Curve("ppo", "objective/scores", "score", "eval/scores"),
  ),
  Panel(
    "KL to SFT",
    "How far the policy has moved, log π(answer) − log π_SFT(answer); the band is one standard "
    "error.",
    Curve("ppo", "objective/kl", "nats a response", "eval/kl"),
  ),
  Panel(
    "Length",
    "Mean length of answers; a rise without a rise of gold is the reward model's taste for length.",
    Curve("ppo", "episode/length", "tokens a response", "eval/length", floor=0.0),
  ),
  Panel(
    "Entropy",
    "How much choice the policy leaves itself at each token; a collapse to 0 ends exploration.",
    Curve("ppo", "policy/entropy", "nats a token", floor=0.0),
  ),
  Panel(
    "Clip fraction",
    "Share of tokens whose probability ratio left the trust region, so that they no longer push.",
    Curve("ppo", "policy/clipfrac", "share of tokens", floor=0.0),
  ),
  Panel(
    "Size of the update",
    "How far one step moves the policy from the one that made its rollouts, as approximate KL.",
    Curve("ppo", "policy/approxkl", "nats a token", floor=0.0),
  ),
  Panel(
    "Critic's error",
    "Mean squared difference between the critic's values and the returns.",
    Curve("ppo", "val/error", "score²", floor=0.0),
  ),
  Panel(
    "Explained variance",
    "How much of the returns' variance the critic foresees: 1 is all, 0 no more than their mean.",
    Curve("ppo", "val/explained_var", "share of variance", reference=0.0),
  ),
  Panel(
    "Answers that end",
    "Share of answers that stop by themselves before the length limit.",
    Curve("ppo", "episode/eos_rate", "share of answers", "eval/eos_rate"),
  ),
)

GOLD = Panel(
  "Gold score against distance",
  "What each policy paid in KL for its gold score; bars are one standard error. A fall to the "
  "right is over-optimisation.",
  curves.gold_against_kl,
)

PANELS = {"sft": SFT, "reward": REWARD, "ppo": PPO}  # by stage


def figure(panels: Sequence[Panel], run: Artifacts, columns: int = 3) -> Figure:
  """The panels as one figure, for a notebook."""
  rows = -(-len(panels) // columns)
  with matplotlib.rc_context(STYLE):
    made = Figure(figsize=(4.3 * columns, 3.1 * rows), layout="constrained")
    made.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    for place, panel in enumerate(panels, start=1):
      ax = made.add_subplot(rows, columns, place)
      panel.draw(ax, run)
      ax.set_title(panel.title, pad=16, fontweight="bold")
  return made


def svg(panel: Panel, run: Artifacts) -> str | None:
  """The panel as an <svg> element that follows the page's width and colours; None without data.

  The colours become CSS variables `--c0`, `--c1`, ..., `--ink` and `--faint`.
  """
  with matplotlib.rc_context(STYLE):
    made = Figure(figsize=(4.3, 2.8), layout="constrained")
    ax = made.add_subplot()
    panel.draw(ax, run)
    if not ax.has_data():
      return None
    made.patch.set_visible(False)
    ax.patch.set_visible(False)
    out = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    made.savefig(out, format="svg", metadata=about)
  text = out.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
  text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', text, count=1)
  # Several of these stand in one page, whose ids must differ.
  own = f"p{zlib.crc32((panel.title + panel.note).encode()):x}-"
  text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{own}", text)
  names = {color: f"--c{i}" for i, color in enumerate(COLORS)}
  names |= {INK: "--ink", FAINT: "--faint", "#ffffff": "--paper"}
  return re.sub("|".join(names), lambda found: f"var({names[found[0]]})", text)
