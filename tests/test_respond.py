"""Conversations answered in batches: order, padding and text."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from rlhf_jax.data import village
from rlhf_jax.generation.respond import Responder
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.networks import heads
from rlhf_jax.parallel import mesh as mesh_lib
from rlhf_jax.text import dialogue
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError

R = 8
MESH = mesh_lib.make(mesh_lib.MeshConfig(data=-1, fsdp=1, tensor=1))
TOKENIZER = Tokenizer(
  village.build_tokenizer(village.build_world(village.STANDARD)),
  eos=dialogue.VILLAGE.end,
  pad="<pad>",
  bos=None,
)
POLICY = heads.Policy(tiny.changed(tiny.MODEL, vocab_size=TOKENIZER.vocab_size))
QUESTIONS = (
  "Where does Alice live?",
  "Who is she?",
  "What is the pet of Bob, and where does Bob work?",
)


def conversations(count):
  return [Conversation.of(("user", QUESTIONS[i % len(QUESTIONS)])) for i in range(count)]


def responder(batch_size, temperature=1.0, prompt_length=24):
  sampling = SamplingConfig(
    max_new_tokens=R,
    temperature=temperature,
    top_k=0,
    top_p=1.0,
    stop=None,
    compact_to=(),
    cache_sizes=1,
  )
  return Responder(POLICY, TOKENIZER, dialogue.VILLAGE, MESH, sampling, prompt_length, batch_size)


@pytest.fixture(scope="module")
def params():
  """Loud enough that rows differ, with the end of a message likely."""
  params = tiny.params(POLICY, 0)
  kernel = params["lm_head"]["kernel"]
  params["lm_head"]["kernel"] = kernel.at[:, TOKENIZER.eos_id].multiply(3.0)
  return params


@pytest.fixture(scope="module")
def greedy():
  return {size: responder(size, temperature=0.0) for size in (8, 16)}


def test_replies_come_in_the_order_of_the_questions_however_many_there_are(params, greedy):
  # Greedy, so that the answer is a function of the question.
  alone = [greedy[8].respond(params, [c], jax.random.key(0))[0] for c in conversations(3)]
  assert len({reply.text for reply in alone}) == 3
  for count in (1, 7, 8, 9, 19):
    replies = greedy[8].respond(params, conversations(count), jax.random.key(1))
    assert replies == [alone[i % 3] for i in range(count)]


def test_a_reply_does_not_depend_on_its_neighbours_or_the_batch_size(params, greedy):
  asked = conversations(12)
  forwards = greedy[8].respond(params, asked, jax.random.key(0))
  backwards = greedy[8].respond(params, asked[::-1], jax.random.key(0))
  assert forwards == backwards[::-1] == greedy[16].respond(params, asked, jax.random.key(0))


@pytest.mark.conformance("A36")
def test_chunks_and_rows_with_one_question_draw_differently_and_a_key_fixes_all(params):
  sampled = responder(8)
  same = [Conversation.of(("user", QUESTIONS[0]))] * 24
  draw = lambda seed: [reply.text for reply in sampled.respond(params, same, jax.random.key(seed))]
  texts = draw(0)
  assert len(set(texts)) > 12 and texts[:8] != texts[8:16] != texts[16:]
  assert draw(0) == texts != draw(1)


def test_several_samples_stand_behind_each_other_whatever_the_chunks(params):
  asked = conversations(11)
  several = dataclasses.replace(responder(8, temperature=0.0), samples=3)
  replies = several.respond(params, asked, jax.random.key(0))
  once = responder(8, temperature=0.0).respond(params, asked, jax.random.key(0))
  assert replies == [reply for reply in once for _ in range(3)]
  drawn = dataclasses.replace(responder(8), samples=3).respond(params, asked, jax.random.key(0))
  assert len({reply.text for reply in drawn[:3]}) == 3


def test_the_last_chunk_is_filled_up_with_rows_that_hold_nothing():
  *full, last = responder(8).prompt_batches(conversations(11))
  assert [len(batch.tokens) for batch in (*full, last)] == [8, 8]
  np.testing.assert_array_equal(np.sum(last.mask, axis=1) > 0, [True] * 3 + [False] * 5)
  prompt = dialogue.encode_prompt(conversations(1)[0], dialogue.VILLAGE, TOKENIZER)
  assert np.asarray(full[0].tokens)[0].tolist()[-len(prompt) :] == list(prompt)


def test_length_counts_the_end_mark_and_the_text_leaves_it_out():
  end, words = TOKENIZER.eos_id, TOKENIZER.encode("Alice lives in the mill.")
  room = R - len(words)
  tokens = np.array([[*words, end, *[0] * (room - 1)], [end, *[0] * (R - 1)], [words[0]] * R])
  mask = np.array([np.arange(R) < n for n in (len(words) + 1, 1, R)], np.float32)
  ended, empty, cut = responder(8).decode(tokens, mask, np.array([1.0, 1.0, 0.0]))
  assert (ended.text, ended.length, ended.finished) == (
    "Alice lives in the mill.",
    len(words) + 1,
    True,
  )
  assert (empty.text, empty.length, empty.finished) == ("", 1, True)
  assert cut.text == " ".join(["Alice"] * R) and cut.length == R and not cut.finished


def test_what_fits_is_what_can_be_asked(params):
  long = Conversation.of(("user", "Where does Alice live? " * 8))
  turns = Conversation.of(("user", "Where does Alice live? " * 8), ("assistant", "In the mill."))
  narrow = responder(8)
  assert not narrow.fits(long)
  assert narrow.fits(turns.with_message("user", "Who is she?"))  # the oldest turns are dropped
  with pytest.raises(UserError, match="max_tokens is 24"):
    narrow.respond(params, [long], jax.random.key(0))


def test_a_batch_that_the_mesh_cannot_split_is_refused():
  with pytest.raises(UserError, match="9 rows do not split over the 8 devices"):
    responder(9)
