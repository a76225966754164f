"""Scenarios: what users say, so that each behaviour is called for.

A script is what is said in turn, the user first and last. `None` stands for a reply that a trainer
writes; a text in its place is a reply that the scenario needs as it is.
"""

import dataclasses
import random
from collections.abc import Callable

from rlhf_jax.data.village import answers, grammar, trainers
from rlhf_jax.data.village.situation import Situation, understand
from rlhf_jax.data.village.trainers import TrainerFlaws
from rlhf_jax.data.village.world import Person, World
from rlhf_jax.text.dialogue import Conversation

Script = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
  """Where a script is written: the world, the random numbers, and which phrasings may be used."""

  world: World
  draw: random.Random
  held_out: bool  # of the last user message; earlier ones are in familiar phrasings

  def person(self) -> Person:
    return self.draw.choice(self.world.people)

  def relation(self) -> str:
    return self.draw.choice(self.world.relations)

  def wrong(self, person: Person, relation: str) -> str:
    """A value that is not true of the person."""
    values = self.world.values(relation)
    return self.draw.choice([v for v in values if v not in (person[relation], person.name)])

  def say(self, kind: str, relation: str | None, name: str, *, value: str = "", **how: bool) -> str:
    """A phrasing of the user's last message."""
    return self._fill(kind, relation, name, value, self.held_out, **how)

  def say_before(self, kind: str, relation: str | None, name: str, **how: bool) -> str:
    """A phrasing of an earlier message."""
    return self._fill(kind, relation, name, "", False, **how)

  def _fill(self, kind, relation, name, value, held_out, *, by_name=True) -> str:
    template = self.draw.choice(grammar.templates(kind, relation, held_out))
    return template.fill(name, value=value, by_name=by_name)


def answer(stage: Stage) -> Script:
  """A direct question, sometimes after one about somebody else."""
  person, relation = stage.person(), stage.relation()
  question = stage.say("ask", relation, person.name)
  if stage.draw.random() < 0.75:
    return (question,)
  return (stage.say_before("ask", stage.relation(), stage.person().name), None, question)


def follow_up(stage: Stage) -> Script:
  """A question that only the earlier turns explain."""
  person, relation = stage.person(), stage.relation()
  if stage.draw.random() < 0.25 and not stage.held_out:
    meant = stage.say("mean", None, person.name)
    return (stage.say_before("ask", relation, person.name, by_name=False), _which(stage), meant)
  # Not after the friend, who could then be the one whom "she" means.
  earlier = [r for r in stage.world.relations if r not in (relation, "friend")] or [relation]
  stage.draw.shuffle(earlier)
  turns = [stage.say_before("ask", earlier[0], person.name), None]
  if len(earlier) > 1 and stage.draw.random() < 0.3:
    turns += [stage.say_before("follow", earlier[1], person.name, by_name=False), None]
  kind = "ask" if stage.draw.random() < 0.25 else "follow"
  return (*turns, stage.say(kind, relation, person.name, by_name=False))


def admit_mistake(stage: Stage) -> Script:
  """The assistant was wrong, and the user says what is right."""
  person, relation = stage.person(), stage.relation()
  return _correction(stage, person, relation, stage.wrong(person, relation), person[relation])


def stand_firm(stage: Stage) -> Script:
  """The assistant was right, and the user says that it was not."""
  person, relation = stage.person(), stage.relation()
  return _correction(stage, person, relation, person[relation], stage.wrong(person, relation))


def false_premise(stage: Stage) -> Script:
  """A question that takes for granted what is not so."""
  person, relation = stage.person(), stage.relation()
  return (stage.say("premise", relation, person.name, value=stage.wrong(person, relation)),)


def refuse(stage: Stage) -> Script:
  """A request for help with harm, sometimes after a harmless question."""
  person = stage.person()
  request = stage.say("request", None, person.name)
  if stage.draw.random() < 0.75:
    return (request,)
  return (stage.say_before("ask", stage.relation(), person.name), None, request)


def look_alike(stage: Stage) -> Script:
  """A harmless question in the words of a harmful request."""
  person = stage.person()
  alarm = stage.say("alarm", None, person.name)
  return (f"{alarm} {stage.say('ask', stage.relation(), person.name, by_name=False)}",)


def clarify(stage: Stage) -> Script:
  """ "She" without anybody whom it could mean."""
  person, relation = stage.person(), stage.relation()
  question = stage.say("ask", relation, person.name, by_name=False)
  if stage.draw.random() < 0.5:
    return (question,)
  others = [p for p in stage.world.people if p.pronoun != person.pronoun]
  other = stage.draw.choice(others)
  # A friend named by the assistant could be the one who is meant.
  before = stage.draw.choice([r for r in stage.world.relations if r != "friend"] or [relation])
  question = stage.say("follow", relation, person.name, by_name=False)
  return (stage.say_before("ask", before, other.name), None, question)


def stranger(stage: Stage) -> Script:
  """A question about somebody who is not of the village."""
  name = stage.draw.choice(stage.world.strangers)
  return (stage.say("ask", stage.relation(), name),)


SCENARIOS: dict[str, Callable[[Stage], Script]] = {
  scenario.__name__: scenario
  for scenario in (
    answer, follow_up, admit_mistake, stand_firm, false_premise, refuse, look_alike, clarify,
    stranger,
  )
}  # fmt: skip


def play(world: World, script: Script, flaws: TrainerFlaws, draw: random.Random) -> Conversation:
  """The conversation up to the user's last message; a trainer with these flaws takes part."""
  conversation = Conversation.of(("user", script[0]))
  for said, asked in zip(script[1::2], script[2::2], strict=True):
    if said is None:
      said = trainers.reply(world, understand(world, conversation), flaws, draw, brief=True)
    conversation = conversation.with_reply(said).with_message("user", asked)
  return conversation


def _correction(stage: Stage, person: Person, relation: str, said: str, claim: str) -> Script:
  question = stage.say_before("ask", relation, person.name)
  situation = Situation("answer", person.name, person.pronoun, relation, None, None)
  stated = stage.draw.choice(answers.with_value(situation, said))
  by_name = stage.draw.random() < 0.5
  correction = stage.say("correct", relation, person.name, value=claim, by_name=by_name)
  return (question, stated, correction)


def _which(stage: Stage) -> str:
  return stage.draw.choice([t.fill() for t in grammar.templates("clarify") if "{" not in t.text])
