"""Anthropic's HH-RLHF: pairs of dialogues that differ in the assistant's last answer.

Bai et al. 2022, "Training a Helpful and Harmless Assistant with RLHF". One JSON object a line:

  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": the same with another last answer}

A pair yields a `Comparison` of the two answers and, as a `Demonstration`, the chosen dialogue.
The public files hold a few odd pairs, which are dealt with as follows:

- The two dialogues differ before the last answer (a model that ran on and wrote "Human:" itself):
  there is no common prompt, so the pair is malformed. 11 of the 3,501 pairs of a sample.
- Two assistant turns in a row in the common part: kept as they are.
- An empty answer: kept in the comparison, since a labeler did compare with it; a dialogue with an
  empty assistant turn is no demonstration.
"""

import collections.abc
from typing import Any

import tensorflow_datasets as tfds

from rlhf_jax.data import builders
from rlhf_jax.data.records import Comparison, Demonstration, Record
from rlhf_jax.text.messages import parse_plain
from rlhf_jax.types import UserError

LABELER = "crowdworker"  # the data do not say which
AUTHOR = "anthropic"  # one of several models of that lab; the data do not say which


class HhRlhf(builders.RecordBuilder, skip_registration=True):
  """Comparisons of two answers, and the chosen dialogues as demonstrations."""

  VERSION = tfds.core.Version("1.0.0")
  OBTAIN = (
    "Get e.g. helpful-base/train.jsonl.gz from the data set Anthropic/hh-rlhf on huggingface.co or "
    "from github.com/anthropics/hh-rlhf; see docs/data.md."
  )

  @classmethod
  def parse(
    cls, item: Any, source: str, config: builders.FilesConfig
  ) -> collections.abc.Iterator[Record]:
    return parse_pair(item, source)


def parse_pair(item: Any, source: str) -> collections.abc.Iterator[Record]:
  """A `Comparison`, and a `Demonstration` unless the assistant is silent in one of its turns."""
  if not isinstance(item, dict) or not all(
    isinstance(item.get(key), str) for key in ("chosen", "rejected")
  ):
    raise UserError(f"a pair must have texts 'chosen' and 'rejected', got {item!r:.200}.")
  chosen, rejected = parse_plain(item["chosen"]), parse_plain(item["rejected"])
  if chosen.last.role != "assistant" or rejected.last.role != "assistant":
    raise UserError("both dialogues of a pair must end with the assistant's answer.")
  if len(chosen.messages) < 2 or chosen.messages[:-1] != rejected.messages[:-1]:
    raise UserError("the dialogues of a pair must differ in the last answer only.")
  yield Comparison(
    conversation=chosen.prompt_before(len(chosen.messages) - 1),
    responses=(chosen.last.content, rejected.last.content),
    ranks=(0, 1),
    authors=(AUTHOR, AUTHOR),
    labeler=LABELER,
    source=source,
  )
  if all(chosen.messages[i].content for i in chosen.assistant_turns):
    yield Demonstration(chosen, source)
