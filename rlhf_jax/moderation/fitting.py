"""One fit of the classifier, from items to parameters, and the scores of a fitted one."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.data.moderation import CATEGORIES
from rlhf_jax.fit import Stage, fit
from rlhf_jax.moderation import classifier, rows
from rlhf_jax.moderation.bench import Bench
from rlhf_jax.moderation.rows import Item
from rlhf_jax.parallel import hosts, rules
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.training import files, optim
from rlhf_jax.types import Params


def fit_items(
  bench: Bench,
  name: str,
  train: Mapping[str, Sequence[Item]],
  weights: Mapping[str, float],
  heldout: Sequence[Item],
) -> Params:
  """Fits a classifier on `train` (items by source, mixed by weight) in workdir/NAME.

  All of the network's parameters come back. `heldout` is only looked at, never chosen by: the
  state after the last step is the result.
  """
  config, directory = bench.config.fit, bench.workdir / name
  everything = [item for some in train.values() for item in some]
  labels = [np.stack([getattr(item, f) for item in everything]) for f in ("labels", "known")]
  base_rates = classifier.base_rates(*labels)
  positive_weights = classifier.positive_weights(*labels, config.positive_weight_power)
  sources = [
    batches.Source(source, packed(bench, some)[0], weights[source])
    for source, some in train.items()
    if some
  ]
  num_steps = steps(bench, sources)
  whole = classifier.from_trunk(bench.network, bench.trunk, base_rates, bench.key("head"))
  trainable, frozen = optim.split(rules.place(whole, bench.mesh), config.frozen)
  optimizer = optim.make(config.optim, num_steps)
  state = rules.place(classifier.init(trainable, optimizer), bench.mesh)
  step = mesh_lib.bind(
    classifier.step,
    network=bench.network,
    optimizer=optimizer,
    micro_batches=config.micro_batches,
    first_block=bench.stem,
  )
  step = rules.compile_step(step, state, bench.mesh)
  measure = heldout_measure(bench, heldout, frozen) if len(heldout) else lambda state: {}
  stage = Stage(
    name=f"moderation {name}",
    directory=directory,
    num_steps=num_steps,
    eval_every=config.eval_every,
    unit="tokens",
    per_step=config.batch_size * config.sequence_length,
    shown=("moderation/loss", "moderation/accuracy"),
    checkpoints=bench.config.checkpoints,
    profile=bench.config.profile,
  )
  stream = batches.endless(sources, config.batch_size, seed=bench.config.seed)
  put = functools.partial(mesh_lib.put_batch, bench.mesh)
  state, _ = fit(
    stage,
    lambda s, b: step(s, b, frozen, positive_weights),
    state,
    lambda at: map(put, stream.starting_at(at)),
    measure,
  )
  return optim.merge(state.params, frozen)


def steps(bench: Bench, sources: Sequence[batches.Source]) -> int:
  """The optimiser steps after which the evaluated source was seen `num_epochs` times."""
  config = bench.config.fit
  main = next(s for s in sources if s.name == bench.config.data.evaluated)
  share = main.weight / sum(source.weight for source in sources)
  return max(math.ceil(config.num_epochs * len(main.rows) / (config.batch_size * share)), 1)


def packed(bench: Bench, some: Sequence[Item]) -> tuple[rows.Rows, list[list[int]]]:
  """Items as rows of the fit's shape, and where each went."""
  config = bench.config.fit
  return rows.label_rows(some, config.sequence_length, config.max_texts, bench.config.seed)


def heldout_measure(bench: Bench, heldout: Sequence[Item], frozen: Params) -> Callable:
  """`state -> figures` on held-out items."""
  evaluate = mesh_lib.bind(classifier.evaluate, bench.network, first_block=bench.stem)
  evaluate = mesh_lib.jit(evaluate, bench.mesh)
  whole = batches.once(packed(bench, heldout)[0], bench.config.fit.batch_size)
  on_mesh = [mesh_lib.put_batch(bench.mesh, batch) for batch in whole]

  def measure(state: classifier.FitState) -> dict[str, float]:
    params = optim.merge(state.params, frozen)
    sums = [hosts.whole(evaluate(params, batch)) for batch in on_mesh]
    figures = classifier.summarize(jax.tree.map(lambda *parts: sum(parts), *sums))
    return {f"moderation/heldout_{key}": value for key, value in figures.items()}

  return measure


def score(bench: Bench, params: Params, texts: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
  """Logits [n, C] of texts, given as their windows, by the worst window of each."""
  owners = np.repeat(np.arange(len(texts)), [len(windows) for windows in texts])
  items = rows.unlabelled(window for windows in texts for window in windows)
  some, plan = packed(bench, items)
  apply = mesh_lib.jit(
    mesh_lib.bind(classifier.logits, bench.network, first_block=bench.stem), bench.mesh
  )
  found = np.full((len(texts), len(CATEGORIES)), -np.inf)
  size = bench.config.fit.batch_size
  for number, batch in enumerate(batches.once(some, size)):
    got = hosts.whole(apply(params, mesh_lib.put_batch(bench.mesh, batch)))
    for row, slots in zip(got, plan[number * size :]):
      for logits, item in zip(row, slots):
        found[owners[item]] = np.maximum(found[owners[item]], logits)
  return found


def done(folder: pathlib.Path, work: Callable[[], Any]) -> Any:
  """What `work()` found, as JSON; it is kept in the folder, and not worked out again."""
  marker = folder / "done.json"
  due = not marker.exists()
  hosts.wait(f"whether {folder.name} is due")
  if due:
    found = work()
    if hosts.is_first():
      folder.mkdir(parents=True, exist_ok=True)
      files.write_json_atomic(marker, found)
    hosts.wait(f"{folder.name} is done")
  return files.read_json(marker)
