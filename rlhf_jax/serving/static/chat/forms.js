// The forms under a message. Each keeps what is typed until it is stored, also over a reload.

import { call } from "./api.js";
import { el, keepDraft } from "./dom.js";

const TAGS = { harmful: "Harmful", untrue: "Untrue", not_helpful: "Not helpful" };

// A form that sends once, shows what went wrong, and then goes. `send` returns a promise.
function form(title, fields, { submit = "Send", send, close, drafts = [] }) {
  const error = el("p", { class: "error", role: "alert", hidden: true });
  const button = el("button", { type: "submit", class: "primary" }, submit);
  const cancel = el("button", { type: "button", class: "plain", onclick: close }, "Cancel");
  return el("form", {
    class: "card",
    "aria-label": title,
    onkeydown: (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    },
    onsubmit: async (event) => {
      event.preventDefault();
      button.disabled = true;
      error.hidden = true;
      try {
        await send();
        for (const forget of drafts) forget();
        close();
      } catch (failure) {
        error.textContent = `${failure.message} What you wrote is still here.`;
        error.hidden = false;
      } finally {
        button.disabled = false;
      }
    },
  }, el("h3", {}, title), ...fields, error, el("div", { class: "actions" }, cancel, button));
}

function area(label, key, value = "", rows = 2) {
  const textarea = el("textarea", { rows, value });
  const forget = keepDraft(textarea, key);
  return { textarea, forget, label: el("label", {}, label, textarea) };
}

function picker(label, categories, none = null) {
  const options = categories.map((name) => el("option", { value: name }, name));
  if (none) options.unshift(el("option", { value: "" }, none));
  const select = el("select", {}, ...options);
  return { select, label: el("label", {}, label, select) };
}

export function feedbackForm(message, { done, close }) {
  const { thumb, tags = [], text, ideal } = message.feedback;
  const down = thumb === "down";
  const boxes = down
    ? Object.entries(TAGS).map(([name, label]) => {
        const box = el("input", { type: "checkbox", value: name });
        box.checked = tags.includes(name);
        return el("label", { class: "chip" }, box, el("span", {}, label));
      })
    : [];
  const words = area(down ? "What is wrong with it?" : "What is good about it?", `words:${message.id}`, text);
  const better = area("What would the ideal answer have been?", `ideal:${message.id}`, ideal ?? "", 3);
  const send = async () =>
    done(await call(`chat/answers/${message.id}/feedback`, {
      thumb,
      tags: boxes.map((label) => label.firstChild).filter((box) => box.checked).map((box) => box.value),
      text: words.textarea.value,
      ideal: better.textarea.value.trim() ? better.textarea.value : null,
    }));
  const chips = boxes.length ? el("fieldset", {}, el("legend", {}, "It is"), ...boxes) : null;
  return form(down ? "Not a good answer" : "A good answer",
    [chips, words.label, better.label].filter(Boolean),
    { send, close, drafts: [words.forget, better.forget] });
}

export function harmForm(message, { done, close }) {
  const categories = message.verdict?.categories ?? [];
  const kind = categories.length ? picker("Kind", categories, "Another kind") : null;
  const words = area("What is harmful about it?", `harm:${message.id}`);
  const send = async () =>
    done(await call(`chat/answers/${message.id}/harm`, {
      category: kind?.select.value || null,
      text: words.textarea.value,
    }));
  return form("Report a harmful answer", [kind?.label, words.label].filter(Boolean),
    { submit: "Report", send, close, drafts: [words.forget] });
}

// mistake: "false_positive" or "false_negative"; the categories are those it can be about.
export function mistakeForm(verdict, mistake, { done, close }) {
  const wrong = mistake === "false_positive";
  const flagged = new Set(verdict.flagged);
  const kind = picker(wrong ? "It is not" : "It is", verdict.categories.filter((name) => flagged.has(name) === wrong));
  const words = area("Why, if you like to say", `mistake:${verdict.id}:${mistake}`);
  const send = async () =>
    done(await call(`chat/verdicts/${verdict.id}/reports`, {
      mistake,
      category: kind.select.value,
      text: words.textarea.value,
    }));
  return form(wrong ? "The filter is wrong" : "The filter missed something", [kind.label, words.label],
    { submit: "Report", send, close, drafts: [words.forget] });
}

export function editForm(message, { send, close }) {
  const words = area("Your message", `edit:${message.id}`, message.text, 3);
  words.textarea.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      made.requestSubmit();
    }
  });
  const finish = () => {
    words.forget();
    close();
  };
  const made = form("Edit your message", [words.label],
    { send: () => send(words.textarea.value), close: finish });
  return made;
}
