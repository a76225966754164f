"""The village as a tfds builder: what its config determines, written down once.

The village draws its own held-out openings; its own fraction and seed divide its records, and not
those of `PrepareConfig`.
"""

import collections.abc
import pathlib

import tensorflow_datasets as tfds

from rlhf_jax import config as config_lib
from rlhf_jax.data import builders, records, village
from rlhf_jax.data.records import Record, Split


class Village(builders.RecordBuilder, skip_registration=True):
  """Demonstrations and prompts of both sides of the split, and the chronicle."""

  VERSION = tfds.core.Version("1.0.0")

  @classmethod
  def read(
    cls, config: village.VillageConfig, skipped: list[str]
  ) -> collections.abc.Iterator[Record]:
    for side in ("train", "heldout"):
      yield from village.demonstrations(config, side)
      yield from village.prompts(config, side)
    yield from village.texts(config)

  @classmethod
  def fingerprint(cls, config: village.VillageConfig) -> list:
    # The generator is the village's source file: another grammar is another data set.
    code = sorted(pathlib.Path(village.__file__).parent.glob("*.py"))
    return [config_lib.to_dict(config), [builders.digest(path) for path in code]]

  @classmethod
  def split(
    cls, record: Record, config: village.VillageConfig, prepare: builders.PrepareConfig
  ) -> Split:
    return records.split_of(record.prompt_key, config.heldout_fraction, config.seed)
