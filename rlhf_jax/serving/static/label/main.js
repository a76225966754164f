// The page: who is signed in, which part is shown, and what keys do.

import { Problem, call, get, onSignedOut, post } from "./api.js";
import { Compare, KEYS as COMPARE_KEYS } from "./compare.js";
import { dashboard } from "./dashboard.js";
import { Demonstrate, KEYS as DEMONSTRATE_KEYS } from "./demonstrate.js";
import { byId, el, isTyping, notice } from "./dom.js";
import { records } from "./records.js";

const TABS = { compare: "Compare", demonstrate: "Demonstrate", records: "My records", dashboard: "Dashboard" };
let me = null; // who is signed in
let view = null; // the task that is open
let tab = null;
let drawing = 0; // of several that were asked for, the last one is shown

function failed(problem) {
  if (!(problem instanceof Problem)) throw problem;
  if (problem.status !== 401 && problem.status !== 409) notice(problem.message, "bad");
}

function close() {
  view?.close();
  view = null;
}

function signIn(message = "") {
  close();
  me = null;
  byId("tabs").hidden = byId("sign-out").hidden = true;
  const token = el("input", { id: "token", type: "password", autocomplete: "current-password", required: true, maxlength: 200, spellcheck: "false" });
  const error = el("p", { class: "bad", role: "alert" }, message);
  const form = el("form", { class: "sign-in panel", onsubmit: async (event) => {
    event.preventDefault();
    try {
      start(await post("session", { token: token.value }));
    } catch (problem) {
      error.textContent = problem.message;
      token.select();
    }
  } },
  el("h1", {}, "Sign in"), el("label", { for: "token" }, "Your token"), token, error,
  el("button", { class: "primary" }, "Sign in"),
  el("p", { class: "hint" }, "A researcher gave it to you. Whoever has it can answer in your name; keep it to yourself."));
  byId("main").replaceChildren(form);
  token.focus();
}

function start(session) {
  me = session;
  notice("");
  byId("sign-out").hidden = byId("tabs").hidden = false;
  byId("sign-out").title = `Signed in as ${me.name}`;
  const names = Object.keys(TABS).filter((name) => name !== "dashboard" || me.role === "researcher");
  byId("tabs").replaceChildren(...names.map((name) => el("button", { type: "button", class: "tab", "data-tab": name, onclick: () => { location.hash = name; open(name); } }, TABS[name])));
  const wanted = location.hash.slice(1);
  open(names.includes(wanted) ? wanted : "compare");
}

async function open(name) {
  close();
  tab = name;
  const mine = ++drawing;
  for (const button of byId("tabs").children) button.toggleAttribute("aria-current", button.dataset.tab === name);
  byId("keys").replaceChildren(...[...({ compare: COMPARE_KEYS, demonstrate: DEMONSTRATE_KEYS }[name] ?? []), ["?", "This help"]].map(([keys, what]) => el("tr", {}, el("th", { scope: "row" }, el("kbd", {}, keys)), el("td", {}, what))));
  try {
    const content = name === "records" ? await records() : name === "dashboard" ? await dashboard(me, () => open(name)) : await task(name, mine);
    if (mine === drawing && content) byId("main").replaceChildren(content);
    if (mine === drawing) view?.focus();
  } catch (problem) {
    failed(problem);
  }
}

async function task(work, mine) {
  const [{ assignment }, progress, instructions] = await Promise.all([post("tasks/next", { work }), get("progress"), guide()]);
  if (mine !== drawing) return null;
  const all = progress.all[work];
  const kind = work === "compare" ? "comparison" : "demonstration";
  const line = el("p", { class: "progress" },
    el("span", {}, `${progress.mine[kind]} by you`),
    all ? el("progress", { max: all.slots, value: all.done, "aria-label": "Done by all" }) : null,
    all ? el("span", {}, `${all.done} of ${all.slots} by all`) : null);
  if (!assignment) {
    return el("div", { class: "narrow" }, line, el("div", { class: "empty-state panel" }, el("h1", {}, "Nothing left to do"),
      el("p", {}, work === "compare" ? "There are no answers to rank for you just now." : "There are no dialogues to write for you just now."),
      el("button", { type: "button", class: "plain", onclick: () => open(work) }, "Look again")));
  }
  const options = { ...me, done: () => open(tab), skip, failed };
  view = work === "compare" ? new Compare(assignment, options) : new Demonstrate(assignment, options);
  view.element.lastElementChild.append(instructions);
  view.element.querySelector(".column").prepend(line);
  return view.element;
}

let guideText = null;

// Plain text: blank lines part blocks, and a block without a full stop is a heading.
async function guide() {
  guideText ??= await fetch("/label/static/guide.txt").then((response) => response.text());
  const blocks = guideText.trim().split(/\n\n+/).map((block) => {
    const [head, ...rest] = block.split("\n");
    if (/[.:]$/.test(head)) return [el("p", {}, block)];
    return [el("h3", {}, head), ...(rest.length ? [el("p", {}, rest.join("\n"))] : [])];
  });
  return el("details", { class: "panel guide", open: matchMedia("(min-width: 68rem)").matches }, el("summary", {}, "Instructions"), blocks);
}

function skip(send) {
  const dialog = byId("skip"), reason = byId("skip-reason");
  reason.value = "";
  byId("skip-form").onsubmit = () => { if (reason.value.trim()) send(reason.value.trim()); };
  dialog.showModal();
}

function theme() {
  const root = document.documentElement;
  const next = { undefined: "light", light: "dark", dark: "" }[root.dataset.theme];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  localStorage.setItem("theme", next);
  showTheme();
}

function showTheme() {
  const name = { light: "light", dark: "dark" }[document.documentElement.dataset.theme] ?? "auto";
  byId("theme").textContent = `◐ ${name}`;
  byId("theme").setAttribute("aria-label", `Theme: ${name}`);
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (event.key === "?" && !isTyping(event.target)) {
    byId("help").showModal();
    event.preventDefault();
  } else if (view?.key(event)) event.preventDefault();
});
byId("theme").addEventListener("click", theme);
byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("skip-cancel").addEventListener("click", () => byId("skip").close());
byId("sign-out").addEventListener("click", async () => {
  await view?.work.save();
  view?.work.end();
  view = null;
  for (const key of Object.keys(sessionStorage)) if (key.startsWith("label-draft-")) sessionStorage.removeItem(key);
  await call("DELETE", "session").catch(failed);
  signIn();
});
window.addEventListener("hashchange", () => { const name = location.hash.slice(1); if (me && name in TABS && name !== tab) open(name); });
onSignedOut((message) => signIn(message));
showTheme();
get("session").then(start, (problem) => signIn(problem.status === 401 ? "" : problem.message));
