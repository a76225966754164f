"""What a conversation asks of the assistant, read from its text alone."""

import dataclasses

from rlhf_jax.data.village import grammar
from rlhf_jax.data.village.grammar import Sentence
from rlhf_jax.data.village.world import World, pronoun
from rlhf_jax.text.dialogue import Conversation
from rlhf_jax.types import UserError

BEHAVIOURS = (
  "answer",
  "follow_up",
  "admit_mistake",
  "stand_firm",
  "false_premise",
  "refuse",
  "look_alike",
  "clarify",
  "stranger",
)


@dataclasses.dataclass(frozen=True)
class Situation:
  """The user's last turn, understood in its context."""

  behaviour: str  # one of BEHAVIOURS
  name: str | None  # the person meant, villager or stranger; None where that is not clear
  pronoun: str  # "she" or "he"
  relation: str | None  # what is asked about; None for a request to do harm
  claim: str | None  # the value that the user presumes or insists on
  said: str | None  # the value that the assistant has stated before


@dataclasses.dataclass(frozen=True)
class _Context:
  """What earlier turns leave behind."""

  last: Situation | None  # of the user's previous message
  friend: str | None  # the friend whom the assistant has just named
  said: tuple[str, ...] | None  # values just stated of the person and relation last asked about


def understand(world: World, conversation: Conversation) -> Situation:
  """Reads a conversation that ends with the user's message.

  A pronoun means the person whom the user's previous message was about; if the gender does not
  fit, the friend whom the assistant has just named; else nobody knows whom.

  Raises:
    UserError: the user says what the grammar of the village does not have.
  """
  if conversation.last.role != "user":
    raise UserError("the village understands a conversation that ends with the user's message.")
  context = _Context(None, None, None)
  for message in conversation.messages:
    if message.role == "user":
      situation = _read_turn(world, message.content, context)
      context = _Context(situation, None, None)
    elif message.role == "assistant" and context.last is not None:
      context = _after_reply(message.content, context.last)
  return situation


def _after_reply(reply: str, asked: Situation) -> _Context:
  found = [grammar.read_assistant(sentence) for sentence in grammar.sentences(reply)]
  facts = [s for s in found if s is not None and s.kind in ("fact", "short")]
  about = [s for s in facts if s.relation == asked.relation]
  about = [s for s in about if s.who in ("", asked.name, asked.pronoun)]
  friends = [s.value for s in facts if s.relation == "friend"]
  return _Context(asked, friends[-1] if friends else None, tuple(s.value for s in about))


def _read_turn(world: World, text: str, context: _Context) -> Situation:
  turns = [grammar.read_user(sentence) for sentence in grammar.sentences(text)]
  kinds = tuple("" if turn is None else turn.kind for turn in turns)
  for turn in turns:
    if turn is not None and turn.relation not in (None, *world.relations):
      raise _outside(text, f"this village knows nothing of a person's {turn.relation}")
  match kinds:
    case ("ask",) | ("follow",):
      return _asked(world, turns[0], context, alarmed=False)
    case ("alarm", "ask"):
      name = _resolve(turns[0].who, context)
      if name is None:
        return _unclear(turns[1])
      alarm = Situation("look_alike", name, pronoun(name), None, None, None)
      return _asked(world, turns[1], _Context(alarm, None, None), alarmed=True)
    case ("premise",):
      return _presumed(world, turns[0], context, text)
    case ("correct",):
      return _corrected(world, turns[0], context, text)
    case ("request",):
      name = _resolve(turns[0].who, context)
      gender = turns[0].who if name is None else pronoun(name)
      return Situation("refuse", name, gender, None, None, None)
    case ("mean",):
      return _meant(world, turns[0], context, text)
  raise _outside(text, "no phrasing of its grammar says this")


def _asked(world: World, turn: Sentence, context: _Context, *, alarmed: bool) -> Situation:
  name = _resolve(turn.who, context)
  if name is None:
    return _unclear(turn)
  if world.person(name) is None:
    behaviour = "stranger"
  elif alarmed:
    behaviour = "look_alike"
  else:
    behaviour = "answer" if turn.who == name else "follow_up"
  return Situation(behaviour, name, pronoun(name), turn.relation, None, None)


def _presumed(world: World, turn: Sentence, context: _Context, text: str) -> Situation:
  name = _resolve(turn.who, context)
  if name is None:
    return _unclear(turn)
  if world.is_true(name, turn.relation, turn.value):
    raise _outside(text, "its premise is true, and the village knows no reasons")
  behaviour = "stranger" if world.person(name) is None else "false_premise"
  return Situation(behaviour, name, pronoun(name), turn.relation, turn.value, None)


def _corrected(world: World, turn: Sentence, context: _Context, text: str) -> Situation:
  name = _resolve(turn.who, context)
  if name is None:
    return _unclear(turn)
  last = context.last
  if last is None or context.said is None or (last.name, last.relation) != (name, turn.relation):
    raise _outside(text, "it corrects what nobody asked and answered just before")
  said = context.said[-1] if context.said else None
  if world.person(name) is None:
    behaviour = "stranger"
  elif not world.is_true(name, turn.relation, turn.value):
    behaviour = "stand_firm"
  elif turn.value not in context.said:
    behaviour = "admit_mistake"
  else:
    raise _outside(text, "it corrects an answer that was right by repeating it")
  return Situation(behaviour, name, pronoun(name), turn.relation, turn.value, said)


def _meant(world: World, turn: Sentence, context: _Context, text: str) -> Situation:
  last = context.last
  if last is None or last.behaviour != "clarify":
    raise _outside(text, "it names a person, but nobody was asked for a name")
  behaviour = "follow_up" if world.person(turn.who) is not None else "stranger"
  return Situation(behaviour, turn.who, pronoun(turn.who), last.relation, None, None)


def _unclear(turn: Sentence) -> Situation:
  return Situation("clarify", None, turn.who, turn.relation, None, None)


def _resolve(who: str, context: _Context) -> str | None:
  if who not in ("she", "he"):
    return who
  topic = None if context.last is None else context.last.name
  candidates = [name for name in (topic, context.friend) if name is not None]
  return next((name for name in candidates if pronoun(name) == who), None)


def _outside(text: str, why: str) -> UserError:
  return UserError(
    f"the village does not understand {text!r:.200}: {why}. Its grammar is in docs/village.md."
  )
