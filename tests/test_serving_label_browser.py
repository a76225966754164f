"""The labeling page in a browser: keys, mouse, reloads, and other people's texts."""

import pathlib
import shutil

import labeling
import pytest

from rlhf_jax.feedback import tasks
from rlhf_jax.feedback.labels import Comparison, Demonstration, Skip
from rlhf_jax.serving.label_page import STATIC

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
PATIENCE = 5_000  # milliseconds
SCRIPT = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"


@pytest.fixture(scope="module")
def chromium():
  with playwright.sync_playwright() as started:
    browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture
def server(tmp_path):
  built = labeling.build(tmp_path / "f.db")
  with labeling.served(built.app) as built.url:
    yield built
  built.store.close()


@pytest.fixture
def open_page(chromium, server):
  """`open_page("ann")`: the page after signing in; errors of its scripts fail the test."""
  contexts, errors = [], []

  def open_(name, tab="compare", **options):
    context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    contexts.append(context)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{server.url}/label#{tab}")
    page.fill("#token", server.tokens[name])
    page.keyboard.press("Enter")
    page.wait_for_selector("#tabs:not([hidden])")
    return page

  yield open_
  for context in contexts:
    context.close()
  assert not errors


def saved(page):
  page.wait_for_selector(".saved:has-text('Draft saved')")


def shown_as(page):
  """The texts of the answers as they stand on the page."""
  return page.locator(".answer .said").all_inner_texts()


def test_four_answers_are_ranked_with_a_tie_by_keyboard_alone(server, open_page):
  server.store.add(labeling.to_rank())
  page = open_page("ann")
  page.wait_for_selector(".answer")
  order = shown_as(page)
  press = page.keyboard.press
  for keys in (["2", "Shift+Digit5"], ["1", "Shift+Digit7"], ["3"], ["ArrowRight"]):
    for key in keys:
      press(key)
    press("ArrowDown")
  # First 2, second 1, third 3; the fourth went from nothing to 1, and goes on to 3: a tie.
  press("ArrowRight")
  press("ArrowRight")
  press("n")
  page.keyboard.type("Third and fourth are alike. 2")
  press("Control+Enter")
  page.wait_for_selector("text=Nothing left to do")
  (record,) = server.store.records(Comparison)
  ranks = {answer.text: (answer.rank, answer.quality) for answer in record.answers}
  assert [ranks[text] for text in order] == [(1, 5), (0, 7), (2, None), (2, None)]
  assert record.note == "Third and fourth are alike. 2" and record.author == server.ids["ann"]
  assert [record.answers[i].text for i in record.presented] == order


def test_letters_are_dragged_into_ranks_and_back(server, open_page):
  server.store.add(labeling.to_rank("AB"))
  page = open_page("ann")
  page.wait_for_selector(".answer")
  order = shown_as(page)

  def drag(letter, rank):
    page.locator(f".chip >> text={letter}").scroll_into_view_if_needed()
    chip = page.locator(f".chip >> text={letter}").bounding_box()
    tier = page.locator(f'.tier[data-rank="{rank}"]').bounding_box()
    page.mouse.move(chip["x"] + 15, chip["y"] + 15)
    page.mouse.down()
    page.mouse.move(tier["x"] + 150, tier["y"] + 10, steps=4)
    page.mouse.up()

  for letter, rank in (("A", 1), ("B", 1), ("A", 2)):
    drag(letter, rank)
  assert page.locator('.tier[data-rank="1"] .chip').all_inner_texts() == ["B"]
  drag("B", 2)
  assert page.locator(".given").all_inner_texts() == ["rank 2, tied"] * 2
  drag("B", 1)
  page.locator(".flags summary").first.click()
  page.locator("text=Hallucination").first.click()
  page.click("#submit")
  page.wait_for_selector("text=Nothing left to do")
  (record,) = server.store.records(Comparison)
  found = {a.text: (a.rank, a.flags) for a in record.answers}
  assert [found[text] for text in order] == [(1, ("hallucination",)), (0, ())]


def test_a_reload_keeps_everything_and_so_does_another_browser(server, open_page):
  server.store.add(labeling.to_rank())
  page = open_page("ann")
  page.wait_for_selector(".answer")
  for key in ("3", "Shift+Digit2", "ArrowDown", "1"):
    page.keyboard.press(key)
  saved(page)
  page.fill("#note", "at the last moment")
  page.reload()  # before it could be saved
  page.wait_for_selector(".answer")

  def state(page):
    chosen = page.locator(".answer input:checked")
    ids = [chosen.nth(i).get_attribute("id") for i in range(chosen.count())]
    return shown_as(page), ids, page.input_value("#note")

  here = state(page)
  assert here[1] == ["rank-0-3", "quality-0-2", "rank-1-1"] and here[2] == "at the last moment"
  page.keyboard.press("4")
  page.keyboard.press("3")
  saved(page)
  elsewhere = open_page("ann")
  elsewhere.wait_for_selector(".answer")
  assert state(elsewhere) == state(page)


def test_a_suggestion_is_inserted_edited_and_recorded_with_its_distance(server, open_page):
  server.store.add(labeling.to_write())
  page = open_page("ann", "demonstrate")
  page.wait_for_selector(".turn textarea")
  page.keyboard.type("When does the post office open?")
  page.keyboard.press("Control+Enter")
  page.keyboard.press("Alt+s")
  page.wait_for_selector(".offer .insert")
  page.keyboard.press("Alt+i")
  answer = page.locator(".turn.assistant textarea")
  assert answer.input_value() == server.engine.text
  assert "as suggested" in page.locator(".turn.assistant .origin").inner_text()
  page.keyboard.press("End")
  page.keyboard.type(" Not on Sundays.")
  assert "edited" in page.locator(".turn.assistant .origin").inner_text()
  saved(page)
  page.reload()
  page.wait_for_selector(".turn.assistant textarea")
  assert answer.input_value() == f"{server.engine.text} Not on Sundays."
  page.click("#submit")
  page.wait_for_selector("text=Nothing left to do")
  (record,) = server.store.records(Demonstration)
  question, turn = record.turns
  assert question.content == "When does the post office open?" and question.suggestion is None
  assert (turn.suggestion, turn.suggested_by) == (server.engine.text, server.policy)
  assert turn.edit_distance == len(" Not on Sundays.")
  assert record.seconds >= 0


def test_a_double_click_on_submit_is_one_record(server, open_page):
  server.store.add_all([labeling.to_rank("AB"), labeling.to_rank("AB")])
  page = open_page("ann")
  page.wait_for_selector(".answer")
  for key in ("1", "ArrowDown", "2"):
    page.keyboard.press(key)
  page.dblclick("#submit")
  page.wait_for_selector("text=1 by you")
  assert len(server.store.records(Comparison)) == 1


def test_whoever_comes_back_too_late_is_told_and_goes_on(server, open_page):
  first = server.store.add(labeling.to_rank("AB", priority=1))
  second = server.store.add(labeling.to_rank("CD"))
  page = open_page("ann")
  page.wait_for_selector(".answer")
  with server.store.engine.begin() as connection:
    connection.exec_driver_sql("UPDATE slots SET lease_until = '2000-01-01T00:00:00.000000Z'")
  assert tasks.next_task(server.store, server.ids["bob"], "compare").task.id == first
  page.keyboard.press("1")
  page.wait_for_selector(".lost:not([hidden])")
  assert page.locator("#submit").is_disabled()
  page.click("text=Next task")
  page.wait_for_selector(".answer .said >> text=/^[CD]$/ >> nth=0")
  assert tasks.next_task(server.store, server.ids["ann"], "compare").task.id == second


def test_a_task_is_skipped_with_a_reason(server, open_page):
  server.store.add(labeling.to_rank())
  page = open_page("ann")
  page.wait_for_selector(".answer")
  page.keyboard.press("s")
  page.keyboard.type("It is broken")
  page.keyboard.press("Enter")
  page.wait_for_selector("text=Nothing left to do")
  (record,) = server.store.records(Skip)
  assert record.reason == "It is broken"


def test_a_script_in_a_text_is_seen_and_does_nothing(server, open_page):
  server.store.add(labeling.to_rank((SCRIPT, "b"), ask=SCRIPT, instructions=SCRIPT))
  server.engine.text = SCRIPT
  server.store.add(labeling.to_write(("user", SCRIPT)))
  page = open_page("eve")
  page.wait_for_selector(".answer")
  assert page.locator(f"text={SCRIPT}").count() >= 3
  for key in ("1", "ArrowDown", "1"):
    page.keyboard.press(key)
  page.fill("#note", SCRIPT)
  page.click("#submit")
  page.wait_for_selector("text=Nothing left to do")
  page.click("[data-tab=demonstrate]")
  page.locator(".turn .suggest").click()
  page.wait_for_selector(".offer .insert")
  page.click("[data-tab=records]")
  page.locator(".records summary").first.click()
  page.wait_for_selector(".ranked")
  page.click("[data-tab=dashboard]")
  page.wait_for_selector(".tiles")
  assert page.evaluate("window.hit") is None


def test_on_a_phone_nothing_is_wider_than_the_screen(server, open_page):
  long = "word" * 60
  server.store.add(labeling.to_rank((long, "b", "c", "d", "e"), ask=long, instructions=long))
  server.store.add(labeling.to_write(("user", long), ("assistant", long)))
  page = open_page("eve", viewport={"width": 360, "height": 740})
  shows = {"compare": ".answer", "demonstrate": ".turn", "records": ".empty-state"}
  for tab, content in (shows | {"dashboard": ".tiles"}).items():
    page.click(f"[data-tab={tab}]")
    page.wait_for_selector(content)
    assert page.evaluate("document.documentElement.scrollWidth") == 360, tab


def test_help_themes_focus_and_signing_out(server, open_page):
  server.store.add(labeling.to_rank())
  page = open_page("ann", color_scheme="dark")
  page.wait_for_selector(".answer")
  page.keyboard.press("?")
  assert "Move the answer" in page.locator("#help").inner_text()
  page.keyboard.press("Escape")
  ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
  dark = ground()
  page.click("#theme")
  light = ground()
  assert dark != light
  page.reload()
  page.wait_for_selector(".answer")
  assert ground() == light
  page.keyboard.press("Tab")
  style = "getComputedStyle(document.activeElement).outlineStyle"
  assert page.evaluate(style) == "solid"
  page.keyboard.press("1")
  page.click("#sign-out")
  page.wait_for_selector("#token")
  assert page.evaluate("Object.keys(sessionStorage).length") == 0
  assert page.request.get(f"{server.url}/label/session").status == 401
  assert tasks.next_task(server.store, server.ids["ann"], "compare").draft  # saved on the way out


def test_researchers_import_and_export_tasks(server, open_page, tmp_path):
  path = tmp_path / "tasks.jsonl"
  path.write_text('{"prompt": "Hi!", "responses": ["a", "b"], "overlap": 2}\n{}\n')
  page = open_page("eve", "dashboard")
  page.set_input_files("#import-file", str(path))
  page.click("text=Import tasks")
  page.wait_for_selector("text=2 tasks added, 3 to do.")
  with page.expect_download() as download:
    page.click("text=Export tasks")
  written = pathlib.Path(download.value.path()).read_text()
  assert written.count("\n") == 2 and '"overlap": 2' in written


def test_files_of_the_page_are_all_served_by_name():
  names = {path.name for path in STATIC.iterdir()}
  page = (STATIC / "index.html").read_text()
  assert {"index.html", "guide.txt"} <= names
  assert all(name in names for name in ("main.js", "label.css", "theme.js", "icon.svg"))
  assert page.count("label/static/") == 4
