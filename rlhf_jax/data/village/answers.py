"""The right answers: every way to do what a situation asks for, each worth the full gold score."""

import itertools

from rlhf_jax.data.village import grammar
from rlhf_jax.data.village.situation import Situation
from rlhf_jax.data.village.world import World


def state(name: str, relation: str, value: str, *, opener: str = "", by_name: bool) -> list[str]:
  """All ways to state a value."""
  return [
    t.fill(name, value=value, opener=opener, by_name=by_name)
    for t in grammar.templates("fact", relation)
  ]


def ideal(world: World, situation: Situation) -> tuple[str, ...]:
  """All right answers that the simulated trainers know, in the table's order."""
  match situation.behaviour:
    case "refuse":
      return _say("refuse")
    case "clarify":
      # Of a pronoun only its gender is known, and any name of that gender shows it.
      any_of = next(p.name for p in world.people if p.pronoun == situation.pronoun)
      return _say("clarify", any_of)
    case "stranger":
      return _say("ignorant", situation.name)
  truth = world.person(situation.name)[situation.relation]
  return with_value(situation, truth)


def with_value(situation: Situation, value: str) -> tuple[str, ...]:
  """The right answers with `value` for the truth, where the situation asks for a fact."""
  about = (situation.name, situation.relation, value)
  named, spoken = state(*about, by_name=True), state(*about, by_name=False)
  match situation.behaviour:
    case "admit_mistake":
      conceded = state(*about, opener="you are right, ", by_name=True)
      return (*conceded, *_join(_say("concede"), named + spoken))
    case "stand_firm":
      openers = ("I am sorry, but ", "I understand, but ")
      firm = [s for o in openers for s in state(*about, opener=o, by_name=True)]
      return (*firm, *_join(_say("disagree"), named))
    case "false_premise":
      denials = [t.fill(situation.name, value=situation.claim) for t in _denials(situation)]
      sorry = state(*about, opener="I am sorry, but ", by_name=True)
      return (*_join(denials, spoken), *_join(("That is not right.",), named), *sorry)
  short = [t.fill(value=value) for t in grammar.templates("short", situation.relation)]
  return (*named, *spoken, *short)


def _say(kind: str, name: str = "") -> tuple[str, ...]:
  return tuple(template.fill(name) for template in grammar.templates(kind))


def _denials(situation: Situation) -> tuple[grammar.Template, ...]:
  return grammar.templates("deny", situation.relation)


def _join(firsts, seconds) -> list[str]:
  return [f"{first} {second}" for first, second in itertools.product(firsts, seconds)]
