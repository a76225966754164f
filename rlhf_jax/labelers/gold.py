"""The true reward: what labelers go by, and what a run is judged by.

A policy never sees it; the reward model learns it from comparisons only. In the village it is
computed from the world. For real dialogues a reward model that was trained otherwise than the
proxies plays its part, the synthetic setup of Gao et al. 2022.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import reward
from rlhf_jax.data import rows, village
from rlhf_jax.data.records import Comparison
from rlhf_jax.networks import heads
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.text.dialogue import ChatTemplate
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Params

Parts = dict[str, float]  # the parts of a true reward by name, "total" among them


@dataclasses.dataclass(frozen=True)
class Gold:
  """A true reward and what it says of answers."""

  name: str
  judge: Callable[[Conversation, Sequence[str]], list[Parts]]
  category: Callable[[Conversation], str]  # what kind of prompt it is, for tables
  maximum: float | None  # the best possible total, where there is one

  def totals(self, conversation: Conversation, answers: Sequence[str]) -> list[float]:
    """The total of each answer."""
    return [parts["total"] for parts in self.judge(conversation, answers)]


def of_village(world: village.World) -> Gold:
  """The village's own: every answer is checked against the world."""

  def judge(conversation: Conversation, answers: Sequence[str]) -> list[Parts]:
    return [_village_parts(world, conversation, answer) for answer in answers]

  behaviour = lambda conversation: village.understand(world, conversation).behaviour
  return Gold("village", judge, behaviour, maximum=1.0)


def _village_parts(world: village.World, conversation: Conversation, answer: str) -> Parts:
  score = village.gold.score(world, conversation, answer)
  done = village.gold.acts(world, village.understand(world, conversation), answer)
  refused = float(any(act.kind == "refuse" for act in done))
  return {"total": score.total, **dataclasses.asdict(score), "refused": refused}


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A reward model that scores text: K answers at a time, in one compiled function."""

  network: heads.ScalarNetwork
  tokenizer: Tokenizer
  template: ChatTemplate
  mesh: Mesh
  sequence_length: int  # tokens of prompt and answer
  max_responses: int  # K

  @functools.cached_property
  def _score(self) -> Callable:
    return jax.jit(functools.partial(reward.score_sequences, self.network))

  def score(
    self, params: Params, conversation: Conversation, answers: Sequence[str]
  ) -> list[float]:
    """The score of each answer; prompt and answer must fit into `sequence_length`."""
    scores = []
    slots = -(-self.max_responses // mesh_lib.batch_devices(self.mesh))
    slots *= mesh_lib.batch_devices(self.mesh)
    for start in range(0, len(answers), slots):
      chunk = tuple(answers[start : start + slots])
      filled = chunk + chunk[:1] * (max(2, len(chunk)) - len(chunk))  # a comparison needs two
      ranks = (0,) * len(filled)
      record = Comparison(conversation, filled, ranks, ("",) * len(filled), "", "scoring")
      batch = rows.ranking_rows(
        [record],
        self.template,
        self.tokenizer,
        max_tokens=self.sequence_length,
        max_responses=slots,
        on_too_long="error",
      )[0]
      tokens, mask = mesh_lib.put_batch(self.mesh, (batch.tokens, batch.mask))
      scores += np.asarray(self._score(params, tokens, mask))[: len(chunk)].tolist()
    return scores


def of_reward_model(name: str, scorer: Scorer, params: Params) -> Gold:
  """A reward model in the place of people (Gao et al. 2022, section 2)."""

  def judge(conversation: Conversation, answers: Sequence[str]) -> list[Parts]:
    return [{"total": score} for score in scorer.score(params, conversation, answers)]

  turns = lambda conversation: sum(m.role == "user" for m in conversation.messages)
  category = lambda conversation: "first turn" if turns(conversation) == 1 else "later turn"
  return Gold(name, judge, category, maximum=None)
