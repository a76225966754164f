"""Sources: what each format becomes, what is refused, and how builds are kept."""

import gzip
import json
import pathlib

import pytest

from rlhf_jax import config as config_lib
from rlhf_jax.data import (
  builders,
  files,
  hh_rlhf,
  instructions,
  jsonl,
  open_assistant,
  sources,
  village,
)
from rlhf_jax.data import text as text_lib
from rlhf_jax.data.records import Comparison, Demonstration, Prompt, Text, split_of
from rlhf_jax.text.messages import Conversation
from rlhf_jax.types import UserError

HI = Conversation.of(("user", "Hi?"))


def write(path: pathlib.Path, items: list) -> str:
  opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")
  with opened as file:
    file.writelines(item if isinstance(item, str) else json.dumps(item) + "\n" for item in items)
  return str(path)


def pair(question: str, good: str, bad: str) -> dict:
  start = f"\n\nHuman: {question}\n\nAssistant:"
  return {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}


def prepared(tmp_path, builder, config, fraction=0.0):
  return builders.prepare(builder, config, builders.PrepareConfig(str(tmp_path), fraction, 0))


def test_a_pair_of_hh_dialogues_becomes_a_comparison_and_the_chosen_demonstration():
  comparison, demonstration = hh_rlhf.parse_pair(pair("Hi?", "Hello.", "Go."), "s")
  assert comparison.conversation == HI
  assert (comparison.responses, comparison.ranks) == (("Hello.", "Go."), (0, 1))
  assert demonstration.conversation == HI.with_reply("Hello.")


def test_an_empty_answer_is_compared_but_demonstrates_nothing():
  (comparison,) = hh_rlhf.parse_pair(pair("Hi?", "", "Go."), "s")
  assert comparison.responses == ("", "Go.")


@pytest.mark.parametrize(
  ("item", "message"),
  [
    ({"chosen": "\n\nHuman: a"}, "texts 'chosen' and 'rejected'"),
    ({"chosen": "a", "rejected": "b"}, "must begin with"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "end with the assistant's"),
    (pair("a", "b", "c") | {"rejected": pair("x", "b", "c")["rejected"]}, "last answer only"),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "last answer only"),
  ],
)
def test_pairs_without_a_common_prompt_are_refused(item, message):
  with pytest.raises(UserError, match=message):
    list(hh_rlhf.parse_pair(item, "s"))


def node(role, text, replies=(), **fields):
  return {"role": role, "text": text, "replies": list(replies), **fields}


def test_a_message_tree_gives_k_way_comparisons_and_the_best_ranked_threads():
  deep = node("prompter", "More?", [node("assistant", "No.")])
  tree = node(
    "prompter",
    "Hi?",
    [
      node("assistant", "Third.", [node("prompter", "Why?", [node("assistant", "So.")])], rank=3),
      node("assistant", "First.", [deep, node("prompter", "Bye.")], rank=0, model_name="m"),
      node("assistant", "Deleted.", rank=1, deleted=True),
      node("assistant", "Second.", rank=2),
      node("assistant", "Unranked."),
    ],
  )
  found = list(open_assistant.parse_tree({"prompt": tree}, "s"))
  (comparison,) = [r for r in found if isinstance(r, Comparison)]
  assert comparison.conversation == HI
  assert comparison.responses == ("First.", "Second.", "Third.")
  assert comparison.ranks == (0, 1, 2)
  assert comparison.authors == ("m", "volunteer", "volunteer")
  (thread,) = [r for r in found if isinstance(r, Demonstration)]
  expected = HI.with_reply("First.").with_message("user", "More?").with_reply("No.")
  assert thread.conversation == expected


def test_a_ranking_best_first_becomes_one_k_way_comparison():
  item = {"messages": HI.to_json(), "replies_best_first": ["a", "b", "c"]}
  (comparison,) = open_assistant.parse_ranking(item, "s")
  assert (comparison.responses, comparison.ranks) == (("a", "b", "c"), (0, 1, 2))


@pytest.mark.conformance("A2")
@pytest.mark.parametrize("given", ["", "{braces} and\nlines"])
def test_an_instruction_becomes_a_dialogue_that_holds_all_of_it(given):
  item = {"instruction": "Fix {this}.", "input": given, "output": "Done."}
  (record,) = instructions.parse_instruction(item, "s")
  user, assistant = record.conversation.messages
  assert (user.role, assistant.role, assistant.content) == ("user", "assistant", "Done.")
  assert "Fix {this}." in user.content and given in user.content
  if not given:
    assert user.content == "Fix {this}."


def test_instructions_take_all_natural_forms_and_each_item_always_the_same():
  messages = {instructions.user_message("Fix this.", f"case {i}"): i for i in range(100)}
  forms = {text.replace(f"case {i}", "*") for text, i in messages.items()}
  expected = {form.format(instruction="Fix this.", input="*") for form in instructions.WITH_INPUT}
  assert forms == expected
  again = {instructions.user_message("Fix this.", f"case {i}") for i in range(100)}
  assert again == set(messages)


def test_a_preference_becomes_a_comparison_unless_both_answers_are_the_same():
  item = {"instruction": "Say hi.", "input": "", "output": "Hi.", "chosen": "Hi.", "rejected": "No"}
  demonstration, comparison = instructions.parse_instruction(item, "s")
  assert comparison.responses == ("Hi.", "No")
  assert comparison.conversation == demonstration.conversation.prompt_before(1)
  (only,) = instructions.parse_instruction(item | {"rejected": "Hi."}, "s")
  assert only == demonstration


def test_self_instruct_and_flattened_dialogues_are_read_too():
  task = {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}] * 2}
  assert len(list(instructions.parse_instruction(task, "s"))) == 2
  dolly = {"instruction": "Add.", "context": "1", "response": "2", "category": "open_qa"}
  assert next(instructions.parse_instruction(dolly, "s")) == (
    next(instructions.parse_instruction(task, "s"))
  )
  (flat,) = instructions.parse_flat({"text": "### Human: Hi? ### Assistant: Hello."}, "s")
  assert flat.conversation == HI.with_reply("Hello.")


@pytest.mark.parametrize(
  "item",
  [
    3,
    {"instruction": "Fix.", "input": ""},
    {"instruction": " ", "input": "", "output": "x"},
    {"instruction": "Fix.", "input": "", "output": ""},
    {"instruction": "Fix.", "instances": []},
    {"text": "### Assistant: Hello."},
    {"text": "### Human: Hi? ### Assistant:"},
    {"text": "Hello."},
  ],
)
def test_malformed_instructions_are_refused(item):
  with pytest.raises(UserError):
    list(instructions.Instructions.parse(item, "s", None))


def test_own_files_fill_in_what_may_be_left_out_and_keep_what_is_given():
  item = {"messages": HI.to_json(), "responses": ["a", "b"]}
  bare = jsonl.parse_comparison(item, "file")
  assert bare == Comparison(HI, ("a", "b"), (0, 1), ("unknown",) * 2, "unknown", "file")
  full = {"ranks": [1, 0], "authors": ["x", "y"], "labeler": "z", "source": "mine"}
  expected = Comparison(HI, ("a", "b"), (1, 0), ("x", "y"), "z", "mine")
  assert jsonl.parse_comparison(item | full, "file") == expected
  assert jsonl.parse_prompt({"prompt": "Hi?"}, "f") == Prompt(HI, "f")
  assert jsonl.parse_prompt({"messages": HI.to_json()}, "f") == Prompt(HI, "f")


@pytest.mark.parametrize(
  ("parse", "item", "message"),
  [
    (jsonl.parse_comparison, {"messages": HI.to_json(), "responses": ["a"]}, "at least 2"),
    (jsonl.parse_comparison, {"messages": HI.to_json(), "respones": []}, "unknown.*'respones'"),
    (jsonl.parse_comparison, [], "JSON object"),
    (jsonl.parse_demonstration, {"messages": HI.to_json()}, "needs an assistant message"),
    (jsonl.parse_prompt, {"prompt": "a", "messages": []}, "has both"),
  ],
)
def test_mistakes_in_own_files_are_refused_by_name(parse, item, message):
  with pytest.raises(UserError, match=message):
    parse(item, "f")


def test_running_text_is_divided_at_blank_lines_and_nothing_is_lost():
  text = "aaaa\nbbbb\n\ncc\n  \n\ndddd\n\n\nee\n"
  assert list(text_lib.documents(text, 5)) == ["aaaa\nbbbb", "cc\n\ndddd", "ee\n"]


def test_records_of_each_kind_come_back_in_the_order_of_the_files(tmp_path):
  config = jsonl.JsonlConfig(
    demonstrations=(
      write(
        tmp_path / "d.jsonl", [{"messages": HI.with_reply(str(i)).to_json()} for i in range(30)]
      ),
    ),
    comparisons=(write(tmp_path / "c.jsonl.gz", [{"messages": HI.to_json(), "responses": "ab"}]),),
    prompts=(write(tmp_path / "p.jsonl", [{"prompt": "été 🙂"}, "\n"]),),
    on_malformed="skip",
  )
  source = prepared(tmp_path / "out", jsonl.Jsonl, config)
  said = [r.conversation.last.content for r in source.records(Demonstration, "train")]
  assert said == [str(i) for i in range(30)]
  (prompt,) = source.records(Prompt, "train")
  assert prompt == Prompt(Conversation.of(("user", "été 🙂")), "jsonl/p")
  assert len(source.records(Comparison, "train")) == 0  # "ab" is no list of responses
  assert source.skipped.count == 1 and "c.jsonl.gz line 1" in source.skipped.examples[0]


@pytest.mark.conformance("A22")
def test_no_prompt_is_on_both_sides_of_a_prepared_split(tmp_path):
  items = [pair(f"Question {i % 40}?", f"yes {i}", "no") for i in range(120)]
  config = builders.FilesConfig((write(tmp_path / "a.jsonl", items),), "error")
  source = prepared(tmp_path / "out", hh_rlhf.HhRlhf, config, fraction=0.3)
  keys = {
    split: {
      r.prompt_key for kind in (Comparison, Demonstration) for r in source.records(kind, split)
    }
    for split in ("train", "heldout")
  }
  assert keys["train"] and keys["heldout"] and not keys["train"] & keys["heldout"]
  assert len(keys["train"] | keys["heldout"]) == 40
  assert all(split_of(key, 0.3, 0) == "heldout" for key in keys["heldout"])
  both = [source.records(Comparison, split) for split in ("train", "heldout")]
  assert sum(map(len, both)) == 120


@pytest.mark.parametrize(
  ("broken", "reason"),
  [
    ('{"chosen": "\\n\\nHuman: a\n', "line 2: not valid JSON.*column"),
    ({"chosen": "x", "rejected": "y"}, "line 2: a dialogue must begin"),
    ('"\udcff"\n', "line 2: not UTF-8"),
    (pair("Hi?", "\ud83d", "No."), "line 2: message content holds a lone surrogate"),
  ],
)
def test_a_malformed_record_stops_with_file_line_and_reason_or_is_counted(tmp_path, broken, reason):
  path = tmp_path / "pairs.jsonl"
  good = [json.dumps(pair("Hi?", answer, "No.")) + "\n" for answer in ("Yes.", "Well.")]
  line = broken if isinstance(broken, str) else json.dumps(broken) + "\n"
  path.write_bytes((good[0] + line + good[1]).encode("utf-8", "surrogateescape"))
  stop, skip = (builders.FilesConfig((str(path),), how) for how in ("error", "skip"))
  with pytest.raises(UserError, match=f"pairs.jsonl {reason}.*on_malformed"):
    prepared(tmp_path / "out", hh_rlhf.HhRlhf, stop)
  assert not (tmp_path / "out").exists()  # nothing was written
  source = prepared(tmp_path / "out", hh_rlhf.HhRlhf, skip)
  assert [r.responses[0] for r in source.records(Comparison, "train")] == ["Yes.", "Well."]
  assert source.skipped.count == 1 and "pairs.jsonl line 2" in source.skipped.examples[0]


def test_a_missing_file_is_named_with_a_way_to_get_it(tmp_path):
  config = builders.FilesConfig((str(tmp_path / "none.jsonl"),), "skip")
  with pytest.raises(UserError, match="none.jsonl does not exist.*anthropics/hh-rlhf"):
    prepared(tmp_path, hh_rlhf.HhRlhf, config)


def test_a_file_without_a_usable_record_is_an_error(tmp_path):
  empty = builders.FilesConfig((write(tmp_path / "a.jsonl", []),), "error")
  with pytest.raises(UserError, match="no usable record: the files are empty"):
    prepared(tmp_path, hh_rlhf.HhRlhf, empty)


def test_a_truncated_gzip_file_is_named(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  write(path, [pair(f"Hi {i}?", "a", "b") for i in range(200)])
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(UserError, match="a.jsonl.gz cannot be read"):
    prepared(tmp_path, hh_rlhf.HhRlhf, builders.FilesConfig((str(path),), "skip"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "c4-train.00000-of-01024.json.gz"])
def test_a_list_and_lines_are_told_apart_by_content_not_by_name(tmp_path, name):
  path = write(tmp_path / name, [{"text": "a"}, {"text": "b"}])
  assert [(where, load()["text"]) for where, load in files.items(path)] == [
    (f"{path} line 1", "a"),
    (f"{path} line 2", "b"),
  ]
  path = write(tmp_path / name, ["\n", [{"text": "a"}, {"text": "b"}]])
  assert [(where, load()["text"]) for where, load in files.items(path)] == [
    (f"{path} item 1", "a"),
    (f"{path} item 2", "b"),
  ]


def test_a_broken_list_is_named(tmp_path):
  with pytest.raises(UserError, match="a.json: not valid JSON"):
    list(files.items(write(tmp_path / "a.json", ['[{"text": "a"}, '])))


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
  (tmp_path / "file").write_text("in the way")
  config = builders.FilesConfig((write(tmp_path / "a.jsonl", [pair("Hi?", "a", "b")]),), "error")
  with pytest.raises(UserError, match="cannot write the data build"):
    prepared(tmp_path / "file", hh_rlhf.HhRlhf, config)


def test_a_changed_source_is_built_anew_and_an_unchanged_one_is_only_opened(tmp_path, monkeypatch):
  path = write(tmp_path / "a.jsonl", [pair("Hi?", "a", "b")])
  config = builders.FilesConfig((path,), "error")
  first = prepared(tmp_path / "out", hh_rlhf.HhRlhf, config).records(Comparison, "train")
  write(tmp_path / "a.jsonl", [pair("Hi?", "c", "d")])
  second = prepared(tmp_path / "out", hh_rlhf.HhRlhf, config).records(Comparison, "train")
  assert (first[0].responses, second[0].responses) == (("a", "b"), ("c", "d"))
  monkeypatch.setattr(hh_rlhf, "parse_pair", None)  # reading again would now fail
  third = prepared(tmp_path / "out", hh_rlhf.HhRlhf, config).records(Comparison, "train")
  assert list(third) == list(second)


def test_a_build_that_died_half_way_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
  path = write(tmp_path / "a.jsonl", [pair("Hi?", "a", "b")])
  config = builders.FilesConfig((path,), "error")

  def die(self, lines):
    yield 0, {"record": lines[0]}
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(hh_rlhf.HhRlhf, "_generate_examples", die)
    with pytest.raises(KeyboardInterrupt):
      prepared(tmp_path / "out", hh_rlhf.HhRlhf, config)
  source = prepared(tmp_path / "out", hh_rlhf.HhRlhf, config)
  assert len(source.records(Comparison, "train")) == 1


def test_building_prints_nothing(tmp_path, capfd):
  path = write(tmp_path / "a.jsonl", [pair("Hi?", "a", "b")])
  prepared(tmp_path / "out", hh_rlhf.HhRlhf, builders.FilesConfig((path,), "error"))
  assert capfd.readouterr() == ("", "")


def data_section(tmp_path, **sections) -> dict:
  names = ("village", "hh_rlhf", "open_assistant", "instructions", "jsonl", "text")
  section = dict.fromkeys(names) | sections
  section["prepare"] = {"data_dir": str(tmp_path / "out"), "heldout_fraction": 0.0, "split_seed": 0}
  section.setdefault("weights", dict.fromkeys(sections, 1.0))
  section.setdefault("prompts_from", ["comparison", "demonstration"])
  return section


def test_the_data_of_a_run_come_by_kind_from_all_sources_that_have_it(tmp_path):
  hh = write(tmp_path / "hh.jsonl", [pair("Hi?", "a", "b"), pair("Ho?", "a", "b")])
  own = write(tmp_path / "i.jsonl", [{"instruction": "Hi?", "input": "", "output": "x"}])
  document = write(tmp_path / "t.txt", ["Once upon a time.\n"])
  section = data_section(
    tmp_path,
    hh_rlhf={"paths": [hh], "on_malformed": "error"},
    instructions={"paths": [own], "on_malformed": "error"},
    text={"paths": [document], "on_malformed": "error", "document_chars": 100},
  )
  data = sources.load(config_lib.build(sources.DataConfig, section, "data"))
  assert list(data.by_source(Demonstration, "train")) == ["hh_rlhf", "instructions"]
  assert len(data.records(Demonstration, "train")) == 3
  assert [r.text for r in data.records(Text, "train")] == ["Once upon a time.\n"]
  asked = [prompt.conversation.last.content for prompt in data.prompts("train")]
  assert asked == ["Hi?", "Ho?"]  # "Hi?" once, though three records ask it
  assert {name: skipped.count for name, skipped in data.skipped().items()} == {
    "hh_rlhf": 0,
    "instructions": 0,
    "text": 0,
  }


def test_a_source_without_a_weight_and_a_run_without_a_source_are_refused(tmp_path):
  build = lambda section: config_lib.build(sources.DataConfig, section, "data")
  hh = {"paths": ["x"], "on_malformed": "error"}
  with pytest.raises(UserError, match=r"weights: names \[\], but the sources.*'hh_rlhf'"):
    build(data_section(tmp_path, hh_rlhf=hh) | {"weights": {}})
  with pytest.raises(UserError, match="no source is used"):
    build(data_section(tmp_path))


def test_the_village_is_prepared_with_its_own_split(tmp_path):
  small = config_lib.to_dict(village.STANDARD)
  small |= {"demonstrations": 60, "prompts": 30, "heldout": 10, "texts": 20}
  section = data_section(tmp_path, village=small) | {"prompts_from": ["prompt"]}
  data = sources.load(config_lib.build(sources.DataConfig, section, "data"))
  config = config_lib.build(village.VillageConfig, small)
  for split, count in (("train", 60), ("heldout", 10)):
    assert data.records(Demonstration, split) == list(village.demonstrations(config, split))
    assert len(data.records(Demonstration, split)) == count
  assert len(data.records(Text, "train")) + len(data.records(Text, "heldout")) == 20
