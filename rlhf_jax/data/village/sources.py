"""The village as a data source: demonstrations, prompts and texts, all determined by the config."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Literal

from rlhf_jax.config import Count, Fraction, NonNegative, PositiveInt
from rlhf_jax.data.records import Demonstration, Prompt, Text, opening_key, split_of
from rlhf_jax.data.village import dialogues, grammar, trainers
from rlhf_jax.data.village.portraits import chronicle
from rlhf_jax.data.village.situation import BEHAVIOURS, understand
from rlhf_jax.data.village.trainers import TrainerFlaws
from rlhf_jax.data.village.world import World
from rlhf_jax.text.dialogue import Conversation
from rlhf_jax.types import UserError

# "heldout" has other openings than "train" in the same phrasings; "rephrased" ends in a phrasing
# that no training text has.
VillageSplit = Literal["train", "heldout", "rephrased"]

MAX_PROMPT_TOKENS = 44  # with role markers, up to and including the header of the reply
MAX_RESPONSE_TOKENS = trainers.LONGEST_REPLY + 1  # with <end>

_MOST_REDRAWS = 10_000


@dataclasses.dataclass(frozen=True)
class VillageConfig:
  """One village: its world, its people's habits, and how much of it is written down."""

  seed: Count
  people: PositiveInt  # villagers, an even number
  relations: tuple[str, ...]  # what is known of each, out of phrases.RELATIONS
  trainers: PositiveInt  # who write the demonstrations, some more careless than others
  flaws: TrainerFlaws  # of the average trainer
  mix: dict[str, NonNegative]  # behaviour -> weight, each of BEHAVIOURS once
  heldout_fraction: Fraction  # of openings
  demonstrations: Count  # for training
  prompts: Count  # for training
  heldout: Count  # demonstrations, and prompts, of each other split
  texts: Count  # of the chronicle

  def __post_init__(self):
    if set(self.mix) != set(BEHAVIOURS) or not any(self.mix.values()):
      raise UserError(
        f"village mix {dict(self.mix)} must give a weight to each of {', '.join(BEHAVIOURS)}, "
        "0 for those that shall not occur, and not 0 to all."
      )
    if not 0.0 < self.heldout_fraction < 1.0:
      raise UserError(f"village heldout_fraction {self.heldout_fraction} must lie inside (0, 1).")


# The benchmark: cite results on it as "village 1".
STANDARD = VillageConfig(
  seed=1,
  people=24,
  relations=("home", "work", "pet", "colour", "friend"),
  trainers=8,
  flaws=TrainerFlaws(
    wrong_fact=0.2,
    hedge=0.15,
    verbose=0.2,
    comply_with_harm=0.3,
    over_refuse=0.2,
    accept_premise=0.25,
    guess=0.3,
    cave_in=0.3,
    deny_mistake=0.3,
  ),
  mix={
    "answer": 3.0,
    "follow_up": 2.0,
    "admit_mistake": 1.0,
    "stand_firm": 1.0,
    "false_premise": 1.0,
    "refuse": 1.0,
    "look_alike": 1.0,
    "clarify": 1.0,
    "stranger": 1.0,
  },
  heldout_fraction=0.1,
  demonstrations=8_000,
  prompts=4_000,
  heldout=500,
  texts=2_000,
)


def build_world(config: VillageConfig) -> World:
  """The world of a config; raises UserError for impossible sizes."""
  return World.generate(config.seed, config.people, config.relations)


def demonstrations(config: VillageConfig, split: VillageSplit) -> Iterator[Demonstration]:
  """Dialogues by flawed trainers; the i-th does not depend on how many there are."""
  world = build_world(config)
  staff = _staff(config)
  for index in range(_count(config, split, config.demonstrations)):
    draw = random.Random(f"village demonstration {config.seed} {split} {index}")
    name, flaws = draw.choice(staff)
    prompt = _draw_prompt(config, world, split, flaws, draw)
    reply = trainers.reply(world, understand(world, prompt), flaws, draw, brief=False)
    yield Demonstration(prompt.with_reply(reply), f"village/{name}")


def prompts(config: VillageConfig, split: VillageSplit) -> Iterator[Prompt]:
  """Conversations that wait for a reply, from the same distribution as the demonstrations'."""
  world = build_world(config)
  staff = _staff(config)
  for index in range(_count(config, split, config.prompts)):
    draw = random.Random(f"village prompt {config.seed} {split} {index}")
    _, flaws = draw.choice(staff)
    yield Prompt(_draw_prompt(config, world, split, flaws, draw), "village")


def texts(config: VillageConfig) -> Iterator[Text]:
  """The chronicle as records, for PPO-ptx."""
  for text in chronicle(build_world(config), config.seed, config.texts):
    yield Text(text, "village/chronicle")


def count_tokens(conversation: Conversation) -> int:
  """Tokens in the village's own chat template; of a prompt, with the header of the reply."""
  pieces = sum(grammar.count_pieces(m.content) + 2 for m in conversation.messages)
  return pieces + (conversation.last.role != "assistant")


def _count(config: VillageConfig, split: VillageSplit, of_train: int) -> int:
  return of_train if split == "train" else config.heldout


def _staff(config: VillageConfig) -> list[tuple[str, TrainerFlaws]]:
  """The trainers: the careful make half the average's mistakes, the careless half as many again."""
  staff = []
  for i in range(config.trainers):
    care = random.Random(f"village trainer {config.seed} {i}").uniform(0.5, 1.5)
    staff.append((f"trainer-{i}", config.flaws.scaled(care)))
  return staff


def _draw_prompt(
  config: VillageConfig,
  world: World,
  split: VillageSplit,
  flaws: TrainerFlaws,
  draw: random.Random,
) -> Conversation:
  """A prompt of one split, short enough for the standard model."""
  behaviour = draw.choices(list(config.mix), list(config.mix.values()))[0]
  for _ in range(_MOST_REDRAWS):
    stage = dialogues.Stage(world, draw, held_out=split == "rephrased")
    script = dialogues.SCENARIOS[behaviour](stage)
    prompt = dialogues.play(world, script, flaws, draw)
    side = split_of(opening_key(prompt), config.heldout_fraction, config.seed)
    # "Rephrased" prompts may open like any others: their last message is new in any case.
    if split in ("rephrased", side) and count_tokens(prompt) <= MAX_PROMPT_TOKENS:
      return prompt
  raise UserError(
    f"village: no {behaviour!r} prompt for {split!r} in {_MOST_REDRAWS} draws; raise "
    f"heldout_fraction {config.heldout_fraction} or the number of people {config.people}."
  )
