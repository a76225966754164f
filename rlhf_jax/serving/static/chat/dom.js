// Elements, icons and small things around them. Text from outside only ever becomes text nodes.

const ICONS = {
  plus: ["M12 5v14M5 12h14"],
  close: ["M6 6l12 12M18 6L6 18"],
  menu: ["M4 7h16M4 12h16M4 17h16"],
  sliders: ["M4 8h8M18 8h2M4 16h2M12 16h8", "M15 5.500a2.500 2.500 0 1 0 0 5 2.500 2.500 0 0 0 0-5zM9 13.500a2.500 2.500 0 1 0 0 5 2.500 2.500 0 0 0 0-5z"],
  contrast: ["M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16z", "M12 4v16M12 8h3.500M12 12h8M12 16h5"],
  trash: ["M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12"],
  send: ["M12 19V6M6.500 11L12 5.500 17.500 11"],
  stop: ["M8 8h8v8H8z"],
  copy: ["M9 9h10v10H9z", "M15 9V5H5v10h4"],
  check: ["M5 12.500l4.500 4.500L19 7.500"],
  up: ["M7 11v8H4v-8zM7 11l4-7c1.500 0 2.500 1 2.200 2.600L12.700 10H18c1.300 0 2.200 1.200 1.800 2.400l-1.700 5.200c-.3.900-1 1.400-1.900 1.400H7"],
  down: ["M7 13V5H4v8zM7 13l4 7c1.500 0 2.500-1 2.200-2.600L12.700 14H18c1.300 0 2.200-1.200 1.800-2.400l-1.700-5.200c-.3-.900-1-1.400-1.900-1.400H7"],
  again: ["M19 12a7 7 0 1 1-2.100-5M19 4v4h-4"],
  compare: ["M4 5h6.500v14H4zM13.500 5H20v14h-6.500z"],
  flag: ["M6 20V5M6 5h11l-2.500 4L17 13H6"],
  missed: ["M12 4l8.500 15h-17zM12 10v4M12 16.500v.5"],
  edit: ["M5 19l1-4L16 5l3 3L9 18z"],
  left: ["M14 6l-6 6 6 6"],
  right: ["M10 6l6 6-6 6"],
};

// el("button", {class: "x", "aria-label": "Send", disabled: true, onclick: f}, "text", child, null)
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  for (const d of ICONS[name]) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

export function iconButton(name, label, onclick) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick }, icon(name));
}

// Puts their icon into the buttons of index.html.
export function dressIcons() {
  for (const button of document.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));
}

// Makes `wanted` the children of an element without touching those that stay in place, so that
// whoever types in one of them goes on typing.
export function reconcile(parent, wanted) {
  const keep = new Set(wanted);
  for (const child of [...parent.children]) if (!keep.has(child)) child.remove();
  wanted.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
  });
}

// Keeps a text over a reload; a browser that is full, or keeps nothing, keeps it on the page only.
export function remember(key, text) {
  try {
    sessionStorage.setItem(key, text);
  } catch {
    sessionStorage.removeItem(key);
  }
}

// A textarea whose text outlives the page until `forget`.
export function keepDraft(textarea, key) {
  textarea.value = sessionStorage.getItem(key) ?? textarea.value;
  textarea.addEventListener("input", () => remember(key, textarea.value));
  return () => sessionStorage.removeItem(key);
}

// 20 letters and digits, 100 random bits and more.
export function newId() {
  const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
  return [...crypto.getRandomValues(new Uint8Array(24))].map((byte) => alphabet[byte & 31]).join("");
}

export function isTyping(target) {
  return target instanceof HTMLElement && target.matches("input, textarea, select, [contenteditable]");
}
