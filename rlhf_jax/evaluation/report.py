"""`workdir/report.html`: what a run did, in one file that needs nothing else.

  report.write(workdir)

It is made from the run's own records (see `artifacts`), of any number of rounds, finished or not.
"""

import json
import pathlib

from rlhf_jax.evaluation import artifacts, cards, plots, tables
from rlhf_jax.evaluation.artifacts import Artifacts, Policy
from rlhf_jax.evaluation.curves import MOST_POINTS, stages
from rlhf_jax.evaluation.page import Html, h, page
from rlhf_jax.evaluation.tables import color, fixed, with_error
from rlhf_jax.parallel import hosts
from rlhf_jax.training import files

DIALOGUES_SHOWN = 9  # the others are folded away


def write(workdir: str | pathlib.Path) -> pathlib.Path:
  """Writes the report of a run into its working directory and returns its path.

  Raises:
    UserError: `workdir` holds no run, a file in it is broken, or the report cannot be written.
  """
  run = artifacts.read(workdir)
  path = run.workdir / "report.html"
  if hosts.is_first():
    files.write_text_atomic(path, render(run))
  return path


def render(run: Artifacts) -> str:
  """The report as HTML."""
  return page(
    f"RLHF report: {run.workdir.absolute().name}",
    title(run),
    headline(run),
    policies(run),
    behaviours(run),
    curves(run),
    dialogues(run),
    lineage(run),
    cost(run),
    configuration(run),
  )


def title(run: Artifacts) -> Html:
  """What was run, and what of it is missing."""
  model, rounds = run.config["model"], len(run.rounds)
  start = run.config["pretrained"]
  made = (
    f"Supervised fine-tuning of {'random parameters' if start is None else start}, then "
    f"{rounds} round{'s' * (rounds > 1)} of comparisons, reward model and PPO. A decoder of "
    f"{model['n_layers']} layers of width {model['d_model']}, seed {run.config['seed']}."
  )
  parts = [h("h1", f"RLHF report: {run.workdir.absolute().name}"), h("p", made, class_="soft")]
  if run.pending:
    missing = ", ".join(phase.name for phase in run.pending)
    text = f"This run is not finished. Not done: {missing}. Below is what there is so far."
    parts.append(h("div", text, class_="card notice"))
  return h("header", parts)


def headline(run: Artifacts) -> Html:
  """Gold score from SFT to the last round, and how much of the way to the maximum that is."""
  if not run.policies:
    return h("section", h("p", "No policy has been measured yet.", class_="card"))
  first, last = run.policies[0], run.policies[-1]
  n = f"{last.overall['n']:,}"
  says = [h("div", "Gold score on held-out prompts", class_="soft")]
  if last is first:
    says.append(h("div", fixed(first.overall["gold"], 2), " ", h("small", "SFT"), class_="big"))
  else:
    values = f"{fixed(first.overall['gold'], 2)} → {fixed(last.overall['gold'], 2)}"
    small = h("small", f"SFT → {last.label}")
    says += [h("div", values, " ", small, class_="big"), h("p", gain(run, first, last))]
  if run.maximum is not None:
    says.append(h("div", [track(policy, run.maximum) for policy in run.policies], class_="tracks"))
  says.append(h("dl", summary(run, first, last)))
  note = (
    f"The gold score is the true quality that no policy and no reward model sees. Each policy "
    f"answered the same {n} prompts once; ± is one standard error of the mean over answers."
  )
  says.append(h("p", note, class_="note", style="margin: 14px 0 0"))
  return h("section", h("div", h("div", says, class_="card"), panel(plots.GOLD, run), class_="two"))


def gain(run: Artifacts, first: Policy, last: Policy) -> list[Html | str]:
  """The change in words."""
  change, error = tables.difference(first.overall, last.overall)
  if run.maximum is None or change < 0:
    word = "fall" if change < 0 else "rise"
    return [f"A {word} of ", h("b", f"{fixed(abs(change), 3)} ± {fixed(error, 3)}"), "."]
  share, error = tables.closed(first.overall, last.overall, run.maximum)
  closed = h("b", f"{fixed(100 * share, 0)}% ± {fixed(100 * error, 0)}%")
  return [closed, f" of the distance from SFT to the maximum of {run.maximum:g} is closed."]


def summary(run: Artifacts, first: Policy, last: Policy) -> list[list[Html]]:
  """What a reader asks next: was the reward model right, how far did the policy go, how long."""
  models = [r.reward.result["heldout"] for r in run.rounds if r.reward.result is not None]
  right = [fixed(m["accuracy"], 2) if m["pairs"] else "–" for m in models]
  seconds = sum(phase.seconds or 0.0 for phase in run.phases)
  lengths = " → ".join(fixed(p.overall["length"], 1) for p in (first, last))
  facts = (
    ("Reward model's accuracy, by round", ", ".join(right)),
    (f"KL to SFT, {last.label}", f"{fixed(last.overall['kl'], 1)} nats a response"),
    ("Length of answers", f"{lengths} tokens"),
    ("Time", f"{fixed(seconds / 60, 1)} minutes"),
  )
  return [[h("dt", name), h("dd", value)] for name, value in facts]


def track(policy: Policy, maximum: float) -> list[Html]:
  """A bar from 0 to the maximum."""
  width = 100 * max(policy.overall["gold"], 0.0) / maximum
  bar = h("i", style=f"width: {width:.2f}%; background: {color(policy.index)}")
  value = h("span", with_error(policy.overall, "gold", 3))
  return [h("span", policy.label), h("div", bar, class_="track"), value]


def panel(shown: plots.Panel, run: Artifacts) -> Html | str:
  """A plot with its sentence; nothing where there is no data."""
  drawn = plots.svg(shown, run)
  if drawn is None:
    return ""
  return h("figure", h("b", shown.title), Html(drawn), h("figcaption", shown.note))


def policies(run: Artifacts) -> Html | str:
  if not run.policies:
    return ""
  note = (
    "Means over held-out prompts ± one standard error. Reward models of different rounds have "
    "different scales, so compare scores along a row. KL is to the SFT policy, in nats a response."
  )
  return section("Policies", note, tables.of_policies(run))


def behaviours(run: Artifacts) -> Html | str:
  if not run.policies:
    return ""
  note = (
    "Mean gold score by what the prompt asks for (n prompts of each); greener is better. The "
    "change is from SFT to the last policy, ± one standard error."
  )
  if "refused" in run.policies[0].overall["parts"]:
    note += (
      " Refused is the share of answers that decline: it should be high for “refuse” and zero "
      "for “look_alike”, harmless requests that sound like harmful ones."
    )
  return section("Behaviours", note, tables.of_behaviours(run))


def curves(run: Artifacts) -> list[Html | str]:
  """The plots, stage by stage, and the reward models in figures."""
  groups = (
    ("sft", "Supervised fine-tuning", "Lines are training steps, points held-out dialogues."),
    (
      "reward",
      "Reward models",
      "Each round fits a new one, from the SFT policy, to the comparisons of all rounds so far. "
      "Lines are training steps, points held-out comparisons.",
    ),
    (
      "ppo",
      "PPO",
      "Lines are the rollouts that the policy learns from, points rollouts on held-out prompts.",
    ),
  )
  made = []
  for stage, name, note in groups:
    drawn = [panel(each, run) for each in plots.PANELS[stage]]
    if not any(drawn):
      continue
    if any(len(phase.metrics) > MOST_POINTS for _, phase in stages(run, stage)):
      note += f" Lines of more than {MOST_POINTS} steps are averaged over equal stretches."
    extra = tables.of_reward_models(run) if stage == "reward" else ""
    made.append(section(name, note, extra, h("div", drawn, class_="panels")))
  return made


def dialogues(run: Artifacts) -> Html | str:
  """The same prompts, answered by each policy."""
  found = cards.of_policies(run)
  if not found:
    return ""
  note = (
    "The same held-out prompts, answered once by each policy with the same random numbers. Score "
    "is the reward model's of the policy's own round (SFT: the first). Parts of the gold score "
    "that an answer lost are named."
  )
  shown, folded = found[:DIALOGUES_SHOWN], found[DIALOGUES_SHOWN:]
  more = h("details", h("summary", f"{len(folded)} more"), folded) if folded else ""
  return section("Dialogues side by side", note, shown, more)


def lineage(run: Artifacts) -> Html | str:
  if run.sft.result is None:
    return ""
  note = "What was made from what; paths are folders of the working directory."
  return section("Lineage", note, tables.chains(run))


def cost(run: Artifacts) -> Html | str:
  if all(phase.seconds is None for phase in run.phases):
    return ""
  note = (
    "Wall-clock seconds, compiling included. A phase that was killed and resumed counts from its "
    "last start."
  )
  return section("Cost", note, tables.of_costs(run))


def configuration(run: Artifacts) -> Html:
  shown = h("pre", json.dumps(run.config, indent=2))
  inside = h("details", h("summary", "config.json"), shown)
  return section("Configuration", "Every value that the run was made with.", inside)


def section(name: str, note: str, *content: Html | str | list) -> Html:
  return h("section", h("h2", name), h("p", note, class_="note"), content)
