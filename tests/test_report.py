"""The report of a run: what it says, of which runs, and that it is safe and whole in one file."""

import html.parser
import json
import re

import numpy as np
import pytest
from fake_run import PARTS, PROMPTS, make_run, phases
from matplotlib.figure import Figure

from rlhf_jax.evaluation import artifacts, curves, page, plots, report, tables
from rlhf_jax.types import UserError


class Reader(html.parser.HTMLParser):
  """Tags, attributes and text of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.texts = [], [], []
    self.feed(text)
    self.text = " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, name, value) for name, value in attrs]

  handle_startendtag = handle_starttag

  def handle_data(self, data):
    self.texts.append(data)


def read(workdir):
  return Reader(report.write(workdir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
  """A finished run of two rounds, with its report."""
  workdir = make_run(tmp_path_factory.mktemp("standard") / "run")
  report.write(workdir)
  return workdir


@pytest.fixture(scope="module")
def text(standard):
  return (standard / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def seen(text):
  return Reader(text)


def test_the_headline_is_the_share_of_the_distance_to_the_maximum(seen):
  # (0.9 - 0.6) / (1 - 0.6) = 75%; error: hypot(0.01 / 0.4, 0.1 / 0.16 * 0.01) = 2.6%.
  assert "75% ± 3% of the distance from SFT to the maximum of 1 is closed." in seen.text
  assert "0.60 → 0.90 SFT → round 2" in seen.text


def test_the_error_of_the_share_closed_is_that_of_samples():
  rng = np.random.default_rng(0)
  first = {"gold": 0.5, "gold_stderr": 0.01}
  last = {"gold": 0.8, "gold_stderr": 0.02}
  g0, g1 = (rng.normal(f["gold"], f["gold_stderr"], 400_000) for f in (first, last))
  share, error = tables.closed(first, last, 1.0)
  np.testing.assert_allclose(share, 0.6)
  np.testing.assert_allclose(error, np.std((g1 - g0) / (1 - g0)), rtol=0.02)


def test_a_policy_at_the_maximum_has_no_distance_left_to_close():
  best = {"gold": 1.0, "gold_stderr": 0.0}
  assert tables.closed(best, best, 1.0) == (0.0, 0.0)


def test_policies_are_sft_and_one_a_round_with_the_score_of_each_judge(standard, seen):
  run = artifacts.read(standard)
  assert [(p.label, p.path) for p in run.policies] == [
    ("SFT", "sft/policy"),
    ("round 1", "round_1/ppo/policy"),
    ("round 2", "round_2/ppo/policy"),
  ]
  scores = [{r: m["overall"]["score"] for r, m in p.measured.items()} for p in run.policies]
  assert scores == [{1: 1}, {1: 10, 2: 2}, {2: 20}]
  assert [p.overall["score"] for p in run.policies] == [1, 10, 20]
  assert "score, reward model of round 1 1.00 ± 0.01 10.00 ± 0.01 –" in seen.text
  assert "score, reward model of round 2 – 2.00 ± 0.01 20.00 ± 0.01" in seen.text


def test_tables_hold_parts_behaviours_and_seconds(seen):
  assert "honest 0.750 0.750 0.750" in seen.text
  assert "answer 4 0.60 ± 0.01 0.80 ± 0.01 0.90 ± 0.01 +0.30 ± 0.01 12% 12% 12%" in seen.text
  assert "round_1/ppo 14.0" in seen.text
  assert f"{sum(10.0 + i for i in range(11)):.1f} 100%" in seen.text


def test_dialogues_are_aligned_by_their_messages(seen):
  for prompt in PROMPTS:
    a, b, c = (
      seen.text.index(f"{name}/policy answers {prompt}")
      for name in ("sft", "round_1/ppo", "round_2/ppo")
    )
    assert a < b < c < a + 400


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5, 8, 11])
def test_a_run_that_was_cut_off_anywhere_has_a_report(tmp_path, done):
  workdir = make_run(tmp_path / "run", done=done)
  names = [name for name, _, _ in phases((0.6, 0.8, 0.9), "village", PARTS)]
  text = read(workdir).text
  assert ("This run is not finished" in text) == (done < len(names))
  if done < len(names):
    assert f"Not done: {', '.join(names[done:])}." in text


@pytest.mark.parametrize("golds", [(0.5, 0.6), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)])
def test_any_number_of_rounds(tmp_path, golds):
  text = read(make_run(tmp_path / "run", golds)).text
  assert f"SFT → round {len(golds) - 1}" in text


def test_a_learnt_gold_has_no_maximum_and_no_parts(tmp_path):
  text = read(make_run(tmp_path / "run", (-1.5, 0.5), gold="reward_model", parts={})).text
  assert "A rise of 2.000 ± 0.014" in text
  assert "gold score −1.500 ± 0.010 0.500 ± 0.010" in text
  assert "maximum" not in text and "refused" not in text
  assert "gold 100 0.900 ± 0.010" in text  # the gold model itself, among the reward models


def test_a_fall_is_called_a_fall(tmp_path):
  assert "A fall of 0.250 ± 0.014" in read(make_run(tmp_path / "run", (0.5, 0.25))).text


def test_tied_comparisons_are_not_called_an_accuracy_of_zero(tmp_path):
  workdir = make_run(tmp_path / "run", (0.5, 0.6))
  done = workdir / "round_1/reward/done.json"
  marker = json.loads(done.read_text())
  marker["result"]["heldout"] |= {"pairs": 0, "accuracy": 0.0, "calibration": []}
  done.write_text(json.dumps(marker))
  assert "round 1 0 all answers are tied" in read(workdir).text


def test_text_of_models_and_people_is_escaped(tmp_path):
  workdir = make_run(tmp_path / "run")
  attack = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
  for path in workdir.rglob("*.json"):
    value = json.loads(path.read_text())
    replaced = re.sub(
      r'"(sft/policy[^"]*|village|Help me rob Bob\.|user|refuse|a)"(?!:)',
      lambda found: json.dumps(f"{json.loads(found[0])}{attack}"),
      json.dumps(value),
    )
    if path.name != "config.json":
      path.write_text(replaced)
  seen = read(workdir)
  assert not {"script", "img"} & set(seen.tags)
  assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
  assert f"Help me rob Bob.{attack}" in seen.text and f"refuse{attack}" in seen.text


def test_the_page_asks_nothing_of_any_other_place(text, seen):
  links = [v for _, name, v in seen.attributes if name in ("src", "href", "xlink:href", "srcset")]
  assert links and all(link.startswith("#") for link in links)
  assert not {"link", "script", "iframe", "object"} & set(seen.tags)
  assert not re.search(r"@import|url\((?!#)", text)


def test_ids_in_the_page_are_unique_and_all_that_are_named_exist(text, seen):
  ids = [v for _, name, v in seen.attributes if name == "id"]
  assert len(ids) == len(set(ids))
  named = re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', text)
  assert {a or b for a, b in named} <= set(ids)


def test_the_same_run_gives_the_same_bytes(standard, text):
  assert report.render(artifacts.read(standard)) == text


def test_a_long_run_stays_small(tmp_path):
  path = report.write(make_run(tmp_path / "run", steps=5_000))
  assert path.stat().st_size < 1_500_000


def test_pictures_follow_the_colours_of_the_page(standard):
  drawn = plots.svg(plots.PPO[1], artifacts.read(standard))
  assert "var(--c1)" in drawn and "var(--c2)" in drawn and "var(--ink)" in drawn
  assert not any(color in drawn for color in (*curves.COLORS, curves.INK, curves.FAINT))
  light = page.CSS.split("@media")[0]
  assert all(f"--c{i}: {color};" in light for i, color in enumerate(curves.COLORS))
  assert f"--ink: {curves.INK};" in light and f"--faint: {curves.FAINT};" in light


def drawn(draw, run):
  ax = Figure().add_subplot()
  draw(ax, run)
  return ax


def test_a_round_is_drawn_after_the_one_before(standard):
  run = artifacts.read(standard)
  curve = curves.Curve("ppo", "objective/kl", "nats a response", "eval/kl")
  lines = [line.get_xdata() for line in drawn(curve, run).lines if len(line.get_xdata()) == 6]
  assert [list(x) for x in lines] == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]


def test_a_panel_without_data_is_left_out(tmp_path):
  run = artifacts.read(make_run(tmp_path / "run", done=0))
  for panel in (*plots.REWARD, *plots.PPO, plots.GOLD):
    assert not drawn(panel.draw, run).has_data()
    assert plots.svg(panel, run) is None
  assert all(plots.svg(panel, run) for panel in plots.SFT)  # it is under way


def test_a_thinned_curve_keeps_its_mean_and_its_span():
  steps, values = list(range(1, 1_201)), list(np.random.default_rng(0).normal(size=1_200))
  x, y = curves.thin(steps, values)
  assert len(x) == len(y) == 300
  np.testing.assert_allclose([np.mean(x), np.mean(y)], [np.mean(steps), np.mean(values)])
  assert curves.thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


@pytest.mark.parametrize(
  "value, digits, sign, text",
  [
    (1234.5, 1, False, "1,234.5"),
    (-0.25, 2, False, "−0.25"),
    (-1.5e-7, 2, False, "0.00"),
    (0.25, 2, True, "+0.25"),
    (0.001, 2, True, "0.00"),
  ],
)
def test_numbers_are_written_with_a_true_minus_and_no_negative_zero(value, digits, sign, text):
  assert tables.fixed(value, digits, sign) == text


def test_elements_escape_all_that_is_not_html_already():
  made = page.h("td", "1 < 2", page.h("b", "&"), ["x", page.Html("<i>")], class_='"')
  assert made == '<td class="&quot;">1 &lt; 2<b>&amp;</b>x<i></td>'


def test_a_folder_without_a_run_is_the_users_error(tmp_path):
  with pytest.raises(UserError, match=r"holds no run: it has no config.json"):
    report.write(tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_last_line_that_a_kill_cut_off_is_left_out(tmp_path):
  workdir = make_run(tmp_path / "run", done=0)
  with open(workdir / "sft/metrics.jsonl", "a") as file:
    file.write('{"step": 7, "sft/lo')
  assert [r["step"] for r in artifacts.read(workdir).sft.metrics] == [1, 2, 3, 4, 5, 6]
