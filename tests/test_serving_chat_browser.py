"""The chat page in a Chromium: what a person sees, clicks and types, and the records it becomes."""

import pathlib
import re
import shutil

import pytest
from chat_cases import FakeEngine, FakeModerator, gated, page
from serving_cases import until

from rlhf_jax.feedback.labels import Comparison
from rlhf_jax.feedback.records import ChatMessage, Feedback, HarmReport, Verdict, VerdictReport

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
XSS = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def chromium():
  api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
  if CHROMIUM is None or not pathlib.Path(CHROMIUM).exists():
    pytest.skip("no Chromium is installed")
  with api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture
def visit(chromium):
  """Opens the page at a URL as a new visitor; in the end, nothing may have gone wrong in it."""
  contexts, errors = [], []

  def opened(url, **options):
    context = chromium.new_context(viewport={"width": 1000, "height": 700}, **options)
    context.set_default_timeout(5000)
    contexts.append(context)
    tab = context.new_page()
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    tab.goto(url)
    tab.locator("#empty").wait_for()
    return tab

  yield opened
  for context in contexts:
    context.close()
  assert not errors


@pytest.fixture
def expect():
  return pytest.importorskip("playwright.sync_api").expect


def say(tab, text):
  """Types a message, sends it, and waits for the whole answer."""
  before = tab.locator("article.assistant").count()
  tab.fill("#input", text)
  tab.press("#input", "Enter")
  tab.locator("article.assistant").nth(before).wait_for()
  tab.locator("#send").wait_for()


def bodies(tab, role):
  return tab.locator(f"article.{role} .body")


def button(tab, label, nth=-1):
  return tab.locator(f'article button[aria-label="{label}"]').nth(nth)


def test_an_answer_is_seen_to_grow_and_stops_at_escape(tmp_path, visit, expect):
  says, gate = gated("one two three four")
  with page(tmp_path, engine=FakeEngine(says)) as at:
    tab = visit(at.url)
    tab.fill("#input", "first line")
    tab.press("#input", "Shift+Enter")
    tab.type("#input", "second line")
    tab.press("#input", "Enter")
    expect(bodies(tab, "assistant")).to_have_text("one two")
    expect(tab.locator("article.assistant")).to_have_attribute("aria-busy", "true")
    expect(tab.locator("#input")).to_have_value("")
    gate.set()
    expect(bodies(tab, "assistant")).to_have_text("one two three four")
    expect(tab.locator("article.assistant")).to_have_attribute("aria-busy", "false")
    gate.clear()
    tab.fill("#input", "again")
    tab.press("#input", "Enter")
    expect(bodies(tab, "assistant").nth(1)).to_have_text("one two")
    tab.keyboard.press("Escape")
    expect(tab.locator("article.assistant .tools").nth(1)).to_contain_text("Stopped")
    assert at.engine.answers[1].cancelled
    assert [m.content for m in at.context.store.records(ChatMessage)] == [
      "first line\nsecond line", "one two three four", "again", "one two ",
    ]  # fmt: skip


def test_edits_and_new_answers_are_siblings_behind_arrows(tmp_path, visit, expect):
  with page(tmp_path) as at:
    tab = visit(at.url)
    say(tab, "cats")
    tab.keyboard.press("Alt+ArrowUp")
    tab.locator("article.user textarea").fill("dogs")
    tab.locator("article.user textarea").press("Enter")
    expect(bodies(tab, "assistant")).to_have_text("You said: dogs")
    expect(tab.locator("article.user .count")).to_have_text("2/2")
    button(tab, "Answer again").click()
    expect(tab.locator("article.assistant .count")).to_have_text("2/2")
    tab.locator('article.user [aria-label="The one before"]').click()
    expect(bodies(tab, "user")).to_have_text("cats")
    expect(bodies(tab, "assistant")).to_have_text("You said: cats")
    expect(tab.locator("article.assistant .arrows")).to_be_hidden()
    tab.reload()  # the branch that was looked at is the one that comes back
    expect(bodies(tab, "assistant")).to_have_text("You said: cats")
    tab.locator('article.user [aria-label="The one after"]').click()
    expect(tab.locator("article.assistant .count")).to_have_text("2/2")
    records = at.context.store.records(ChatMessage)
    dogs = next(r for r in records if r.content == "dogs")
    assert dogs.parent is None and len([r for r in records if r.parent == dogs.id]) == 2


def test_a_thumb_down_comes_with_tags_words_and_an_ideal_answer(tmp_path, visit, expect):
  with page(tmp_path) as at:
    tab = visit(at.url)
    say(tab, "Hi")
    button(tab, "Bad answer").click()
    form = tab.locator("form.card")
    form.locator(".chip", has_text="Untrue").click()
    form.get_by_label("What is wrong with it?").fill("It is not so.")
    form.get_by_label("What would the ideal answer have been?").fill("Hello!\nHow are you?")
    form.get_by_role("button", name="Send").click()
    expect(form).to_have_count(0)
    expect(button(tab, "Bad answer")).to_have_attribute("aria-pressed", "true")
    (down,) = at.context.store.records(Feedback)
    assert (down.tags, down.text, down.ideal) == (
      ("untrue",), "It is not so.", "Hello!\nHow are you?",
    )  # fmt: skip
    button(tab, "Good answer").click()
    expect(button(tab, "Good answer")).to_have_attribute("aria-pressed", "true")
    until(lambda: at.context.store.records(Feedback)[0].thumb == "up")
    assert len(at.context.store.records(Feedback, superseded=True)) == 3


def test_the_better_of_two_answers_is_chosen_by_a_key(tmp_path, visit, expect):
  engine = FakeEngine(lambda request: f"Answer {len(engine.answers)}")
  with page(tmp_path, engine=engine) as at:
    tab = visit(at.url)
    say(tab, "Hi")
    stands = {"1": "2/3", "2": "5/5", "0": "6/7"}  # which of its siblings is then shown
    for i, (key, ranks) in enumerate({"1": (0, 1), "2": (1, 0), "0": (0, 0)}.items()):
      button(tab, "Compare two new answers").click()
      expect(tab.locator(".question")).to_have_text("Which answer is better?")
      shown = [f"Answer {2 * i + 1}", f"Answer {2 * i + 2}"]
      assert tab.locator(".column .body").all_inner_texts() == shown
      tab.keyboard.press(key)
      expect(tab.locator(".pair")).to_have_count(0)
      record = at.context.store.records(Comparison)[i]
      assert [a.text for a in record.answers] == shown
      assert tuple(a.rank for a in record.answers) == ranks and 0 < record.seconds < 20
      expect(bodies(tab, "assistant")).to_have_text(shown[1] if key == "2" else shown[0])
      expect(tab.locator("article.assistant .count")).to_have_text(stands[key])


def test_two_answers_stream_beside_each_other_and_outlive_a_reload(tmp_path, visit, expect):
  says, gate = gated("one two")
  with page(tmp_path, engine=FakeEngine(says)) as at:
    gate.set()
    tab = visit(at.url)
    say(tab, "Hi")
    gate.clear()
    button(tab, "Compare two new answers").click()
    for i in (0, 1):
      expect(tab.locator(".column .body").nth(i)).to_have_text("one")
    expect(tab.locator(".choice").first).to_be_disabled()
    tab.reload()
    gate.set()
    for i in (0, 1):
      expect(tab.locator(".column .body").nth(i)).to_have_text("one two")
    tab.get_by_role("button", name="Tie").click()
    expect(tab.locator(".pair")).to_have_count(0)
    (record,) = at.context.store.records(Comparison)
    assert [a.rank for a in record.answers] == [0, 0]


def test_the_filters_mistakes_are_reported_both_ways(tmp_path, visit, expect):
  with page(tmp_path, moderator=FakeModerator()) as at:
    tab = visit(at.url)
    say(tab, "a fight")
    asked = tab.locator("article.user")
    expect(asked.locator(".warning")).to_contain_text("violence")
    asked.get_by_role("button", name="This is wrong").click()
    asked.get_by_label("Why, if you like to say").fill("It is a song.")
    asked.get_by_role("button", name="Report").last.click()
    expect(asked.locator(".warning")).to_contain_text("You reported this as wrong")
    button(tab, "You missed something: report it to the filter").click()
    said = tab.locator("article.assistant")
    assert said.locator("option").all_inner_texts() == ["hate", "self-harm"]
    said.get_by_label("It is").select_option("self-harm")
    said.get_by_role("button", name="Report").last.click()
    expect(said.locator(".notice")).to_contain_text("You reported what the filter missed")
    found = [(r.mistake, r.category, r.text) for r in at.context.store.records(VerdictReport)]
    assert found == [
      ("false_positive", "violence", "It is a song."), ("false_negative", "self-harm", ""),
    ]  # fmt: skip


def test_a_blocked_message_stays_in_the_field_and_can_be_contradicted(tmp_path, visit, expect):
  with page(tmp_path, moderator=FakeModerator()) as at:
    tab = visit(at.url)
    tab.fill("#input", "I hate rain")
    tab.press("#input", "Enter")
    expect(tab.locator("#notices")).to_contain_text("hate")
    expect(tab.locator("#input")).to_have_value("I hate rain")
    tab.get_by_role("button", name="This is wrong").click()
    tab.locator("#notices form").get_by_role("button", name="Report").click()
    expect(tab.locator("#notices")).to_contain_text("You reported this as wrong")
    (report,) = at.context.store.records(VerdictReport)
    assert at.context.store.get(report.verdict).text == "I hate rain"
    assert at.context.store.records(ChatMessage) == [] and at.engine.requests == []


def test_markup_is_inert_in_every_field(tmp_path, visit, expect):
  with page(tmp_path, moderator=FakeModerator()) as at:
    tab = visit(at.url)
    tab.get_by_role("button", name="Settings").click()
    tab.fill("#system", XSS)
    tab.get_by_role("button", name="Done").click()
    say(tab, f"fight {XSS}\n```{XSS}\n{XSS}\n```")
    button(tab, "Bad answer").click()
    for field in ("What is wrong with it?", "What would the ideal answer have been?"):
      tab.get_by_label(field).fill(XSS)
    tab.get_by_role("button", name="Send", exact=True).first.click()
    expect(tab.locator("form.card")).to_have_count(0)
    button(tab, "Report a harmful answer").click()
    tab.get_by_label("What is harmful about it?").fill(XSS)
    tab.locator("form.card").get_by_role("button", name="Report").click()
    expect(tab.locator("form.card")).to_have_count(0)
    tab.locator("article.user").get_by_role("button", name="This is wrong").click()
    tab.get_by_label("Why, if you like to say").fill(XSS)
    tab.locator("form.card").get_by_role("button", name="Report").click()
    expect(tab.locator("form.card")).to_have_count(0)
    button(tab, "Edit", 0).click()
    tab.locator("article.user textarea").fill(XSS)
    tab.locator("article.user textarea").press("Enter")
    expect(bodies(tab, "assistant")).to_have_text(f"You said: {XSS}")
    tab.fill("#input", XSS)
    tab.reload()
    expect(bodies(tab, "assistant")).to_have_text(f"You said: {XSS}")
    expect(bodies(tab, "system")).to_have_text(XSS)
    expect(tab.locator("#input")).to_have_value(XSS)
    tab.locator('article.user [aria-label="The one before"]').click()
    expect(tab.locator("article.user figure code")).to_have_text(XSS)
    button(tab, "Bad answer").click()
    expect(tab.get_by_label("What is wrong with it?")).to_have_value(XSS)
    assert tab.locator("img").count() == 0 and "owned" not in tab.title()
    store = at.context.store
    (feedback,), (harm,) = store.records(Feedback), store.records(HarmReport)
    (report,) = store.records(VerdictReport)
    assert {feedback.text, feedback.ideal, harm.text, report.text} == {XSS}


def test_a_reload_keeps_an_answer_under_way_and_what_was_typed(tmp_path, visit, expect):
  says, gate = gated("one two three four")
  with page(tmp_path, engine=FakeEngine(says)) as at:
    tab = visit(at.url)
    tab.fill("#input", "Hi")
    tab.press("#input", "Enter")
    expect(bodies(tab, "assistant")).to_have_text("one two")
    tab.fill("#input", "not sent yet")
    tab.reload()
    expect(bodies(tab, "assistant")).to_have_text("one two")
    expect(tab.locator("#input")).to_have_value("not sent yet")
    gate.set()
    expect(bodies(tab, "assistant")).to_have_text("one two three four")
    other = visit(at.url)
    expect(other.locator("#conversations a")).to_have_count(0)
    other.goto(tab.url)
    expect(other.locator("#notices")).to_contain_text("not one of yours")
    assert not at.context.store.records(ChatMessage, role="assistant")[0].stopped


def test_a_full_queue_and_a_lost_server_keep_what_was_typed(tmp_path, visit, expect):
  with page(tmp_path) as at:
    tab = visit(at.url)
    at.engine.room = 0
    tab.fill("#input", "Hi")
    tab.press("#input", "Enter")
    expect(tab.locator("#notices")).to_contain_text("Many people are asking")
    expect(tab.locator("#input")).to_have_value("Hi")
    tab.context.set_offline(True)
    tab.get_by_role("button", name="Try again").click()
    expect(tab.locator("#notices")).to_contain_text("cannot be reached")
    expect(tab.locator("#input")).to_have_value("Hi")
    tab.context.set_offline(False)
    at.engine.room = 1000
    tab.get_by_role("button", name="Try again").click()
    expect(bodies(tab, "assistant")).to_have_text("You said: Hi")
    expect(tab.locator("#input")).to_have_value("")
    assert len(at.context.store.records(ChatMessage)) == 2


def test_deleting_everything_asks_first(tmp_path, visit, expect):
  with page(tmp_path, moderator=FakeModerator()) as at:
    tab = visit(at.url)
    tab.get_by_role("button", name="Settings").click()
    tab.fill("#system", "I am Ann.")
    tab.get_by_role("button", name="Done").click()
    say(tab, "Hi")
    tab.get_by_role("button", name="Delete my data").click()
    expect(tab.locator("#goodbye-count")).to_have_text("That is 6 records.")
    tab.get_by_role("button", name="Keep it").click()
    assert len(at.context.store.records(Verdict)) == 3
    tab.get_by_role("button", name="Delete my data").click()
    tab.get_by_role("button", name="Delete everything").click()
    expect(tab.locator("#empty")).to_be_visible()
    expect(tab.locator("#conversations a")).to_have_count(0)
    assert "Ann" not in tab.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")
    expect(tab.locator("#system")).to_have_value("")
    assert not at.context.store.records(ChatMessage) and not at.context.store.records(Verdict)


def test_a_phone_has_a_drawer_and_nothing_is_wider_than_it(tmp_path, visit, expect):
  with page(tmp_path) as at:
    tab = visit(at.url)
    say(tab, "x" * 300 + "\n```\n" + "y" * 300 + "\n```")
    tab.set_viewport_size({"width": 360, "height": 640})
    expect(tab.locator("#side")).to_be_hidden()
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    assert tab.evaluate("document.getElementById('scroll').scrollWidth") <= 360
    tab.get_by_role("button", name="Chats and settings").click()
    expect(tab.locator("#side")).to_be_visible()
    tab.get_by_role("button", name=re.compile("Theme")).click()
    tab.get_by_role("button", name=re.compile("Theme: light")).click()
    assert tab.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    tab.keyboard.press("Escape")
    expect(tab.locator("#side")).to_be_hidden()
    tab.locator("#open-side").focus()
    tab.keyboard.press("/")
    expect(tab.locator("#input")).to_be_focused()


def test_the_settings_reach_the_engine(tmp_path, visit, expect):
  with page(tmp_path) as at:
    tab = visit(at.url)
    tab.get_by_role("button", name="Settings").click()
    values = {"system": "Be brief.", "temperature": "0.7", "top_p": "0.9", "max_tokens": "50"}
    for name, value in {**values, "seed": "123456789012345678"}.items():
      tab.fill(f"#{name}", value)
    tab.get_by_role("button", name="Done").click()
    tab.reload()
    tab.locator("#empty").wait_for()
    say(tab, "Hi")
    (request,) = at.engine.requests
    assert (request.temperature, request.top_p, request.max_tokens) == (0.7, 0.9, 50)
    assert request.seed == 123456789012345678
    assert request.conversation.messages[0].content == "Be brief."
    expect(bodies(tab, "system")).to_have_text("Be brief.")
