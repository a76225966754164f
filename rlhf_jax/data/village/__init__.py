"""The village: a closed world in which every answer can be checked (docs/village.md).

world = village.build_world(village.STANDARD)
for record in village.demonstrations(village.STANDARD, "train"): ...
gold.score(world, conversation, "Alice lives in the mill.").total
"""

from rlhf_jax.data.village import gold
from rlhf_jax.data.village.answers import ideal
from rlhf_jax.data.village.gold import GoldScore
from rlhf_jax.data.village.portraits import chronicle
from rlhf_jax.data.village.situation import BEHAVIOURS, Situation, understand
from rlhf_jax.data.village.sources import (
  MAX_PROMPT_TOKENS,
  MAX_RESPONSE_TOKENS,
  STANDARD,
  VillageConfig,
  build_world,
  count_tokens,
  demonstrations,
  prompts,
  texts,
)
from rlhf_jax.data.village.trainers import TrainerFlaws
from rlhf_jax.data.village.vocabulary import build_tokenizer
from rlhf_jax.data.village.world import Person, World

__all__ = [
  "BEHAVIOURS",
  "MAX_PROMPT_TOKENS",
  "MAX_RESPONSE_TOKENS",
  "STANDARD",
  "GoldScore",
  "Person",
  "Situation",
  "TrainerFlaws",
  "VillageConfig",
  "World",
  "build_tokenizer",
  "build_world",
  "chronicle",
  "count_tokens",
  "demonstrations",
  "gold",
  "ideal",
  "prompts",
  "texts",
  "understand",
]
