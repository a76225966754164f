// The page: list, thread, composer, keys. What happens in a conversation is conversation.js.

import { call, Failure } from "./api.js";
import { PairView } from "./compare.js";
import { Conversation } from "./conversation.js";
import { dressIcons, el, iconButton, isTyping, reconcile, remember } from "./dom.js";
import { mistakeForm } from "./forms.js";
import { MessageView, warning } from "./message.js";
import { initSettings, resetSettings } from "./settings.js";
import { closeSide, initSide, NARROW } from "./side.js";
import { initWithdrawal } from "./withdraw.js";

const $ = (id) => document.getElementById(id);
const [thread, input, scroll, notices] = ["thread", "input", "scroll", "notices"].map($);

let chat = null; // the Conversation that is shown
let listed = [];
let views = new Map(); // message id -> MessageView
let pairView = null;
let sending = false;
let planned = false;

// -- what is shown

function plan(changedChat) {
  if (changedChat !== chat || planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    render();
  });
}

function render() {
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
  const path = chat.tree.path();
  const cut = chat.pair ? path.findIndex((message) => message.id === chat.pair.parent) + 1 : 0;
  const shown = cut ? path.slice(0, cut) : path;
  const elements = shown.map((message) => {
    if (!views.has(message.id)) views.set(message.id, new MessageView(message, actions));
    const view = views.get(message.id);
    view.update(message, chat.tree.siblings(message));
    return view.element;
  });
  if (cut) elements.push(pairElement());
  else pairView = null;
  const last = shown[shown.length - 1];
  if (!cut && last?.role === "user") elements.push(unanswered(last));
  reconcile(thread, elements);
  $("empty").hidden = elements.length > 0;
  const busy = chat.running.length > 0;
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("send").disabled = sending;
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

function pairElement() {
  const isNew = pairView?.pair.submission !== chat.pair.submission;
  if (isNew) {
    pairView = new PairView(chat.pair, {
      chosen: (message) => {
        chat.setPair(null);
        chat.choose(message);
        notice("Thank you. Your choice is stored.", { brief: true });
        input.focus();
      },
      leave: () => chat.setPair(null),
      failed,
    });
    const { element } = pairView;
    requestAnimationFrame(() => element.focus());
  }
  pairView.update(chat.pair.ids.map((id) => chat.tree.messages.get(id)));
  return pairView.element;
}

let unansweredRow = null;
function unanswered(message) {
  if (unansweredRow?.dataset.id !== message.id) {
    unansweredRow = el("p", { class: "unanswered", "data-id": message.id }, "There is no answer. ",
      el("button", { type: "button", class: "link", onclick: () => attempt(() => chat.draw(message.id, 1)) }, "Answer this message"));
  }
  return unansweredRow;
}

const actions = {
  regenerate: (message) => attempt(() => chat.draw(message.parent, 1)),
  compare: (message) => attempt(() => chat.draw(message.parent, 2)),
  choose: (message, by) => {
    chat.choose(message);
    render();
    const view = views.get(message.id);
    (by < 0 ? [view.previous, view.next] : [view.next, view.previous]).find((button) => !button.disabled)?.focus();
  },
  changed: (message) => chat.patch(message),
  failed: (failure, retry) => failed(failure, retry),
  edit: async (message, text) => {
    const blocked = await chat.send(text, message.parent);
    if (blocked) {
      showBlocked(blocked);
      throw new Failure("The filter blocks this message.");
    }
    refreshList();
  },
};

// -- what is said to the person

function notice(text, { retry = null, brief = false, kept = false } = {}) {
  const row = el("div", { class: "note" }, el("span", {}, kept ? `${text} Your message is kept.` : text));
  if (retry) {
    row.append(el("button", { type: "button", class: "link", onclick: () => (row.remove(), retry()) }, "Try again"));
  }
  row.append(iconButton("close", "Close this note", () => row.remove()));
  notices.replaceChildren(row);
  if (brief) setTimeout(() => row.remove(), 4000);
}

function failed(failure, retry = null) {
  if (!(failure instanceof Failure)) console.error(failure);
  notice(failure instanceof Failure ? failure.message : "Something went wrong on this page.", { retry });
}

async function attempt(action) {
  try {
    notices.replaceChildren();
    await action();
  } catch (failure) {
    failed(failure, () => attempt(action));
  }
}

function showBlocked(verdict) {
  const row = el("div", { class: "note blocked" });
  const draw = () => {
    const lead = "This message is not answered. The filter finds in it:";
    row.replaceChildren(warning(verdict, lead, () => row.append(mistakeForm(verdict, "false_positive", {
      done: (report) => (verdict = { ...verdict, reports: [...verdict.reports, report] }),
      close: draw,
    }))));
  };
  draw();
  notices.replaceChildren(row);
}

// -- conversations

function newConversation(id) {
  const made = new Conversation(id, { changed: () => plan(made), failed: (...told) => made === chat && failed(...told) });
  return made;
}

async function open(id) {
  saveDraft();
  chat = newConversation(id);
  views = new Map();
  notices.replaceChildren();
  thread.replaceChildren();
  input.value = sessionStorage.getItem(`draft:${id ?? "new"}`) ?? "";
  closeSide();
  showList();
  const opened = chat;
  if (id !== null) {
    try {
      await chat.load();
    } catch (failure) {
      if (opened !== chat) return;
      if (failure.status === 404) {
        history.replaceState(null, "", location.pathname + location.search);
        await open(null);
        notice("This chat is not one of yours, or it was deleted.");
        return;
      }
      failed(failure, () => open(id));
    }
  }
  if (opened !== chat) return;
  render();
  scroll.scrollTop = scroll.scrollHeight;
  if (!NARROW.matches) input.focus();
}

const hashId = () => (/^#[0-9A-Za-z-]{16,48}$/.test(location.hash) ? location.hash.slice(1) : null);

function goTo(id) {
  if (id === hashId()) open(id);
  else if (id) location.hash = id;
  else {
    history.pushState(null, "", location.pathname + location.search);
    open(null);
  }
}

async function refreshList() {
  try {
    listed = (await call("chat/conversations")).conversations;
    showList();
  } catch (failure) {
    failed(failure, refreshList);
  }
}

function showList() {
  const rows = listed.map(({ id, title }) =>
    el("li", {}, el("a", { href: `#${id}`, title, dir: "auto", "aria-current": id === chat?.id ? "page" : null,
      onclick: closeSide }, title || "(no words)")));
  $("conversations").replaceChildren(...rows);
  $("no-conversations").hidden = rows.length > 0;
  $("title").textContent = listed.find(({ id }) => id === chat?.id)?.title ?? "New chat";
}

// -- the composer

const saveDraft = () => {
  if (chat) remember(`draft:${chat.id ?? "new"}`, input.value);
};

async function submit() {
  const text = input.value;
  if (!text.trim() || sending) return;
  if (chat.running.length) {
    notice("An answer is on its way; Esc stops it.", { brief: true });
    return;
  }
  const sender = chat;
  const isNew = sender.id === null;
  const parent = sender.tail();
  sending = true;
  render();
  try {
    const blocked = await sender.send(text, parent);
    if (!blocked) refreshList();
    if (sender !== chat) return;
    notices.replaceChildren();
    if (blocked) {
      showBlocked(blocked);
      return;
    }
    sessionStorage.removeItem(`draft:${isNew ? "new" : sender.id}`);
    if (input.value === text) input.value = "";
    if (isNew) history.replaceState(null, "", `#${sender.id}`);
    scroll.scrollTop = scroll.scrollHeight;
  } catch (failure) {
    if (!(failure instanceof Failure)) console.error(failure);
    if (sender === chat) notice(failure.message, { retry: submit, kept: true });
  } finally {
    sending = false;
    render();
  }
}

function initComposer() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  input.addEventListener("input", saveDraft);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  $("stop").addEventListener("click", () => chat.stop());
}

function initKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
    if (event.key === "Escape") {
      if (document.body.classList.contains("side-open")) closeSide();
      else chat.stop();
    } else if (event.key === "ArrowUp" && event.altKey) {
      const mine = chat.tree.path().filter((message) => message.role === "user");
      const view = views.get(mine[mine.length - 1]?.id);
      if (view?.element.isConnected) {
        event.preventDefault();
        view.openEdit();
      }
    } else if (plain && !isTyping(event.target)) {
      if (event.key === "/") {
        event.preventDefault();
        input.focus();
      } else if (chat.pair && pairView?.key(event.key)) {
        event.preventDefault();
      }
    }
  });
}

async function asNew() {
  input.value = "";
  resetSettings(); // a system message is their text, too
  chat = null; // nothing typed before is kept
  listed = [];
  history.replaceState(null, "", location.pathname + location.search);
  await open(null);
  notice("Everything of yours is deleted.", { brief: true });
}

async function start() {
  try {
    const session = await call("chat/session");
    $("model").textContent = session.model;
    document.title = `Chat with ${session.model}`;
    await refreshList();
    await open(hashId());
  } catch (failure) {
    failed(failure, start);
  }
}

dressIcons();
initSettings();
initComposer();
initKeys();
initSide(() => goTo(null));
initWithdrawal(asNew);
addEventListener("hashchange", () => open(hashId()));
addEventListener("popstate", () => { if (!location.hash && chat?.id) open(null); });
chat = newConversation(null);
start();
