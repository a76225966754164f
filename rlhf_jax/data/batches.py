"""Batches in a deterministic order in which any step can be asked for.

`endless` shuffles each source anew in every epoch, mixes sources by weight and never ends;
`batch_at(step)` is a pure function of the settings and the step, so a run that is resumed at step n
sees exactly what an undisturbed one would have seen. `once` goes through rows in order, for
evaluation. Both give every process of a multi-host run whole batches, of which it puts its own rows
on its devices (`mesh.put_batch`); so the order does not depend on how many processes there are.
"""

import collections.abc
import dataclasses
import math
from typing import Any

import grain
import jax
import numpy as np

from rlhf_jax.data.rows import Rows
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Source:
  """Rows with their name, for messages, and their share in a mixture."""

  name: str
  rows: Rows
  weight: float  # relative to the other sources; the share of rows drawn from this one


@dataclasses.dataclass(frozen=True)
class Batches:
  """An endless sequence of batches of one shape."""

  dataset: grain.MapDataset
  per_epoch: int  # whole batches that hold as many rows as all sources together

  def batch_at(self, step: int) -> Any:
    """The batch of step 0, 1, ...: a pytree of `rlhf_jax.types` with NumPy leaves."""
    return self.dataset[step]

  def starting_at(self, step: int) -> collections.abc.Iterator[Any]:
    """The batches of `step` and all later ones."""
    while True:
      yield self.batch_at(step)
      step += 1


def endless(
  sources: collections.abc.Sequence[Source],
  batch_size: int,
  *,
  seed: int,
) -> Batches:
  """Shuffled, mixed batches without end.

  Args:
    sources: rows of one kind and one shape. Of every few consecutive rows, each source gives its
      share; a small source is repeated, reshuffled, more often than a large one.
    batch_size: B, at least 1.
    seed: of the order.

  Raises:
    UserError: no source, an empty one, or one too small to give a batch its share without repeating
      a row.
  """
  _check(sources, batch_size)
  datasets = []
  for i, source in enumerate(sources):
    order = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
    datasets.append(grain.MapDataset.source(source.rows).shuffle(seed=order).repeat())
  mixed = grain.MapDataset.mix(datasets, [source.weight for source in sources])
  rows = sum(len(source.rows) for source in sources)
  return Batches(mixed.batch(batch_size, batch_fn=stack), rows // batch_size)


def once(rows: Rows, batch_size: int) -> list[Any]:
  """All rows in order; the last batch is filled up with rows that hold nothing.

  Raises:
    UserError: there are no rows.
  """
  if not len(rows):
    raise UserError("there is nothing to evaluate on: no held-out record is left.")
  batches = []
  for start in range(0, len(rows), batch_size):
    indices = range(start, start + batch_size)
    batches.append(stack([rows[i] if i < len(rows) else rows.empty for i in indices]))
  return batches


def stack(rows: collections.abc.Sequence[Any]) -> Any:
  """Rows of one shape as a batch."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _check(sources: collections.abc.Sequence[Source], batch_size: int) -> None:
  if not sources:
    raise UserError("there is no data source to draw batches from; configure at least one.")
  total = sum(source.weight for source in sources)
  for source in sources:
    if not source.weight > 0:
      raise UserError(f"weight {source.weight} of data source {source.name!r} must be above 0.")
    needed = math.ceil(batch_size * source.weight / total - 1e-9)
    if len(source.rows) < needed:
      raise UserError(
        f"data source {source.name!r} has {len(source.rows)} rows ({source.rows.skipped} records "
        f"did not fit), but its share of a batch of {batch_size} is {needed}; use a smaller "
        "batch_size, a lower weight or more data."
      )
