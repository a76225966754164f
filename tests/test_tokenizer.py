"""Tokenizers: round trips, special tokens, and the formats they are read from."""

import gzip
import json
import struct

import gguf
import pytest

from rlhf_jax.text.tokenizer import Tokenizer, from_llama2c, from_vocab_merges, train_bpe
from rlhf_jax.types import UserError

SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEXTS = ("Hello there, world!", "  two  spaces\n\n", "été 東京 🙂", "1234567", "", "\x00\x7f")


def trained(corpus=("Hello there, world! Hello again.",) * 4, vocab_size=300) -> Tokenizer:
  return train_bpe(corpus, vocab_size, SPECIALS, eos="<|im_end|>", pad="<|pad|>")


def test_any_text_decodes_to_itself():
  tokenizer = trained()
  for text in TEXTS:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_merges_what_is_frequent_and_keeps_all_bytes():
  tokenizer = trained()
  assert tokenizer.vocab_size <= 300
  assert len(tokenizer.encode("Hello there")) < len("Hello there") / 2
  assert [tokenizer.token_id(text) for text in SPECIALS] == [0, 1, 2]


def test_training_twice_gives_the_same_tokenizer():
  assert trained().backend.to_str() == trained().backend.to_str()


def test_encode_never_yields_a_special_token_and_encode_special_does():
  tokenizer = trained()
  text = "<|im_start|>user\nHello<|im_end|>"
  special = {tokenizer.token_id(name) for name in tokenizer.specials}
  assert not special & set(tokenizer.encode(text))
  assert tokenizer.decode(tokenizer.encode(text)) == text
  ids = tokenizer.encode_special(text)
  assert ids[0] == 1 and ids[-1] == tokenizer.eos_id == 2
  assert tokenizer.decode(ids) == "user\nHello"
  assert tokenizer.decode(ids, skip_special=False) == text


def test_what_encode_special_returns_is_the_callers_own():
  tokenizer = trained()
  tokenizer.encode_special("<|im_start|>").append(7)
  assert tokenizer.encode_special("<|im_start|>") == [1]


@pytest.mark.conformance("A5", "B7")
def test_a_pad_that_is_the_eos_is_refused():
  backend = trained().backend
  with pytest.raises(UserError, match="pad and EOS are both '<|im_end|>'"):
    Tokenizer(backend, eos="<|im_end|>", pad="<|im_end|>", bos=None)


def test_an_ordinary_token_cannot_serve_as_eos():
  with pytest.raises(UserError, match="'a' is not a special token"):
    Tokenizer(trained().backend, eos="a", pad="<|pad|>", bos=None)


def test_a_token_outside_the_vocabulary_has_no_id():
  with pytest.raises(UserError, match="'<nobody>' is not in the vocabulary"):
    trained().token_id("<nobody>")


def test_saving_and_loading_changes_nothing(tmp_path):
  tokenizer = trained()
  tokenizer.save(tmp_path / "t")
  for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
    loaded = Tokenizer.load(path)
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (2, 0, None)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_config_that_names_the_eos_as_pad_gets_another_pad(tmp_path):
  trained().save(tmp_path)
  config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>"}  # both forms of HF
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  loaded = Tokenizer.load(tmp_path)
  assert (loaded.eos, loaded.pad) == ("<|im_end|>", "<|pad|>")


def test_a_tokenizer_that_does_not_say_its_eos_must_be_told(tmp_path):
  trained().backend.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(UserError, match="give it as eos="):
    Tokenizer.load(tmp_path)
  assert Tokenizer.load(tmp_path, eos="<|im_end|>").eos_id == 2


@pytest.mark.parametrize("name", ["none.json", "none.gguf", "none.bin"])
def test_a_missing_file_is_named(tmp_path, name):
  with pytest.raises(UserError, match=f"{name} does not exist"):
    Tokenizer.load(tmp_path / name)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer.json is no tokenizer"):
    Tokenizer.load(tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
  with pytest.raises(UserError, match="vocab_size 200 is below 259"):
    trained(vocab_size=200)


def test_gpt2_files_give_the_merges_in_their_order_and_a_pad_of_its_own(tmp_path):
  vocab = {"l": 0, "o": 1, "w": 2, "lo": 3, "low": 4, "ow": 5, "<|endoftext|>": 6}
  with gzip.open(tmp_path / "vocab.json.gz", "wt") as file:
    json.dump(vocab, file)
  (tmp_path / "merges.txt").write_text("#version: 0.2\no w\nl ow\nl o\n")
  tokenizer = from_vocab_merges(tmp_path / "vocab.json.gz", tmp_path / "merges.txt")
  assert tokenizer.encode("low") == [4]
  assert tokenizer.encode("lo") == [3]
  assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (6, 7, 8)


def write_gguf(path, pre="smollm", model="gpt2"):
  letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "1", "2", "l", "o", "lo", "12"]
  writer = gguf.GGUFWriter(str(path), "llama")
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(letters)
  writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 7)
  writer.add_token_merges(["l o", "1 2"])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_pad_token_id(2)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_gguf_metadata_say_vocabulary_merges_specials_and_pre_tokenizer(tmp_path):
  write_gguf(tmp_path / "a.gguf")
  tokenizer = Tokenizer.load(tmp_path / "a.gguf")
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.pad == "<|endoftext|>"  # the file names the EOS, which would hide it
  assert tokenizer.encode("lo 12") == [8, 3, 4, 5]  # digits one by one, whatever the merges say
  write_gguf(tmp_path / "b.gguf", pre="gpt-2")
  assert Tokenizer.load(tmp_path / "b.gguf").encode("lo") == [8]
  assert Tokenizer.load(tmp_path / "b.gguf").encode("12") == [9]


@pytest.mark.parametrize(("pre", "model"), [("qwen2", "gpt2"), ("smollm", "llama")])
def test_a_gguf_tokenizer_of_another_kind_is_refused_with_a_remedy(tmp_path, pre, model):
  write_gguf(tmp_path / "a.gguf", pre=pre, model=model)
  with pytest.raises(UserError, match=f"'{model}'.*'{pre}'.*tokenizer.json instead"):
    Tokenizer.load(tmp_path / "a.gguf")


def test_llama2c_pieces_are_joined_best_score_first(tmp_path):
  # Of "abc", "bc" (score -1) is joined before "ab" (-2); the byte of "d" is a piece of its own.
  pieces = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
  pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
  pieces += [("bc", -1.0), ("ab", -2.0), (" ", -3.0), ("a", -4.0), ("b", -5.0), ("c", -6.0)]
  data = struct.pack("<i", 9)
  for text, score in pieces:
    data += struct.pack("<fi", score, len(text)) + text.encode()
  (tmp_path / "tok.bin").write_bytes(data)
  tokenizer = from_llama2c(tmp_path / "tok.bin")
  ids = {text: i for i, (text, _) in enumerate(pieces)}
  assert tokenizer.encode("abcd") == [ids[" "], ids["a"], ids["bc"], ids["<0x64>"]]
  assert tokenizer.decode(tokenizer.encode("abcd é")) == "abcd é"
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
  assert Tokenizer.load(tmp_path / "tok.bin", eos="<s>").eos_id == 1
  with pytest.raises(UserError, match="'<end>' is not a special token"):
    Tokenizer.load(tmp_path / "tok.bin", eos="<end>")


def test_the_stories_tokenizer_agrees_with_llama2c(weights_folder):
  path = weights_folder / "stories260K" / "tok512.bin"
  if not path.exists():
    pytest.skip(f"{path} is not there")
  tokenizer = Tokenizer.load(path)
  # The ids that llama2.c's own test prints for its tokenizer of 512 pieces.
  assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
  text = "Lily's mom said, \"Let's go to the park — été!\""
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_tokenizer_files_round_trip_real_text(data_folder):
  names = (data_folder / "gpt2-tokenizer" / name for name in ("vocab.json.gz", "merges.txt.gz"))
  tokenizer = from_vocab_merges(*names)
  assert tokenizer.encode("Hello world") == [15496, 995]
  assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (50256, 50257, 50258)
  with gzip.open(data_folder / "text" / "tinyshakespeare.txt.gz", "rt") as file:
    text = file.read()[:20_000]
  assert tokenizer.decode(tokenizer.encode(text)) == text
