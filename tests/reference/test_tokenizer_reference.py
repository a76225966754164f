"""SmolLM2's tokenizer and chat template out of GGUF, against transformers' reading of the file.

transformers takes vocabulary, merges and template from the metadata but not `tokenizer.ggml.pre`:
it pre-tokenizes as GPT-2 does. SmolLM2's own tokenizer.json, like llama.cpp's "smollm", first sets
each digit apart: "\\n\\n1" is two tokens, not three. Texts without digits are compared as they
are; those with digits after giving transformers' tokenizer that pre-tokenizer.
"""

import gzip
import json
import os
import pathlib

import pytest
from tokenizers import pre_tokenizers

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

from rlhf_jax.data.hh_rlhf import parse_pair  # noqa: E402
from rlhf_jax.text import dialogue  # noqa: E402
from rlhf_jax.text.tokenizer import Tokenizer  # noqa: E402
from rlhf_jax.types import UserError  # noqa: E402

pytestmark = pytest.mark.reference

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
  if "RLHF_JAX_DATA" not in os.environ:
    pytest.skip("needs RLHF_JAX_DATA, a folder with the files that docs/data.md names")
  path = pathlib.Path(os.environ["RLHF_JAX_DATA"]) / "hh-rlhf" / "helpful-base.jsonl.gz"
  with gzip.open(path, "rt") as file:
    return [json.loads(line) for _, line in zip(range(200), file)]


@pytest.fixture(scope="module")
def smollm2() -> tuple:
  folder = pathlib.Path(os.environ.get("RLHF_JAX_WEIGHTS", ""))
  if not (folder / FILE).is_file():
    pytest.skip(f"needs RLHF_JAX_WEIGHTS, a folder with {FILE}")
  theirs = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=FILE)
  return Tokenizer.load(folder / FILE), theirs


def without_digits(text: str) -> str:
  return "".join(letter for letter in text if not letter.isnumeric())


def set_digits_apart(tokenizer) -> None:
  digits = pre_tokenizers.Digits(individual_digits=True)
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])


def test_texts_get_the_ids_that_transformers_gives_them(smollm2, pairs):
  ours, theirs = smollm2
  their_ids = lambda text: theirs(text, add_special_tokens=False).input_ids
  for pair in pairs:
    text = without_digits(pair["chosen"])
    assert ours.encode(text) == their_ids(text)
  set_digits_apart(theirs)
  for pair in pairs:
    assert ours.encode(pair["chosen"]) == their_ids(pair["chosen"])
    assert ours.decode(ours.encode(pair["chosen"])) == pair["chosen"]


def test_prompts_get_the_ids_of_the_chat_template_in_the_file(smollm2, pairs):
  ours, theirs = smollm2
  set_digits_apart(theirs)
  compared = 0
  for pair in pairs:
    try:
      comparison = next(parse_pair(pair, "hh"))
    except UserError:
      continue  # a pair without a common prompt; see rlhf_jax/data/hh_rlhf.py
    messages = comparison.conversation.to_json()
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert dialogue.render_prompt(comparison.conversation, dialogue.CHATML) == expected
    ids = dialogue.encode_prompt(comparison.conversation, dialogue.CHATML, ours)
    assert list(ids) == theirs(expected, add_special_tokens=False).input_ids
    compared += 1
  assert compared > 190
