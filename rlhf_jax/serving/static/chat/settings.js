// How answers are drawn, the system message, and light or dark; kept in this browser only.

const DEFAULTS = { system: "", temperature: "1", top_p: "1", max_tokens: "", seed: "" };
const THEMES = { auto: "automatic", light: "light", dark: "dark" };
const field = (name) => document.getElementById(name);

export function initSettings() {
  const dialog = field("settings");
  const saved = JSON.parse(localStorage.getItem("settings") ?? "{}");
  for (const [name, value] of Object.entries(DEFAULTS)) {
    field(name).value = saved[name] ?? value;
    field(name).addEventListener("input", save);
  }
  field("open-settings").addEventListener("click", () => dialog.showModal());
  field("reset").addEventListener("click", resetSettings);
  field("theme").addEventListener("click", nextTheme);
  showTheme();
}

export function resetSettings() {
  for (const [name, value] of Object.entries(DEFAULTS)) field(name).value = value;
  save();
}

function save() {
  const values = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, field(name).value]));
  localStorage.setItem("settings", JSON.stringify(values));
}

// As the server takes it; a field that is empty is left out, and so stands at the server's default.
export function sampling() {
  const found = {};
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (field(name).value !== "") found[name] = Number(field(name).value);
  }
  if (field("seed").value.trim()) found.seed = field("seed").value.trim(); // 63 bits are no JSON number
  return found;
}

export const systemMessage = () => field("system").value.trim() || null;

function nextTheme() {
  const names = Object.keys(THEMES);
  const now = localStorage.getItem("theme") ?? "auto";
  localStorage.setItem("theme", names[(names.indexOf(now) + 1) % names.length]);
  showTheme();
}

function showTheme() {
  const now = THEMES[localStorage.getItem("theme")] ? localStorage.getItem("theme") : "auto";
  if (now === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = now;
  field("theme").lastChild.textContent = `Theme: ${THEMES[now]}`;
}
