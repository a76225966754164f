"""Real checkpoints, in and out.

`load` reads a Hugging Face folder, a GGUF file or a llama2.c file and finds the sizes in it;
`load_as` does so for a model that is configured already. Both return NumPy arrays, for the caller
to place on its mesh. `save` writes a folder that `transformers` reads.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from rlhf_jax.networks import gguf_file, hf_layout, llama2c_file, safetensors_file
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.types import Params, UserError

NOTHING = MappingProxyType({})


def load(path: str | pathlib.Path) -> tuple[dict[str, Any], Params]:
  """Reads a pretrained checkpoint.

  Args:
    path: a folder with config.json and *.safetensors, a .gguf file, or a llama2.c .bin file.

  Returns:
    The fields of ModelConfig that the checkpoint decides (all but `compute`), and the parameters,
    float32, one subtree a layer: those of a `Policy`, or of a `ScalarNetwork` where the checkpoint
    has a score head.

  Raises:
    UserError: nothing readable at `path`, tensors that are missing, unknown or of another shape,
      and features that our decoder does not have (biases, scaled rotary positions, ...).
  """
  source = _open(pathlib.Path(path).expanduser())
  return source.fields, hf_layout.assemble(source)


def load_as(config: ModelConfig, path: str | pathlib.Path) -> Params:
  """Parameters of the checkpoint at `path` for networks of `config`, stacked if it scans layers.

  Raises:
    UserError: as `load`, and where a size in `config` is not the checkpoint's; before any weight is
      read.
  """
  source = _open(pathlib.Path(path).expanduser())
  ours = dataclasses.asdict(config)
  differing = [
    f"{name} is {ours[name]} in the configuration, {value} in the checkpoint"
    for name, value in source.fields.items()
    if ours[name] != value
  ]
  if differing:
    raise UserError(
      f"{source.where} does not fit the configured model: {'; '.join(differing)}. Set these fields "
      "to the checkpoint's values, or choose another checkpoint."
    )
  params = hf_layout.assemble(source)
  return stack_layers(params) if config.compute.scan_layers else params


def save_safetensors(
  folder: str | pathlib.Path,
  config: ModelConfig,
  params: Params,
  *,
  extra: Mapping[str, Any] = NOTHING,
) -> None:
  """Writes parameters in Hugging Face's layout, float32: config.json and model.safetensors.

  A policy is read by `LlamaForCausalLM`, a scalar network by `LlamaForSequenceClassification` with
  one label. That class has no bias, so a bias other than 0 goes into a tensor of its own,
  "score.bias": `load` reads it back, while transformers leaves it out and its scores are lower by
  the bias, which ranks nothing differently.

  Args:
    folder: where to write; the two files are replaced if they are there.
    config: the sizes of the network.
    params: of a `Policy` or a `ScalarNetwork`, layers stacked or not.
    extra: keys of config.json that a ModelConfig does not hold: "bos_token_id", "eos_token_id",
      "pad_token_id" (transformers needs it to score a padded batch), "max_position_embeddings".

  Raises:
    UserError: parameters that are not those of `config`; a folder or disk that cannot be written.
  """
  params = unstack_layers(params) if "blocks" in params["trunk"] else params
  tensors = hf_layout.disassemble(params)
  if "score.bias" in tensors and not np.any(tensors["score.bias"]):
    del tensors["score.bias"]
  unread = {name: array.shape for name, array in tensors.items()}
  layered = dataclasses.replace(config, compute=hf_layout.COMPUTE)
  hf_layout.check_tensors(str(folder), layered, unread)
  safetensors_file.write_folder(pathlib.Path(folder).expanduser(), config, tensors, extra)


def stack_layers(params: Params) -> Params:
  """Network parameters with the layers' subtrees stacked into one, for `scan_layers`."""
  outer = {name: leaf for name, leaf in params["trunk"].items() if not name.startswith("block_")}
  blocks = [params["trunk"][f"block_{i}"] for i in range(len(params["trunk"]) - len(outer))]
  stacked = jax.tree.map(lambda *layers: np.stack(layers), *blocks)
  return {**params, "trunk": {**outer, "blocks": stacked}}


def unstack_layers(params: Params) -> Params:
  """The inverse of `stack_layers`."""
  outer = {name: leaf for name, leaf in params["trunk"].items() if name != "blocks"}
  blocks = jax.tree.map(np.asarray, params["trunk"]["blocks"])
  layers = range(jax.tree.leaves(blocks)[0].shape[0])
  split = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in layers}
  return {**params, "trunk": {**outer, **split}}


def _open(path: pathlib.Path) -> hf_layout.Source:
  """Chooses the reader by what is at `path`."""
  if path.is_dir():
    return safetensors_file.open_folder(path)
  if not path.exists():
    raise UserError(f"there is no checkpoint at {path}; give the path of a folder or a file.")
  if path.suffix == ".gguf":
    return gguf_file.open_file(path)
  if path.suffix == ".bin":
    return llama2c_file.open_file(path)
  raise UserError(
    f"{path} is no checkpoint that can be read; expected a folder with config.json and "
    "*.safetensors, a .gguf file, or a llama2.c .bin file."
  )
