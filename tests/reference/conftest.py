"""Tiny random models of transformers, and the way from them to ours.

The tests of this folder hold our code against code that we did not write, run live: PyTorch,
transformers, TRL and rlax. Each is skipped where its library is not installed.
"""

import importlib
import importlib.util

import numpy as np
import pytest

from rlhf_jax.networks import hf_layout, pretrained
from rlhf_jax.networks.config import ModelConfig

PAD, EOS = 0, 2  # ids; never the same


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
  """PyTorch's threads spin at barriers; beside XLA's on few cores that costs more than it saves."""
  if importlib.util.find_spec("torch") is not None:
    importlib.import_module("torch").set_num_threads(1)


@pytest.fixture(scope="session")
def make_llama():
  """make_llama("CausalLM", seed, **settings): a random model whose every parameter matters."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")

  def make(kind, seed=0, **settings):
    sizes = {
      "vocab_size": 40,
      "hidden_size": 32,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "intermediate_size": 80,
      "rope_theta": 300.0,
      "rms_norm_eps": 1e-5,
      "pad_token_id": PAD,
      "eos_token_id": EOS,
    }
    if kind == "SequenceClassification":
      sizes["num_labels"] = 1
    config = transformers.LlamaConfig(**(sizes | settings))
    torch.manual_seed(seed)
    model = getattr(transformers, f"LlamaFor{kind}")(config).eval()
    with torch.no_grad():
      for parameter in model.parameters():  # larger than at birth, so that attention is not flat
        parameter.copy_(parameter.mean() + 0.15 * torch.randn_like(parameter))
    return model

  return make


@pytest.fixture(scope="session")
def import_llama(tmp_path_factory):
  """import_llama(model): the ModelConfig and parameters that we read from its saved checkpoint."""

  def read(model):
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    fields, params = pretrained.load(folder)
    return ModelConfig(**fields, compute=hf_layout.COMPUTE), params

  return read


@pytest.fixture(scope="session")
def torch_gradients():
  """torch_gradients(model): its gradients as flat stored tensors, by Hugging Face name."""
  return lambda model: {
    name: parameter.grad.numpy() for name, parameter in model.named_parameters()
  }


@pytest.fixture
def assert_close(record_property):
  """assert_close(ours, theirs, atol): arrays, or dicts of them; records the largest deviation."""

  def check(ours, theirs, atol, rtol=0.0):
    if isinstance(theirs, dict):
      assert set(ours) == set(theirs)
      pairs = [(ours[name], theirs[name], name) for name in theirs]
    else:
      pairs = [(ours, theirs, "")]
    worst = max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b, _ in pairs)
    record_property("deviation", float(worst))
    for a, b, name in pairs:
      np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=rtol, err_msg=name)

  return check


@pytest.fixture(scope="session")
def stored_gradients():
  """stored_gradients(tree): gradients of our parameters under Hugging Face's names."""

  def flatten(tree):
    tensors = hf_layout.disassemble(tree)
    tensors.pop("score.bias", None)  # transformers has none
    return tensors

  return flatten
