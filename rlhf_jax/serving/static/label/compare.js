// Ranking K answers: by dragging letters into rows, by clicking, or by keyboard alone.

import { Board, dense, letter } from "./board.js";
import { conversation, el, isTyping, textarea } from "./dom.js";
import { TaskView } from "./task_view.js";

export const KEYS = [
  ["↑ ↓", "Go to the answer above or below"],
  ["1 … 9", "Give the answer this rank; the same rank twice is a tie"],
  ["← →", "Move the answer one rank better or worse"],
  ["0", "Take its rank away"],
  ["Shift + 1 … 7", "Its quality"],
  ["N", "Write a note"],
  ["S", "Skip the task"],
  ["Ctrl + Enter", "Submit"],
];

export class Compare extends TaskView {
  constructor(assignment, options) {
    super(assignment, options);
    this.count = assignment.answers.length;
    this.current = 0;
    this.flags = options.flags;
    this.build();
    this.show();
  }

  // Drafts and records are in the task's order, the page in the order shown.
  restore(draft) {
    const each = (make) => this.assignment.answers.map(({ place }) => make(place));
    const old = draft.judgments; // as the server keeps what came too late
    const within = (value, most) => (Number.isInteger(value) && value >= 1 && value <= most ? value : null);
    return {
      ranks: each((p) => within(old ? old[p]?.rank + 1 : draft.ranks?.[p], this.assignment.answers.length)),
      quality: each((p) => within(old ? old[p]?.quality : draft.quality?.[p], 7)),
      flags: each((p) => [...(old ? old[p]?.flags : draft.flags?.[p]) ?? []]),
      note: typeof draft.note === "string" ? draft.note : "",
    };
  }

  draft(state) {
    const placed = (values) => { const found = []; this.assignment.answers.forEach(({ place }, i) => { found[place] = values[i]; }); return found; };
    return { ...state, ranks: placed(state.ranks), quality: placed(state.quality), flags: placed(state.flags) };
  }

  build() {
    const { assignment } = this;
    this.board = new Board(this.count, (i, rank) => this.rank(i, rank), (i) => this.go(i));
    this.cards = assignment.answers.map((answer, i) => this.card(answer, i));
    this.note = textarea({ id: "note", maxlength: 100000, placeholder: "Anything the ranking does not say (optional)", value: this.state.note }, (text) => { this.state.note = text; this.change(); });
    this.element = el("div", { class: "compare" },
      el("div", { class: "column" },
        this.lost,
        assignment.instructions ? el("p", { class: "instructions" }, assignment.instructions) : null,
        conversation(assignment.messages),
        el("section", { class: "answers", "aria-label": "Answers" }, this.cards.map((card) => card.element))),
      el("div", { class: "rail" },
        el("section", { class: "panel", "aria-label": "Ranking" }, el("h2", {}, "Ranking"), el("p", { class: "hint" }, "Drag the letters, or press 1 to 9 on an answer."), this.board.element),
        this.finish("Submit ranking", el("label", { for: "note" }, "Note"), this.note)));
  }

  card(answer, i) {
    const name = `rank-${i}`;
    const radios = (label, group, values, titles, pick) => el("fieldset", { class: `choice ${group}` }, el("legend", {}, label),
      values.map((value) => {
        const input = el("input", { type: "radio", name: `${group}-${i}`, value, id: `${group}-${i}-${value}`, onclick: () => pick(value) });
        return [input, el("label", { for: input.id, title: titles?.[value] }, String(value))];
      }));
    const ranks = radios("Rank", "rank", Array.from({ length: this.count }, (_, r) => r + 1), { 1: "best" }, (r) => this.rank(i, r));
    const quality = radios("Quality", "quality", [1, 2, 3, 4, 5, 6, 7], { 1: "terrible", 7: "perfect" }, (q) => this.quality(i, q));
    const summary = el("summary", {});
    const boxes = Object.entries(this.flags).map(([flag, text]) => {
      const input = el("input", { type: "checkbox", id: `flag-${i}-${flag}`, onchange: () => this.flag(i, flag, input.checked) });
      return { flag, input, row: el("label", { for: input.id }, input, el("span", {}, text)) };
    });
    const element = el("article", { class: "answer", tabindex: 0, id: `answer-${i}`, "aria-labelledby": `${name}-name`, onfocus: () => this.go(i, false) },
      el("header", {}, el("h3", { id: `${name}-name` }, `Answer ${letter(i)}`), el("span", { class: "given" })),
      answer.text.trim() ? el("p", { class: "said" }, answer.text) : el("p", { class: "said empty" }, "(This answer is empty.)"),
      el("div", { class: "judge" }, ranks, quality),
      el("details", { class: "flags" }, summary, el("div", { class: "flag-list" }, boxes.map((box) => box.row))));
    return { element, summary, boxes, given: element.querySelector(".given") };
  }

  go(i, focus = true) {
    this.current = Math.max(0, Math.min(this.count - 1, i));
    if (focus) this.cards[this.current].element.focus();
    this.show();
  }

  change() { this.work.touch(); this.show(); }

  rank(i, rank) {
    this.state.ranks[i] = rank;
    this.change();
  }

  quality(i, value) {
    this.state.quality[i] = value;
    this.change();
  }

  flag(i, flag, raised) {
    const others = this.state.flags[i].filter((other) => other !== flag);
    this.state.flags[i] = raised ? [...others, flag] : others;
    this.change();
  }

  show() {
    if (!this.cards) return;
    const { ranks, quality, flags } = this.state;
    this.board.show(ranks, this.current);
    this.cards.forEach(({ element, summary, boxes, given }, i) => {
      element.classList.toggle("current", i === this.current);
      for (const input of element.querySelectorAll("input[type=radio]")) {
        const chosen = input.name === `rank-${i}` ? ranks[i] : quality[i];
        input.checked = Number(input.value) === chosen;
      }
      for (const { flag, input } of boxes) input.checked = flags[i].includes(flag);
      const tied = ranks[i] !== null && ranks.filter((rank) => rank === ranks[i]).length > 1;
      given.textContent = ranks[i] === null ? "not ranked" : `rank ${ranks[i]}${tied ? ", tied" : ""}`;
      given.classList.toggle("none", ranks[i] === null);
      summary.textContent = flags[i].length ? `Flags: ${flags[i].length}` : "Flags";
    });
    const left = ranks.flatMap((rank, i) => (rank === null ? [letter(i)] : []));
    this.showEnd(left.length ? `Still to rank: ${left.join(", ")}` : "");
  }

  key(event) {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
      if (!this.submitButton.disabled) this.submit();
      return true;
    }
    if (isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey) return false;
    const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1] ?? (/^\d$/.test(event.key) ? event.key : null);
    const step = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (digit !== null) {
      const n = Number(digit);
      if (event.shiftKey && n >= 1 && n <= 7) this.quality(this.current, n);
      else if (!event.shiftKey && n === 0) this.rank(this.current, null);
      else if (!event.shiftKey && n <= this.count) this.rank(this.current, n);
    } else if (event.shiftKey) return false;
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") this.go(this.current + step);
    else if (step) {
      const rank = this.state.ranks[this.current] ?? (step > 0 ? 0 : this.count + 1);
      this.rank(this.current, Math.max(1, Math.min(this.count, rank + step)));
    } else if (event.key === "n") this.note.focus();
    else if (event.key === "s") this.askSkip();
    else return false;
    return true;
  }

  submit() {
    const { ranks, quality, flags, note } = this.state;
    const judgments = [];
    const places = dense(ranks);
    this.assignment.answers.forEach(({ place }, i) => { judgments[place] = { rank: places[i], quality: quality[i], flags: flags[i] }; });
    return this.send("comparison", { judgments, note });
  }

  focus() { this.cards[0].element.focus({ preventScroll: true }); }
}
