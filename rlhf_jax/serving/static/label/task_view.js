// What ranking and writing have in common: a task that is sent off, skipped, lost or left.

import { el } from "./dom.js";
import { Work } from "./work.js";

export class TaskView {
  // `restore` and `draft`, of the class below, turn drafts into the state of the page and back.
  constructor(assignment, { done, skip, failed }) {
    this.assignment = assignment;
    this.done = done;
    this.skip = skip;
    this.failed = failed;
    this.work = new Work(assignment, (draft) => this.restore(draft), () => this.show(), (state) => this.draft(state));
    this.missing = el("p", { class: "missing", id: "missing" });
    this.lost = el("div", { class: "lost", role: "alert", hidden: true },
      el("p", {}, "This task went to somebody else while you were away. What you did is kept as a draft, and not submitted."),
      el("button", { type: "button", class: "primary", onclick: () => { this.close(); this.done(); } }, "Next task"));
  }

  get state() { return this.work.state; }

  draft(state) { return state; }

  // The panel with which a task ends.
  finish(name, ...fields) {
    this.submitButton = el("button", { type: "button", class: "primary", id: "submit", onclick: () => this.submit() }, name);
    const skip = el("button", { type: "button", class: "plain", id: "skip-button", onclick: () => this.askSkip() }, "Skip");
    return el("section", { class: "panel finish" }, fields, this.missing, el("div", { class: "actions" }, skip, this.submitButton), this.work.line);
  }

  // `missing`: what has to be done before this can be submitted, or "".
  showEnd(missing) {
    this.missing.textContent = missing;
    this.submitButton.disabled = Boolean(missing) || this.work.lost || this.sending;
    this.lost.hidden = !this.work.lost;
  }

  askSkip() { this.skip((reason) => this.send("skip", { reason })); }

  async send(what, body) {
    this.sending = true;
    this.show();
    try {
      if (await this.work.submit(what, body)) this.done();
    } catch (problem) {
      this.failed(problem);
    } finally {
      this.sending = false;
      this.show();
    }
  }

  close() { if (!this.work.over) { this.work.save(); this.work.end(); } }
}
