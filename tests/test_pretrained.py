"""Checkpoints in and out: names, shapes, layouts, round trips, and what is refused."""

import dataclasses
import json
import struct

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from rlhf_jax.generation import decode, sampling
from rlhf_jax.networks import attention, heads, hf_layout, pretrained
from rlhf_jax.networks.config import ModelConfig
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import PromptBatch, UserError

# No two sizes of a matrix agree, so a transposition cannot go unseen; rows are whole GGUF blocks.
TINY = ModelConfig(
  vocab_size=40,
  d_model=32,
  n_layers=2,
  n_heads=4,
  n_kv_heads=2,
  head_dim=16,
  d_ff=96,
  rope_base=500.0,
  norm_eps=1e-5,
  tie_embeddings=False,
  compute=hf_layout.COMPUTE,
)
TIED = dataclasses.replace(TINY, tie_embeddings=True)


def random_params(network, seed=0):
  """Every leaf random, norms and biases too, so that no two can be mistaken for each other."""
  shapes = jax.eval_shape(lambda key: heads.init(network, key), jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def fields_of(config):
  """The fields that a checkpoint decides."""
  fields = dataclasses.asdict(config)
  return {name: fields[name] for name in fields if name != "compute"}


def logits(config, params, tokens):
  """Of rows without padding."""
  apply = jax.jit(lambda params, *inputs: heads.Policy(config).apply({"params": params}, *inputs))
  return apply(params, jnp.asarray(tokens), *heads.layout(jnp.ones(tokens.shape)))


def assert_equal_trees(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def folder(tmp_path):
  """A saved untied policy."""
  pretrained.save_safetensors(tmp_path / "model", TINY, random_params(heads.Policy(TINY)))
  return tmp_path / "model"


def edit_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


# --- round trips


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("network", [heads.Policy, heads.ScalarNetwork])
def test_saved_parameters_come_back_bit_for_bit(tmp_path, config, network):
  params = random_params(network(config))
  pretrained.save_safetensors(tmp_path, config, params)
  fields, loaded = pretrained.load(tmp_path)
  assert fields == fields_of(config)
  assert_equal_trees(loaded, params)


def test_a_second_save_writes_the_same_bytes(folder, tmp_path):
  _, params = pretrained.load(folder)
  pretrained.save_safetensors(tmp_path / "again", TINY, params)
  for name in ("model.safetensors", "config.json"):
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_stacked_layers_are_saved_as_the_same_checkpoint(tmp_path, folder):
  params = random_params(heads.Policy(TINY))
  scanned = tiny.changed(TINY, compute__scan_layers=True)
  pretrained.save_safetensors(tmp_path, scanned, pretrained.stack_layers(params))
  saved = (tmp_path / "model.safetensors").read_bytes()
  assert saved == (folder / "model.safetensors").read_bytes()
  assert_equal_trees(pretrained.load_as(scanned, folder), pretrained.stack_layers(params))


def test_stacked_and_unstacked_layers_compute_the_same_logits():
  scanned = tiny.changed(TINY, compute__scan_layers=True)
  params = jax.tree.map(lambda leaf: 0.1 * leaf, random_params(heads.Policy(TINY)))
  tokens = np.arange(14).reshape(2, 7)
  np.testing.assert_allclose(
    logits(scanned, pretrained.stack_layers(params), tokens),
    logits(TINY, params, tokens),
    atol=1e-5,
  )
  assert_equal_trees(pretrained.unstack_layers(pretrained.stack_layers(params)), params)


def test_a_score_bias_of_zero_leaves_no_tensor_behind(tmp_path):
  params = random_params(heads.ScalarNetwork(TINY))
  params["score"]["bias"] = np.zeros((1,), np.float32)
  pretrained.save_safetensors(tmp_path, TINY, params)
  assert "score.bias" not in safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert_equal_trees(pretrained.load(tmp_path)[1], params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_weights_become_float32_of_the_same_value(folder, dtype):
  edit_tensors(folder, lambda tensors: {k: t.astype(dtype) for k, t in tensors.items()})
  params = random_params(heads.Policy(TINY))
  expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params)
  assert_equal_trees(pretrained.load(folder)[1], expected)


def test_shards_with_an_index_load_like_one_file(folder):
  _, whole = pretrained.load(folder)
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = sorted(tensors)
  shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
  for shard, held in shards.items():
    safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / shard)
  weight_map = {name: shard for shard, held in shards.items() for name in held}
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  assert_equal_trees(pretrained.load(folder)[1], whole)
  (folder / "b.safetensors").unlink()
  with pytest.raises(UserError, match=r"names \['b.safetensors'\].*copy all shards"):
    pretrained.load(folder)


def test_loaded_parameters_do_not_hang_on_the_file(folder):
  _, params = pretrained.load(folder)
  (folder / "model.safetensors").write_bytes(b"")
  assert_equal_trees(params, random_params(heads.Policy(TINY)))


# --- configurations


def test_absent_keys_mean_what_transformers_means_by_them(folder):
  path = folder / "config.json"
  optional = ("num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rms_norm_eps")
  kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in optional}
  path.write_text(json.dumps(kept))
  with pytest.raises(UserError, match=r"q_proj.weight' has shape \[64, 32\].*make it \[32, 32\]"):
    pretrained.load(folder)  # head_dim is then 32 / 4
  edit_config(folder, head_dim=16, num_key_value_heads=2)
  fields, _ = pretrained.load(folder)
  assert (fields["rope_base"], fields["norm_eps"]) == (10000.0, 1e-6)


def test_the_rotary_base_is_found_in_old_and_new_configurations(folder):
  edit_config(folder, rope_theta=7.0, rope_parameters=None)
  assert pretrained.load(folder)[0]["rope_base"] == 7.0
  edit_config(folder, rope_theta=7.0, rope_parameters={"rope_type": "default", "rope_theta": 9.0})
  assert pretrained.load(folder)[0]["rope_base"] == 9.0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"attention_bias": True}, "attention_bias is true.*only false"),
    ({"mlp_bias": True}, "mlp_bias is true"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu".*only "silu"'),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "llama3.*'default'"),
    ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "full rotary"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; only 'llama'"),
    ({"hidden_size": "32"}, r"\['hidden_size'\] must be positive integers"),
    ({"num_attention_heads": 0}, r"\['num_attention_heads'\] must be positive integers"),
    ({"num_key_value_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"rms_norm_eps": -1.0}, "norm_eps: -1.0 is outside"),
  ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(folder, changes, message):
  edit_config(folder, **changes)
  with pytest.raises(UserError, match=message):
    pretrained.load(folder)


# --- tensors that do not fit


def test_a_missing_tensor_is_named(folder):
  edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
  with pytest.raises(UserError, match="tensor 'model.norm.weight' is missing"):
    pretrained.load(folder)


def test_an_unexpected_tensor_is_named(folder):
  bias = {"model.layers.1.self_attn.q_proj.bias": np.zeros((64,), np.float32)}
  edit_tensors(folder, lambda tensors: tensors | bias)
  with pytest.raises(UserError, match=r"'model.layers.1.self_attn.q_proj.bias'.*has no place"):
    pretrained.load(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
  wide = {"model.layers.0.mlp.up_proj.weight": np.zeros((96, 33), np.float32)}
  edit_tensors(folder, lambda tensors: tensors | wide)
  with pytest.raises(UserError, match=r"up_proj.weight' has shape \[96, 33\].*make it \[96, 32\]"):
    pretrained.load(folder)


def test_a_wholly_different_model_is_reported_in_a_few_lines(folder):
  edit_config(folder, num_hidden_layers=12)
  with pytest.raises(UserError, match=r"\.\.\. and 84 more") as caught:
    pretrained.load(folder)
  assert len(str(caught.value).splitlines()) == hf_layout.MOST_NAMED + 2


def test_integer_tensors_are_no_weights(folder):
  packed = {"model.norm.weight": np.zeros((32,), np.int8)}
  edit_tensors(folder, lambda tensors: tensors | packed)
  with pytest.raises(UserError, match="'model.norm.weight' has type I8"):
    pretrained.load(folder)


def test_old_rotary_buffers_are_recomputed_rather_than_refused(folder):
  buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros((8,), np.float32)}
  edit_tensors(folder, lambda tensors: tensors | buffers)
  assert_equal_trees(pretrained.load(folder)[1], random_params(heads.Policy(TINY)))


def test_a_head_stored_beside_a_tied_embedding_must_equal_it(tmp_path):
  params = random_params(heads.Policy(TIED))
  pretrained.save_safetensors(tmp_path, TIED, params)
  edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].copy()})
  assert_equal_trees(pretrained.load(tmp_path)[1], params)
  edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
  with pytest.raises(UserError, match="differs from 'model.embed_tokens.weight'"):
    pretrained.load(tmp_path)


# --- files that are not what they should be


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_says_which(folder, name):
  (folder / name).unlink()
  with pytest.raises(UserError, match=name.replace(".", r"\.")):
    pretrained.load(folder)


def test_pickled_weights_are_never_read(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(UserError, match=r"\['pytorch_model.bin'\] may run code when read"):
    pretrained.load(folder)


@pytest.mark.parametrize("kept", [0, 5, 400, -1])
def test_a_truncated_safetensors_file_is_a_clear_error(folder, kept):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(UserError, match="no readable safetensors file"):
    pretrained.load(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "\ud800'])
def test_a_broken_config_is_a_clear_error(folder, text):
  (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
  with pytest.raises(UserError, match=r"config\.json"):
    pretrained.load(folder)


def test_a_path_that_holds_no_checkpoint_says_what_would(tmp_path):
  with pytest.raises(UserError, match="there is no checkpoint at"):
    pretrained.load(tmp_path / "absent")
  (tmp_path / "weights.pt").write_bytes(b"x")
  with pytest.raises(UserError, match="expected a folder.*a .gguf file, or a llama2.c .bin file"):
    pretrained.load(tmp_path / "weights.pt")


# --- a model that is configured already


def test_load_as_names_every_size_that_differs(folder):
  wrong = dataclasses.replace(TINY, n_layers=3, d_ff=64)
  with pytest.raises(UserError) as caught:
    pretrained.load_as(wrong, folder)
  assert "n_layers is 3 in the configuration, 2 in the checkpoint" in str(caught.value)
  assert "d_ff is 64 in the configuration, 96 in the checkpoint" in str(caught.value)


def test_load_as_gives_parameters_that_the_configured_network_takes(folder):
  params = pretrained.load_as(TINY, folder)
  assert logits(TINY, params, np.ones((1, 3), int)).shape == (1, 3, TINY.vocab_size)


# --- saving


def test_saving_parameters_of_another_model_is_refused_and_keeps_what_is_there(folder):
  before = (folder / "model.safetensors").read_bytes()
  wider = dataclasses.replace(TINY, d_ff=128)
  with pytest.raises(UserError, match=r"gate_proj.weight' has shape \[128, 32\]"):
    pretrained.save_safetensors(folder, TINY, random_params(heads.Policy(wider)))
  assert (folder / "model.safetensors").read_bytes() == before


def test_parameters_without_a_place_in_the_layout_are_refused_by_name(tmp_path):
  params = random_params(heads.Policy(TINY))
  params["trunk"]["block_0"]["adapter"] = {"kernel": np.zeros((2, 3), np.float32)}
  with pytest.raises(UserError, match="trunk/block_0/adapter/kernel.*no place"):
    pretrained.save_safetensors(tmp_path, TINY, params)


def test_saving_where_nothing_can_be_written_is_a_clear_error(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="cannot write the checkpoint"):
    pretrained.save_safetensors(tmp_path / "file", TINY, random_params(heads.Policy(TINY)))
  assert (tmp_path / "file").read_text() == "in the way"


def test_a_write_that_fails_leaves_the_old_checkpoint_whole(folder, monkeypatch):
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  def disk_full(tensors, path, metadata):
    path.write_bytes(b"half of the wei")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
  with pytest.raises(UserError, match="No space left on device"):
    pretrained.save_safetensors(folder, TINY, random_params(heads.Policy(TINY), seed=1))
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_token_ids_are_kept_in_the_config_but_sizes_are_not_overridden(tmp_path):
  params = random_params(heads.Policy(TINY))
  pretrained.save_safetensors(tmp_path, TINY, params, extra={"eos_token_id": 2})
  assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2
  with pytest.raises(UserError, match=r"\['hidden_size'\] follow from the model"):
    pretrained.save_safetensors(tmp_path, TINY, params, extra={"hidden_size": 2})


# --- interleaved rotary positions


def test_split_halves_makes_neighbour_rotation_equal_to_half_rotation():
  """Su et al. 2021, eq. 34 turns (2i, 2i+1); attention scores must be those of our layout."""
  N, H, D = 3, 8, 5
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((2, N * H, D))  # query and key projections as llama.cpp stores them
  inputs = rng.standard_normal((2, D))  # of the token that asks, and of the one that is looked at
  positions = (11, 4)

  def neighbours(x, position):
    x = x.reshape(N, H // 2, 2)
    turned = np.empty_like(x)
    for i in range(H // 2):
      angle = position * 100.0 ** (-2 * i / H)
      turned[:, i, 0] = x[:, i, 0] * np.cos(angle) - x[:, i, 1] * np.sin(angle)
      turned[:, i, 1] = x[:, i, 1] * np.cos(angle) + x[:, i, 0] * np.sin(angle)
    return turned.reshape(N, H)

  def halves(x, position):
    angles = attention.rotary(jnp.array([[position]]), H, 100.0)
    return np.asarray(attention.rotate(jnp.asarray(x.reshape(1, 1, N, H)), *angles))[0, 0]

  expected = [neighbours(w @ x, p) for w, x, p in zip(rows, inputs, positions)]
  reordered = [hf_layout.split_halves(w, N) for w in rows]
  ours = [halves(w @ x, p) for w, x, p in zip(reordered, inputs, positions)]
  np.testing.assert_allclose(
    np.sum(ours[0] * ours[1], axis=-1), np.sum(expected[0] * expected[1], axis=-1), rtol=1e-4
  )


# --- GGUF

GGUF_NAMES = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "model.layers.": "blk.",
}


def interleave(rows, n_heads):
  """Rows in llama.cpp's order: the permutation of its convert_hf_to_gguf.py."""
  return rows.reshape(n_heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, config, params, kind="F32", metadata=(), tensors=()):
  """A GGUF file of a policy; matrices are quantised to `kind`. Returns the dequantised tensors."""
  kind = gguf.GGMLQuantizationType[kind]
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(config.n_layers)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.n_heads)
  writer.add_head_count_kv(config.n_kv_heads)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  for key, value in metadata:
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  dequantised = {}
  for name, tensor in hf_layout.disassemble(params).items():
    used = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
    dequantised[name] = gguf.quants.dequantize(gguf.quants.quantize(tensor, used), used)
    if "q_proj" in name or "k_proj" in name:
      tensor = interleave(tensor, config.n_heads if "q_proj" in name else config.n_kv_heads)
    for theirs, short in GGUF_NAMES.items():
      name = name.replace(theirs, short)
    writer.add_tensor(name, gguf.quants.quantize(tensor, used), raw_dtype=used)
  for name, tensor in tensors:
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return dequantised


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_tensors_are_dequantised_transposed_and_reordered(tmp_path, kind):
  params = random_params(heads.Policy(TINY))
  dequantised = write_gguf(tmp_path / "model.gguf", TINY, params, kind)
  fields, loaded = pretrained.load(tmp_path / "model.gguf")
  assert fields == fields_of(TINY)
  assert_equal_trees(hf_layout.disassemble(loaded), dequantised)
  if kind == "F32":
    assert_equal_trees(loaded, params)


def test_a_gguf_file_without_an_output_tensor_is_tied(tmp_path):
  params = random_params(heads.Policy(TIED))
  write_gguf(tmp_path / "model.gguf", TIED, params)
  fields, loaded = pretrained.load(tmp_path / "model.gguf")
  assert fields["tie_embeddings"] is True
  assert_equal_trees(loaded, params)


def test_a_stored_epsilon_is_the_decimal_that_its_author_wrote(tmp_path):
  write_gguf(tmp_path / "model.gguf", TINY, random_params(heads.Policy(TINY)))
  assert pretrained.load(tmp_path / "model.gguf")[0]["norm_eps"] == 1e-5


@pytest.mark.parametrize(
  ("metadata", "tensors", "message"),
  [
    ([("llama.rope.scaling.type", "linear")], [], "rope.scaling.type is 'linear'"),
    ([("llama.attention.sliding_window", 128)], [], "sliding_window is 128"),
    ([("llama.expert_count", 8)], [], "expert_count is 8"),
    ([("llama.attention.key_length", 24)], [], "head widths differ"),
    ([], [("rope_freqs.weight", np.ones((8,), np.float32))], "scaled rotary positions"),
    ([], [("blk.0.attn_q.bias", np.ones((64,), np.float32))], "'blk.0.attn_q.bias'.*no place"),
  ],
)
def test_a_gguf_feature_that_the_decoder_lacks_is_refused(tmp_path, metadata, tensors, message):
  params = random_params(heads.Policy(TINY))
  write_gguf(tmp_path / "model.gguf", TINY, params, metadata=metadata, tensors=tensors)
  with pytest.raises(UserError, match=message):
    pretrained.load(tmp_path / "model.gguf")


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
  writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(UserError, match="architecture is 'gpt2'; only 'llama'"):
    pretrained.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [0, 3, 100, 2000, -1000])
def test_a_truncated_gguf_file_is_a_clear_error(tmp_path, kept):
  path = tmp_path / "model.gguf"
  write_gguf(path, TINY, random_params(heads.Policy(TINY)))
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(UserError, match="no complete GGUF file"):
    pretrained.load(path)


# --- llama2.c


def write_llama2c(path, config, params, max_length=10):
  """A version-0 file, in the order of llama2.c's export.py."""
  tensors = hf_layout.disassemble(params)
  sizes = (config.d_model, config.d_ff, config.n_layers, config.n_heads, config.n_kv_heads)
  vocab = config.vocab_size if config.tie_embeddings else -config.vocab_size
  chunks = [tensors["model.embed_tokens.weight"]]
  for kind in (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
  ):
    for i in range(config.n_layers):
      weights = tensors[f"model.layers.{i}.{kind}.weight"]
      heads_of = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}
      chunks.append(interleave(weights, heads_of[kind]) if kind in heads_of else weights)
  chunks += [tensors["model.norm.weight"], np.full((max_length * config.head_dim,), np.nan)]
  if not config.tie_embeddings:
    chunks.append(tensors["lm_head.weight"])
  body = b"".join(np.ascontiguousarray(chunk, np.float32).tobytes() for chunk in chunks)
  path.write_bytes(struct.pack("7i", *sizes, vocab, max_length) + body)


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_tensors_are_read_in_the_order_of_its_export(tmp_path, tied):
  config = dataclasses.replace(TINY, tie_embeddings=tied, head_dim=8, rope_base=10000.0)
  params = random_params(heads.Policy(config))
  write_llama2c(tmp_path / "model.bin", config, params)
  fields, loaded = pretrained.load(tmp_path / "model.bin")
  assert fields == fields_of(config)
  assert_equal_trees(loaded, params)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda content: content[:-4], "means"),
    (lambda content: content + b"1234", "means"),
    (lambda content: content[:20], "version 0"),
    (lambda content: b"24ka" + content[4:], "version 0"),
    (lambda content: struct.pack("i", -3) + content[4:], "impossible sizes"),
  ],
)
def test_a_file_that_is_no_llama2c_checkpoint_is_a_clear_error(tmp_path, change, message):
  config = dataclasses.replace(TIED, head_dim=8)
  path = tmp_path / "model.bin"
  write_llama2c(path, config, random_params(heads.Policy(config)))
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(UserError, match=message):
    pretrained.load(path)


def test_stories260k_tells_the_story_that_its_authors_print(weights_folder):
  """The greedy text in the model's own card, as llama2.c's run.c writes it."""
  path = next(weights_folder.rglob("stories260K.bin"), None)
  if path is None:
    pytest.skip(f"stories260K.bin is not under {weights_folder}")
  fields, params = pretrained.load(path)
  tokenizer = Tokenizer.load(path.parent / "tok512.bin")
  policy = heads.Policy(ModelConfig(**fields, compute=hf_layout.COMPUTE))
  greedy = sampling.SamplingConfig(
    max_new_tokens=155, temperature=0.0, top_k=0, top_p=1.0, stop=None, compact_to=(), cache_sizes=1
  )
  prompt = PromptBatch(jnp.full((1, 1), tokenizer.bos_id), jnp.ones((1, 1)))
  tell = jax.jit(
    lambda params, key: decode.generate(
      policy, params, prompt, key, config=greedy, stops=sampling.Stops(()), pad_id=tokenizer.pad_id
    )
  )
  story = tokenizer.decode(tell(params, jax.random.key(0)).tokens[0])
  card = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She "
    'said, "I want to play with your ball, but I can\'t find it."\nLily was sad'
  )
  assert story.strip().startswith(card)
