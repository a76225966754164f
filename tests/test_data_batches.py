"""Packing, rows and batches: hand tables, invariants, and exact resumption."""

import collections
import itertools

import jax
import numpy as np
import pytest

from rlhf_jax.data import batches, packing, rows
from rlhf_jax.data.records import Comparison, Demonstration, Prompt, Text
from rlhf_jax.text import dialogue
from rlhf_jax.text.dialogue import CHATML, VILLAGE
from rlhf_jax.text.messages import Conversation
from rlhf_jax.text.tokenizer import Tokenizer, train_bpe
from rlhf_jax.types import UserError

SPECIALS = ("<pad>", "<system>", "<user>", "<assistant>", "<end>")
PAD, USER, ASSISTANT, END = 0, 2, 3, 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  """Bytes only: every letter is a token, so lengths can be counted by hand."""
  return train_bpe(["ab"], 256 + len(SPECIALS), SPECIALS, eos="<end>", pad="<pad>")


def demonstration(question: str, answer: str) -> Demonstration:
  return Demonstration(Conversation.of(("user", question), ("assistant", answer)), "unit")


def ask(*texts: str) -> Conversation:
  sides = itertools.cycle(("user", "assistant"))
  return Conversation.of(*zip(sides, texts))


def numbered(count: int) -> rows.Rows:
  """Rows with a number each; an empty row has -1."""
  build = lambda content: {"id": np.int32(content[0] if content else -1)}
  return rows.Rows([(i,) for i in range(count)], build, 0)


def endless(*sources, batch_size=4, seed=0) -> batches.Batches:
  return batches.endless(sources, batch_size, seed=seed)


def drawn(stream: batches.Batches, count: int, start: int = 0) -> list[int]:
  some = itertools.islice(stream.starting_at(start), count)
  return [int(i) for batch in some for i in batch["id"]]


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.conformance("B18")
@pytest.mark.parametrize("seed", range(5))
def test_packing_places_every_document_once_and_overfills_no_row(seed):
  lengths = np.random.default_rng(seed).integers(1, 65, size=200).tolist()
  plan = packing.pack(lengths, 64, seed)
  assert sorted(i for row in plan for i in row) == list(range(200))
  filled = [sum(lengths[i] for i in row) for row in plan]
  assert max(filled) <= 64
  assert sum(filled) / (64 * len(plan)) > 0.9


def test_packing_fills_the_tightest_row_that_has_room_and_opens_one_only_if_none_has():
  lengths = np.random.default_rng(3).integers(1, 30, size=80).tolist()
  rooms = []  # the definition of best fit, by a search over all rows
  for i in np.random.default_rng(9).permutation(80):
    fitting = [room for room in rooms if room >= lengths[i]]
    if fitting:
      rooms.remove(min(fitting))
    rooms.append((min(fitting) if fitting else 40) - lengths[i])
  plan = packing.pack(lengths, 40, 9)
  assert sorted(40 - sum(lengths[i] for i in row) for row in plan) == sorted(rooms)


def test_packing_is_deterministic_and_another_seed_packs_other_company():
  lengths = [5] * 40
  assert packing.pack(lengths, 20, 1) == packing.pack(lengths, 20, 1)
  assert packing.pack(lengths, 20, 1) != packing.pack(lengths, 20, 2)


def test_a_document_longer_than_a_row_is_refused():
  with pytest.raises(UserError, match="65 tokens does not fit a row of 64"):
    packing.pack([3, 65], 64, 0)


def test_a_packed_row_by_hand():
  first = packing.Document(np.array([7, 8, 9], np.int32), np.array([0, 1, 1], np.float32))
  second = packing.Document(np.array([5, 6], np.int32), np.array([0, 1], np.float32))
  row = packing.token_row((first, second), max_tokens=7, pad_id=1)
  np.testing.assert_array_equal(row.tokens, [7, 8, 9, 5, 6, 1, 1])
  np.testing.assert_array_equal(row.segments, [1, 1, 1, 2, 2, 0, 0])
  np.testing.assert_array_equal(row.positions, [0, 1, 2, 0, 1, 0, 0])
  np.testing.assert_array_equal(row.loss_mask, [0, 1, 1, 0, 1, 0, 0])


# --- rows ----------------------------------------------------------------------------------------


def demonstration_rows(records, tokenizer, max_tokens=24, packing_seed=None, on_too_long="error"):
  return rows.demonstration_rows(
    records,
    VILLAGE,
    tokenizer,
    max_tokens=max_tokens,
    supervise="all",
    on_too_long=on_too_long,
    packing_seed=packing_seed,
  )


@pytest.mark.conformance("A3", "A5", "B7")
def test_a_demonstration_row_by_hand(tokenizer):
  a, b = tokenizer.encode("a") + tokenizer.encode("b")
  (row,) = demonstration_rows([demonstration("a", "bb")], tokenizer, max_tokens=10)
  np.testing.assert_array_equal(row.tokens, [USER, a, END, ASSISTANT, b, b, END, PAD, PAD, PAD])
  np.testing.assert_array_equal(row.loss_mask, [0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
  np.testing.assert_array_equal(row.segments, [1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
  np.testing.assert_array_equal(row.positions, [0, 1, 2, 3, 4, 5, 6, 0, 0, 0])


@pytest.mark.conformance("B18")
def test_packed_rows_hold_each_dialogue_whole_in_a_segment_of_its_own(tokenizer):
  records = [demonstration("a" * (i % 7), "b" * (i % 5)) for i in range(60)]
  packed = demonstration_rows(records, tokenizer, max_tokens=40, packing_seed=0)
  assert len(packed) < 30
  found = collections.Counter()
  for row in packed:
    starts = np.flatnonzero(np.diff(row.segments, prepend=0))
    assert list(row.segments[starts[: row.segments.max()]]) == list(
      range(1, row.segments.max() + 1)
    )
    for segment in range(1, row.segments.max() + 1):
      place = np.flatnonzero(row.segments == segment)
      assert list(place) == list(range(place[0], place[-1] + 1))
      np.testing.assert_array_equal(row.positions[place], np.arange(len(place)))
      found[tuple(row.tokens[place]), tuple(row.loss_mask[place])] += 1
    padding = row.segments == 0
    assert not row.loss_mask[padding].any() and (row.tokens[padding] == PAD).all()
  alone = [dialogue.encode(r.conversation, VILLAGE, tokenizer, supervise="all") for r in records]
  assert found == collections.Counter((e.ids, e.loss_mask) for e in alone)


def test_what_the_user_says_after_the_last_answer_is_left_out(tokenizer):
  long = Demonstration(ask("a", "b", "aaaa"), "unit")
  (row,) = demonstration_rows([long], tokenizer)
  (same,) = demonstration_rows([demonstration("a", "b")], tokenizer)
  assert jax.tree.all(jax.tree.map(np.array_equal, row, same))


@pytest.mark.conformance("A7")
def test_dialogues_that_are_too_long_lose_old_turns_or_are_counted_or_stop_the_run(tokenizer):
  records = [Demonstration(ask("a" * 20, "b", "a", "b"), "unit"), demonstration("a" * 20, "b")]
  kept = demonstration_rows(records, tokenizer, max_tokens=12, on_too_long="skip")
  assert (len(kept), kept.skipped) == (1, 1)
  (short,) = demonstration_rows([demonstration("a", "b")], tokenizer, max_tokens=12)
  assert jax.tree.all(jax.tree.map(np.array_equal, kept[0], short))
  with pytest.raises(UserError, match=f"demonstration {records[1].identity} of unit.*needs 25"):
    demonstration_rows(records, tokenizer, max_tokens=12)


def test_running_text_is_cut_to_rows_and_every_token_with_a_predecessor_is_a_target(tokenizer):
  text = Text("abcdefghi", "unit")
  made = rows.text_rows([text], tokenizer, max_tokens=4, packing_seed=None)
  assert [tokenizer.decode(row.tokens) for row in made] == ["abcd", "efgh"]  # "i" predicts nothing
  np.testing.assert_array_equal(made[0].loss_mask, [0, 1, 1, 1])
  (tail,) = rows.text_rows([Text("ab", "unit")], tokenizer, max_tokens=4, packing_seed=0)
  np.testing.assert_array_equal(tail.loss_mask, [0, 1, 0, 0])
  np.testing.assert_array_equal(tail.segments, [1, 1, 0, 0])


def test_prompts_are_padded_on_the_left_so_that_responses_start_in_one_column(tokenizer):
  (a,) = tokenizer.encode("a")
  (row,) = rows.prompt_rows(
    [Prompt(ask("a"), "unit")], VILLAGE, tokenizer, max_tokens=6, on_too_long="error"
  )
  np.testing.assert_array_equal(row.tokens, [PAD, PAD, USER, a, END, ASSISTANT])
  np.testing.assert_array_equal(row.mask, [0, 0, 1, 1, 1, 1])


def comparison(prompt: Conversation, *responses: str, ranks=None) -> Comparison:
  count = len(responses)
  return Comparison(prompt, responses, ranks or tuple(range(count)), ("m",) * count, "l", "unit")


def ranking_rows(records, tokenizer, max_tokens=12, max_responses=3, on_too_long="error"):
  return rows.ranking_rows(
    records,
    VILLAGE,
    tokenizer,
    max_tokens=max_tokens,
    max_prompts=2,
    max_responses=max_responses,
    on_too_long=on_too_long,
    packing_seed=0,
  )


def test_a_ranking_row_by_hand(tokenizer):
  a, b = tokenizer.encode("a") + tokenizer.encode("b")
  (row,) = ranking_rows([comparison(ask("a"), "bb", "", ranks=(1, 0))], tokenizer, max_tokens=10)
  header = [USER, a, END, ASSISTANT]
  np.testing.assert_array_equal(row.tokens, [*header, b, b, END, END, PAD, PAD])
  np.testing.assert_array_equal(row.segments, [1] * 8 + [0] * 2)
  np.testing.assert_array_equal(row.branches, [0, 0, 0, 0, 1, 1, 1, 2, 0, 0])
  np.testing.assert_array_equal(row.positions, [0, 1, 2, 3, 4, 5, 6, 4, 0, 0])
  np.testing.assert_array_equal(row.ends, [[6, 7, 0], [0, 0, 0]])
  np.testing.assert_array_equal(row.ranks, [[1, 0, 0], [0, 0, 0]])
  np.testing.assert_array_equal(row.valid, [[1, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(row.lengths, [[3, 1, 0], [0, 0, 0]])


@pytest.mark.conformance("A12")
def test_comparisons_are_packed_whole_each_once_and_not_too_many_to_a_row(tokenizer):
  records = [comparison(ask("ab"[i % 2]), "b" * (i % 5), "bb") for i in range(30)]
  packed = ranking_rows(records, tokenizer, max_tokens=40)
  assert len(packed) == 15  # three would fit, two are allowed
  found = collections.Counter()
  for row in packed:
    assert row.valid.sum(-1).tolist() == [2, 2]
    for m in range(2):
      ids = row.tokens[row.segments == m + 1]
      found[(tokenizer.decode(ids[1:2]), row.lengths[m, 0])] += 1
      assert row.tokens[row.ends[m, :2]].tolist() == [END, END]
  assert found == collections.Counter(("ab"[i % 2], i % 5 + 1) for i in range(30))


@pytest.mark.conformance("A7")
def test_all_answers_of_a_comparison_see_the_same_context_and_are_never_cut(tokenizer):
  prompt = ask("aaaa", "b", "a")
  whole = ranking_rows([comparison(prompt, "b", "bb")], tokenizer, max_tokens=18)[0]
  assert ((whole.segments > 0).sum(), whole.lengths[0].tolist()) == (13 + 5, [2, 3, 0])
  cut = ranking_rows([comparison(prompt, "b", "bb")], tokenizer, max_tokens=17)[0]
  assert ((cut.segments > 0).sum(), cut.lengths[0].tolist()) == (4 + 5, [2, 3, 0])
  skipped = ranking_rows([comparison(prompt, "b", "b" * 15)], tokenizer, on_too_long="skip")
  assert (len(skipped), skipped.skipped) == (0, 1)


def test_more_answers_than_slots_are_an_error(tokenizer):
  with pytest.raises(UserError, match="ranks 4 responses, but there are 3 slots"):
    ranking_rows([comparison(ask("a"), "a", "b", "c", "d")], tokenizer)


def test_empty_rows_hold_nothing(tokenizer):
  ranking = ranking_rows([comparison(ask("a"), "b", "bb")], tokenizer)
  assert not ranking.empty.valid.any() and not ranking.empty.segments.any()
  dialogues = demonstration_rows([demonstration("a", "b")], tokenizer)
  assert not dialogues.empty.loss_mask.any() and not dialogues.empty.segments.any()
  same = lambda x, y: x.shape == y.shape and x.dtype == y.dtype
  assert jax.tree.all(jax.tree.map(same, dialogues.empty, dialogues[0]))
  assert jax.tree.all(jax.tree.map(same, ranking.empty, ranking[0]))


# --- batches -------------------------------------------------------------------------------------


def test_batches_stack_rows_into_the_types_of_the_package(tokenizer):
  source = batches.Source(
    "d", demonstration_rows([demonstration("a", "b" * i) for i in range(8)], tokenizer), 1.0
  )
  batch = endless(source).batch_at(3)
  assert type(batch).__name__ == "TokenBatch"
  assert {leaf.shape for leaf in jax.tree.leaves(batch)} == {(4, 24)}
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(batch)]
  assert dtypes == [np.int32, np.int32, np.int32, np.float32]


@pytest.mark.parametrize("start", [0, 1, 7, 23])
def test_batches_from_step_n_on_are_the_tail_of_the_batches_from_the_start(start):
  two = [batches.Source("a", numbered(30), 2.0), batches.Source("b", numbered(17), 1.0)]
  undisturbed = drawn(endless(*two), 40)
  assert drawn(endless(*two), 40 - start, start) == undisturbed[4 * start :]


@pytest.mark.conformance("A37")
def test_every_epoch_has_each_row_once_in_a_new_order():
  stream = endless(batches.Source("a", numbered(20), 1.0), batch_size=5)
  assert stream.per_epoch == 4
  epochs = [drawn(stream, 4, start) for start in (0, 4, 8)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in epochs}) == 3
  assert tuple(range(20)) not in map(tuple, epochs)


def test_epochs_do_not_lose_rows_that_fill_no_batch():
  stream = endless(batches.Source("a", numbered(7), 1.0), batch_size=4)
  counts = collections.Counter(drawn(stream, 7))  # 28 rows are four epochs of 7
  assert set(counts.values()) == {4}


def test_the_seed_decides_the_order():
  source = batches.Source("a", numbered(50), 1.0)
  first, second = (drawn(endless(source, seed=seed), 12) for seed in (0, 1))
  assert first != second
  assert first == drawn(endless(source, seed=0), 12)


def test_sources_are_mixed_by_weight_whatever_their_sizes():
  low, high = numbered(10), numbered(500)
  high = rows.Rows([(i + 1000,) for i in range(500)], high.build, 0)
  stream = endless(batches.Source("a", low, 3.0), batches.Source("b", high, 1.0), batch_size=8)
  found = drawn(stream, 50)
  assert sum(i < 1000 for i in found) == 300  # of 400
  for start in range(0, 400, 8):  # and in every batch
    assert sum(i < 1000 for i in found[start : start + 8]) == 6
  assert max(collections.Counter(i for i in found if i >= 1000).values()) == 1


def test_sources_of_one_size_are_not_shuffled_alike():
  stream = endless(batches.Source("a", numbered(64), 1.0), batches.Source("b", numbered(64), 1.0))
  found = drawn(stream, 32)
  assert found[0::2] != found[1::2]


def test_once_goes_through_all_rows_in_order_and_fills_up_with_empty_ones():
  found = batches.once(numbered(6), 4)
  np.testing.assert_array_equal([batch["id"] for batch in found], [[0, 1, 2, 3], [4, 5, -1, -1]])


@pytest.mark.parametrize(
  ("sizes", "batch_size", "message"),
  [
    ((), 4, "no data source"),
    ((3,), 4, "'0' has 3 rows .*share of a batch of 4 is 4"),
    ((100, 1), 4, "'1' has 1 rows .*share of a batch of 4 is 2"),
    ((100, 0), 4, "'1' has 0 rows"),
  ],
)
def test_data_that_cannot_fill_a_batch_are_an_error_before_the_start(sizes, batch_size, message):
  sources = [batches.Source(str(i), numbered(size), 1.0) for i, size in enumerate(sizes)]
  with pytest.raises(UserError, match=message):
    endless(*sources, batch_size=batch_size)


def test_evaluating_on_nothing_is_an_error():
  with pytest.raises(UserError, match="nothing to evaluate on"):
    batches.once(numbered(0), 4)


def test_chatml_needs_its_own_eos(tokenizer):
  with pytest.raises(UserError, match="not the EOS of this tokenizer"):
    rows.prompt_rows([Prompt(ask("a"), "u")], CHATML, tokenizer, max_tokens=9, on_too_long="error")
