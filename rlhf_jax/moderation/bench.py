"""What every fit of a moderation experiment shares: texts, tokenizer, trunk, and what is frozen."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import normalizers

from rlhf_jax import config as config_lib
from rlhf_jax.data import batches
from rlhf_jax.data import moderation as data_lib
from rlhf_jax.data.moderation import CATEGORIES, ModerationExample
from rlhf_jax.moderation import rows
from rlhf_jax.moderation.classifier import LabelBatch
from rlhf_jax.moderation.config import ModerationConfig
from rlhf_jax.networks import heads, pretrained
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.parallel import hosts, rules
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training import checkpoint, files, optim
from rlhf_jax.types import Params, UserError

EOS, PAD = "<|endoftext|>", "<|pad|>"
CHANGES_NO_RESULT = ("checkpoints", "profile", "actions", "thresholds", "evaluation")  # of a fit


@dataclasses.dataclass(frozen=True)
class Bench:
  """A moderation experiment, opened."""

  config: ModerationConfig
  workdir: pathlib.Path
  mesh: Mesh
  examples: Mapping[str, list[ModerationExample]]  # by source
  tokenizer: Tokenizer
  trunk: Params  # that every fit starts from

  @functools.cached_property
  def network(self) -> heads.LabelNetwork:
    return heads.LabelNetwork(model(self.config), len(CATEGORIES), self.config.trunk.pooling)

  @functools.cached_property
  def stem(self) -> int:
    """How many of the lowest blocks no fit changes: their output is computed once a text."""
    _, frozen = optim.split({"trunk": self.trunk, "score": {"bias": 0}}, self.config.fit.frozen)
    return heads.shared_stem(self.network.config, [self.trunk], frozen.get("trunk", {}))

  @property
  def evaluated(self) -> list[ModerationExample]:
    """The texts that are cross-validated."""
    return self.examples[self.config.data.evaluated]

  def key(self, name: str) -> jax.Array:
    """The PRNG key of one part of the experiment."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(jax.random.key(self.config.seed), int.from_bytes(digest[:4], "big"))

  def windows(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
    """Each text as the network reads it: windows of ids, or of the stream after the stem."""
    length = self.config.fit.sequence_length
    ids = [rows.windows(rows.encode(text, self.tokenizer), length) for text in texts]
    if not self.stem:
      return ids
    flat = iter(streams(self, [window for some in ids for window in some]))
    return [[next(flat) for _ in some] for some in ids]


def model(config: ModerationConfig) -> ModelConfig:
  """The sizes of the classifier's trunk."""
  sizes = config.trunk.model
  return dataclasses.replace(sizes, n_layers=config.trunk.blocks or sizes.n_layers)


def start(section: Any, workdir: str | pathlib.Path) -> Bench:
  """Opens an experiment: the same command with the same config goes on where it was killed.

  Raises:
    UserError: a mistake in the config or its data, or a `workdir` that another config made.
  """
  config = config_lib.build(ModerationConfig, section)
  workdir = pathlib.Path(workdir).expanduser().absolute()
  mesh = mesh_lib.make(config.mesh)
  part = config.fit.batch_size // config.fit.micro_batches
  mesh_lib.check_batch(mesh, part, "fit.batch_size / fit.micro_batches")
  check_workdir(config, workdir)
  with hosts.first_goes_first("data and tokenizer"):
    examples = data_lib.load(config.data, config.seed)
    tokenizer = find_tokenizer(config, examples, workdir)
  if tokenizer.vocab_size > config.trunk.model.vocab_size:
    raise UserError(
      f"config trunk.model.vocab_size: {config.trunk.model.vocab_size} is smaller than the "
      f"tokenizer's vocabulary of {tokenizer.vocab_size}."
    )
  bench = Bench(config, workdir, mesh, examples, tokenizer, first_trunk(config, mesh))
  optim.split({"trunk": bench.trunk, "score": {"bias": 0}}, config.fit.frozen)
  if hosts.is_first():
    files.write_json_atomic(workdir / "config.json", config_lib.to_dict(config))
  hosts.wait("started")
  return bench


def check_workdir(config: ModerationConfig, workdir: pathlib.Path) -> None:
  """Raises a UserError where `workdir` cannot be written or holds fits of another config."""
  files.ensure_writable(workdir)
  if not (workdir / "config.json").exists() or not any(workdir.rglob("about.json")):
    return
  keep = lambda sections: {k: v for k, v in sections.items() if k not in CHANGES_NO_RESULT}
  old, new = files.read_json(workdir / "config.json"), config_lib.to_dict(config)
  changed = config_lib.differences(keep(old), keep(new))
  folds = config_lib.differences(old.get("evaluation"), new["evaluation"], "evaluation")
  changed += [line for line in folds if "folds" in line or "near_duplicate" in line]
  if changed:
    shown = "\n  ".join(changed[:8])
    raise UserError(
      f"{workdir} was made with another config; choose another --workdir, or use the values it was "
      f"made with (there -> now):\n  {shown}"
    )


def find_tokenizer(
  config: ModerationConfig, examples: Mapping[str, list[ModerationExample]], workdir: pathlib.Path
) -> Tokenizer:
  """The tokenizer of the config; one that is learnt here reads all texts, but no label."""
  if config.trunk.tokenizer != "train":
    return Tokenizer.load(config.trunk.tokenizer)
  texts = [example.text.lower() for some in examples.values() for example in some]
  size = config.trunk.vocab_size
  made = tokenizer_lib.train_bpe(texts, size, (PAD, EOS), eos=EOS, pad=PAD)
  # With a thousand texts to learn from, "Kill" and "kill" had better be one word.
  made.backend.normalizer = normalizers.Lowercase()
  return made


def first_trunk(config: ModerationConfig, mesh: Mesh) -> Params:
  """The trunk that every fit starts from: a run's policy, a pretrained model's, or random.

  Raises:
    UserError: nothing readable there, or a model of other sizes.
  """
  path, sizes = config.trunk.checkpoint, model(config)
  if path is None:
    init = functools.partial(heads.init, heads.LabelNetwork(sizes, 1, "mean"))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    layout = rules.partition(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=layout)(key)["trunk"]
  if (pathlib.Path(path) / "about.json").exists():
    params, about = checkpoint.load_params(path)
    without = lambda fields: {k: v for k, v in fields.items() if k != "compute"}
    ours = config_lib.to_dict(config.trunk.model)
    changed = config_lib.differences(without(about["model"]), without(ours), "trunk.model")
    if changed:
      raise UserError(f"{path} is a model of other sizes (there -> here): {'; '.join(changed)}.")
  else:
    whole = dataclasses.replace(sizes.compute, scan_layers=False)
    params = pretrained.load_as(dataclasses.replace(config.trunk.model, compute=whole), path)
  if "blocks" in params["trunk"]:
    params = pretrained.unstack_layers(params)
  above = {f"block_{i}" for i in range(sizes.n_layers, config.trunk.model.n_layers)}
  params = {"trunk": {name: part for name, part in params["trunk"].items() if name not in above}}
  params = pretrained.stack_layers(params) if sizes.compute.scan_layers else params
  return rules.place(params, mesh)["trunk"]


def streams(bench: Bench, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
  """The stream [t, D] after the stem for each window of ids.

  A file in the workdir keeps them, so the folds and a resumed run compute none twice, and memory
  holds those that are read.
  """
  name = hashlib.sha256(b"|".join(window.tobytes() for window in windows)).hexdigest()[:16]
  path = bench.workdir / "streams" / f"{name}.npy"
  if not path.exists() and hosts.is_first():
    files.ensure_writable(path.parent)
  lengths = np.array([len(window) for window in windows])
  ends = np.cumsum(lengths)
  if not path.exists():
    _compute_streams(bench, windows, path, ends - lengths, int(ends[-1]))
  kept = np.load(path, mmap_mode="r", allow_pickle=False)
  return [kept[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist())]


def _compute_streams(bench, windows, path, starts, total) -> None:
  """Runs the stem over all windows, packed into rows, and writes what comes out, text by text."""
  config, D = bench.config.fit, bench.network.config.d_model
  fresh = path.with_name(f"tmp-{path.name}")
  items = rows.unlabelled(windows)
  packed, plan = rows.label_rows(items, config.sequence_length, config.max_texts, bench.config.seed)
  stem = mesh_lib.jit(
    lambda trunk, batch: bench.network.apply(
      {"params": {"trunk": trunk}},
      *(batch.inputs, batch.positions, batch.segments, bench.stem),
      method="stem",
    ),
    bench.mesh,
  )
  if hosts.is_first():
    files.ensure_space(path.parent, total * D * 4)
    out = np.lib.format.open_memmap(fresh, mode="w+", dtype=np.float32, shape=(total, D))
  size = max(config.batch_size // config.micro_batches, 1)
  for number in range(0, len(packed), size):
    chosen = range(number, min(number + size, len(packed)))
    filled = [packed[i] for i in chosen] + [packed.empty] * (size - len(chosen))
    batch: LabelBatch = mesh_lib.put_batch(bench.mesh, batches.stack(filled))
    found = hosts.whole(stem(bench.trunk, batch))
    if not hosts.is_first():
      continue
    for row, i in enumerate(chosen):
      column = 0
      for w in plan[i]:
        length = len(windows[w])
        out[starts[w] : starts[w] + length] = found[row, column : column + length]
        column += length
  if hosts.is_first():
    out.flush()
    fresh.rename(path)
  hosts.wait("streams")
