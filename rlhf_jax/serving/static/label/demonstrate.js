// Writing a dialogue, both sides, turn by turn, with the model's suggestions to edit.

import { post } from "./api.js";
import { conversation, el, isTyping, notice, roleName, textarea } from "./dom.js";
import { TaskView } from "./task_view.js";

export const KEYS = [
  ["Ctrl + Enter", "Next turn, by the other side"],
  ["Alt + S", "Ask the model for a suggestion for this turn"],
  ["Alt + I", "Insert the suggestion, to edit it"],
  ["Alt + Backspace", "Remove this turn"],
  ["S", "Skip the task (outside a text)"],
  ["Ctrl + Shift + Enter", "Submit"],
];

const other = (role) => (role === "user" ? "assistant" : "user");

export class Demonstrate extends TaskView {
  constructor(assignment, options) {
    super(assignment, options);
    this.model = options.model;
    this.cards = [];
    this.build();
    for (const turn of this.state.turns) this.append(turn);
    if (!this.state.turns.length) this.add();
    this.show();
  }

  restore(draft) {
    const turns = Array.isArray(draft.turns) ? draft.turns : [];
    return { turns: turns.filter((turn) => turn?.role in { user: 1, assistant: 1 } && typeof turn.content === "string") };
  }

  build() {
    const { assignment } = this;
    this.list = el("div", { class: "turns" });
    this.addButtons = ["user", "assistant"].map((role) => el("button", { type: "button", class: "plain", id: `add-${role}`, onclick: () => this.add(role) }, `+ ${roleName(role)}'s turn`));
    this.element = el("div", { class: "demonstrate" },
      el("div", { class: "column" },
        this.lost,
        el("p", { class: "instructions" }, assignment.instructions || (assignment.messages.length ? "Go on with this dialogue: write the turns that should follow." : "Begin a dialogue: write what a person asks and the answer that you would be glad to get.")),
        assignment.messages.length ? conversation(assignment.messages, "The dialogue so far") : null,
        this.list,
        el("div", { class: "add" }, this.addButtons)),
      el("div", { class: "rail" }, this.finish("Submit demonstration")));
  }

  // Whose turn comes after the first `n` written ones.
  next(n) {
    const before = [...this.assignment.messages, ...this.state.turns.slice(0, n)].at(-1);
    return before && before.role !== "system" ? other(before.role) : "user";
  }

  add(role = this.next(this.state.turns.length)) {
    const turn = { role, content: "", suggestion: null, suggested_by: null, offered: null };
    this.state.turns.push(turn);
    this.append(turn);
    this.work.touch();
    this.cards.at(-1).area.focus();
    this.show();
  }

  append(turn) {
    const name = `turn-${Math.random().toString(36).slice(2)}`;
    const area = textarea({ id: name, maxlength: 100000, value: turn.content, placeholder: turn.role === "user" ? "What the person says" : "What the assistant answers" }, (text) => { turn.content = text; this.work.touch(); this.show(); });
    const ask = el("button", { type: "button", class: "quiet-button suggest", onclick: () => this.suggest(card) }, "Suggest");
    const remove = el("button", { type: "button", class: "quiet-button", "aria-label": `Remove this turn of the ${roleName(turn.role)}`, onclick: () => this.remove(card) }, "Remove");
    const origin = el("span", { class: "origin" });
    const offer = el("div", { class: "offer", hidden: true });
    const element = el("article", { class: `turn ${turn.role}` },
      el("header", {}, el("label", { class: "who", for: name }, roleName(turn.role)), origin, ask, remove), area, offer);
    const card = { turn, element, area, ask, origin, offer };
    this.cards.push(card);
    this.list.append(element);
    this.offer(card);
  }

  remove(card) {
    const i = this.cards.indexOf(card);
    this.cards.splice(i, 1);
    this.state.turns.splice(i, 1);
    card.element.remove();
    this.work.touch();
    (this.cards[Math.max(0, i - 1)]?.area ?? this.addButtons[0]).focus();
    this.show();
  }

  async suggest(card) {
    if (card.asking) return;
    card.asking = true;
    this.show();
    const before = this.state.turns.slice(0, this.cards.indexOf(card)).filter((turn) => turn.content.trim());
    try {
      const found = await post(`tasks/${this.work.task}/suggestion`, { role: card.turn.role, turns: before.map(({ role, content }) => ({ role, content })) });
      if (found.text) card.turn.offered = { text: found.text, policy: found.policy };
      else notice("The model suggests to say nothing. Ask again, or write it yourself.");
      this.work.touch();
    } catch (problem) {
      this.failed(problem);
    } finally {
      card.asking = false;
      this.offer(card);
      this.show();
    }
  }

  // What the model has offered and nobody has taken yet.
  offer(card) {
    const { offered } = card.turn;
    card.offer.hidden = !offered;
    card.offer.replaceChildren(...(offered ? [
      el("p", { class: "offer-name" }, `Suggested by ${this.model}`),
      el("p", { class: "said" }, offered.text),
      el("div", { class: "actions" },
        el("button", { type: "button", class: "plain", onclick: () => { card.turn.offered = null; this.offer(card); this.work.touch(); card.area.focus(); } }, "Dismiss"),
        el("button", { type: "button", class: "primary insert", onclick: () => this.insert(card) }, "Insert and edit")),
    ] : []));
  }

  insert(card) {
    const { offered } = card.turn;
    if (!offered) return;
    Object.assign(card.turn, { content: offered.text, suggestion: offered.text, suggested_by: offered.policy, offered: null });
    card.area.value = offered.text;
    card.area.refit();
    this.offer(card);
    this.work.touch();
    card.area.focus();
    this.show();
  }

  written() { return this.state.turns.filter((turn) => turn.content.trim()); }

  show() {
    if (!this.cards) return;
    for (const { turn, ask, origin, asking } of this.cards) {
      ask.disabled = Boolean(asking);
      ask.textContent = asking ? "Thinking…" : turn.offered || turn.suggestion ? "Suggest again" : "Suggest";
      origin.textContent = turn.suggestion === null || turn.suggestion === undefined ? "" : turn.suggestion === turn.content ? "as suggested" : "from a suggestion, edited";
    }
    const written = this.written();
    const answers = written.some((turn) => turn.role === "assistant");
    this.showEnd(answers ? "" : "An answer of the assistant is still missing.");
    const next = this.next(this.state.turns.length);
    this.addButtons.forEach((button, i) => button.classList.toggle("expected", ["user", "assistant"][i] === next));
  }

  key(event) {
    const card = this.cards.find(({ element }) => element.contains(event.target));
    const command = event.ctrlKey || event.metaKey;
    if (command && event.key === "Enter") {
      if (!event.shiftKey) this.add();
      else if (!this.submitButton.disabled) this.submit();
    } else if (event.altKey && event.code === "KeyS" && card) this.suggest(card);
    else if (event.altKey && event.code === "KeyI" && card) this.insert(card);
    else if (event.altKey && event.key === "Backspace" && card) this.remove(card);
    else if (event.key === "s" && !command && !event.altKey && !isTyping(event.target)) this.askSkip();
    else return false;
    return true;
  }

  submit() {
    const turns = this.written().map(({ role, content, suggestion, suggested_by }) => ({ role, content, suggestion: suggestion ?? null, suggested_by: suggestion ? suggested_by ?? null : null }));
    return this.send("demonstration", { turns });
  }

  focus() { this.cards.at(-1)?.area.focus({ preventScroll: true }); }
}
