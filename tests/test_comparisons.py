"""Comparisons: which message is ranked, by whom, and what is written down."""

import collections
import subprocess
import sys

import jax
import pytest

from rlhf_jax import comparisons
from rlhf_jax.comparisons import ComparisonConfig, choose_turn, collect, draw_prompts
from rlhf_jax.data import records
from rlhf_jax.data.records import Comparison, Demonstration
from rlhf_jax.generation.respond import Reply
from rlhf_jax.generation.sampling import SamplingConfig
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

SAMPLING = SamplingConfig(
  max_new_tokens=4, temperature=1.0, top_k=0, top_p=1.0, stop=None, compact_to=(), cache_sizes=1
)


def config(**changes):
  values = {
    "prompts": 4,
    "responses": 3,
    "include_original": False,
    "include_recorded": False,
    "heldout_prompts": 1,
    "batch_size": 2,
    "prompt_length": 8,
    "sampling": SAMPLING,
  }
  return ComparisonConfig(**(values | changes))


def chat(name, exchanges=4):
  """A dialogue of so many questions and answers."""
  pairs = [[("user", f"{name} q{i}"), ("assistant", f"{name} a{i}")] for i in range(exchanges)]
  return Conversation.of(*(turn for pair in pairs for turn in pair))


class Echo:
  """A responder whose replies, three to a conversation, are numbered in their order."""

  def __init__(self):
    self.asked = []

  def respond(self, params, conversations, key):
    self.asked = list(conversations)
    return [Reply(f"{params} {i}", 2, True) for i in range(3 * len(conversations))]


class Fixed:
  """A labeler who gives set ranks and remembers what was seen."""

  def __init__(self, name, ranks):
    self.name, self.ranks, self.seen = name, ranks, []

  def rank(self, conversation, responses):
    self.seen.append((conversation, tuple(responses)))
    return self.ranks


@pytest.mark.conformance("A1")
def test_the_ranked_message_is_drawn_uniformly():
  count, turns = 4000, 4
  drawn = collections.Counter(choose_turn(chat(str(i)), 0)[1].split()[1] for i in range(count))
  assert set(drawn) == {f"a{i}" for i in range(turns)}
  # chi square with 3 degrees of freedom; 16.3 is its 99.9% point
  expected = count / turns
  assert sum((n - expected) ** 2 / expected for n in drawn.values()) < 16.3


@pytest.mark.conformance("A1")
def test_its_context_is_the_true_prefix():
  for i in range(50):
    whole = chat(str(i))
    prefix, said = choose_turn(whole, 0)
    length = len(prefix.messages)
    assert prefix.messages == whole.messages[:length]
    assert whole.messages[length].content == said and whole.messages[length].role == "assistant"
    assert prefix.last.role == "user"


def test_the_draw_is_the_same_in_another_process_and_differs_by_seed():
  code = (
    "import sys; from rlhf_jax.comparisons import choose_turn\n"
    "from rlhf_jax.text.messages import Conversation\n"
    "pairs = [[('user', f'x q{i}'), ('assistant', f'x a{i}')] for i in range(4)]\n"
    "whole = Conversation.of(*(turn for pair in pairs for turn in pair))\n"
    "sys.stdout.write(' '.join(choose_turn(whole, seed)[1] for seed in range(9)))"
  )
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  here = [choose_turn(chat("x"), seed)[1] for seed in range(9)]
  assert ran.stdout == " ".join(here) and len(set(here)) > 1


def test_messages_that_answer_nobody_are_not_drawn():
  greeting, twice = ("assistant", "hello"), ("assistant", "and another thing")
  odd = Conversation.of(greeting, ("user", "q"), ("assistant", "a"), twice)
  assert {choose_turn(odd, seed)[1] for seed in range(30)} == {"a"}
  assert choose_turn(Conversation.of(greeting), 0) is None
  assert choose_turn(Conversation.of(greeting, ("user", "q")), 0) is None


def demonstrations(count, exchanges=1):
  return [Demonstration(chat(str(i), exchanges), "test") for i in range(count)]


def test_each_dialogue_is_drawn_once_before_any_is_drawn_again():
  some = demonstrations(5, exchanges=3)
  chosen = draw_prompts(some, 10, 0, lambda prompt: True)
  openings = [prompt.messages[0].content for prompt, _ in chosen]
  assert sorted(openings[:5]) == sorted(openings[5:]) and len(set(openings[:5])) == 5
  assert openings[:5] != openings[5:]
  assert draw_prompts(some, 3, 0, lambda prompt: True) == chosen[:3]
  assert draw_prompts(some, 10, 1, lambda prompt: True) != chosen


def test_prompts_that_do_not_fit_or_answer_nobody_are_passed_over():
  silent = Demonstration(Conversation.of(("assistant", "hello")), "test")
  some = [*demonstrations(6), silent]
  chosen = draw_prompts(some, 4, 0, lambda prompt: prompt.last.content != "3 q0")
  assert "3 q0" not in {prompt.last.content for prompt, _ in chosen}
  with pytest.raises(UserError, match="none of 7 dialogues gives a prompt that fits"):
    draw_prompts(some, 4, 0, lambda prompt: False)
  with pytest.raises(UserError, match="none of 1 dialogues"):
    draw_prompts([silent], 1, 0, lambda prompt: True)


def collected(labelers, **changes):
  responder = Echo()
  prompts = draw_prompts(demonstrations(4), 4, 0, lambda prompt: True)
  found = collect(
    config(**changes), responder, "says", prompts, jax.random.key(0), labelers=labelers, author="p"
  )
  return prompts, responder, found


def test_each_prompt_gets_its_own_k_answers_in_order():
  prompts, responder, found = collected([Fixed("ann", (0, 1, 2))])
  assert responder.asked == [prompt for prompt, _ in prompts]
  assert [record.conversation for record in found] == [prompt for prompt, _ in prompts]
  for i, record in enumerate(found):
    assert record.responses == tuple(f"says {3 * i + k}" for k in range(3))


@pytest.mark.conformance("A1")
def test_every_answer_says_which_model_wrote_it():
  _, _, found = collected([Fixed("ann", (0, 1, 2))])
  assert all(record.authors == ("p", "p", "p") and record.source == "p" for record in found)


def test_the_original_is_ranked_too_on_request_and_is_nobodys_sample():
  prompts, _, found = collected([Fixed("ann", (1, 0, 2, 0))], include_original=True)
  for record, (_, original) in zip(found, prompts):
    assert record.responses[-1] == original and record.authors == ("p", "p", "p", "original")


def test_labelers_take_turns_and_sign():
  people = [Fixed("ann", (0, 1, 2)), Fixed("ben", (2, 1, 0)), Fixed("eve", (0, 0, 0))]
  _, _, found = collected(people)
  assert [record.labeler for record in found] == ["ann", "ben", "eve", "ann"]
  assert [record.ranks for record in found] == [(0, 1, 2), (2, 1, 0), (0, 0, 0), (0, 1, 2)]
  assert people[1].seen == [(found[1].conversation, found[1].responses)]


@pytest.mark.conformance("A13")
def test_ties_are_kept_and_survive_the_file():
  _, _, found = collected([Fixed("eve", (0, 0, 1))])
  again = [records.from_json(Comparison, records.to_json(record)) for record in found]
  assert again == found and again[0].ranks == (0, 0, 1)
  assert [record.identity for record in again] == [record.identity for record in found]


def test_one_answer_cannot_be_compared():
  from rlhf_jax import config as config_lib

  values = config_lib.to_dict(config())
  with pytest.raises(UserError, match="responses: 1 is outside"):
    config_lib.build(comparisons.ComparisonConfig, values | {"responses": 1})
