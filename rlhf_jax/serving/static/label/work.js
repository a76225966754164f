// A task in hand: its draft, its lease, and how long it has been worked on.

import { Problem, call, post } from "./api.js";
import { atTime, clock, el, newId } from "./dom.js";

const SAVE_AFTER = 700; // milliseconds without a key
const HEARTBEAT = 60_000; // the lease is renewed so often while somebody is here
const AWAY_AFTER = 120_000; // without a sign of life, the clock stands

export class Work {
  // `restore(draft)` gives the state of the page, `draft(state)` is its inverse.
  constructor(assignment, restore, changed, draft = (state) => state) {
    this.draftOf = draft;
    this.assignment = assignment;
    this.task = assignment.task;
    this.changed = changed;
    this.key = `label-draft-${this.task}`;
    const here = sessionStorage.getItem(this.key);
    const found = here ? JSON.parse(here) : assignment.draft ?? {};
    this.state = { seconds: 0, submission: newId(), ...restore(found) };
    if (typeof found.seconds === "number") this.state.seconds = found.seconds;
    if (typeof found.submission === "string") this.state.submission = found.submission;
    this.pending = found.pending ?? null; // sent, and nobody knows whether it came through
    this.lost = false;
    this.line = el("p", { class: "work-line" });
    this.said = found.submission ? "Draft restored" : "";
    this.lease = assignment.lease_until;
    this.active = Date.now();
    this.begin();
  }

  begin() {
    const alive = () => { this.active = Date.now(); };
    this.stopping = new AbortController();
    const options = { signal: this.stopping.signal, passive: true };
    for (const name of ["keydown", "pointerdown", "pointermove", "scroll"]) document.addEventListener(name, alive, options);
    document.addEventListener("visibilitychange", () => { if (document.hidden) this.save(true); }, options);
    this.ticking = setInterval(() => this.tick(), 1000);
    this.beating = setInterval(() => { if (this.isHere()) this.save(); }, HEARTBEAT);
    this.show();
  }

  isHere() { return !document.hidden && Date.now() - this.active < AWAY_AFTER; }

  tick() {
    if (this.isHere() && !this.lost) this.state.seconds += 1;
    this.show();
  }

  // Called after every change of `state`.
  touch() {
    this.pending = null; // what was sent is not what stands here now
    this.keep();
    this.said = "Saving…";
    this.show();
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.save(), SAVE_AFTER);
  }

  content() { return { ...this.draftOf(this.state), pending: this.pending }; }

  keep() { sessionStorage.setItem(this.key, JSON.stringify(this.content())); }

  async save(leaving = false) {
    clearTimeout(this.saving);
    if (this.over) return;
    try {
      const { lease_until } = await call("PUT", `tasks/${this.task}/draft`, { content: this.content() }, { keepalive: leaving });
      if (this.over) return;
      this.said = `Draft saved ${atTime(Date.now())}`;
      if (lease_until) this.lease = lease_until;
      else this.lose();
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      this.said = problem.status ? problem.message : "Not saved yet: the server cannot be reached";
    }
    this.show();
  }

  lose() {
    if (this.lost) return;
    this.lost = true;
    this.changed();
  }

  show() {
    const lease = this.lost ? "No longer yours" : `Yours until ${atTime(this.lease)}`;
    this.line.replaceChildren(
      el("span", { title: "Time on this task" }, clock(this.state.seconds)),
      el("span", { class: this.lost ? "bad" : "" }, lease),
      el("span", { class: "saved" }, this.said),
    );
  }

  // Sends what is finished. The same body goes out until the server has said something, so a second
  // click or a lost answer makes no second record. Resolves to whether the task is over.
  async submit(what, body) {
    if (this.sending) return false;
    this.sending = true;
    clearTimeout(this.saving);
    this.pending ??= { what, body: { ...body, submission: this.state.submission, seconds: this.state.seconds } };
    this.keep();
    try {
      await post(`tasks/${this.task}/${this.pending.what}`, this.pending.body);
      this.end();
      sessionStorage.removeItem(this.key);
      return true;
    } catch (problem) {
      if (problem.status === 409) this.lose();
      if (problem.status) this.pending = null; // refused: it may be changed and sent again
      this.keep();
      throw problem;
    } finally {
      this.sending = false;
    }
  }

  end() {
    this.over = true;
    clearTimeout(this.saving);
    clearInterval(this.ticking);
    clearInterval(this.beating);
    this.stopping.abort();
  }
}
