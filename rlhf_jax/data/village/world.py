"""The closed world: people and what is true about them, drawn from a seed."""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Literal

from rlhf_jax.data.village import phrases
from rlhf_jax.types import UserError

Pronoun = Literal["she", "he"]

MIN_STRANGERS = 8


@dataclasses.dataclass(frozen=True)
class Person:
  """A villager: the true value of every relation, in the order of `World.relations`."""

  name: str
  pronoun: Pronoun
  facts: tuple[tuple[str, str], ...]  # (relation, value)

  def __getitem__(self, relation: str) -> str:
    return dict(self.facts)[relation]


@dataclasses.dataclass(frozen=True)
class World:
  """Who lives in the village; names outside of it are strangers."""

  people: tuple[Person, ...]  # by name
  relations: tuple[str, ...]

  @classmethod
  def generate(cls, seed: int, people: int, relations: Sequence[str]) -> "World":
    """Draws `people` villagers, half of them women, and their facts.

    The values of a relation are dealt out like cards, so that none is more common than another by
    more than one person and the base rate tells nothing. Friends come in pairs.

    Raises:
      UserError: an odd number of people, more than the names allow, or an unknown relation.
    """
    most = len(phrases.NAMES) - MIN_STRANGERS
    if people % 2 or not 4 <= people <= most:
      raise UserError(
        f"village people {people}: friends come in pairs and {MIN_STRANGERS} of the "
        f"{len(phrases.NAMES)} names are for strangers; use an even number from 4 to {most}."
      )
    unknown = [r for r in relations if r not in phrases.RELATIONS]
    if unknown or not relations or len(set(relations)) < len(relations):
      raise UserError(
        f"village relations {tuple(relations)}: choose one or more of "
        f"{', '.join(phrases.RELATIONS)}, each once."
      )
    draw = random.Random(f"village world {seed}")
    women = draw.sample(phrases.WOMEN, people // 2)
    men = draw.sample(phrases.MEN, people // 2)
    names = draw.sample(women + men, people)
    # Every relation is drawn, used or not: choosing fewer relations leaves the others as they are.
    values = {r: _deal(draw, names, r) for r in phrases.RELATIONS}
    return cls(
      tuple(
        Person(name, pronoun(name), tuple((r, values[r][name]) for r in relations))
        for name in sorted(names)
      ),
      tuple(relations),
    )

  def person(self, name: str) -> Person | None:
    """The villager of that name, or None for a stranger."""
    return self._by_name.get(name)

  @functools.cached_property
  def strangers(self) -> tuple[str, ...]:
    """Names that nobody in the village has."""
    return tuple(name for name in phrases.NAMES if name not in self._by_name)

  @functools.cached_property
  def _by_name(self) -> dict[str, Person]:
    return {person.name: person for person in self.people}

  def values(self, relation: str) -> tuple[str, ...]:
    """The values that the relation takes in this world."""
    return tuple(sorted({person[relation] for person in self.people}))

  def is_true(self, name: str, relation: str, value: str) -> bool:
    """Whether a statement holds; nothing is true of a stranger, who has no facts."""
    person = self.person(name)
    return person is not None and person[relation] == value


def pronoun(name: str) -> Pronoun:
  """How one speaks of a person of that name, villager or stranger."""
  return "she" if name in phrases.WOMEN else "he"


def _deal(draw: random.Random, names: Sequence[str], relation: str) -> dict[str, str]:
  if relation == "friend":
    pairs = zip(names[::2], names[1::2])
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}
  values = phrases.RELATIONS[relation].values
  deck = [values[i % len(values)] for i in range(len(names))]
  draw.shuffle(deck)
  return dict(zip(names, deck))
