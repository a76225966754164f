"""What a stage is fed: a run's records as rows, and rows as batches on its mesh."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import batches, rows
from rlhf_jax.data.records import Demonstration, Split, Text
from rlhf_jax.experiment import Run
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.types import Params


def demonstration_rows(
  run: Run, max_tokens: int, demonstrations: Sequence[Demonstration], *, pack: bool
) -> rows.Rows:
  """Dialogues as rows, several in one where `pack`."""
  return rows.demonstration_rows(
    demonstrations,
    run.template,
    run.tokenizer,
    max_tokens=max_tokens,
    supervise=run.config.sft.supervise,
    on_too_long=run.config.text.on_too_long,
    packing_seed=run.config.seed if pack else None,
  )


def text_rows(run: Run, max_tokens: int, texts: Sequence[Text]) -> rows.Rows:
  """Plain text as packed rows."""
  return rows.text_rows(texts, run.tokenizer, max_tokens=max_tokens, packing_seed=run.config.seed)


def pretraining_sources(run: Run, dialogues: Sequence[batches.Source]) -> list[batches.Source]:
  """Plain text, weighted to make `pretraining_share` of the rows beside the dialogues."""
  config = run.config.sft
  share = config.pretraining_share
  if not share:
    return []
  texts = run.data.mixture(Text, "train", functools.partial(text_rows, run, config.sequence_length))
  total = sum(s.weight for s in dialogues) * share / (1.0 - share)
  scale = total / sum(s.weight for s in texts)
  return [dataclasses.replace(s, name=f"{s.name} text", weight=s.weight * scale) for s in texts]


def experience_stream(run: Run, split: Split) -> Callable[[int], Iterator]:
  """From a step on: the prompts of each step, and the pretraining rows that go with it, or None.

  Pretraining rows come as [updates, rows, T], one slice for each optimiser step.
  """
  config = run.config.ppo
  padded = rows.prompt_rows(
    run.data.prompts(split),
    run.template,
    run.tokenizer,
    max_tokens=config.rollout.prompt_length,
    on_too_long=run.config.text.on_too_long,
  )
  source = batches.Source("prompts", padded, 1.0)
  prompts = batch_stream(run, [source], config.rollout.batch_size)
  if not config.ptx_rows or split == "heldout":
    return lambda step: ((batch, None) for batch in prompts(step))
  make_rows = functools.partial(text_rows, run, config.ptx.sequence_length)
  sources = run.data.mixture(Text, "train", make_rows)
  texts = host_batches(run, sources, config.updates * config.ptx_rows)
  fold = lambda x: x.reshape(config.updates, -1, *x.shape[1:])
  put = lambda batch: mesh_lib.put_batch(run.mesh, jax.tree.map(fold, batch), axis=1)
  return lambda step: zip(prompts(step), map(put, texts.starting_at(step)))


def host_batches(run: Run, sources: Sequence[batches.Source], batch_size: int) -> batches.Batches:
  """An endless, shuffled mixture."""
  return batches.endless(sources, batch_size, seed=run.config.seed)


def batch_stream(
  run: Run, sources: Sequence[batches.Source], batch_size: int
) -> Callable[[int], Iterator]:
  """The same on the mesh, from any step on."""
  stream = host_batches(run, sources, batch_size)
  return lambda step: (mesh_lib.put_batch(run.mesh, b) for b in stream.starting_at(step))


def draw(some: Sequence, count: int | None, seed: int) -> list:
  """`count` of them in a random order, or all of them as they stand."""
  if count is None:
    return list(some)
  order = np.random.default_rng(seed).permutation(len(some))
  return [some[int(i)] for i in order[:count]]


def summed(run: Run, measure: Callable, heldout: rows.Rows, batch_size: int) -> Callable:
  """`params -> sums`: what `measure(params, batch)` gives, added up over all held-out rows."""
  measure = mesh_lib.jit(measure, run.mesh)
  on_mesh = [mesh_lib.put_batch(run.mesh, b) for b in batches.once(heldout, batch_size)]

  def over_all(params: Params) -> dict[str, Any]:
    sums = [hosts.whole(measure(params, batch)) for batch in on_mesh]
    return jax.tree.map(lambda *parts: sum(parts).tolist(), *sums)

  return over_all
