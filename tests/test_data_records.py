"""Records: validation, JSON, identity and the held-out split."""

import dataclasses
import hashlib
import json

import pytest

from rlhf_jax.data import records
from rlhf_jax.data.records import Comparison, Demonstration, Prompt, Text, split_of
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

PROMPT = Conversation.of(("system", "Be kind."), ("user", "Who  are you?"))
DEMONSTRATION = Demonstration(PROMPT.with_reply("A model."), "unit")
COMPARISON = Comparison(
  PROMPT, ("A model.", "Nobody.", "I."), (0, 2, 0), ("m1", "m2", "ann"), "bob", "unit"
)
EVERY = (DEMONSTRATION, COMPARISON, Prompt(PROMPT, "unit"), Text("Once. 東京", "unit"))


@pytest.mark.parametrize("record", EVERY, ids=lambda record: type(record).__name__)
def test_records_survive_json_with_their_identity(record):
  line = json.dumps(records.to_json(record))
  again = records.from_json(type(record), json.loads(line))
  assert again == record
  assert again.identity == record.identity and again.prompt_key == record.prompt_key


def test_an_identity_is_sha256_of_canonical_json_because_lineage_keeps_it_on_disk():
  messages = '[{"role":"system","content":"Be kind."},{"role":"user","content":"Who  are you?"}'
  told = f'{messages},{{"role":"assistant","content":"A model."}}]'
  assert DEMONSTRATION.identity == hashlib.sha256(told.encode()).hexdigest()[:16]
  ranked = f'[{messages}],["A model.","Nobody.","I."],[0,2,0],["m1","m2","ann"],"bob"]'
  assert COMPARISON.identity == hashlib.sha256(ranked.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
  "change",
  [
    {"ranks": (0, 1, 0)},
    {"labeler": "carol"},
    {"authors": ("m1", "m2", "m2")},
    {"responses": ("A model.", "Nobody.", "Me.")},
    {"conversation": Conversation.of(("user", "Who  are you?"))},
  ],
)
def test_the_identity_of_a_comparison_depends_on_all_of_its_content(change):
  assert dataclasses.replace(COMPARISON, **change).identity != COMPARISON.identity


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"responses": ("a",), "ranks": (0,), "authors": ("m",)}, "at least 2 responses.*got 1"),
    ({"ranks": (0, 1)}, "2 ranks and 3 authors"),
    ({"ranks": (1, 2, 3)}, "0 for the best"),
    ({"ranks": (0, -1, 1)}, "0 for the best"),
    ({"ranks": (0, True, 1)}, "0 for the best"),
    ({"ranks": (0, 0.5, 1)}, "0 for the best"),
    ({"responses": ("a", "b", None)}, "must be text"),
    ({"conversation": PROMPT.with_reply("x")}, "must end with the user's message"),
  ],
)
def test_impossible_comparisons_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(COMPARISON, **change)


def test_a_demonstration_needs_an_assistant_and_a_prompt_must_not_end_with_one():
  with pytest.raises(UserError, match="needs an assistant message"):
    Demonstration(PROMPT, "unit")
  with pytest.raises(UserError, match="must end with the user's message"):
    Prompt(DEMONSTRATION.conversation, "unit")
  with pytest.raises(UserError, match="must hold text"):
    Text(" \n", "unit")


@pytest.mark.parametrize(
  ("item", "message"),
  [
    ([], "must be a JSON object"),
    ({"messages": []}, r"missing \['source'\]"),
    ({"messages": [], "source": "s", "lable": 1}, r"unknown \['lable'\]"),
    ({"messages": "hi", "source": "s"}, "messages must be a list"),
    ({"messages": [{"role": "user", "content": "x"}], "source": 3}, "source.*must be text"),
  ],
)
def test_malformed_json_is_refused_by_name(item, message):
  with pytest.raises(UserError, match=message):
    records.from_json(Demonstration, item)


@pytest.mark.conformance("A22")
def test_all_records_that_grow_from_one_opening_lie_on_one_side_of_the_split():
  opening = Conversation.of(("user", "Who are you?"))
  later = opening.with_reply("A model.").with_message("user", "And I?")
  family = [
    Prompt(opening, "a"),
    Prompt(later, "b"),
    Demonstration(opening.with_reply("Guess."), "c"),
    Comparison(later, ("x", "y"), (0, 1), ("m", "m"), "l", "d"),
    Prompt(Conversation.of(("system", "Be kind."), ("user", " who are  YOU?")), "e"),
  ]
  for seed in range(20):
    assert len({split_of(record.prompt_key, 0.5, seed) for record in family}) == 1
  assert len({split_of(family[0].prompt_key, 0.5, seed) for seed in range(20)}) == 2


def test_the_split_holds_out_its_fraction_and_does_not_move_when_data_are_added():
  keys = [Text(f"document {i}", "t").prompt_key for i in range(4000)]
  sides = [split_of(key, 0.2, 7) for key in keys]
  assert 0.2 - 0.025 < sides.count("heldout") / 4000 < 0.2 + 0.025  # four standard errors
  assert [split_of(key, 0.2, 7) for key in keys[::-1]] == sides[::-1]
  wider = [split_of(key, 0.3, 7) for key in keys]
  assert all(w == "heldout" for s, w in zip(sides, wider) if s == "heldout")
  assert {split_of(key, 0.0, 7) for key in keys} == {"train"}
  with pytest.raises(UserError, match="heldout_fraction 1.0"):
    split_of("00", 1.0, 0)


def test_the_prompt_of_a_record_is_what_its_answers_answer():
  assert records.to_prompt(DEMONSTRATION) == Prompt(PROMPT, "unit")
  assert records.to_prompt(COMPARISON) == Prompt(PROMPT, "unit")
  twice = Demonstration(PROMPT.with_reply("A model.").with_reply("Truly."), "unit")
  assert records.to_prompt(twice) == Prompt(PROMPT, "unit")
  unasked = Demonstration(Conversation.of(("assistant", "Hi."), ("user", "Hi.")), "unit")
  assert records.to_prompt(unasked) is None
