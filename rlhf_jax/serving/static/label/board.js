// Where answers stand: a row for each rank, and letters that are dragged into them.

import { el } from "./dom.js";

const FAR = 6; // pixels; less is a click

export const letter = (i) => (i < 26 ? String.fromCharCode(65 + i) : `A${String.fromCharCode(39 + i)}`);

export class Board {
  // `place(i, rank)` is called with the answer shown i-th and its rank, or null; `pick(i)` on a click.
  constructor(count, place, pick) {
    this.place = place;
    this.chips = Array.from({ length: count }, (_, i) => this.chip(i, pick));
    const row = (rank, name) => el("div", { class: "tier", "data-rank": rank ?? "", role: "listitem" }, el("span", { class: "tier-name" }, name), el("div", { class: "tier-chips" }));
    this.tray = row(null, "Not ranked yet");
    this.rows = Array.from({ length: count }, (_, i) => row(i + 1, i === 0 ? "1  best" : i === count - 1 ? `${i + 1}  worst` : `${i + 1}`));
    this.element = el("div", { class: "board", role: "list", "aria-label": "Ranking" }, this.tray, this.rows);
  }

  chip(i, pick) {
    const chip = el("button", { type: "button", class: "chip", "aria-label": `Answer ${letter(i)}`, "data-chip": i }, letter(i));
    chip.addEventListener("pointerdown", (event) => this.grab(event, chip, i, pick));
    return chip;
  }

  grab(down, chip, i, pick) {
    if (down.button) return;
    down.preventDefault();
    chip.focus({ preventScroll: true });
    chip.setPointerCapture(down.pointerId);
    let far = false, over = null;
    const under = (event) => document.elementsFromPoint(event.clientX, event.clientY).filter((e) => e !== chip).map((e) => e.closest(".tier")).find(Boolean) ?? null;
    const mark = (tier) => { over?.classList.remove("over"); over = tier; over?.classList.add("over"); };
    const move = (event) => {
      const [dx, dy] = [event.clientX - down.clientX, event.clientY - down.clientY];
      far ||= Math.hypot(dx, dy) > FAR;
      if (!far) return;
      chip.classList.add("dragged");
      chip.style.transform = `translate(${dx}px, ${dy}px)`;
      mark(under(event));
    };
    const up = (event) => {
      stop.abort();
      const tier = far && event.type === "pointerup" ? under(event) : null;
      mark(null);
      chip.classList.remove("dragged");
      chip.style.transform = "";
      if (tier) this.place(i, tier.dataset.rank ? Number(tier.dataset.rank) : null);
      else if (!far) pick(i);
    };
    const stop = new AbortController();
    for (const [name, handler] of [["pointermove", move], ["pointerup", up], ["pointercancel", up]]) chip.addEventListener(name, handler, { signal: stop.signal });
  }

  show(ranks, current) {
    this.chips.forEach((chip, i) => {
      const row = ranks[i] === null ? this.tray : this.rows[ranks[i] - 1];
      const home = row.lastElementChild;
      if (chip.parentElement !== home) home.append(chip);
      chip.classList.toggle("current", i === current);
    });
    this.tray.hidden = ranks.every((rank) => rank !== null);
  }
}

// Ranks as records have them: 0 for the best, none left out. [1, 3, 3, 4] -> [0, 1, 1, 2]
export function dense(ranks) {
  const used = [...new Set(ranks)].sort((a, b) => a - b);
  return ranks.map((rank) => used.indexOf(rank));
}
