// One message on the page. It is made once and updated, so that open forms stay as they are.

import { call } from "./api.js";
import { el, icon, iconButton } from "./dom.js";
import { editForm, feedbackForm, harmForm, mistakeForm } from "./forms.js";
import { copyText, show } from "./text.js";

const ROLES = { system: "System message", user: "You", assistant: "Assistant" };

// What the filter warns of, with the button to contradict it; also used above the composer.
export function warning(verdict, lead, open) {
  const names = verdict.flagged.map((name) => el("strong", {}, name));
  const list = names.flatMap((name, i) => (i ? [", ", name] : [name]));
  const reported = verdict.reports?.some((report) => report.mistake === "false_positive");
  const button = reported
    ? el("span", { class: "quiet" }, "You reported this as wrong")
    : el("button", { type: "button", class: "link", onclick: open }, "This is wrong");
  return el("div", { class: "warning" }, icon("missed"), el("span", {}, lead, " ", ...list), button);
}

export class MessageView {
  // actions: {edit(message, text), regenerate(message), compare(message), choose(message), changed(message)}
  constructor(message, actions) {
    this.actions = actions;
    this.shown = null; // what the body shows, to draw it again only where that has changed
    this.body = el("div", { class: "body", dir: "auto" });
    this.notice = el("div", { class: "notice" });
    this.slot = el("div", { class: "slot" });
    this.note = el("span", { class: "quiet" });
    this.tools = el("div", { class: "tools" });
    this.element = el("article", { class: `message ${message.role}`, "data-id": message.id, "aria-label": ROLES[message.role] },
      el("header", {}, ROLES[message.role]), this.body, this.notice, this.tools, this.slot);
    this.makeTools(message);
  }

  makeTools(message) {
    const current = () => this.message;
    const later = (action) => () => action(current());
    this.previous = iconButton("left", "The one before", () => this.step(-1));
    this.count = el("span", { class: "count" });
    this.next = iconButton("right", "The one after", () => this.step(1));
    this.arrows = el("span", { class: "arrows", role: "group", "aria-label": "Versions" }, this.previous, this.count, this.next);
    const copy = iconButton("copy", "Copy", () => copyText(current().text, copy));
    this.missed = iconButton("missed", "You missed something: report it to the filter", () => this.openMistake("false_negative"));
    if (message.role === "user") {
      this.edit = iconButton("edit", "Edit", () => this.openEdit());
      this.tools.append(this.arrows, copy, this.edit, this.missed);
    } else if (message.role === "assistant") {
      this.up = iconButton("up", "Good answer", () => this.thumb("up"));
      this.down = iconButton("down", "Bad answer", () => this.thumb("down"));
      this.again = iconButton("again", "Answer again", later(this.actions.regenerate));
      this.compare = iconButton("compare", "Compare two new answers", later(this.actions.compare));
      this.harm = iconButton("flag", "Report a harmful answer", () => this.openHarm());
      this.tools.append(this.arrows, copy, this.up, this.down, this.again, this.compare, this.harm, this.missed, this.note);
    }
    this.copy = copy;
  }

  update(message, siblings) {
    this.message = message;
    this.siblings = siblings;
    const text = message.text;
    if (this.shown !== text) {
      show(this.body, text);
      this.shown = text;
    }
    const empty = !text.trim();
    this.element.classList.toggle("running", message.running);
    this.element.classList.toggle("withheld", message.withheld);
    this.body.classList.toggle("empty", empty && !message.running);
    if (empty && !message.running) this.body.textContent = "(an empty answer)";
    this.element.setAttribute("aria-busy", String(message.running));
    this.tools.hidden = message.running || message.role === "system";
    const at = siblings.findIndex((one) => one.id === message.id);
    this.arrows.hidden = siblings.length < 2;
    this.count.textContent = `${at + 1}/${siblings.length}`;
    this.previous.disabled = at === 0;
    this.next.disabled = at === siblings.length - 1;
    this.missed.hidden = !message.verdict || message.withheld;
    if (message.role === "assistant") this.updateAnswer(message);
    this.updateNotice(message);
  }

  updateAnswer(message) {
    for (const [name, button] of [["up", this.up], ["down", this.down]]) {
      button.setAttribute("aria-pressed", String(message.feedback?.thumb === name));
      button.hidden = message.withheld;
    }
    this.harm.hidden = message.withheld;
    this.harm.setAttribute("aria-pressed", String(message.harm_reported));
    const notes = [];
    if (message.stopped) notes.push(message.finish_reason === "error" ? "Broke off" : "Stopped");
    if (message.finish_reason === "length") notes.push("Cut at the most tokens");
    this.note.textContent = notes.join(", ");
  }

  updateNotice(message) {
    const state = JSON.stringify(message.verdict);
    if (this.noticed === state) return;
    this.noticed = state;
    const lead = message.withheld ? "Withheld:" : "The filter finds here:";
    this.notice.replaceChildren();
    if (message.verdict?.flagged.length && message.verdict.action !== "none") {
      this.notice.append(warning(message.verdict, lead, () => this.openMistake("false_positive")));
    }
    if (message.verdict?.reports?.some((report) => report.mistake === "false_negative")) {
      this.notice.append(el("p", { class: "quiet" }, "You reported what the filter missed. Thank you."));
    }
  }

  step(by) {
    const at = this.siblings.findIndex((one) => one.id === this.message.id);
    this.actions.choose(this.siblings[at + by], by);
  }

  open(form) {
    this.slot.replaceChildren(form);
    form.querySelector("textarea, select, input")?.focus({ preventScroll: true });
    form.scrollIntoView({ block: "nearest" });
  }

  close() {
    this.slot.replaceChildren();
    this.body.hidden = false;
    this.tools.hidden = false;
    if (document.activeElement === document.body) this.copy.focus({ preventScroll: true });
  }

  changed(changes) {
    this.message = { ...this.message, ...changes }; // for what comes before it is drawn again
    this.actions.changed({ id: this.message.id, ...changes });
  }

  async thumb(thumb) {
    const before = this.message.feedback;
    try {
      if (before?.thumb !== thumb) {
        const body = { thumb, text: "", tags: [], ideal: null };
        this.changed({ feedback: await call(`chat/answers/${this.message.id}/feedback`, body) });
      }
    } catch (failure) {
      this.actions.failed(failure, () => this.thumb(thumb));
      return;
    }
    this.open(feedbackForm(this.message, {
      done: (feedback) => this.changed({ feedback }),
      close: () => this.close(),
    }));
  }

  openHarm() {
    this.open(harmForm(this.message, {
      done: () => this.changed({ harm_reported: true }),
      close: () => this.close(),
    }));
  }

  openMistake(mistake) {
    const { verdict } = this.message;
    this.open(mistakeForm(verdict, mistake, {
      done: (report) => this.changed({ verdict: { ...verdict, reports: [...verdict.reports, report] } }),
      close: () => this.close(),
    }));
  }

  openEdit() {
    this.body.hidden = true;
    this.tools.hidden = true;
    this.open(editForm(this.message, {
      send: (text) => this.actions.edit(this.message, text),
      close: () => this.close(),
    }));
  }
}
