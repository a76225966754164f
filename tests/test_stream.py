"""Streaming gives the tokens of the compiled loop, and whole characters only."""

import functools

import jax
import numpy as np
import pytest
import tiny

from rlhf_jax.data import village
from rlhf_jax.generation import decode, stream
from rlhf_jax.generation.sampling import Stops
from rlhf_jax.text import dialogue
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text.tokenizer import Tokenizer

STOPS = Stops((tiny.EOS, 2))
SAMPLING = tiny.changed(tiny.SAMPLING, max_new_tokens=12)
LENGTHS = (1, 5, 17, 31, 32)


@pytest.fixture(scope="module")
def params():
  return tiny.params(tiny.POLICY, 0)


@functools.cache
def streamer(sampling=SAMPLING, stops=STOPS):
  return stream.Streamer(tiny.POLICY, sampling, stops, tiny.PAD)


@functools.cache
def compiled(sampling, stops):
  generate = functools.partial(
    decode.generate, tiny.POLICY, config=sampling, stops=stops, pad_id=tiny.PAD
  )
  return jax.jit(generate)


def at_once(params, prompt, key, sampling, stops=STOPS):
  """The same answer by `decode.generate`."""
  prompts = tiny.left_padded([prompt], stream.bucket(len(prompt)))
  done = jax.device_get(compiled(sampling, stops)(params, prompts, key))
  return done.tokens[0][done.mask[0] > 0].tolist()


def prompt(length):
  return tiny.random_tokens((length,), length).tolist()


@pytest.mark.parametrize(
  "sampling",
  [
    SAMPLING,
    tiny.changed(SAMPLING, temperature=0.0),
    tiny.changed(SAMPLING, temperature=0.7, top_k=5, top_p=0.8),
  ],
)
def test_the_same_key_streams_the_tokens_of_generate(params, sampling):
  lengths = set()
  for seed, length in enumerate(LENGTHS):
    key = jax.random.key(seed)
    streamed = list(streamer(sampling).ids(params, prompt(length), key))
    assert streamed == at_once(params, prompt(length), key, sampling)
    lengths.add(len(streamed))
  assert sampling is not SAMPLING or len(lengths) > 1  # some ended early


def test_a_stop_token_is_the_last_and_without_one_all_room_is_used(params):
  for seed in range(20):
    ids = list(streamer().ids(params, prompt(5), jax.random.key(seed)))
    assert not set(ids[:-1]) & set(STOPS.always)
    assert ids[-1] in STOPS.always or len(ids) == SAMPLING.max_new_tokens
  endless = streamer(stops=Stops(())).ids(params, prompt(5), jax.random.key(0))
  assert len(list(endless)) == SAMPLING.max_new_tokens


def test_another_key_gives_another_answer(params):
  draw = lambda seed: tuple(streamer().ids(params, prompt(5), jax.random.key(seed)))
  assert draw(0) == draw(0) and len({draw(seed) for seed in range(5)}) > 1


def test_prompts_of_one_bucket_share_one_compilation(params):
  fresh = stream.Streamer(tiny.POLICY, SAMPLING, Stops(()), tiny.PAD)
  for length in (1, 7, 32):
    list(fresh.ids(params, prompt(length), jax.random.key(0)))
  assert fresh._prefill._cache_size() == fresh._step._cache_size() == 1
  list(fresh.ids(params, prompt(33), jax.random.key(0)))
  assert fresh._prefill._cache_size() == fresh._step._cache_size() == 2


def test_buckets_are_powers_of_two_that_hold_the_prompt():
  for length in range(1, 2_000):
    width = stream.bucket(length)
    assert width >= max(length, stream.SMALLEST_BUCKET) and width & (width - 1) == 0
    assert width < 2 * length or width == stream.SMALLEST_BUCKET


def test_each_token_is_handed_over_before_the_next_is_drawn(params):
  ids = streamer(stops=Stops(())).ids(params, prompt(5), jax.random.key(0))
  first = next(ids)
  ids.close()  # an answer that is stopped leaves nothing behind
  again = streamer(stops=Stops(())).ids(params, prompt(5), jax.random.key(0))
  assert next(again) == first


TEXTS = (
  "naïve café",
  "日本語と한국어",
  "👩‍🚀 flies 🚀",
  "a\ufffdb",
  "\ufffd",
  "",
  " lead",
  "e\u0301",
)


@functools.cache
def byte_level():
  """A tokenizer without merges beyond ASCII words: any other character is several tokens."""
  return tokenizer_lib.train_bpe(
    ["the cat sat on the mat"] * 9, 300, ("<|pad|>", "<|im_end|>"), eos="<|im_end|>", pad="<|pad|>"
  )


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_bytes_are_whole_characters_and_join_to_the_text(text):
  tokenizer = byte_level()
  pieces = list(stream.pieces(tokenizer.encode(text), tokenizer.decode))
  assert "".join(pieces) == text
  if "\ufffd" not in text:
    assert not any("\ufffd" in piece for piece in pieces)
  assert all(pieces)


def test_random_bytes_join_to_what_decoding_them_at_once_gives():
  tokenizer = byte_level()
  draw = np.random.default_rng(0)
  ordinary = [i for i in range(tokenizer.vocab_size) if i not in (tokenizer.pad_id,)]
  for _ in range(300):
    ids = draw.choice(ordinary, draw.integers(1, 12)).tolist()
    assert "".join(stream.pieces(ids, tokenizer.decode)) == tokenizer.decode(ids)


def test_a_piece_comes_with_the_token_that_completes_it():
  tokenizer = byte_level()
  ids, given = tokenizer.encode("é x"), []

  def watched():
    for token in ids:
      given.append(token)
      yield token

  arrived = [(len(given), piece) for piece in stream.pieces(watched(), tokenizer.decode)]
  assert len(tokenizer.encode("é")) == 2
  assert arrived[0] == (2, "é")
  assert "".join(piece for _, piece in arrived) == "é x"


def test_pieces_of_village_words_keep_their_spaces():
  backend = village.build_tokenizer(village.build_world(village.STANDARD))
  tokenizer = Tokenizer(backend, eos=dialogue.VILLAGE.end, pad="<pad>", bos=None)
  text = "No, Alice's friend is Bob. Does she live in the mill?"
  ids = dialogue.encode_response(text, dialogue.VILLAGE, tokenizer)
  decode_ids = lambda ids: dialogue.decode_response(ids, dialogue.VILLAGE, tokenizer)
  pieces = list(stream.pieces(ids, decode_ids))
  assert len(pieces) > 8
  assert "".join(pieces) == decode_ids(ids)


def test_the_plain_templates_leading_space_is_not_shown():
  tokenizer = tokenizer_lib.train_bpe(
    ["yes no"], 300, ("<|pad|>", "<|endoftext|>"), eos="<|endoftext|>", pad="<|pad|>"
  )
  decode_ids = lambda ids: dialogue.decode_response(ids, dialogue.PLAIN, tokenizer)
  ids = dialogue.encode_response("yes", dialogue.PLAIN, tokenizer)
  assert "".join(stream.pieces(ids, decode_ids)) == "yes"


def test_a_real_models_tokenizer_streams_what_it_decodes(weights_folder):
  paths = sorted(weights_folder.rglob("*.gguf")) + sorted(weights_folder.rglob("tok512.bin"))
  if not paths:
    pytest.skip("no tokenizer among the weights")
  for path in paths:
    tokenizer = Tokenizer.load(path)
    for text in ("Once upon a time, Zoë saw 12 🚀 and said “hi”.", "x\n\n  y"):
      ids = tokenizer.encode(text)
      pieces = list(stream.pieces(ids, tokenizer.decode))
      assert "".join(pieces) == tokenizer.decode(ids) and "\ufffd" not in "".join(pieces)


@pytest.mark.conformance("A34")
def test_a_late_stop_token_ends_the_stream_where_it_ends_the_batch(params):
  stops = Stops((tiny.EOS,), late=tuple(range(2, 12)), at_or_after=3)
  lengths = set()
  for seed in range(8):
    key = jax.random.key(seed)
    streamed = list(streamer(stops=stops).ids(params, prompt(5), key))
    assert streamed == at_once(params, prompt(5), key, SAMPLING, stops)
    lengths.add(len(streamed))
  assert len(lengths) > 1 and max(lengths) >= 4
