// For researchers: how far labelers agree, how fast they are, and tasks in and out.

import { call, get, post } from "./api.js";
import { clock, el, notice } from "./dom.js";

const percent = (share) => (share.value === null ? "–" : `${Math.round(100 * share.value)} %`);
const number = (value) => (value === null ? "–" : value.toFixed(2));
const time = (seconds) => (seconds === null ? "–" : clock(seconds));

export async function dashboard({ flags }, refresh) {
  const found = await get("dashboard");
  return el("div", { class: "dashboard" }, el("h1", {}, "Dashboard"),
    el("div", { class: "tiles" },
      tile("Pairs alike", percent(found.pairwise), `of ${found.pairwise.of} pairs that two people ranked`),
      tile("Alike where both decide", percent(found.decided), `of ${found.decided.of} pairs without a tie`),
      tile("Alpha of preferences", number(found.preference_alpha), "Krippendorff, ordinal: 1 perfect, 0 chance"),
      tile("Alpha of quality", number(found.quality_alpha), "Krippendorff, ordinal"),
      ...Object.entries(found.all).map(([work, p]) => tile(work === "compare" ? "Rankings" : "Demonstrations", `${p.done} / ${p.slots}`, `${p.tasks} tasks, ${p.leased} in hand, ${p.skips} skips`))),
    el("section", { class: "panel" }, el("h2", {}, "Labelers"), labelers(found.labelers)),
    el("section", { class: "panel" }, el("h2", {}, "Agreement on flags"), el("p", { class: "hint" }, "Krippendorff's alpha, nominal; – where all said the same or nobody was asked twice."), flagTable(found.flag_alpha, flags)),
    exchange(refresh));
}

const tile = (name, value, about) => el("div", { class: "tile" }, el("p", { class: "tile-name" }, name), el("p", { class: "tile-value" }, value), el("p", { class: "hint" }, about));

function table(heads, rows) {
  return el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Table" }, el("table", { class: "figures" },
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, cell)))))));
}

function labelers(rows) {
  const heads = ["Name", "Rankings", "Time each", "With others", "With gold", "Dialogues", "Time each", "Edited", "Skips"];
  return table(heads, rows.map((one) => [
    el("span", {}, one.name, one.role === "researcher" ? el("span", { class: "tag" }, "researcher") : null, one.active ? null : el("span", { class: "tag off" }, "inactive")),
    String(one.comparisons), time(one.seconds_a_comparison), percent(one.with_others), percent(one.with_gold),
    String(one.demonstrations), time(one.seconds_a_demonstration), one.edited === null ? "–" : `${Math.round(100 * one.edited)} %`, String(one.skips),
  ]));
}

const flagTable = (alphas, names) => table(["Flag", "Alpha"], Object.entries(alphas).map(([flag, alpha]) => [names[flag] ?? flag, number(alpha)]));

function exchange(refresh) {
  const file = el("input", { type: "file", id: "import-file", accept: ".jsonl,.ndjson,.json,text/plain" });
  const read = el("button", { type: "button", class: "primary", onclick: async () => {
    if (!file.files[0]) { notice("Choose a file of tasks first.", "bad"); return; }
    read.disabled = true;
    try {
      const { tasks, slots } = await post("tasks/import", { lines: await file.files[0].text() });
      await refresh();
      notice(`${tasks} tasks added, ${slots} to do.`, "good");
    } catch (problem) {
      notice(problem.message, "bad");
    } finally {
      read.disabled = false;
    }
  } }, "Import tasks");
  const write = el("button", { type: "button", class: "plain", onclick: async () => {
    try {
      const response = await call("GET", "tasks/export", undefined, { raw: true });
      const link = el("a", { href: URL.createObjectURL(await response.blob()), download: "tasks.jsonl" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    } catch (problem) {
      notice(problem.message, "bad");
    }
  } }, "Export tasks");
  return el("section", { class: "panel" }, el("h2", {}, "Tasks"),
    el("p", { class: "hint" }, "A file holds one JSON object a line: prompt or messages, with responses to rank; without, a dialogue to write. All of a file is added, or nothing."),
    el("div", { class: "exchange" }, el("label", { for: "import-file" }, "File"), file, read, write));
}
