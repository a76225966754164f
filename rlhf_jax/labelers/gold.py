"""The true reward: what labelers go by, and what a run is judged by.

A policy never sees it; the reward model learns it from comparisons only. In the village it is
computed from the world. For real dialogues a reward model that was trained otherwise than the
proxies plays its part, the synthetic setup of Gao et al. 2022.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from rlhf_jax import reward
from rlhf_jax.data import batches, packing, rows, village
from rlhf_jax.data.records import Prompt
from rlhf_jax.networks import heads
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.text import dialogue
from rlhf_jax.text.dialogue import ChatTemplate
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Params

LENGTH_STEP = 32  # widths are multiples of it, so that a few compiled functions score all lengths

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
  """A reward model that scores answers to a prompt, K at a time, spread over the devices."""

  network: heads.ScalarNetwork
  tokenizer: Tokenizer
  template: ChatTemplate
  mesh: Mesh
  sequence_length: int  # tokens of prompt and answer, at most
  max_responses: int  # K

  @functools.cached_property
  def _score(self) -> Callable:
    return mesh_lib.jit(mesh_lib.bind(reward.score_answers, self.network), self.mesh)

  def score(
    self, params: Params, conversation: Conversation, answers: Sequence[str]
  ) -> list[float]:
    """The score of each answer; all are read in the same context, cut to whole turns.

    Raises:
      UserError: the last turn and the longest answer do not fit into `sequence_length`.
    """
    if not answers:
      return []
    encode = functools.partial(
      dialogue.encode_response, template=self.template, tokenizer=self.tokenizer
    )
    ids = [np.array(encode(answer), np.int32) for answer in answers]
    prompt = rows.prompt_ids(
      Prompt(conversation, "scoring"),
      self.template,
      self.tokenizer,
      max_tokens=self.sequence_length - max(map(len, ids)),
      on_too_long="error",
    )
    prompt = np.array(prompt, np.int32)
    devices = mesh_lib.batch_devices(self.mesh)
    per_row = -(-self.max_responses // devices)
    parts = [ids[i : i + per_row] for i in range(0, len(ids), per_row)]
    scores = []
    for start in range(0, len(parts), devices):
      scores += self._score_rows(params, prompt, parts[start : start + devices], devices, per_row)
    return scores

  def _score_rows(self, params, prompt, parts, count: int, per_row: int) -> list[float]:
    """One call: a row for each part of the answers, each behind its own copy of the prompt."""
    groups = [[packing.Group(prompt, tuple(part), (0,) * len(part))] for part in parts]
    longest = max(len(group[0]) for group in groups)
    build = functools.partial(
      packing.ranking_row,
      max_tokens=-(-longest // LENGTH_STEP) * LENGTH_STEP,
      max_prompts=1,
      max_responses=per_row,
      pad_id=self.tokenizer.pad_id,
    )
    batch = batches.stack([build(group) for group in groups + [[]] * (count - len(groups))])
    scores = hosts.whole(self._score(params, mesh_lib.put_batch(self.mesh, batch)))
    return scores[batch.valid > 0].tolist()


def of_reward_model(name: str, scorer: Scorer, params: Params) -> Gold:
  """A reward model in the place of people (Gao et al. 2022, section 2)."""

  def judge(conversation: Conversation, answers: Sequence[str]) -> list[Parts]:
    return [{"total": score} for score in scorer.score(params, conversation, answers)]

  turns = lambda conversation: sum(m.role == "user" for m in conversation.messages)
  category = lambda conversation: "first turn" if turns(conversation) == 1 else "later turn"
  return Gold(name, judge, category, maximum=None)
