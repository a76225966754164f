// Two answers beside each other, and the question which is better.

import { call } from "./api.js";
import { el, newId } from "./dom.js";
import { show } from "./text.js";

const CHOICES = [["first", "First", "1"], ["second", "Second", "2"], ["tie", "Tie", "0"]];

export class PairView {
  // actions: {chosen(message), leave(), failed(failure, retry)}
  constructor(pair, actions) {
    this.pair = pair; // {parent, ids: [first, second], submission}
    this.actions = actions;
    this.since = null; // when both were there
    this.bodies = [0, 1].map(() => el("div", { class: "body", dir: "auto" }));
    this.notes = [0, 1].map(() => el("p", { class: "quiet" }));
    this.buttons = CHOICES.map(([choice, label, key]) =>
      el("button", { type: "button", class: "choice", "data-choice": choice, onclick: () => this.choose(choice) },
        label, el("kbd", {}, key)));
    this.question = el("p", { class: "question", id: `question-${pair.submission}` });
    const column = (i) =>
      el("section", { class: "column", "aria-label": `${CHOICES[i][1]} answer` },
        el("header", {}, `${CHOICES[i][1]} answer`), this.bodies[i], this.notes[i]);
    const leave = el("button", { type: "button", class: "plain", onclick: () => actions.leave() }, "Do not choose");
    this.element = el("div", { class: "pair", tabindex: "-1", role: "group", "aria-labelledby": this.question.id },
      el("div", { class: "columns" }, column(0), column(1)),
      this.question, el("div", { class: "choices" }, ...this.buttons, leave));
  }

  get ready() {
    return this.messages?.every((message) => message && !message.running && !message.withheld) ?? false;
  }

  update(messages) {
    this.messages = messages; // of which one is undefined where nothing was drawn
    messages.forEach((message, i) => {
      show(this.bodies[i], message?.text ?? "");
      this.bodies[i].parentElement.classList.toggle("running", message?.running ?? false);
      this.notes[i].textContent = !message ? "There is no answer." : message.stopped ? "Stopped" : "";
    });
    const over = messages.every((message) => !message?.running);
    this.question.textContent = this.ready ? "Which answer is better?"
      : over ? "These two cannot be compared." : "Two answers are on their way.";
    if (this.ready) this.since ??= performance.now();
    for (const button of this.buttons) button.disabled = !this.ready;
  }

  async choose(choice) {
    if (!this.ready || this.busy) return;
    this.busy = true;
    const [first, second] = this.pair.ids;
    if (this.attempt?.choice !== choice) {
      const seconds = (performance.now() - this.since) / 1000;
      this.attempt = { id: this.pair.submission, first, second, choice, seconds };
    }
    try {
      await call("chat/preferences", this.attempt); // again the same, if need be: it is one record
      this.actions.chosen(this.messages[choice === "second" ? 1 : 0]);
    } catch (failure) {
      this.actions.failed(failure, () => this.choose(choice));
    } finally {
      this.busy = false;
    }
  }

  key(key) {
    const found = CHOICES.find((choice) => choice[2] === key);
    if (found) this.choose(found[0]);
    return Boolean(found);
  }
}

export const newPair = (parent, ids) => ({ parent, ids, submission: newId() });
