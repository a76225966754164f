"""The public data sets themselves: everything parses, or is counted; nothing gets lost."""

import gzip
import json
import pathlib

import pytest

from rlhf_jax.data import builders, hh_rlhf, instructions, open_assistant, rows
from rlhf_jax.data import text as text_lib
from rlhf_jax.data.records import Comparison, Demonstration, Text
from rlhf_jax.text import dialogue
from rlhf_jax.text.dialogue import CHATML, PLAIN
from rlhf_jax.text.messages import parse_plain
from rlhf_jax.text.tokenizer import train_bpe


def prepared(tmp_path, builder, config):
  return builders.prepare(builder, config, builders.PrepareConfig(str(tmp_path), 0.1, 0))


def count(source, kind) -> int:
  return sum(len(source.records(kind, split)) for split in ("train", "heldout"))


def lines(path: pathlib.Path) -> list:
  with gzip.open(path, "rt") as file:
    return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", ["harmless-base", "helpful-base"])
def test_every_hh_pair_becomes_a_comparison_or_is_counted(data_folder, tmp_path, name):
  path = data_folder / "hh-rlhf" / f"{name}.jsonl.gz"
  pairs = lines(path)
  source = prepared(tmp_path, hh_rlhf.HhRlhf, builders.FilesConfig((str(path),), "skip"))
  assert count(source, Comparison) + source.skipped.count == len(pairs)
  assert source.skipped.count / len(pairs) < 0.01
  assert count(source, Comparison) - count(source, Demonstration) <= 5  # empty answers
  assert {record.source for record in source.records(Comparison, "heldout")} == {f"hh_rlhf/{name}"}


@pytest.mark.parametrize("name", ["harmless-base", "helpful-base"])
def test_hh_dialogues_render_back_to_their_text_but_for_white_space(data_folder, name):
  for pair in lines(data_folder / "hh-rlhf" / f"{name}.jsonl.gz"):
    for text in pair.values():
      rendered = dialogue.render(parse_plain(text), PLAIN).replace(PLAIN.end, "")
      assert rendered.split() == text.split()


@pytest.mark.conformance("A2")
def test_every_instruction_item_becomes_a_valid_dialogue_and_round_trips(data_folder):
  folder = data_folder / "instructions"
  items = []
  for name in ("instruction-data", "instruction-data-with-preference"):
    items += json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))
  tasks = lines(folder / "self-instruct-seed_tasks.jsonl.gz")
  cases = [(item, item) for item in items]
  cases += [(task, instance) for task in tasks for instance in task["instances"]]
  assert len(cases) == 2375
  for item, case in cases:
    record = next(instructions.parse_instruction({**item, **case, "instances": [case]}, "s"))
    user, assistant = record.conversation.messages
    instruction, given = item["instruction"].strip(), case["input"].strip()
    assert assistant.content == case["output"].strip()
    rest = user.content.replace(instruction, "", 1).replace(given, "", 1)
    frames = {form.format(instruction="", input="") for form in instructions.WITH_INPUT}
    assert rest in (frames if given else {""})
    # Items may hold "### Human" or the like, but none holds the headers of the plain template.
    assert parse_plain(dialogue.render(record.conversation, PLAIN).removesuffix(PLAIN.end)) == (
      record.conversation
    )


def test_every_dolly_line_is_a_question_and_an_answer(data_folder):
  for item in lines(data_folder / "dolly-open-qa" / "open_qa.jsonl.gz"):
    (record,) = instructions.parse_flat(item, "s")
    user, assistant = record.conversation.messages
    flat = f"### Human: {user.content} ### Assistant: {assistant.content}"
    assert flat.split() == item["text"].split()


def test_open_assistant_trees_hold_the_rankings_that_are_also_listed(data_folder, tmp_path):
  folder = data_folder / "open-assistant"
  found = {}
  for name in ("en_trees", "kway"):
    config = builders.FilesConfig((str(folder / f"{name}.jsonl.gz"),), "error")
    source = prepared(tmp_path, open_assistant.OpenAssistant, config)
    both = (source.records(Comparison, split) for split in ("train", "heldout"))
    found[name] = {(r.conversation, r.responses, r.ranks) for some in both for r in some}
    if name == "en_trees":
      assert count(source, Demonstration) >= 81  # one for each tree at least
  assert found["kway"] == found["en_trees"] and len(found["kway"]) == 177
  assert {len(responses) for _, responses, _ in found["kway"]} == {2, 3, 4, 5, 6, 8, 9}


def test_pretraining_text_keeps_all_of_its_words(data_folder, tmp_path):
  path = data_folder / "text" / "wikitext-2-valid.txt.gz"
  config = text_lib.TextConfig((str(path),), "error", 3000)
  source = prepared(tmp_path, text_lib.PlainText, config)
  both = [record.text for split in ("train", "heldout") for record in source.records(Text, split)]
  words = gzip.decompress(path.read_bytes()).decode().split()
  assert sum(len(text.split()) for text in both) == len(words)
  assert len(both) > 100


@pytest.mark.conformance("B17", "A3")
def test_the_supervised_tokens_of_real_packed_dialogues_are_the_assistants_words(data_folder):
  specials = ("<|pad|>", "<|im_start|>", "<|im_end|>")
  pairs = lines(data_folder / "hh-rlhf" / "helpful-base.jsonl.gz")[:60]
  texts = [pair["chosen"] for pair in pairs]
  tokenizer = train_bpe(texts, 1000, specials, eos="<|im_end|>", pad="<|pad|>")
  records = [Demonstration(parse_plain(text), "hh") for text in texts]
  packed = rows.demonstration_rows(
    records,
    CHATML,
    tokenizer,
    max_tokens=2048,
    supervise="all",
    on_too_long="error",
    packing_seed=0,
  )
  said = []
  for row in packed:
    supervised = row.tokens[row.loss_mask > 0]
    said += tokenizer.decode(supervised, skip_special=False).split("<|im_end|>")[:-1]
  messages = [message for record in records for message in record.conversation.messages]
  expected = [message.content for message in messages if message.role == "assistant"]
  assert sorted(said) == sorted(expected) and len(expected) > 100
