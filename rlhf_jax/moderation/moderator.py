"""The moderator that a server loads: texts in, verdicts out.

A trained one lies in a workdir as `moderator/` (parameters, sizes, and how texts are cut),
`tokenizer/`, and `thresholds.json`: calibration, threshold and actions by category, which an
operator may edit.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from rlhf_jax import config as config_lib
from rlhf_jax.config import PositiveInt
from rlhf_jax.data.moderation import CATEGORIES
from rlhf_jax.moderation import rows, verdicts
from rlhf_jax.moderation.calibration import Platt, Threshold
from rlhf_jax.moderation.verdicts import Actions, Side, Verdict
from rlhf_jax.networks import heads
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.networks.heads import Pooling
from rlhf_jax.parallel import hosts, rules
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.text.messages import check_text
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training import checkpoint, files
from rlhf_jax.types import Params, UserError

SHORTEST = 16  # tokens of the smallest bucket


@dataclasses.dataclass(frozen=True)
class Design:
  """What it takes to read texts as in training; `config.json` beside the parameters."""

  model: ModelConfig
  pooling: Pooling
  sequence_length: PositiveInt  # tokens of a window
  categories: tuple[str, ...]

  def __post_init__(self):
    if self.categories != CATEGORIES:
      raise UserError(f"this moderator has the categories {self.categories}, not {CATEGORIES}.")

  @property
  def network(self) -> heads.LabelNetwork:
    return heads.LabelNetwork(self.model, len(self.categories), self.pooling)


@dataclasses.dataclass(frozen=True)
class Rule:
  """How a logit of one category is judged; an entry of `thresholds.json`."""

  platt: Platt
  threshold: Threshold
  actions: Actions


@dataclasses.dataclass(frozen=True)
class Moderator:
  """`(texts) -> verdicts`, compiled once for each length bucket.

  Windows are padded to a power of two, 16 at least, so a new length compiles nothing. A bucket has
  at most two programs: for as many rows as there are devices, and for `batch_size` rows.
  """

  design: Design
  params: Params
  tokenizer: Tokenizer
  rules: Mapping[str, Rule]  # by category
  mesh: Mesh
  batch_size: int = 16  # windows at a time, where there are many

  def __post_init__(self):
    mesh_lib.check_batch(self.mesh, self.batch_size, "batch_size of a moderator")
    missing = [category for category in CATEGORIES if category not in self.rules]
    if missing:
      raise UserError(f"a moderator needs calibration and threshold of {', '.join(missing)}.")

  def __call__(self, texts: Sequence[str], side: Side = "input") -> list[Verdict]:
    """The verdict on each text, as what a person wrote ("input") or the model did ("output")."""
    thresholds = {name: rule.threshold.value for name, rule in self.rules.items()}
    actions = {name: rule.actions for name, rule in self.rules.items()}
    judge = functools.partial(verdicts.judge, thresholds=thresholds, actions=actions, side=side)
    return [judge(scores) for scores in self.probabilities(texts)]

  def probabilities(self, texts: Sequence[str]) -> np.ndarray:
    """Calibrated probabilities [n, C], by each text's worst window."""
    logits = self.logits(texts)
    calibrated = [self.rules[name].platt(logits[:, c]) for c, name in enumerate(CATEGORIES)]
    return np.stack(calibrated, axis=1)

  def logits(self, texts: Sequence[str]) -> np.ndarray:
    """Logits [n, C], by each text's worst window."""
    if isinstance(texts, str):
      raise UserError("a moderator takes a list of texts, got one text; put it into a list.")
    for text in texts:
      check_text(text, "a text to moderate")
    found = np.full((len(texts), len(CATEGORIES)), -np.inf)
    by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
    for i, text in enumerate(texts):
      ids = rows.encode(text, self.tokenizer)
      for window in rows.windows(ids, self.design.sequence_length):
        by_length.setdefault(self._bucket(len(window)), []).append((i, window))
    for length, some in sorted(by_length.items()):
      for i, logits in zip((i for i, _ in some), self._run([w for _, w in some], length)):
        found[i] = np.maximum(found[i], logits)
    return found

  def compile(self) -> None:
    """Compiles every program at once, so that no text waits for it later."""
    length = 0
    while length < self.design.sequence_length:
      length = self._bucket(length + 1)
      for count in (1, mesh_lib.batch_devices(self.mesh) + 1):
        self._run([np.zeros(length, np.int32)] * count, length)

  def _bucket(self, length: int) -> int:
    """The padded length of a window: a power of two, or the longest there is."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), self.design.sequence_length)

  def _run(self, windows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Logits of windows of one bucket."""
    few = mesh_lib.batch_devices(self.mesh)
    found = []
    while len(found) < len(windows):
      left = windows[len(found) :]
      size = few if len(left) <= few else self.batch_size
      tokens = np.full((size, length), self.tokenizer.pad_id, np.int32)
      segments = np.zeros((size, length), np.int32)
      for row, window in enumerate(left[:size]):
        tokens[row, : len(window)], segments[row, : len(window)] = window, 1
      positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape) * segments
      batch = mesh_lib.put_batch(self.mesh, (tokens, positions, segments))
      found += list(hosts.whole(self._apply(self.params, *batch))[:, 0][: len(left)])
    return np.stack(found)

  @functools.cached_property
  def _apply(self) -> Callable:
    network = self.design.network
    return mesh_lib.jit(lambda params, *batch: network.apply({"params": params}, *batch), self.mesh)


def save(workdir: pathlib.Path, moderator: Moderator) -> None:
  """Writes a moderator for `load`; the thresholds last, so what has them is whole."""
  checkpoint.save_params(
    workdir / "moderator", moderator.params, config_lib.to_dict(moderator.design)
  )
  if hosts.is_first():
    fresh = workdir / "tmp-tokenizer"
    moderator.tokenizer.save(fresh)
    files.replace_directory(fresh, workdir / "tokenizer")
    table = {name: config_lib.to_dict(rule) for name, rule in moderator.rules.items()}
    files.write_json_atomic(workdir / "thresholds.json", table)
  hosts.wait("moderator saved")


def load(
  workdir: str | pathlib.Path, *, mesh: Mesh | None = None, batch_size: int = 16
) -> Moderator:
  """The moderator of a workdir of `experiments/moderate.py`, on `mesh` (None: the first device).

  Raises:
    UserError: there is none, it is damaged, or its files are not as `save` writes them.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  if not (workdir / "thresholds.json").exists():
    raise UserError(f"{workdir} holds no moderator; run experiments/moderate.py first.")
  mesh = one_device() if mesh is None else mesh
  design = config_lib.build(Design, files.read_json(workdir / "moderator" / "config.json"))
  shapes = heads.shapes(design.network)
  params, _ = checkpoint.load_params(workdir / "moderator", rules.abstract(shapes, mesh))
  table = files.read_json(workdir / "thresholds.json")
  if not isinstance(table, dict) or set(table) != set(CATEGORIES):
    found = sorted(table) if isinstance(table, dict) else f"{table!r:.80}"
    raise UserError(f"thresholds.json: needs the categories {sorted(CATEGORIES)}, has {found}.")
  judged = {name: _rule(name, entry) for name, entry in table.items()}
  tokenizer = Tokenizer.load(workdir / "tokenizer")
  return Moderator(design, params, tokenizer, judged, mesh, batch_size)


def one_device() -> Mesh:
  """A mesh of this process's first device."""
  axes = ("data", "fsdp", "tensor")
  types = (AxisType.Auto,) * 3
  return jax.make_mesh((1, 1, 1), axes, types, devices=jax.local_devices()[:1])


def _rule(name: str, entry: Any) -> Rule:
  rule = config_lib.build(Rule, entry, f"thresholds.json: {name}")
  if not 0.0 <= rule.threshold.value <= 1.0:
    raise UserError(
      f"thresholds.json: the threshold of {name} is {rule.threshold.value}, outside [0, 1]."
    )
  return rule
