"""The decoder and its checkpoints against transformers' Llama, on tiny random models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rlhf_jax import reward  # noqa: E402
from rlhf_jax.generation import decode, sampling  # noqa: E402
from rlhf_jax.networks import heads, pretrained  # noqa: E402
from rlhf_jax.types import PromptBatch  # noqa: E402

pytestmark = pytest.mark.reference

VARIANTS = {
  "grouped": {},
  "tied": {"tie_word_embeddings": True},
  "one key-value head": {"num_key_value_heads": 1},
  "full attention": {"num_key_value_heads": 4},
  "wide heads": {"head_dim": 16},
}


@pytest.fixture
def tokens():
  return np.random.default_rng(0).integers(3, 40, (3, 17))


def policy_logits(config, params, tokens, mask):
  apply = jax.jit(lambda params, *inputs: heads.Policy(config).apply({"params": params}, *inputs))
  return apply(params, jnp.asarray(tokens), *heads.layout(jnp.asarray(mask)))


def torch_logits(model, tokens, **inputs):
  with torch.no_grad():
    return model(torch.tensor(tokens), **inputs).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_checkpoint_that_transformers_saved(
  make_llama, import_llama, tokens, assert_close, variant
):
  model = make_llama("CausalLM", **VARIANTS[variant])
  config, params = import_llama(model)
  ours = policy_logits(config, params, tokens, np.ones(tokens.shape))
  assert_close(ours, torch_logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_our_logits_from_a_checkpoint_that_we_saved(
  make_llama, import_llama, tokens, tmp_path, assert_close, variant
):
  """The weights make the whole round: what comes back is bit for bit what went out."""
  model = make_llama("CausalLM", **VARIANTS[variant])
  config, params = import_llama(model)
  pretrained.save_safetensors(tmp_path, config, params)
  back, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, back.state_dict()[name]), name
  ours = policy_logits(config, params, tokens, np.ones(tokens.shape))
  assert_close(ours, torch_logits(back, tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_shards_are_read_as_transformers_reads_them(make_llama, tmp_path, dtype):
  model = make_llama("CausalLM").to(getattr(torch, dtype))
  model.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  _, params = pretrained.load(tmp_path)
  theirs = model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().numpy()
  np.testing.assert_array_equal(params["trunk"]["block_1"]["mlp"]["up"]["kernel"].T, theirs)


@pytest.mark.conformance("A30", "B4", "B5")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_logits_of_an_unpadded_row(
  make_llama, import_llama, tokens, assert_close, side
):
  model = make_llama("CausalLM")
  config, params = import_llama(model)
  lengths = np.array([17, 9, 1])
  column = np.arange(17)[None, :]
  mask = (column >= 17 - lengths[:, None]) if side == "left" else (column < lengths[:, None])
  ours = policy_logits(config, params, np.where(mask, tokens, 5), mask)
  kept = {str(i): np.asarray(ours[i])[mask[i]] for i in range(3)}
  alone = {str(i): torch_logits(model, tokens[i : i + 1, mask[i]])[0] for i in range(3)}
  assert_close(kept, alone, atol=1e-5)


def test_greedy_decoding_with_a_cache_draws_the_tokens_that_transformers_draws(
  make_llama, import_llama, tokens
):
  model = make_llama("CausalLM")
  config, params = import_llama(model)
  lengths = [12, 7, 1]
  mask = np.array([[0] * (12 - n) + [1] * n for n in lengths], np.float32)
  prompts = PromptBatch(jnp.asarray(np.where(mask, tokens[:, :12], 0)), jnp.asarray(mask))
  settings = sampling.SamplingConfig(
    max_new_tokens=20, temperature=0.0, top_k=0, top_p=1.0, stop=None, compact_to=(), cache_sizes=1
  )
  generate = jax.jit(
    lambda params, key: decode.generate(
      heads.Policy(config),
      params,
      prompts,
      key,
      config=settings,
      stops=sampling.Stops(()),
      pad_id=0,
    )
  )
  drawn = generate(params, jax.random.key(0)).tokens
  for i, length in enumerate(lengths):
    prompt = torch.tensor(tokens[i : i + 1, 12 - length : 12])
    out = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=20,
      do_sample=False,
      eos_token_id=-1,
    )
    assert drawn[i].tolist() == out[0, length:].tolist()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_gradients_of_the_language_model_loss(
  make_llama, import_llama, tokens, assert_close, stored_gradients, torch_gradients, scan_layers
):
  model = make_llama("CausalLM")
  config, params = import_llama(model)
  model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
  if scan_layers:
    compute = dataclasses.replace(config.compute, scan_layers=True)
    config = dataclasses.replace(config, compute=compute)
    params = pretrained.stack_layers(params)

  @jax.jit
  @jax.grad
  def gradient(params):
    inputs = jnp.asarray(tokens), *heads.layout(jnp.ones(tokens.shape))
    logits = heads.Policy(config).apply({"params": params}, *inputs)[:, :-1]
    targets = jax.nn.one_hot(tokens[:, 1:], config.vocab_size)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

  ours = gradient(params)
  ours = stored_gradients(pretrained.unstack_layers(ours) if scan_layers else ours)
  assert_close(ours, torch_gradients(model), atol=1e-5)


# --- scalar networks


def scalar_scores(config, params, tokens, mask):
  network = heads.ScalarNetwork(config)
  score = jax.jit(functools.partial(reward.score_sequences, network))
  return score(params, jnp.asarray(tokens), jnp.asarray(mask))


@pytest.mark.conformance("A15", "A16")
def test_scores_are_those_of_llama_for_sequence_classification(
  make_llama, import_llama, tokens, assert_close
):
  model = make_llama("SequenceClassification")
  config, params = import_llama(model)
  mask = np.arange(17)[None, :] < np.array([[17], [9], [4]])
  padded = np.where(mask, tokens, 0)
  theirs = torch_logits(model, padded, attention_mask=torch.tensor(mask))[:, 0]
  assert_close(scalar_scores(config, params, padded, mask), theirs, atol=1e-5)
  assert params["score"]["bias"] == 0


def test_a_saved_reward_model_scores_the_same_in_transformers_up_to_its_bias(
  make_llama, import_llama, tokens, tmp_path, assert_close
):
  config, params = import_llama(make_llama("SequenceClassification"))
  params["score"]["bias"] = np.float32([0.75])
  pretrained.save_safetensors(tmp_path, config, params, extra={"pad_token_id": 0})
  back, report = transformers.LlamaForSequenceClassification.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not report["missing_keys"]
  assert back.config.num_labels == 1
  ours = scalar_scores(config, params, tokens, np.ones(tokens.shape))
  assert_close(ours - 0.75, torch_logits(back, tokens)[:, 0], atol=1e-5)
  assert pretrained.load(tmp_path)[1]["score"]["bias"] == 0.75
