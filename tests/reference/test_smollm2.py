"""SmolLM2-135M-Instruct from GGUF: our reader, decoder and decoding loop against transformers'.

transformers reads the same file with its own code and runs it in PyTorch.
"""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rlhf_jax.generation import decode, sampling  # noqa: E402
from rlhf_jax.networks import heads, hf_layout, pretrained  # noqa: E402
from rlhf_jax.networks.config import ModelConfig  # noqa: E402
from rlhf_jax.text.tokenizer import Tokenizer  # noqa: E402
from rlhf_jax.types import PromptBatch  # noqa: E402

pytestmark = pytest.mark.reference

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
  "It is a truth universally acknowledged, that a single man in possession of a good fortune, must "
  "be in want of a wife. However little known the feelings or views of such a man may be on his "
  "first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding "
  "families, that he is considered as the rightful property of some one or other of their "
  "daughters.",
  "def greatest_common_divisor(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n",
  "Der Mond ist aufgegangen, die goldnen Sternlein prangen; 1779 (Matthias Claudius) \u2014 \u6708",
)
QUESTIONS = (
  "The capital of France is",
  "Why is the sky blue?",
  "Name three animals that live in the sea, as a list.",
)
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def path():
  if "RLHF_JAX_WEIGHTS" not in os.environ:
    pytest.skip("RLHF_JAX_WEIGHTS does not name a folder of checkpoints")
  found = sorted(pathlib.Path(os.environ["RLHF_JAX_WEIGHTS"]).rglob(FILE))
  if not found:
    pytest.skip(f"{FILE} is not under RLHF_JAX_WEIGHTS")
  return found[0]


@pytest.fixture(scope="module")
def theirs(path):
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()


@pytest.fixture(scope="module")
def ours(path):
  """The policy and its parameters."""
  fields, params = pretrained.load(path)
  compute = dataclasses.replace(hf_layout.COMPUTE, scan_layers=True)
  config = ModelConfig(**fields, compute=compute)
  return heads.Policy(config), jax.tree.map(jnp.asarray, pretrained.stack_layers(params))


@pytest.fixture(scope="module")
def tokenizer(path):
  return Tokenizer.load(path)


def pad(rows, width, pad_id, side):
  """Ids and mask [B, width] of rows of unequal length."""
  tokens, mask = np.full((len(rows), width), pad_id), np.zeros((len(rows), width), np.float32)
  for i, row in enumerate(rows):
    place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
    tokens[i, place], mask[i, place] = row, 1.0
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def test_every_weight_equals_what_transformers_reads(ours, theirs):
  tensors = hf_layout.disassemble(pretrained.unstack_layers(ours[1]))
  state = theirs.state_dict()
  assert set(tensors) == set(state) - {"lm_head.weight"}
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, state[name].numpy(), err_msg=name)


@pytest.mark.conformance("A30", "B4", "B5")
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_agree_with_transformers_to_1e_3_however_rows_are_padded(
  ours, theirs, tokenizer, side, record_property
):
  policy, params = ours
  apply = jax.jit(lambda params, *inputs: policy.apply({"params": params}, *inputs))
  rows = [tokenizer.encode(text) for text in TEXTS]
  tokens, mask = pad(rows, 96, tokenizer.pad_id, side)
  batch = np.asarray(apply(params, tokens, *heads.layout(mask)))
  worst = 0.0
  for row, padded, kept in zip(rows, batch, np.asarray(mask) > 0):
    with torch.no_grad():
      expected = theirs(torch.tensor([row])).logits[0].numpy()
    worst = max(worst, np.abs(padded[kept] - expected).max())
  record_property("largest deviation of a logit", float(worst))
  assert worst < 1e-3


def test_greedy_continuations_are_the_same_tokens(ours, theirs, tokenizer):
  """Ours in one left-padded batch with a key-value cache, theirs one prompt at a time."""
  policy, params = ours
  rows = [
    tokenizer.encode_special(
      f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if i else text
    )
    for i, text in enumerate(QUESTIONS)
  ]
  tokens, mask = pad(rows, max(map(len, rows)), tokenizer.pad_id, "left")
  config = sampling.SamplingConfig(
    max_new_tokens=NEW_TOKENS,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    stop=None,
    compact_to=(),
    cache_sizes=1,
  )
  generate = jax.jit(
    lambda params, prompts, key: decode.generate(
      policy,
      params,
      prompts,
      key,
      config=config,
      stops=sampling.Stops((tokenizer.eos_id,)),
      pad_id=0,
    )
  )
  completion = generate(params, PromptBatch(tokens, mask), jax.random.key(0))
  told = []
  for row, drawn, length in zip(rows, completion.tokens, completion.mask.sum(axis=1)):
    prompt = torch.tensor([row])
    out = theirs.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=NEW_TOKENS,
      do_sample=False,
      pad_token_id=tokenizer.pad_id,
    )
    expected = out[0, len(row) :].tolist()
    assert drawn[: int(length)].tolist() == expected
    told.append(tokenizer.decode(expected))
  assert told[0].startswith(" Paris")
