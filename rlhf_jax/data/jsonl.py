"""A researcher's own demonstrations, comparisons and prompts, one JSON object a line.

  demonstrations  {"messages": [{"role": "user", "content": "..."},
                                {"role": "assistant", "content": "..."}]}
  comparisons     {"messages": [..., {"role": "user", "content": "..."}],
                   "responses": ["...", "...", ...],
                   "ranks": [0, 1, ...],       0 is best, equal is a tie; if absent: best first
                   "authors": ["...", ...],    who wrote each; if absent: "unknown"
                   "labeler": "..."}           who ranked; if absent: "unknown"
  prompts         {"messages": [...]}  or  {"prompt": "..."}

`source` may be given too and is then kept. No other key is allowed, so that a misspelt one is
found. The files that this package writes have the same form.
"""

import collections.abc
import dataclasses
from typing import Any, Literal

import tensorflow_datasets as tfds

from rlhf_jax.data import builders, files, records
from rlhf_jax.data.records import Comparison, Demonstration, Prompt, Record
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class JsonlConfig:
  """Files by what they hold."""

  demonstrations: tuple[str, ...]
  comparisons: tuple[str, ...]
  prompts: tuple[str, ...]
  on_malformed: Literal["error", "skip"]

  def __post_init__(self):
    twice = sorted({path for path in self.paths if self.paths.count(path) > 1})
    if twice:
      raise UserError(f"data files are listed more than once: {', '.join(twice)}.")

  @property
  def paths(self) -> tuple[str, ...]:
    return self.demonstrations + self.comparisons + self.prompts


class Jsonl(builders.RecordBuilder, skip_registration=True):
  """Records in the documented form."""

  VERSION = tfds.core.Version("1.0.0")
  OBTAIN = "The forms of these files are in docs/data.md."

  @classmethod
  def items(cls, path: str, config: JsonlConfig) -> collections.abc.Iterator[files.LocatedItem]:
    """Each item goes with the parser of its list of files."""
    for paths, parse in (
      (config.demonstrations, parse_demonstration),
      (config.comparisons, parse_comparison),
      (config.prompts, parse_prompt),
    ):
      if path in paths:
        for where, load in files.items(path):
          yield where, lambda load=load, parse=parse: (parse, load())

  @classmethod
  def parse(cls, item: Any, source: str, config: JsonlConfig) -> collections.abc.Iterator[Record]:
    parse, content = item
    yield parse(content, source)

  @classmethod
  def fingerprint(cls, config: JsonlConfig) -> list:
    counts = [len(config.demonstrations), len(config.comparisons), len(config.prompts)]
    one_list = builders.FilesConfig(paths=config.paths, on_malformed=config.on_malformed)
    return [counts, super().fingerprint(one_list)]


def parse_demonstration(item: Any, source: str) -> Demonstration:
  return records.from_json(Demonstration, _with_defaults(item, source=source))


def parse_comparison(item: Any, source: str) -> Comparison:
  responses = item.get("responses") if isinstance(item, dict) else None
  count = len(responses) if isinstance(responses, list) else 0
  defaults = {"ranks": list(range(count)), "authors": ["unknown"] * count, "labeler": "unknown"}
  return records.from_json(Comparison, _with_defaults(item, source=source, **defaults))


def parse_prompt(item: Any, source: str) -> Prompt:
  item = _with_defaults(item, source=source)
  if "prompt" in item:
    if "messages" in item:
      raise UserError("a prompt has either 'prompt' or 'messages', this one has both.")
    item["messages"] = [{"role": "user", "content": item.pop("prompt")}]
  return records.from_json(Prompt, item)


def _with_defaults(item: Any, **defaults) -> dict:
  if not isinstance(item, dict):
    raise UserError(f"a record must be a JSON object, got {type(item).__name__}.")
  return {**defaults, **item}
