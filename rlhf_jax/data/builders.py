"""The tfds builder that every source shares: records of one source, on disk as ArrayRecord.

`prepare` writes each kind of record and each side of the held-out split as a tfds split of its own
(`comparison_train`, `comparison_heldout`, ...). The folder is named by a hash of the source's files
and settings, so a changed source is never served from a stale build, and an unchanged one is opened
at once. tfds writes into a temporary folder and renames it, so a build that was killed leaves
nothing behind that could be taken for a finished one. TensorFlow is not needed.
"""

import collections
import collections.abc
import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
from typing import Any, Literal

import absl.logging
import tensorflow_datasets as tfds

from rlhf_jax import config as config_lib
from rlhf_jax.config import Count, Fraction
from rlhf_jax.data import files, records
from rlhf_jax.data.records import Record, RecordType, Split
from rlhf_jax.types import UserError

KINDS = (records.Demonstration, records.Comparison, records.Prompt, records.Text)
_EXAMPLES_KEPT = 5  # descriptions of skipped items that are kept, to show what was wrong


@dataclasses.dataclass(frozen=True)
class FilesConfig:
  """Where a source's files are, and what to do with an item that is not as documented."""

  paths: tuple[str, ...]  # JSON, one value a line or one list; each may end in .gz
  on_malformed: Literal["error", "skip"]


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """Where builds are kept and how prompts are divided."""

  data_dir: str
  heldout_fraction: Fraction  # of the prompts
  split_seed: Count


@dataclasses.dataclass(frozen=True)
class Skipped:
  """Items that were left out because they were malformed."""

  count: int
  examples: tuple[str, ...]  # the first few, each with its place and what is wrong


@dataclasses.dataclass(frozen=True)
class Records(collections.abc.Sequence):
  """Random access to the records of one kind, read from disk one at a time."""

  kind: type
  rows: collections.abc.Sequence[dict[str, bytes]]

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Any:
    if not -len(self) <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}.")
    return records.from_json(self.kind, json.loads(self.rows[index % len(self)]["record"]))


@dataclasses.dataclass(frozen=True)
class Prepared:
  """One source, ready to be read."""

  name: str
  builder: "RecordBuilder"

  def records(self, kind: type[RecordType], split: Split) -> collections.abc.Sequence[RecordType]:
    """The records of one kind on one side of the split, in the order of the source."""
    name = _split_name(kind, split)
    if name not in self.builder.info.splits:
      return Records(kind, ())
    return Records(kind, self.builder.as_data_source(split=name))

  @property
  def skipped(self) -> Skipped:
    stored = json.loads(self.builder.info.metadata["skipped"])
    return Skipped(stored["count"], tuple(stored["examples"]))


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A source of records; a subclass says how one item of its files becomes records.

  Raise `VERSION` when `parse` changes: it is part of what names a build.
  """

  VERSION = tfds.core.Version("1.0.0")
  OBTAIN = "Check the path."  # what to do when a file is missing

  @classmethod
  def parse(cls, item: Any, source: str, config: Any) -> collections.abc.Iterable[Record]:
    """The records in one item; raises UserError if the item is not as documented."""
    raise NotImplementedError

  @classmethod
  def items(cls, path: str, config: Any) -> collections.abc.Iterator[files.LocatedItem]:
    """The items of one file, each with its place; JSON unless a source says otherwise."""
    return files.items(path)

  @classmethod
  def read(cls, config: Any, skipped: list[str]) -> collections.abc.Iterator[Record]:
    """All records of a source in order; what is left out is described in `skipped`.

    Raises:
      UserError: an item is malformed and `on_malformed` is "error"; says file, line and reason.
    """
    for path in config.paths:
      for where, load in cls.items(path, config):
        try:
          found = tuple(cls.parse(load(), f"{cls.name}/{files.stem(path)}", config))
        except UserError as error:
          if config.on_malformed == "error":
            raise UserError(
              f"{where}: {error} Mend it, or set on_malformed to 'skip' to leave such items out."
            ) from error
          skipped.append(f"{where}: {error}")
        else:
          yield from found

  @classmethod
  def fingerprint(cls, config: Any) -> list:
    """What the records depend on, apart from the code: settings, and names and bytes of files."""
    files.require(config.paths, cls.OBTAIN)
    settings = {k: v for k, v in config_lib.to_dict(config).items() if k != "paths"}
    return [settings, [[pathlib.Path(path).name, digest(path)] for path in config.paths]]

  @classmethod
  def split(cls, record: Record, config: Any, prepare: PrepareConfig) -> Split:
    """The side of the held-out split on which a record lies, by its prompt."""
    return records.split_of(record.prompt_key, prepare.heldout_fraction, prepare.split_seed)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
      metadata=tfds.core.MetadataDict(skipped=self.builder_config.skipped),
      disable_shuffling=True,  # the order is that of the source; batches shuffle
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    return {
      name: self._generate_examples(lines) for name, lines in self.builder_config.lines.items()
    }

  def _generate_examples(self, lines: list[bytes]):
    return ((i, {"record": line}) for i, line in enumerate(lines))


@dataclasses.dataclass(eq=False)
class _Build(tfds.core.BuilderConfig):
  """What a builder writes; to read a build, its name is enough."""

  lines: dict[str, list[bytes]] = dataclasses.field(default_factory=dict, repr=False)  # by split
  skipped: str = ""  # JSON of `Skipped`


def prepare(builder: type[RecordBuilder], source: Any, config: PrepareConfig) -> Prepared:
  """Opens the build of a source, after writing it if there is none yet.

  The whole source is read and checked before the first byte is written.

  Raises:
    UserError: a missing or malformed file, no record at all, or a folder that cannot be written.
  """
  settings = [config.heldout_fraction, config.split_seed]
  content = json.dumps([str(builder.VERSION), settings, builder.fingerprint(source)])
  key = hashlib.sha256(content.encode()).hexdigest()[:16]
  data_dir = pathlib.Path(config.data_dir).expanduser()
  folder = data_dir / builder.name / key / str(builder.VERSION)
  if not folder.exists():
    _write(builder, _scan(builder, source, config, key), data_dir, folder)
  return Prepared(builder.name, tfds.builder_from_directory(folder))


def _scan(builder: type[RecordBuilder], source: Any, config: PrepareConfig, key: str) -> _Build:
  """Reads all of a source into memory, as JSON."""
  lines, skipped = collections.defaultdict(list), []
  for record in builder.read(source, skipped):
    text = json.dumps(records.to_json(record), ensure_ascii=False)
    side = builder.split(record, source, config)
    lines[_split_name(type(record), side)].append(text.encode())
  if not lines:
    shown = "; ".join(skipped[:_EXAMPLES_KEPT]) or "the files are empty"
    raise UserError(f"data source {builder.name} holds no usable record: {shown}.")
  stored = json.dumps({"count": len(skipped), "examples": skipped[:_EXAMPLES_KEPT]})
  return _Build(name=key, lines=dict(sorted(lines.items())), skipped=stored)


def _write(
  builder: type[RecordBuilder], build: _Build, data_dir: pathlib.Path, folder: pathlib.Path
) -> None:
  try:
    with _silence():
      writer = builder(data_dir=data_dir, config=build, file_format="array_record")
      writer.download_and_prepare()
  except OSError as error:
    if not folder.exists():  # else another process has finished the same build meanwhile
      raise UserError(f"cannot write the data build into {data_dir}: {error}.") from error


@contextlib.contextmanager
def _silence():
  """tfds announces a build with print, a warning and progress bars; none of it helps here."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    absl.logging.set_verbosity(verbosity)


def _split_name(kind: type, split: Split) -> str:
  return f"{kind.__name__.lower()}_{split}"


def digest(path: str | pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with pathlib.Path(path).expanduser().open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
