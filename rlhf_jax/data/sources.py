"""All data of a run: which sources there are, and their records by kind."""

import collections.abc
import dataclasses
from typing import Any, Literal

from rlhf_jax.config import Positive
from rlhf_jax.data import (
  builders,
  hh_rlhf,
  instructions,
  jsonl,
  open_assistant,
  text,
  village_records,
)
from rlhf_jax.data.batches import Source
from rlhf_jax.data.builders import FilesConfig, PrepareConfig, Prepared
from rlhf_jax.data.records import (
  Comparison,
  Demonstration,
  Prompt,
  RecordType,
  Split,
  to_prompt,
)
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.village import VillageConfig
from rlhf_jax.types import UserError

_BUILDERS: dict[str, type[builders.RecordBuilder]] = {  # by section of `DataConfig`
  "village": village_records.Village,
  "hh_rlhf": hh_rlhf.HhRlhf,
  "open_assistant": open_assistant.OpenAssistant,
  "instructions": instructions.Instructions,
  "jsonl": jsonl.Jsonl,
  "text": text.PlainText,
}
_PROMPT_KINDS = {"prompt": Prompt, "comparison": Comparison, "demonstration": Demonstration}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The sources of a run; None for one that is not used."""

  prepare: PrepareConfig
  village: VillageConfig | None
  hh_rlhf: FilesConfig | None
  open_assistant: FilesConfig | None
  instructions: FilesConfig | None
  jsonl: jsonl.JsonlConfig | None
  text: text.TextConfig | None
  weights: dict[str, Positive]  # by source: its relative share of the rows of a mixture
  prompts_from: tuple[Literal["prompt", "comparison", "demonstration"], ...]  # kinds of records

  def __post_init__(self):
    used = [name for name in _BUILDERS if getattr(self, name) is not None]
    if not used:
      raise UserError(f"config data: no source is used; configure one of {', '.join(_BUILDERS)}.")
    if sorted(self.weights) != sorted(used):
      raise UserError(
        f"config data.weights: names {sorted(self.weights)}, but the sources in use are "
        f"{sorted(used)}; give each of them a weight."
      )


@dataclasses.dataclass(frozen=True)
class Data:
  """The prepared sources of a run."""

  config: DataConfig
  prepared: tuple[Prepared, ...]

  def by_source(
    self, kind: type[RecordType], split: Split
  ) -> dict[str, collections.abc.Sequence[RecordType]]:
    """The records of one kind, for each source that has any."""
    found = {source.name: source.records(kind, split) for source in self.prepared}
    return {name: records for name, records in found.items() if len(records)}

  def records(self, kind: type[RecordType], split: Split) -> list[RecordType]:
    """The records of one kind from all sources, one source after the other."""
    return [record for some in self.by_source(kind, split).values() for record in some]

  def prompts(self, split: Split) -> list[Prompt]:
    """The distinct prompts to sample replies to, from the kinds of records in `prompts_from`."""
    found = {}
    for kind in self.config.prompts_from:
      for record in self.records(_PROMPT_KINDS[kind], split):
        prompt = to_prompt(record)
        if prompt is not None:
          found.setdefault(prompt.identity, prompt)
    return list(found.values())

  def mixture(
    self,
    kind: type[RecordType],
    split: Split,
    make_rows: collections.abc.Callable[[collections.abc.Sequence[RecordType]], Rows],
  ) -> list[Source]:
    """Each source's rows with its weight, ready for `batches.endless`."""
    return [
      Source(name, make_rows(records), self.config.weights[name])
      for name, records in self.by_source(kind, split).items()
    ]

  def skipped(self) -> dict[str, builders.Skipped]:
    """What was left out as malformed, by source."""
    return {source.name: source.skipped for source in self.prepared}


def load(config: DataConfig) -> Data:
  """Prepares every source that is used.

  Raises:
    UserError: see `builders.prepare`.
  """
  sections: dict[str, Any] = {name: getattr(config, name) for name in _BUILDERS}
  used = {name: section for name, section in sections.items() if section is not None}
  prepared = [builders.prepare(_BUILDERS[name], used[name], config.prepare) for name in used]
  return Data(config, tuple(dataclasses.replace(p, name=n) for n, p in zip(used, prepared)))
