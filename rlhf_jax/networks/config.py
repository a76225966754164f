"""What a network is: its sizes, and how it is computed."""

import dataclasses
from typing import Literal

import jax
from jax.sharding import Mesh

from rlhf_jax.config import Positive, PositiveInt
from rlhf_jax.networks import panels
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.parallel import rules
from rlhf_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How a network is computed: what trades memory, time and rounding, and changes nothing else."""

  dtype: Literal["float32", "bfloat16"]  # of activations; parameters are always float32
  scan_layers: bool  # one compiled layer under lax.scan, but to decode: compiles fast when deep
  remat: bool  # the backward pass keeps the stream between blocks, and computes the rest again
  # Columns of a row whose logits a loss holds at once. None: all; in training on a CPU, what stays
  # in its cache.
  logit_columns: PositiveInt | None
  # How whole rows attend: all at once, in blocks if there are several (`blocked.py`), or by the
  # accelerator's own kernels (`fused.py`); "auto": in blocks on a CPU, elsewhere all at once.
  attention: Literal["auto", "plain", "blocked", "fused"]
  # Whether decoding multiplies with a copy of the kernels in panels (`panels.py`); "auto": on a CPU
  # where a device has few rows. For very few, devices then share the kernels (`in_one_group`).
  panels: Literal["auto", "always", "never"]

  @property
  def attends(self) -> str:
    """How whole rows attend in what is traced here: "plain", "blocked" or "fused"."""
    if self.attention != "auto":
      return self.attention
    return "blocked" if mesh_lib.platform() == "cpu" else "plain"

  def in_panels(self, rows: int) -> bool:
    """Whether a decoding step of so many rows multiplies with panels; asked in `mesh.jit`."""
    # A device that has whole kernels reads them for a single row as fast without.
    fewest = 1 if rules.tensor_devices() > 1 else 2
    few = fewest <= rows // rules.row_shards(rows) <= panels.MOST_ROWS
    fits = mesh_lib.platform() == "cpu" and few and not rules.gathers_parameters()
    return self.panels == "always" or (self.panels == "auto" and fits)

  def compiler_options(self, rows: int, mesh: Mesh) -> tuple[tuple[str, str], ...]:
    """What `mesh.jit` compiles the decoding of so many rows with."""
    with jax.set_mesh(mesh):
      return panels.compiler_options() if self.in_panels(rows) else ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes of a decoder; letters as in `types.py`."""

  vocab_size: PositiveInt  # V
  d_model: PositiveInt  # D
  n_layers: PositiveInt  # L
  n_heads: PositiveInt  # N
  n_kv_heads: PositiveInt  # G
  head_dim: PositiveInt  # H
  d_ff: PositiveInt  # F
  rope_base: Positive  # base of the rotary frequencies
  norm_eps: Positive  # epsilon inside RMSNorm
  tie_embeddings: bool  # the language-model head is the transposed embedding
  compute: ComputeConfig

  def __post_init__(self):
    if self.n_heads % self.n_kv_heads:
      raise UserError(
        f"config model: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}."
      )
    if self.head_dim % 2:
      raise UserError(f"config model: head_dim {self.head_dim} must be even for rotary positions.")

  def in_one_group(self, rows: int, mesh: Mesh) -> bool:
    """Whether devices that have all parameters decode so many rows with a part of them each.

    A step of few rows takes a CPU little longer than reading the kernels does. So a device reads a
    part of them for all rows, rather than all of them for a part of the rows.
    """
    whole = mesh.shape["fsdp"] == mesh.shape["tensor"] == 1 < mesh.size
    if not whole or mesh.is_multi_process or mesh.devices.flat[0].platform != "cpu":
      return False
    shared = self.n_heads, self.n_kv_heads, self.d_ff, self.vocab_size
    divides = all(count % mesh.size == 0 for count in shared)
    return divides and self.compute.panels == "auto" and 1 < rows <= panels.GROUP_ROWS
