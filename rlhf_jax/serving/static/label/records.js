// What somebody has done here: their own records, nobody else's.

import { get } from "./api.js";
import { clock, conversation, el, roleName } from "./dom.js";

const NAMES = { comparison: "Ranking", demonstration: "Demonstration", skip: "Skipped task" };

export async function records() {
  const { records: found } = await get("records");
  const list = el("ul", { class: "records" }, found.map((record) => {
    const inside = el("div", { class: "record-body" });
    const details = el("details", { ontoggle: () => { if (details.open && !inside.childElementCount) fill(inside, record.id); } },
      el("summary", {}, el("strong", {}, NAMES[record.kind]), el("time", { datetime: record.created_at }, new Date(record.created_at).toLocaleString())), inside);
    return el("li", {}, details);
  }));
  return el("div", { class: "narrow" }, el("h1", {}, "My records"),
    found.length ? list : el("p", { class: "empty-state" }, "You have not done anything here yet."));
}

async function fill(inside, id) {
  const record = await get(`records/${id}`).catch((problem) => ({ kind: "none", note: problem.message }));
  const parts = [];
  if (record.kind === "skip") parts.push(el("p", {}, record.reason));
  if (record.kind === "demonstration") {
    parts.push(conversation(record.turns, "What you wrote"));
    for (const turn of record.turns) if (turn.edit_distance !== null) parts.push(el("p", { class: "hint" }, `${roleName(turn.role)}: ${turn.edit_distance} characters away from the suggestion (${Math.round(100 * turn.edit_fraction)} %)`));
  }
  if (record.kind === "comparison") {
    parts.push(conversation(record.conversation));
    const sorted = [...record.answers].sort((a, b) => a.rank - b.rank);
    parts.push(el("ol", { class: "ranked" }, sorted.map((answer) => el("li", { value: answer.rank + 1 }, el("p", { class: "said" }, answer.text),
      answer.quality === null && !answer.flags.length ? null : el("p", { class: "hint" }, [answer.quality === null ? null : `quality ${answer.quality}`, ...answer.flags].filter(Boolean).join(", "))))));
  }
  if (record.note) parts.push(el("p", { class: "hint" }, record.note));
  if (record.seconds) parts.push(el("p", { class: "hint" }, `${clock(record.seconds)} minutes`));
  inside.replaceChildren(...parts);
}
