"""Instruction, input and output records, rewritten as dialogues.

The ChatGPT post: "We mixed this new dialogue dataset with the InstructGPT dataset, which we
transformed into a dialogue format." The items read here, in JSON or one a line:

  {"instruction", "input", "output"}                        Alpaca and its kin
  {"instruction", "input", "output", "chosen", "rejected"}  the same with a preference
  {"instruction", "context", "response"}                    Dolly
  {"instruction", "instances": [{"input", "output"}, ...]}  self-instruct
  {"text": "### Human: ... ### Assistant: ..."}             dialogues on one line

An instruction with an input has several natural forms in the mouth of a user. Which one an item
takes depends on its content alone, so that a model meets them all and the order does not matter.
"""

import collections.abc
import re
import zlib
from typing import Any

import tensorflow_datasets as tfds

from rlhf_jax.data import builders
from rlhf_jax.data.records import Comparison, Demonstration, Record
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

WITH_INPUT = (
  "{instruction}\n\n{input}",
  "{input}\n\n{instruction}",
  '{instruction}\n\n"{input}"',
  "{instruction} Here it is:\n\n{input}",
  "I have this:\n\n{input}\n\n{instruction}",
)
_FLAT_HEADER = re.compile(r"\s*### (Human|Assistant): ?")
_FLAT_ROLES = {"Human": "user", "Assistant": "assistant"}


class Instructions(builders.RecordBuilder, skip_registration=True):
  """Demonstrations of following an instruction, and comparisons where there is a preference."""

  VERSION = tfds.core.Version("1.0.0")
  OBTAIN = "Any Alpaca-style JSON will do; see docs/data.md for public ones."

  @classmethod
  def parse(
    cls, item: Any, source: str, config: builders.FilesConfig
  ) -> collections.abc.Iterator[Record]:
    if isinstance(item, dict) and "text" in item and "instruction" not in item:
      return parse_flat(item, source)
    return parse_instruction(item, source)


def user_message(instruction: str, given: str) -> str:
  """What a user would type to give an instruction with its input, if it has one."""
  if not given:
    return instruction
  form = WITH_INPUT[zlib.crc32(f"{instruction}\n{given}".encode()) % len(WITH_INPUT)]
  return form.format(instruction=instruction, input=given)


def parse_instruction(item: Any, source: str) -> collections.abc.Iterator[Record]:
  """A `Demonstration` for each output, and a `Comparison` of chosen and rejected if they differ."""
  instruction = _text(item, "instruction")
  given, output = ("context", "response") if "response" in item else ("input", "output")
  if "instances" in item:
    cases = item["instances"]
    if not isinstance(cases, list) or not cases:
      raise UserError(f"instances must be a list with an element or more, got {cases!r:.200}.")
  else:
    cases = [item]
  for case in cases:
    prompt = Conversation.of(("user", user_message(instruction, _text(case, given, empty=True))))
    yield Demonstration(prompt.with_reply(_text(case, output)), source)
  if "chosen" in item or "rejected" in item:
    chosen, rejected = _text(item, "chosen"), _text(item, "rejected")
    if chosen != rejected:
      author, labeler = ("unknown", "unknown"), "unknown"
      yield Comparison(prompt, (chosen, rejected), (0, 1), author, labeler, source)


def parse_flat(item: dict, source: str) -> collections.abc.Iterator[Record]:
  """The `Demonstration` in "### Human: ... ### Assistant: ..." on one line."""
  before, *parts = _FLAT_HEADER.split(_text(item, "text"))
  turns = [(_FLAT_ROLES[name], text.strip()) for name, text in zip(parts[::2], parts[1::2])]
  if before or not turns or turns[0][0] != "user" or not all(text for _, text in turns):
    raise UserError(
      "text must begin with '### Human:' and hold '### Assistant:', with something said after "
      f"each, got {item['text']!r:.200}."
    )
  yield Demonstration(Conversation.of(*turns), source)


def _text(item: Any, key: str, empty: bool = False) -> str:
  """A text of an item, without white space around it; only inputs may be empty."""
  if not isinstance(item, dict) or not isinstance(item.get(key), str):
    raise UserError(f"an instruction item must have a text {key!r}, got {item!r:.200}.")
  if not item[key].strip() and not empty:
    raise UserError(f"{key!r} of an instruction item is empty.")
  return item[key].strip()
