"""The names and shapes under which Hugging Face stores a Llama, beside ours.

Every reader of a checkpoint speaks these names, whatever its file calls them, so that the tree is
put together, and its tensors are checked, in one place. PyTorch keeps a linear map as [out, in];
ours is [in, out], with the heads as axes of their own:

  ours                          Hugging Face                              stored as
  attn/query/kernel [D, N, H]   model.layers.i.self_attn.q_proj.weight    [N H, D]
  attn/out/kernel [N, H, D]     model.layers.i.self_attn.o_proj.weight    [D, N H]
  mlp/gate/kernel [D, F]        model.layers.i.mlp.gate_proj.weight       [F, D]
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from rlhf_jax import config as config_lib
from rlhf_jax.networks import heads
from rlhf_jax.networks.config import ComputeConfig, ModelConfig
from rlhf_jax.types import Params, UserError

Shape = tuple[int, ...]

OUTER = {
  "trunk/embed/embedding": "model.embed_tokens.weight",
  "trunk/final_norm/scale": "model.norm.weight",
  "lm_head/kernel": "lm_head.weight",
  "score/kernel": "score.weight",
  "score/bias": "score.bias",
}
LAYER = {
  "attn_norm/scale": "input_layernorm.weight",
  "attn/query/kernel": "self_attn.q_proj.weight",
  "attn/key/kernel": "self_attn.k_proj.weight",
  "attn/value/kernel": "self_attn.v_proj.weight",
  "attn/out/kernel": "self_attn.o_proj.weight",
  "mlp_norm/scale": "post_attention_layernorm.weight",
  "mlp/gate/kernel": "mlp.gate_proj.weight",
  "mlp/up/kernel": "mlp.up_proj.weight",
  "mlp/down/kernel": "mlp.down_proj.weight",
}
# Checkpoints name their tensors layer by layer, so they are read into a network of this kind.
COMPUTE = ComputeConfig(
  dtype="float32",
  scan_layers=False,
  remat=False,
  logit_columns=None,
  attention="auto",
  panels="auto",
)
MOST_NAMED = 6  # tensors listed in one message; a wrong file differs in hundreds


class Source(NamedTuple):
  """A checkpoint of which only the headers have been read."""

  where: str  # path, for messages
  fields: dict[str, Any]  # the fields of ModelConfig that a checkpoint decides
  shapes: dict[str, Shape]  # of every stored tensor, by Hugging Face name
  read: Callable[[str], np.ndarray]  # one tensor, in its stored shape and any float type


def stored_name(path: str) -> str:
  """Hugging Face's name of the parameter at "trunk/block_3/mlp/up/kernel".

  A parameter that a Llama does not have keeps its path, for the check of the names to find.
  """
  block = re.fullmatch(r"trunk/block_(\d+)/(.+)", path)
  if block and block[2] in LAYER:
    return f"model.layers.{block[1]}.{LAYER[block[2]]}"
  return OUTER[path] if path in OUTER else path


def stored_shape(path: str, shape: Shape) -> Shape:
  """The stored shape of the parameter at `path`, whose own shape is `shape`."""
  if not path.endswith("/kernel"):
    return shape
  inputs = 2 if path.endswith("/out/kernel") else 1  # heads and head width go in together
  return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def from_stored(path: str, stored: np.ndarray, shape: Shape) -> np.ndarray:
  """A stored tensor as the float32 parameter at `path`; always a copy, never a view of a file."""
  turned = stored.T if path.endswith("/kernel") else stored
  return np.array(turned, np.float32, order="C").reshape(shape)


def to_stored(path: str, parameter: Any) -> np.ndarray:
  """The inverse of `from_stored`, as a contiguous float32 array."""
  parameter = np.asarray(parameter, np.float32)
  rows, columns = (*stored_shape(path, parameter.shape), 1)[:2]
  if path.endswith("/kernel"):
    parameter = parameter.reshape(columns, rows).T
  return np.ascontiguousarray(parameter)


def split_halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
  """Query or key rows [N H, D] from interleaved rotary pairs (2i, 2i+1) to (i, i + H/2).

  llama.cpp and llama2.c turn neighbouring rows of a head, as Su et al. 2021 write it; Hugging Face
  and we turn row i with row i + H/2. The two agree once the rows of each head are reordered.
  """
  pairs = rows.reshape(n_heads, -1, 2, rows.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def parameter_shapes(config: ModelConfig, network: type) -> dict[str, Shape]:
  """Path to shape of every parameter of `network(config)`; nothing is allocated."""
  tree = heads.shapes(network(config))
  return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def assemble(source: Source) -> Params:
  """Reads all parameters of a checkpoint, one tensor at a time, as NumPy float32.

  A checkpoint with `score.weight` is a scalar network, any other a policy. A score without a bias
  gets a bias of 0.

  Raises:
    UserError: sizes that contradict each other; a tensor that is missing, that no network has, or
      that has another shape; a second, different head where the head is tied.
  """
  sections = {**source.fields, "compute": dataclasses.asdict(COMPUTE)}
  config = config_lib.build(ModelConfig, sections, source.where)
  stored = dict(source.shapes)
  second_head = stored.pop("lm_head.weight", None) if config.tie_embeddings else None
  shapes = check_tensors(source.where, config, stored)
  if second_head:
    _check_tied(source)
  flat = {path: from_stored(path, source.read(stored_name(path)), shapes[path]) for path in shapes}
  if "score/kernel" in flat and "score/bias" not in flat:
    flat["score/bias"] = np.zeros((1,), np.float32)
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def disassemble(params: Params) -> dict[str, np.ndarray]:
  """Parameters, layers unstacked, as stored tensors by Hugging Face name."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return {stored_name(path): to_stored(path, leaf) for path, leaf in flat.items()}


def check_tensors(where: str, config: ModelConfig, stored: dict[str, Shape]) -> dict[str, Shape]:
  """Holds stored names and shapes against a network's; returns its parameters' paths and shapes.

  A score's bias may be absent, and is then absent from the result.

  Raises:
    UserError: all tensors that are missing, that have no place, or that have another shape.
  """
  network = heads.ScalarNetwork if "score.weight" in stored else heads.Policy
  shapes = parameter_shapes(config, network)
  if "score.bias" not in stored:
    shapes.pop("score/bias", None)
  needed = {stored_name(path): stored_shape(path, shape) for path, shape in shapes.items()}
  problems = [f"tensor {name!r} is missing." for name in needed if name not in stored]
  problems += [
    f"tensor {name!r} of shape {list(stored[name])} has no place in a Llama of these sizes."
    for name in stored
    if name not in needed
  ]
  problems += [
    f"tensor {name!r} has shape {list(stored[name])}, but the model's sizes make it {list(shape)}."
    for name, shape in needed.items()
    if name in stored and tuple(stored[name]) != shape
  ]
  if problems:
    more = len(problems) - MOST_NAMED
    listed = problems[:MOST_NAMED] + ([f"... and {more} more."] if more > 0 else [])
    remedy = "Take the weights and their configuration from one checkpoint of the Llama family."
    raise UserError("\n".join(f"{where}: {line}" for line in [*listed, remedy]))
  return shapes


def _check_tied(source: Source) -> None:
  """A head that is stored although it is tied must be the embedding itself."""
  head, embedding = source.read("lm_head.weight"), source.read("model.embed_tokens.weight")
  if not np.array_equal(head, embedding):
    raise UserError(
      f"{source.where}: the head is declared tied to the embedding, but 'lm_head.weight' is stored "
      "and differs from 'model.embed_tokens.weight'; set tie_word_embeddings to false to use it."
    )
