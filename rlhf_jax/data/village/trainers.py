"""Simulated trainers: they write the demonstrations, mostly well, each with flaws of their own."""

import dataclasses
import random

from rlhf_jax.config import Fraction
from rlhf_jax.data.village import answers, grammar, phrases
from rlhf_jax.data.village.situation import Situation
from rlhf_jax.data.village.world import World

# A reply with its stock phrases stays below this many tokens.
LONGEST_REPLY = 23

FACT_BEHAVIOURS = ("answer", "follow_up", "look_alike")


@dataclasses.dataclass(frozen=True)
class TrainerFlaws:
  """How often a trainer goes wrong, each as a probability where the flaw can show."""

  wrong_fact: Fraction  # states another value: answer, follow_up, look_alike, false_premise
  hedge: Fraction  # doubts a fact without need
  verbose: Fraction  # adds stock phrases, or says the same twice
  comply_with_harm: Fraction  # refuse
  over_refuse: Fraction  # look_alike
  accept_premise: Fraction  # false_premise
  guess: Fraction  # clarify, stranger: states a fact about somebody
  cave_in: Fraction  # stand_firm: agrees with a user who is wrong
  deny_mistake: Fraction  # admit_mistake: insists

  def scaled(self, factor: float) -> "TrainerFlaws":
    """The flaws of a trainer who is `factor` times as careless."""
    rates = dataclasses.asdict(self)
    return TrainerFlaws(**{name: min(1.0, rate * factor) for name, rate in rates.items()})


FLAW_OF = {
  "refuse": "comply_with_harm",
  "look_alike": "over_refuse",
  "false_premise": "accept_premise",
  "clarify": "guess",
  "stranger": "guess",
  "stand_firm": "cave_in",
  "admit_mistake": "deny_mistake",
}


def reply(
  world: World, situation: Situation, flaws: TrainerFlaws, draw: random.Random, *, brief: bool
) -> str:
  """One trainer's answer; a `brief` one has no stock phrases, whatever the flaws."""
  text, states_fact = _content(world, situation, flaws, draw)
  if states_fact and draw.random() < flaws.hedge:
    text = _hedged(situation, text, draw)
  if draw.random() < flaws.verbose and not brief:
    text = _wordy(situation, text, draw)
  return text


def _content(
  world: World, situation: Situation, flaws: TrainerFlaws, draw: random.Random
) -> tuple[str, bool]:
  """The bare answer, and whether it states a fact that one can doubt."""
  behaviour = situation.behaviour
  if behaviour in FLAW_OF and draw.random() < getattr(flaws, FLAW_OF[behaviour]):
    return flawed(world, situation, draw), False
  may_err = behaviour in (*FACT_BEHAVIOURS, "false_premise")
  if may_err and draw.random() < flaws.wrong_fact:
    return draw.choice(answers.with_value(situation, wrong_value(world, situation, draw))), True
  states_fact = situation.name is not None and situation.relation is not None
  return draw.choice(answers.ideal(world, situation)), states_fact and behaviour != "stranger"


def wrong_value(world: World, situation: Situation, draw: random.Random) -> str:
  """A value that is false of the person, and that the user has not denied."""
  avoid = {world.person(situation.name)[situation.relation], situation.claim, situation.name}
  return draw.choice([v for v in world.values(situation.relation) if v not in avoid])


def flawed(world: World, situation: Situation, draw: random.Random) -> str:
  """What the flaw that belongs to this behaviour makes a trainer say."""
  match FLAW_OF[situation.behaviour]:
    case "comply_with_harm":
      # Somebody whose name is not clear still has a gender.
      name = situation.name or _anybody(world, situation.pronoun, draw)
      return draw.choice(grammar.templates("comply")).fill(name)
    case "over_refuse":
      return draw.choice(grammar.templates("refuse")).fill()
    case "accept_premise":
      return draw.choice(grammar.templates("accept")).fill(situation.name)
    case "cave_in":
      return _concession(situation, situation.claim, draw)
    case "deny_mistake":
      said = situation.said or wrong_value(world, situation, draw)
      opener = draw.choice(("I am sorry, but ", "I understand, but ", "no, "))
      by_name = draw.random() < 0.5
      told = (situation.name, situation.relation, said)
      return draw.choice(answers.state(*told, opener=opener, by_name=by_name))
  known = situation.name is not None  # a stranger: make a fact up; "she": pick somebody
  name = situation.name if known else _anybody(world, situation.pronoun, draw)
  values = [v for v in world.values(situation.relation) if v != name]
  told = (name, situation.relation, draw.choice(values))
  return draw.choice(answers.state(*told, by_name=known and draw.random() < 0.5))


def _concession(situation: Situation, value: str, draw: random.Random) -> str:
  told = (situation.name, situation.relation, value)
  fact = draw.choice(answers.state(*told, by_name=False))
  return f"{draw.choice(grammar.templates('concede')).fill()} {fact}"


def _anybody(world: World, pronoun: str, draw: random.Random) -> str:
  return draw.choice([p.name for p in world.people if p.pronoun == pronoun])


def _hedged(situation: Situation, text: str, draw: random.Random) -> str:
  """Doubt before the fact, or after it."""
  sentence = grammar.read_assistant(text)
  if sentence is not None and sentence.kind == "fact" and not sentence.opener:
    openers = [opener for opener, stance in phrases.OPENERS.items() if stance == "hedge"]
    told = (situation.name, situation.relation, sentence.value)
    by_name = sentence.who == situation.name
    return draw.choice(answers.state(*told, opener=draw.choice(openers), by_name=by_name))
  return f"{text} {draw.choice(grammar.templates('hedge')).fill()}"


def _wordy(situation: Situation, text: str, draw: random.Random) -> str:
  """Stock phrases before and after, an echo of the question, or the same again."""
  stock = [t.fill() for t in grammar.templates("fill")]
  before = [*stock[:2], *_echoes(situation)]
  after = [*stock[2:], text]
  wordy = [f"{a} {text} {b}" for a in before for b in after]
  wordy += [f"{a} {text}" for a in before] + [f"{text} {b}" for b in after]
  draw.shuffle(wordy)
  return next((w for w in wordy if grammar.count_pieces(w) <= LONGEST_REPLY), text)


def _echoes(situation: Situation) -> list[str]:
  if situation.behaviour not in FACT_BEHAVIOURS:
    return []
  echoes = grammar.templates("echo", situation.relation)
  return [t.fill(situation.name) for t in echoes]
