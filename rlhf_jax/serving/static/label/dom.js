// Elements and small things around them. Text from outside only ever becomes text nodes.

// el("button", {class: "x", disabled: true, onclick: f}, "text", child, null)
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else if (name === "checked") element.checked = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function isTyping(target) {
  return target instanceof HTMLElement && target.matches("textarea, select, input:not([type=radio]):not([type=checkbox])");
}

// A text area that is as high as its text.
export function textarea(properties, oninput) {
  const area = el("textarea", { rows: 2, ...properties });
  const fit = () => {
    area.style.height = "auto";
    if (area.scrollHeight) area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", () => { fit(); oninput(area.value); });
  // As soon as it is in the page.
  new ResizeObserver((_, self) => { if (area.offsetWidth) { fit(); self.disconnect(); } }).observe(area);
  area.refit = fit;
  return area;
}

// A line that people see and screen readers say, until something else is to be said.
export function notice(text, kind = "plain") {
  byId("notices").replaceChildren(
    ...(text ? [el("p", { class: `notice ${kind}` }, text, el("button", { type: "button", class: "quiet-button", "aria-label": "Dismiss", onclick: () => notice("") }, "×"))] : []),
  );
}

const NAMES = { user: "User", assistant: "Assistant", system: "System" };
export const roleName = (role) => NAMES[role] ?? role;

export function conversation(messages, label = "Conversation") {
  return el("section", { class: "talk", "aria-label": label },
    messages.map(({ role, content }) => el("div", { class: `message ${role}` },
      el("span", { class: "who" }, roleName(role)), el("p", { class: "said" }, content))));
}

export function clock(seconds) {
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

export const atTime = (moment) => new Date(moment).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

// 24 letters and digits, 120 random bits.
export function newId() {
  const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
  return [...crypto.getRandomValues(new Uint8Array(24))].map((byte) => alphabet[byte & 31]).join("");
}
