"""GGUF files of the Llama family (llama.cpp), dequantised to float32 tensor by tensor.

The `gguf` package knows the block formats; F32, F16, Q8_0, Q4_0 and Q4_1 are what we test. Sizes
come from the file's metadata. Shapes are listed reversed there, and the rows of q and k are in
llama.cpp's interleaved rotary order.
"""

import functools
import pathlib
import re
from typing import Any

import gguf
import numpy as np

from rlhf_jax.networks.hf_layout import Shape, Source, split_halves
from rlhf_jax.types import UserError

OUTER = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
SIZES = {
  "embedding_length": "d_model",
  "block_count": "n_layers",
  "attention.head_count": "n_heads",
  "feed_forward_length": "d_ff",
}
# Metadata that changes the network's function, and the only values that our decoder computes.
SUPPORTED = {
  "rope.scaling.type": ("none",),
  "attention.sliding_window": (0,),
  "expert_count": (0,),
  "attention.causal": (True,),
}


def open_file(path: pathlib.Path) -> Source:
  """The checkpoint in a .gguf file; reads its metadata, and maps the tensors into memory.

  Raises:
    UserError: a damaged file, another architecture, a feature that the decoder does not have, or
      a quantisation that cannot be undone.
  """
  try:
    reader = gguf.GGUFReader(path)
  except (OSError, ValueError, IndexError, KeyError) as error:
    raise UserError(f"{path} is no complete GGUF file ({error}); copy it again.") from error
  tensors = {stored_name(tensor.name): tensor for tensor in reader.tensors}
  shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in tensors.items()}
  fields = _fields(path, functools.partial(_metadata, reader), shapes)

  def read(name: str) -> np.ndarray:
    tensor = tensors[name]
    try:
      weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])
    except NotImplementedError as error:
      raise UserError(
        f"{path}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}, which cannot be "
        "dequantised; use a file in F32, F16, Q8_0, Q4_0 or Q4_1."
      ) from error
    if name.endswith("self_attn.q_proj.weight"):
      return split_halves(weights, fields["n_heads"])
    if name.endswith("self_attn.k_proj.weight"):
      return split_halves(weights, fields["n_kv_heads"])
    return weights

  return Source(str(path), fields, shapes, read)


def stored_name(name: str) -> str:
  """Hugging Face's name of a GGUF tensor; one that we do not know keeps its own."""
  layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
  if layer and layer[2] in LAYER:
    return f"model.layers.{layer[1]}.{LAYER[layer[2]]}.weight"
  return OUTER[name] if name in OUTER else name


def _metadata(reader: gguf.GGUFReader, key: str) -> Any:
  """The value at a metadata key, None where there is none."""
  field = reader.get_field(key)
  return None if field is None else field.contents()


def _fields(path: pathlib.Path, metadata, shapes: dict[str, Shape]) -> dict[str, Any]:
  """The fields of ModelConfig, from the metadata of a GGUF file."""
  architecture = metadata("general.architecture")
  if architecture != "llama":
    raise UserError(f"{path}: architecture is {architecture!r}; only 'llama' is supported.")
  _check_supported(path, metadata, shapes)
  required = {key: metadata(f"llama.{key}") for key in (*SIZES, "attention.layer_norm_rms_epsilon")}
  for key, value in required.items():
    if not isinstance(value, (int, float)) or value <= 0:  # absent, or one value a layer
      raise UserError(f"{path}: metadata llama.{key} is {value!r}; expected one positive number.")
  if "model.embed_tokens.weight" not in shapes:
    raise UserError(f"{path}: tensor 'token_embd.weight' is missing; copy the file again.")
  fields = {ours: required[theirs] for theirs, ours in SIZES.items()}
  n_kv_heads = metadata("llama.attention.head_count_kv")
  rope_base = metadata("llama.rope.freq_base")
  return fields | {
    "vocab_size": shapes["model.embed_tokens.weight"][0],
    "n_kv_heads": fields["n_heads"] if n_kv_heads is None else n_kv_heads,
    "head_dim": _head_dim(path, metadata, fields["d_model"] // fields["n_heads"]),
    "rope_base": 10000.0 if rope_base is None else _shortest(rope_base),
    "norm_eps": _shortest(required["attention.layer_norm_rms_epsilon"]),
    "tie_embeddings": "lm_head.weight" not in shapes,
  }


def _check_supported(path: pathlib.Path, metadata, shapes: dict[str, Shape]) -> None:
  for key, values in SUPPORTED.items():
    value = metadata(f"llama.{key}")
    if value is not None and value not in values:
      raise UserError(
        f"{path}: metadata llama.{key} is {value!r}, which the decoder does not have; only "
        f"{values[0]!r} is supported."
      )
  if "rope_freqs.weight" in shapes:
    raise UserError(f"{path}: scaled rotary positions ('rope_freqs.weight') are not supported.")


def _head_dim(path: pathlib.Path, metadata, default: int) -> int:
  """Head width H; rotary positions must turn all of it, and keys and values be equally wide."""
  widths = {
    key: metadata(f"llama.{key}")
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
  }
  stated = {key: width for key, width in widths.items() if width is not None}
  if len(set(stated.values())) > 1:
    raise UserError(f"{path}: head widths differ: {stated}; only one width is supported.")
  return next(iter(stated.values()), default)


def _shortest(value: float) -> float:
  """The shortest decimal of a number stored in float32: 1e-5, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))
