"""Texts with moderation labels, from the released samples, tweets and people's reports.

Markov et al. 2022, "A Holistic Approach to Undesired Content Detection in the Real World", table 1,
has eight categories. A text need not be labelled for all of them: *a category that an example does
not name is unknown*. It is nobody's negative: loss, thresholds and metrics leave it out.
"""

import collections.abc
import csv
import dataclasses
import functools
import hashlib
import io
import json
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from rlhf_jax.config import Positive, PositiveInt
from rlhf_jax.data import files
from rlhf_jax.data.builders import FilesConfig
from rlhf_jax.text.messages import check_text
from rlhf_jax.types import UserError

LETTERS = MappingProxyType(  # of the released samples, with the names of OpenAI's API
  {
    "S": "sexual",
    "H": "hate",
    "V": "violence",
    "HR": "harassment",
    "SH": "self-harm",
    "S3": "sexual/minors",
    "H2": "hate/threatening",
    "V2": "violence/graphic",
  }
)
CATEGORIES = tuple(LETTERS.values())
OBTAIN = "See docs/moderation.md for where to get moderation data."


@dataclasses.dataclass(frozen=True)
class ModerationExample:
  """A text and what is known about it."""

  text: str
  labels: collections.abc.Mapping[str, int]  # category -> 0 or 1; a missing one is unknown
  source: str

  def __post_init__(self):
    check_text(self.text, "a moderated text")
    if not self.text.strip():
      raise UserError("a moderated text must hold something, this one is empty.")
    unknown = sorted(set(self.labels) - set(CATEGORIES))
    if unknown:
      raise UserError(f"unknown moderation categories {unknown}; there are: {list(CATEGORIES)}.")
    if not self.labels:
      raise UserError("a moderation example must have a label for one category at least.")
    for category, label in self.labels.items():
      if type(label) is not int or label not in (0, 1):
        raise UserError(f"the label of {category!r} must be 0 or 1, got {label!r:.80}.")
    object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))

  @functools.cached_property
  def identity(self) -> str:
    """Hash of the text, letter case and spacing aside."""
    plain = " ".join(self.text.casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class TweetsConfig:
  """Davidson et al. 2017, "Automated Hate Speech Detection": tweets that people put in a class."""

  paths: tuple[str, ...]  # CSV with the columns class and tweet
  max_examples: PositiveInt | None  # drawn at random; None: all


@dataclasses.dataclass(frozen=True)
class ModerationDataConfig:
  """The sources; None for one that is not used."""

  samples: FilesConfig | None  # JSON, {"prompt": ..., "S": 0, "V2": 1}, as Markov et al. released
  tweets: TweetsConfig | None
  reports: FilesConfig | None  # JSON, {"text": ..., "labels": {"hate": 0}}: what people reported
  weights: dict[str, Positive]  # by source in use: its relative share of what is trained on
  evaluated: Literal["samples", "tweets", "reports"]  # cross-validated, calibrated on, reported

  def __post_init__(self):
    used = [name for name in PARSERS if getattr(self, name) is not None]
    if sorted(self.weights) != sorted(used) or self.evaluated not in used:
      raise UserError(
        f"config data: sources in use are {used}; weights must name these, not "
        f"{sorted(self.weights)}, and evaluated, {self.evaluated!r}, must be one of them."
      )


def load(config: ModerationDataConfig, seed: int) -> dict[str, list[ModerationExample]]:
  """The examples of each source in use.

  What people reported of a text stands over what another source says of it.

  Raises:
    UserError: a file that is missing or cannot be read, or a malformed item where `on_malformed`
      is "error", with its place.
  """
  used = {name: getattr(config, name) for name in PARSERS}
  used = {name: section for name, section in used.items() if section is not None}
  for section in used.values():
    files.require(section.paths, OBTAIN)
  found = {}
  for name, section in used.items():
    if isinstance(section, TweetsConfig):
      found[name] = tweets(section, seed)
    else:
      found[name] = list(merge(read(section, PARSERS[name])))
    if not found[name]:
      raise UserError(f"config data.{name}: no example in {', '.join(section.paths)}.")
  reported = {example.identity: example.labels for example in found.get("reports", ())}
  correct = lambda e: dataclasses.replace(e, labels={**e.labels, **reported.get(e.identity, {})})
  return {name: list(map(correct, some)) for name, some in found.items()}


def read(
  config: FilesConfig, parse: collections.abc.Callable[[Any, str], ModerationExample]
) -> collections.abc.Iterator[ModerationExample]:
  """The examples of JSON files, in order."""
  for path in config.paths:
    for where, item in files.items(path):
      try:
        yield parse(item(), files.stem(path))
      except UserError as error:
        if config.on_malformed == "error":
          raise UserError(f"{where}: {error}") from error


def parse_sample(item: Any, source: str) -> ModerationExample:
  """One released sample: labels by letter beside the `prompt`; a null label is unknown too."""
  if not isinstance(item, dict) or "prompt" not in item:
    raise UserError(f"a sample must have a 'prompt', got {item!r:.80}.")
  labels = {LETTERS.get(key, key): value for key, value in item.items() if key != "prompt"}
  known = {category: label for category, label in labels.items() if label is not None}
  return ModerationExample(item["prompt"], known, source)


def parse_report(item: Any, source: str) -> ModerationExample:
  """One report: text, labels and, if it says so, its source.

  A false positive of a category is the label 0 for it, a false negative the label 1; about the
  other categories a report says nothing.
  """
  if not isinstance(item, dict) or set(item) - {"source"} != {"text", "labels"}:
    raise UserError(f"a report has the keys 'text' and 'labels', got {item!r:.80}.")
  if not isinstance(item["labels"], dict):
    raise UserError(f"the labels of a report must be an object, got {item['labels']!r:.80}.")
  return ModerationExample(item["text"], item["labels"], item.get("source", source))


PARSERS = MappingProxyType({"samples": parse_sample, "tweets": None, "reports": parse_report})


def tweets(config: TweetsConfig, seed: int) -> list[ModerationExample]:
  """Tweets with what their class says about the categories, and no more.

  Class 0, hate speech: hate is 1. Class 1, offensive but no hate speech: hate is 0; whether it
  harasses somebody was not asked. Class 2, neither: hate and harassment are 0.
  """
  labels = {"0": {"hate": 1}, "1": {"hate": 0}, "2": {"hate": 0, "harassment": 0}}
  found = []
  for path in config.paths:
    for number, row in enumerate(csv.DictReader(io.StringIO(files.read_text(path))), start=1):
      if row.get("class") not in labels or not row.get("tweet"):
        raise UserError(f"{path} tweet {number}: needs a tweet and a class of 0, 1 or 2.")
      found.append(ModerationExample(row["tweet"], labels[row["class"]], files.stem(path)))
  found = list(merge(found))
  if config.max_examples is None:
    return found
  order = np.random.default_rng(seed).permutation(len(found))[: config.max_examples]
  return [found[i] for i in sorted(order.tolist())]


def merge(
  examples: collections.abc.Iterable[ModerationExample],
) -> collections.abc.Iterable[ModerationExample]:
  """Examples of one text as one; of two labels for one category, the later one stands.

  So a report corrects what was thought of the text before.
  """
  by_text: dict[str, ModerationExample] = {}
  for example in examples:
    before = by_text.get(example.identity)
    if before is not None:
      example = dataclasses.replace(before, labels={**before.labels, **example.labels})
    by_text[example.identity] = example
  return by_text.values()


def write_jsonl(examples: collections.abc.Iterable[ModerationExample]) -> str:
  """Examples as lines that `parse_report` reads."""
  lines = ({"text": e.text, "labels": dict(e.labels), "source": e.source} for e in examples)
  return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def label_arrays(
  examples: collections.abc.Sequence[ModerationExample],
) -> tuple[np.ndarray, np.ndarray]:
  """Labels and which are known, [n, C] float32 each; an unknown label is written as 0."""
  labels, known = np.zeros((2, len(examples), len(CATEGORIES)), np.float32)
  for i, example in enumerate(examples):
    for category, label in example.labels.items():
      c = CATEGORIES.index(category)
      labels[i, c], known[i, c] = label, 1.0
  return labels, known
