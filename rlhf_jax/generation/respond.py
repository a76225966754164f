"""Text in, text out: conversations answered in batches of one shape, hence one compilation."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh

from rlhf_jax.data import batches, rows
from rlhf_jax.data.records import Prompt
from rlhf_jax.generation import decode, sampling
from rlhf_jax.networks import heads
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.text import dialogue
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Params, PromptBatch


@dataclasses.dataclass(frozen=True)
class Reply:
  """One sampled answer."""

  text: str
  length: int  # tokens, the end-of-message token included
  finished: bool  # whether the model ended it itself


@dataclasses.dataclass(frozen=True)
class Responder:
  """A policy with everything it takes to answer a conversation."""

  policy: heads.Policy
  tokenizer: Tokenizer
  template: dialogue.ChatTemplate
  mesh: Mesh
  sampling: sampling.SamplingConfig
  prompt_length: int  # P, tokens
  batch_size: int  # prompts in one call of the compiled function
  samples: int = 1  # replies to each prompt

  def __post_init__(self):
    mesh_lib.check_batch(self.mesh, self.batch_size, "batch_size of generation")

  @functools.cached_property
  def stops(self) -> sampling.Stops:
    """The ids that end a reply."""
    return sampling.find_stops(self.sampling, self.tokenizer)

  @functools.cached_property
  def generate(self) -> Callable:
    """The compiled `(params, prompts, key) -> Completion`."""
    return decode.compiled(
      self.policy,
      self.mesh,
      self.batch_size,
      config=self.sampling,
      stops=self.stops,
      pad_id=self.tokenizer.pad_id,
      samples=self.samples,
    )

  def fits(self, conversation: Conversation) -> bool:
    """Whether the conversation, perhaps without its oldest turns, fits into `prompt_length`."""
    limit = self.prompt_length
    kept = dialogue.truncate(conversation, limit, self.template, self.tokenizer, on_too_long="skip")
    return kept is not None

  def prompt_batches(self, conversations: Sequence[Conversation]) -> Iterator[PromptBatch]:
    """Chunks of `batch_size` prompts on the mesh; the last is filled up with empty rows.

    Raises:
      UserError: a conversation does not fit; see `fits`.
    """
    prompts = [Prompt(conversation, "conversation") for conversation in conversations]
    padded = rows.prompt_rows(
      prompts, self.template, self.tokenizer, max_tokens=self.prompt_length, on_too_long="error"
    )
    for batch in batches.once(padded, self.batch_size):
      yield mesh_lib.put_batch(self.mesh, batch)

  def decode(self, tokens, mask, finished) -> list[Reply]:
    """Every row [B, R] as text."""
    tokens, mask, finished = hosts.whole((tokens, mask, finished))
    return [
      Reply(
        dialogue.decode_response(ids[live > 0], self.template, self.tokenizer),
        int(live.sum()),
        bool(ended),
      )
      for ids, live, ended in zip(tokens, mask, finished)
    ]

  def respond(
    self, params: Params, conversations: Sequence[Conversation], key: jax.Array
  ) -> list[Reply]:
    """Sampled replies to each conversation, in order; chunk i draws with fold_in(key, i).

    Of several `samples`, those to one conversation stand together.
    """
    replies = []
    for i, prompts in enumerate(self.prompt_batches(conversations)):
      done = self.generate(params, prompts, jax.random.fold_in(key, i))
      replies += self.decode(done.tokens, done.mask, done.finished)
    return replies[: len(conversations) * self.samples]
