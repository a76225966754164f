"""Checkpoints of karpathy/llama2.c, version 0: seven int32, then float32 tensors in fixed order.

The models are tiny (stories260K is 1 MB), so they are the pretrained language models of tests.
"""

import math
import pathlib

import numpy as np

from rlhf_jax.networks.hf_layout import Source, split_halves
from rlhf_jax.types import UserError

HEADER = ("d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_length")
VERSIONED = 0x616B3432  # "ak42", how files of version 1 and 2 begin
# The format fixes what other formats let a file choose.
ROPE_BASE, NORM_EPS = 10000.0, 1e-5


def open_file(path: pathlib.Path) -> Source:
  """The checkpoint in a llama2.c .bin file, mapped into memory.

  Raises:
    UserError: another version, sizes that make no sense, or a file that is not as long as its
      header says.
  """
  content = np.fromfile(path, np.int32, len(HEADER))
  if content.size < len(HEADER) or content[0] == VERSIONED:
    raise UserError(f"{path}: no llama2.c file of version 0; export it with `--version 0`.")
  sizes = dict(zip(HEADER, content.tolist()))
  tied = sizes["vocab_size"] > 0  # the sign says whether a head of its own follows
  sizes["vocab_size"] = abs(sizes["vocab_size"])
  if min(sizes.values()) < 1 or sizes["d_model"] % sizes["n_heads"]:
    raise UserError(f"{path}: impossible sizes {sizes}; is this a llama2.c checkpoint?")
  max_length = sizes.pop("max_length")
  H = sizes["d_model"] // sizes["n_heads"]
  places, length = _places(sizes, H, max_length, tied)
  if path.stat().st_size != 4 * length:
    raise UserError(
      f"{path}: has {path.stat().st_size} bytes, but its header {sizes} means {4 * length}; copy "
      "the file again."
    )
  floats = np.memmap(path, np.float32, mode="r")

  def read(name: str) -> np.ndarray:
    start, shape = places[name]
    weights = floats[start : start + math.prod(shape)].reshape(shape)
    if name.endswith("self_attn.q_proj.weight"):
      return split_halves(weights, sizes["n_heads"])
    if name.endswith("self_attn.k_proj.weight"):
      return split_halves(weights, sizes["n_kv_heads"])
    return weights

  fields = sizes | {
    "head_dim": H,
    "rope_base": ROPE_BASE,
    "norm_eps": NORM_EPS,
    "tie_embeddings": tied,
  }
  return Source(str(path), fields, {name: shape for name, (_, shape) in places.items()}, read)


def _places(sizes: dict[str, int], H: int, max_length: int, tied: bool):
  """Where each tensor starts, counted in 4-byte words, with its shape; and the file's length."""
  D, F, V = sizes["d_model"], sizes["d_ff"], sizes["vocab_size"]
  NH, GH = sizes["n_heads"] * H, sizes["n_kv_heads"] * H
  layered = {
    "input_layernorm": (D,),
    "self_attn.q_proj": (NH, D),
    "self_attn.k_proj": (GH, D),
    "self_attn.v_proj": (GH, D),
    "self_attn.o_proj": (D, NH),
    "post_attention_layernorm": (D,),
    "mlp.gate_proj": (F, D),
    "mlp.down_proj": (D, F),
    "mlp.up_proj": (F, D),
  }
  places, start = {"model.embed_tokens.weight": (len(HEADER), (V, D))}, len(HEADER) + V * D
  for kind, shape in layered.items():  # all layers of a kind stand together
    for layer in range(sizes["n_layers"]):
      places[f"model.layers.{layer}.{kind}.weight"] = (start, shape)
      start += math.prod(shape)
  places["model.norm.weight"] = (start, (D,))
  start += D + max_length * H  # skips the tables of rotary cosines and sines
  if not tied:
    places["lm_head.weight"] = (start, (V, D))
    start += V * D
  return places, start
