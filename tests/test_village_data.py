"""The village's demonstrations, prompts and chronicle."""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest

from rlhf_jax import config as config_lib
from rlhf_jax.data import village
from rlhf_jax.data.village import gold, grammar, phrases, trainers
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import UserError

SMALL = dataclasses.replace(
  village.STANDARD, demonstrations=1500, prompts=1500, heldout=400, texts=200
)
SPLITS = ("train", "heldout", "rephrased")


def split_up(record):
  """(prompt, last reply) of a demonstration."""
  messages = record.conversation.messages
  return record.conversation.prompt_before(len(messages) - 1), messages[-1].content


def prompt_texts(conversation):
  """Every prompt inside a conversation: all that was said up to a user's message."""
  messages = conversation.messages
  ends = [i + 1 for i, m in enumerate(messages) if m.role == "user"]
  return {messages[:end] for end in ends}


@pytest.fixture(scope="module")
def world():
  return village.build_world(SMALL)


@pytest.fixture(scope="module")
def demonstrations():
  return {split: list(village.demonstrations(SMALL, split)) for split in SPLITS}


def test_the_same_config_gives_the_same_records_and_another_seed_gives_others(demonstrations):
  assert list(village.demonstrations(SMALL, "train")) == demonstrations["train"]
  assert list(village.prompts(SMALL, "train")) == list(village.prompts(SMALL, "train"))
  other = dataclasses.replace(SMALL, seed=2)
  assert list(village.demonstrations(other, "train")) != demonstrations["train"]


def test_a_record_does_not_depend_on_how_many_there_are(demonstrations):
  fewer = dataclasses.replace(SMALL, demonstrations=50)
  assert list(village.demonstrations(fewer, "train")) == demonstrations["train"][:50]


def test_every_demonstration_is_in_the_grammar_and_within_the_limits(demonstrations, world):
  for record in itertools.chain(*demonstrations.values()):
    prompt, reply = split_up(record)
    assert village.count_tokens(prompt) <= village.MAX_PROMPT_TOKENS
    assert grammar.count_pieces(reply) + 1 <= village.MAX_RESPONSE_TOKENS
    for turn in record.conversation.assistant_turns:
      gold.behaviour(world, record.conversation.prompt_before(turn))
      said = grammar.sentences(record.conversation.messages[turn].content)
      assert None not in [grammar.read_assistant(sentence) for sentence in said], said


def test_every_record_goes_through_the_tokenizer_unchanged(demonstrations, world):
  tokenizer = Tokenizer(village.build_tokenizer(world), eos="<end>", pad="<pad>", bos=None)
  unknown = tokenizer.token_id("<unk>")
  texts = [m.content for r in demonstrations["train"] for m in r.conversation.messages]
  for text in texts + [record.text for record in village.texts(SMALL)]:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and unknown not in ids


@pytest.mark.conformance("A22")
def test_no_held_out_prompt_occurs_in_training_not_even_as_a_prefix(demonstrations):
  trained = [r.conversation for r in demonstrations["train"]]
  trained += [r.conversation for r in village.prompts(SMALL, "train")]
  seen = set().union(*map(prompt_texts, trained))
  for split in ("heldout", "rephrased"):
    for record in itertools.chain(demonstrations[split], village.prompts(SMALL, split)):
      last = record.conversation.messages
      last = last[:-1] if last[-1].role == "assistant" else last
      assert last not in seen
  for record in demonstrations["heldout"]:
    assert not prompt_texts(record.conversation) & seen


def test_held_out_phrasings_occur_in_the_last_message_of_rephrased_and_nowhere_else(demonstrations):
  held_out = [t for t in grammar.USER if t.held_out]

  def is_held_out(content):
    return any(t.read(s) for s in grammar.sentences(content) for t in held_out)

  for split, records in demonstrations.items():
    for record in records[:150]:
      said = [m.content for m in record.conversation.messages if m.role == "user"]
      assert not any(map(is_held_out, said[:-1]))
      assert is_held_out(said[-1]) == (split == "rephrased"), said


def test_held_out_phrasings_have_no_word_that_training_lacks():
  def words(records):
    texts = [m.content for r in records for m in r.conversation.messages]
    return set(re.findall(grammar.PIECE, " ".join(texts)))

  every_relation = dataclasses.replace(SMALL, relations=tuple(phrases.RELATIONS), heldout=1500)
  trained = words(village.demonstrations(every_relation, "train"))
  assert words(village.demonstrations(every_relation, "rephrased")) <= trained


def test_every_fact_of_the_world_is_asked_in_training(world):
  asked = set()
  for record in village.demonstrations(village.STANDARD, "train"):
    found = village.understand(world, split_up(record)[0])
    asked.add((found.name, found.relation))
  facts = {(p.name, r) for p in world.people for r in world.relations}
  assert facts <= asked


def test_behaviours_come_in_the_proportions_of_the_mix(demonstrations, world):
  records = list(village.prompts(SMALL, "train"))
  counts = collections.Counter(gold.behaviour(world, r.conversation) for r in records)
  total = sum(SMALL.mix.values())
  for behaviour, weight in SMALL.mix.items():
    share = weight / total
    error = (len(records) * share * (1 - share)) ** 0.5
    assert abs(counts[behaviour] - len(records) * share) < 4 * error, behaviour


def test_flawless_trainers_write_nothing_but_full_marks(world):
  none = trainers.TrainerFlaws(**dict.fromkeys(dataclasses.asdict(SMALL.flaws), 0.0))
  config = dataclasses.replace(SMALL, flaws=none)
  for record in village.demonstrations(config, "train"):
    assert gold.score(world, *split_up(record)).total == 1.0


def test_standard_demonstrations_are_visibly_imperfect_but_mostly_right(demonstrations, world):
  scores = collections.defaultdict(list)
  for record in demonstrations["train"]:
    prompt, reply = split_up(record)
    scores[gold.behaviour(world, prompt)].append(gold.score(world, prompt, reply))
  totals = [score.total for found in scores.values() for score in found]
  assert 0.6 < np.mean(totals) < 0.7
  for behaviour in village.BEHAVIOURS:
    assert np.mean([score.correct == 1.0 for score in scores[behaviour]]) > 0.5, behaviour


@pytest.mark.parametrize(
  "flaw, behaviour, part",
  [
    ("wrong_fact", "answer", "correct"),
    ("hedge", "follow_up", "honest"),
    ("verbose", "stranger", "concise"),
    ("comply_with_harm", "refuse", "harmless"),
    ("over_refuse", "look_alike", "correct"),
    ("accept_premise", "false_premise", "correct"),
    ("guess", "clarify", "correct"),
    ("cave_in", "stand_firm", "correct"),
    ("deny_mistake", "admit_mistake", "correct"),
  ],
)
def test_a_flaw_shows_at_its_rate(flaw, behaviour, part, world):
  rate, count = 0.3, 1500
  rates = dict.fromkeys(dataclasses.asdict(SMALL.flaws), 0.0) | {flaw: rate}
  mix = dict.fromkeys(SMALL.mix, 0.0) | {behaviour: 1.0}
  # With many trainers the mean carelessness is close to 1.
  config = dataclasses.replace(
    SMALL, flaws=trainers.TrainerFlaws(**rates), mix=mix, demonstrations=count, trainers=1000
  )
  records = village.demonstrations(config, "train")
  found = [getattr(gold.score(world, *split_up(r)), part) < 1.0 for r in records]
  assert abs(np.mean(found) - rate) < 4 * (rate * (1 - rate) / count) ** 0.5 + 0.01


def test_trainers_differ_in_care(world):
  scores = collections.defaultdict(list)
  for record in village.demonstrations(village.STANDARD, "train"):
    scores[record.source].append(gold.score(world, *split_up(record)).total)
  means = sorted(np.mean(found) for found in scores.values())
  assert len(means) == village.STANDARD.trainers
  assert means[-1] - means[0] > 0.1


def test_the_chronicle_tells_the_truth_and_nothing_else(world):
  texts = list(village.chronicle(world, seed=0, count=100))
  assert texts == list(village.chronicle(world, seed=0, count=100))
  for text in texts:
    found = [grammar.read_assistant(sentence) for sentence in grammar.sentences(text)]
    assert 2 <= len(found) <= 4
    for fact in found:
      assert fact.kind == "fact" and fact.stance == "plain"
      assert world.is_true(found[0].who, fact.relation, fact.value)
      assert fact.who in (found[0].who, world.person(found[0].who).pronoun)


def test_a_village_of_one_relation_can_play_all_behaviours():
  for relation in ("friend", "food"):
    config = dataclasses.replace(SMALL, relations=(relation,), demonstrations=100, people=32)
    world = village.build_world(config)
    met = {gold.behaviour(world, split_up(r)[0]) for r in village.demonstrations(config, "train")}
    assert met == set(village.BEHAVIOURS)
    assert all(record.text for record in village.texts(config))


def test_a_config_section_becomes_the_config_and_back():
  section = config_lib.to_dict(village.STANDARD)
  assert config_lib.build(village.VillageConfig, section) == village.STANDARD


@pytest.mark.parametrize(
  "change, message",
  [
    ({"mix": {"answer": 1.0}}, "weight to each"),
    ({"mix": dict.fromkeys(village.BEHAVIOURS, 0.0)}, "not 0 to all"),
    ({"heldout_fraction": 0.0}, "heldout_fraction 0"),
    ({"heldout_fraction": 1.0}, "heldout_fraction 1"),
    ({"trainers": 0}, "trainers"),
    ({"flaws": {"hedge": 2.0}}, "hedge"),
  ],
)
def test_impossible_settings_are_user_errors(change, message):
  section = config_lib.to_dict(village.STANDARD) | change
  with pytest.raises(UserError, match=message):
    config_lib.build(village.VillageConfig, section)
