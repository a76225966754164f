"""The configuration of a moderation experiment, checked before anything is computed."""

import dataclasses

from rlhf_jax.config import Count, Fraction, Positive, PositiveInt
from rlhf_jax.data.moderation import CATEGORIES, ModerationDataConfig, TweetsConfig
from rlhf_jax.moderation.calibration import ThresholdConfig
from rlhf_jax.moderation.classifier import FitConfig
from rlhf_jax.moderation.verdicts import Actions
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.networks.heads import Pooling
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.training import checkpoint, profile
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
  """What the classifier stands on."""

  checkpoint: str | None  # a policy of a run, or a file or folder of `pretrained`; None: random
  tokenizer: str  # "train" (a BPE learnt from the texts, in lower case), or a file or folder
  vocab_size: PositiveInt  # of a tokenizer that is trained here
  blocks: PositiveInt | None  # the lowest so many of the checkpoint's blocks; None: all
  pooling: Pooling
  model: ModelConfig  # the checkpoint's sizes, all blocks counted

  def __post_init__(self):
    if self.blocks is not None and self.blocks > self.model.n_layers:
      raise UserError(
        f"config trunk.blocks {self.blocks}: the model has {self.model.n_layers} blocks."
      )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What is measured, and how well it is known."""

  folds: PositiveInt  # of the cross-validation, at least 2
  near_duplicate: Fraction  # texts of at least this Jaccard similarity stay in one fold
  bootstrap: PositiveInt  # samples behind an interval
  level: Fraction  # of the intervals

  def __post_init__(self):
    if self.folds < 2:
      raise UserError(f"config evaluation.folds {self.folds}: cross-validation needs 2 at least.")


@dataclasses.dataclass(frozen=True)
class ReportStudyConfig:
  """Simulated reports of false positives, and the moderator that learns from them."""

  category: str
  count: PositiveInt  # reports
  pool: TweetsConfig  # what the reporters read, one half; both moderators are measured on the other
  weight: Positive  # of the reports in training, where the texts they join have 1

  def __post_init__(self):
    if self.category not in CATEGORIES:
      raise UserError(
        f"config reports.category {self.category!r} is none of {', '.join(CATEGORIES)}."
      )


@dataclasses.dataclass(frozen=True)
class ModerationConfig:
  """All of it."""

  seed: Count
  mesh: mesh_lib.MeshConfig
  data: ModerationDataConfig
  trunk: TrunkConfig
  fit: FitConfig
  evaluation: EvaluationConfig
  thresholds: ThresholdConfig
  actions: dict[str, Actions]  # by category
  reports: ReportStudyConfig
  checkpoints: checkpoint.CheckpointConfig
  profile: profile.ProfileConfig

  def __post_init__(self):
    if sorted(self.actions) != sorted(CATEGORIES):
      raise UserError(
        f"config actions: must name each of {', '.join(CATEGORIES)}, names {sorted(self.actions)}."
      )
