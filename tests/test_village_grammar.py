"""The village's grammar, world and tokenizer."""

import collections
import dataclasses

import pytest

from rlhf_jax.data import village
from rlhf_jax.data.village import answers, grammar, phrases
from rlhf_jax.data.village.world import pronoun
from rlhf_jax.text.dialogue import VILLAGE, Conversation, decode_response, encode, encode_response
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError

ALL = tuple(phrases.RELATIONS)


def all_fillings():
  """Every template with a woman and a man, by name and by pronoun, all openers, all values."""
  for table, read in (
    (grammar.USER, grammar.read_user),
    (grammar.ASSISTANT, grammar.read_assistant),
  ):
    for template in table:
      values = phrases.RELATIONS[template.relation].values if "{value}" in template.text else ("",)
      openers = ("", *phrases.OPENERS) if "{opener}" in template.text else ("",)
      for name in ("Alice", "Bob"):
        for by_name in (True, False):
          for opener in openers:
            for value in values if not opener else values[:1]:
              text = template.fill(name, value=value, opener=opener, by_name=by_name)
              yield template, name, value, opener, text, read(text)


def test_the_parser_reads_back_whatever_the_generator_writes():
  count = 0
  for template, name, value, opener, text, found in all_fillings():
    assert found is not None, text
    assert (found.kind, found.relation, found.value) == (template.kind, template.relation, value)
    assert found.opener.lower() == opener.lower()
    if "{who" in template.text or "{name}" in template.text or "{they}" in template.text:
      assert found.who in (name, pronoun(name)), text
    count += 1
  assert count > 3000


def test_no_phrasing_is_both_familiar_and_held_out():
  familiar = {t.text for t in grammar.USER if not t.held_out}
  assert not familiar & {t.text for t in grammar.USER if t.held_out}


@pytest.mark.parametrize("relation", ALL)
def test_every_question_has_at_least_five_familiar_and_two_held_out_phrasings(relation):
  assert len(grammar.templates("ask", relation)) >= 5
  assert len(grammar.templates("ask", relation, held_out=True)) >= 2
  for kind in ("premise", "correct"):
    assert len(grammar.templates(kind, relation)) >= 4
    assert len(grammar.templates(kind, relation, held_out=True)) >= 1


def test_values_of_different_relations_are_different_words():
  values = [value for relation in phrases.RELATIONS.values() for value in relation.values]
  assert len(values) == len(set(values))


def test_a_stranger_to_the_grammar_is_read_as_nothing():
  for text in ("", "Alice lives.", "Alice lives in the mill", "alice lives in the mill.", "?"):
    assert grammar.read_assistant(text) is None
  assert grammar.read_user("Where does Zelda live?") is None


def test_the_world_depends_on_the_seed_and_on_nothing_else():
  one = village.World.generate(7, 24, ALL)
  assert one == village.World.generate(7, 24, ALL)
  assert one != village.World.generate(8, 24, ALL)
  fewer = village.World.generate(7, 24, ("pet", "home"))
  assert [p["pet"] for p in fewer.people] == [p["pet"] for p in one.people]


def test_values_are_dealt_evenly_and_friends_come_in_pairs():
  world = village.World.generate(3, 32, ALL)
  for relation in set(ALL) - {"friend"}:
    counts = collections.Counter(p[relation] for p in world.people)
    assert max(counts.values()) - min(counts.values()) <= 1
  for person in world.people:
    assert person["friend"] != person.name
    assert world.person(person["friend"])["friend"] == person.name
  assert sum(p.pronoun == "she" for p in world.people) == 16
  assert not {p.name for p in world.people} & set(world.strangers)
  assert len(world.strangers) == len(phrases.NAMES) - 32


@pytest.mark.parametrize("people", [0, 2, 23, 34, -4])
def test_an_impossible_number_of_people_is_a_user_error(people):
  with pytest.raises(UserError, match=f"people {people}"):
    village.World.generate(0, people, ALL)


@pytest.mark.parametrize("relations", [(), ("home", "home"), ("home", "shoe")])
def test_impossible_relations_are_a_user_error(relations):
  with pytest.raises(UserError, match="relations"):
    village.World.generate(0, 24, relations)


@pytest.fixture(scope="module")
def tokenizer():
  backend = village.build_tokenizer(village.World.generate(0, 24, ALL))
  return Tokenizer(backend, eos="<end>", pad="<pad>", bos=None)


def test_the_tokenizer_gives_every_text_of_the_grammar_back(tokenizer):
  unknown = tokenizer.token_id("<unk>")
  for *_, text, _ in all_fillings():
    ids = tokenizer.encode(text)
    assert unknown not in ids, text
    assert tokenizer.decode(ids) == text
    assert len(ids) == grammar.count_pieces(text)


def test_a_word_is_one_token_wherever_it_stands(tokenizer):
  where = tokenizer.token_id("▁Where")
  assert tokenizer.encode("Where does Bob live?")[0] == where
  assert tokenizer.encode("Bob. Where does he live?")[2] == where
  assert tokenizer.encode_special("<user>Where does Bob live?")[1] == where
  assert tokenizer.encode_special("<user> Where does Bob live?")[1] == where


@pytest.mark.conformance("A5")
def test_pad_and_end_are_different_tokens_and_a_reply_ends_with_end(tokenizer):
  assert tokenizer.pad_id != tokenizer.eos_id
  ids = encode_response("Alice lives in the mill.", VILLAGE, tokenizer)
  assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
  assert decode_response(ids, VILLAGE, tokenizer) == "Alice lives in the mill."


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  loaded = Tokenizer.load(tmp_path)
  text = "Alice's friend is Bob."
  assert loaded.encode(text) == tokenizer.encode(text)
  assert (loaded.eos, loaded.pad, loaded.vocab_size) == ("<end>", "<pad>", tokenizer.vocab_size)


def test_worlds_of_all_seeds_share_their_token_ids_and_a_few_hundred_words():
  config = village.STANDARD
  vocabularies = [
    village.build_tokenizer(village.build_world(dataclasses.replace(config, seed=s))).get_vocab()
    for s in (1, 2)
  ]
  assert vocabularies[0] == vocabularies[1]
  assert 200 < len(vocabularies[0]) < 400


def test_token_counts_of_the_module_are_those_of_the_chat_template(tokenizer):
  turns = [("user", "Where is Bob's home?"), ("assistant", "In the mill."), ("user", "Bob.")]
  conversation = Conversation.of(*turns).with_reply("Bob's home is the mill.")
  ids = encode(conversation, VILLAGE, tokenizer, supervise="all").ids
  assert village.count_tokens(conversation) == len(ids)


def test_answers_are_stated_by_name_or_by_the_pronoun_of_the_person():
  assert answers.state("Ruth", "home", "inn", by_name=False) == [
    "She lives in the inn.",
    "Her home is the inn.",
  ]
  assert answers.state("Hugo", "pet", "cat", opener="no, ", by_name=True) == [
    "No, Hugo has a cat.",
    "No, Hugo's pet is a cat.",
  ]
