"""Plain text about the world, for the language-model loss that PPO mixes in (PPO-ptx)."""

import random
from collections.abc import Iterator

from rlhf_jax.data.village import answers
from rlhf_jax.data.village.world import World

SENTENCES_PER_TEXT = (2, 4)


def chronicle(world: World, seed: int, count: int) -> Iterator[str]:
  """Yields `count` portraits: a few true sentences about one person.

  "Alice lives in the mill. She has a goat. Her friend is Bob."
  """
  for index in range(count):
    draw = random.Random(f"village chronicle {seed} {index}")
    person = draw.choice(world.people)
    most = min(SENTENCES_PER_TEXT[1], len(world.relations))
    chosen = draw.sample(world.relations, draw.randint(min(SENTENCES_PER_TEXT[0], most), most))
    sentences = [
      draw.choice(answers.state(person.name, r, person[r], by_name=place == 0))
      for place, r in enumerate(chosen)
    ]
    yield " ".join(sentences)
