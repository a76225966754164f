"""Hugging Face folders: `config.json` beside one or several `*.safetensors` files.

Whatever would change the network's function and that ours does not have is an error that names the
key, never ignored: a checkpoint that loads computes what its author's code computes.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  importing it teaches NumPy the type that bfloat16 tensors come in
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.networks.hf_layout import Shape, Source
from rlhf_jax.types import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FLOATS = ("F32", "F16", "BF16")
SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "d_model",
  "num_hidden_layers": "n_layers",
  "num_attention_heads": "n_heads",
  "intermediate_size": "d_ff",
}
# What an absent key of config.json means: the defaults of transformers' LlamaConfig.
ABSENT = {
  "num_key_value_heads": None,  # as many as query heads
  "head_dim": None,  # hidden_size / num_attention_heads
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "rope_scaling": None,
  "rope_parameters": None,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
  "sliding_window": None,
  "partial_rotary_factor": 1.0,
  "quantization_config": None,
}
# The only values of these keys that our decoder computes.
SUPPORTED = {
  "hidden_act": ("silu", "swish"),  # two names of one function
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "sliding_window": (None,),
  "partial_rotary_factor": (1.0,),
  "quantization_config": (None,),
}


def open_folder(folder: pathlib.Path) -> Source:
  """The checkpoint in a folder; reads config.json and the headers of the weights.

  Raises:
    UserError: a file that is absent or damaged, or a feature that the decoder does not have.
  """
  fields = read_fields(folder / CONFIG)
  headers = {path: _headers(path) for path in weight_files(folder)}
  files = {name: path for path, shapes in headers.items() for name in shapes}
  # Older exports also hold the rotary frequencies, which every reader recomputes from the base.
  kept = [name for name in files if not name.endswith("rotary_emb.inv_freq")]
  shapes = {name: headers[files[name]][name] for name in kept}

  def read(name: str) -> np.ndarray:
    with safetensors.safe_open(files[name], framework="np") as file:
      return file.get_tensor(name)

  return Source(str(folder), fields, shapes, read)


def read_fields(path: pathlib.Path) -> dict[str, Any]:
  """The fields of ModelConfig that a `config.json` of the Llama family decides."""
  stored = _read_json(path)
  if "model_type" not in stored or stored["model_type"] != "llama":
    kind = repr(stored["model_type"]) if "model_type" in stored else "absent"
    raise UserError(f"{path}: model_type is {kind}; only 'llama' is supported.")
  bad = [key for key in SIZES if key not in stored or not _is_size(stored[key])]
  if bad:
    raise UserError(f"{path}: {bad} must be positive integers; restore the checkpoint's config.")
  stored = {**ABSENT, **stored}
  for key, values in SUPPORTED.items():
    if stored[key] not in values:
      allowed = " or ".join(json.dumps(value) for value in values)
      raise UserError(
        f"{path}: {key} is {json.dumps(stored[key])}, which the decoder does not have; only "
        f"{allowed} is supported."
      )
  fields = {ours: stored[theirs] for theirs, ours in SIZES.items()}
  D, N = fields["d_model"], fields["n_heads"]
  if stored["head_dim"] is None and D % N:
    raise UserError(f"{path}: hidden_size {D} is not a multiple of num_attention_heads {N}.")
  return fields | {
    "n_kv_heads": N if stored["num_key_value_heads"] is None else stored["num_key_value_heads"],
    "head_dim": D // N if stored["head_dim"] is None else stored["head_dim"],
    "rope_base": _rope_base(path, stored),
    "norm_eps": stored["rms_norm_eps"],
    "tie_embeddings": stored["tie_word_embeddings"],
  }


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold a folder's tensors: `model.safetensors`, the shards of the index, or one.

  Raises:
    UserError: none, several without an index, or a shard that the index names and that is absent.
  """
  single, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
  if single.exists():
    return [single]
  if index.exists():
    shards = _read_json(index)
    if "weight_map" not in shards:
      raise UserError(f"{index}: no 'weight_map'; download the index of the checkpoint again.")
    names = sorted(set(shards["weight_map"].values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
      raise UserError(f"{index} names {absent}, which {folder} lacks; copy all shards there.")
    return [folder / name for name in names]
  found = sorted(folder.glob("*.safetensors"))
  if len(found) != 1:
    pickled = [path.name for path in sorted(folder.glob("*.bin"))]
    hint = f" {pickled} may run code when read; convert them to safetensors." if pickled else ""
    raise UserError(
      f"{folder}: {len(found)} *.safetensors files and no index; expected model.safetensors, or "
      f"shards with model.safetensors.index.json.{hint}"
    )
  return found


def write_folder(
  folder: pathlib.Path,
  config: ModelConfig,
  tensors: dict[str, np.ndarray],
  extra: Mapping[str, Any],
) -> None:
  """Writes `config.json` and `model.safetensors`; each appears whole or not at all.

  Raises:
    UserError: a key of `extra` that the sizes decide; a folder or disk that cannot be written.
  """
  decided = _config_json(config, "score.weight" in tensors)
  clash = sorted(set(extra) & set(decided))
  if clash:
    raise UserError(f"config.json keys {clash} follow from the model; leave them out of `extra`.")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as draft:
      weights, settings = pathlib.Path(draft, WEIGHTS), pathlib.Path(draft, CONFIG)
      # transformers refuses weights without this note on whose [out, in] layout they have.
      safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
      settings.write_text(json.dumps(decided | dict(extra), indent=2) + "\n", encoding="utf-8")
      os.replace(weights, folder / WEIGHTS)
      os.replace(settings, folder / CONFIG)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"cannot write the checkpoint {folder}: {error}.") from error


def _config_json(config: ModelConfig, is_scalar: bool) -> dict[str, Any]:
  """The keys that both older and newer transformers read."""
  settings = {
    "architectures": ["LlamaForSequenceClassification" if is_scalar else "LlamaForCausalLM"],
    "model_type": "llama",
    **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
    "num_key_value_heads": config.n_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_base,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": "float32",
  }
  one_label = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
  return settings | (one_label if is_scalar else {})


def _rope_base(path: pathlib.Path, stored: dict[str, Any]) -> float:
  """The rotary base: `rope_parameters.rope_theta` (transformers 5) or `rope_theta` (before)."""
  rope = stored["rope_parameters"] or stored["rope_scaling"] or {}
  kinds = {rope[key] for key in ("rope_type", "type") if key in rope} or {"default"}
  partial = "partial_rotary_factor" in rope and rope["partial_rotary_factor"] != 1.0
  if kinds != {"default"} or partial:
    raise UserError(
      f"{path}: rotary positions are changed by {json.dumps(rope)}; only unscaled, full rotary "
      "positions (rope_type 'default') are supported."
    )
  return rope["rope_theta"] if "rope_theta" in rope else stored["rope_theta"]


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _headers(path: pathlib.Path) -> dict[str, Shape]:
  """Name to shape of the tensors in one file; none of them is read."""
  try:
    with safetensors.safe_open(path, framework="np") as file:
      slices = {name: file.get_slice(name) for name in file.keys()}
      types = {name: part.get_dtype() for name, part in slices.items()}
      shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{path} is no readable safetensors file ({error}); copy it again.") from error
  for name, kind in types.items():
    if kind not in FLOATS:
      raise UserError(
        f"{path}: tensor {name!r} has type {kind}; only {', '.join(FLOATS)} are weights here."
      )
  return shapes


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"{path} does not exist; a checkpoint folder needs it.") from error
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}.") from error
  if not isinstance(content, dict):
    raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}.")
  return content
