// Text of people and models as DOM: line breaks stay, ``` fences and `ticks` become code, and that
// is all. Everything is a text node; no markup in it is ever parsed.

import { el, iconButton, icon } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\n`]*)$/;

// [{code: false, text}, {code: true, language, text}]; a fence that is still open holds the rest.
export function blocks(text) {
  const found = [];
  let prose = [];
  let open = null;
  const flush = () => {
    const joined = prose.join("\n").replace(/^\n+|\s+$/g, "");
    if (joined) found.push({ code: false, text: joined });
    prose = [];
  };
  for (const line of text.split("\n")) {
    const fence = line.match(FENCE);
    if (open && fence && fence[1].startsWith(open.fence) && !fence[2].trim()) {
      open = null;
    } else if (open) {
      open.block.lines.push(line);
    } else if (fence) {
      flush();
      const block = { code: true, language: fence[2].trim(), lines: [] };
      open = { fence: fence[1], block };
      found.push(block);
    } else {
      prose.push(line);
    }
  }
  flush();
  return found.map((b) => (b.code ? { code: true, language: b.language, text: b.lines.join("\n") } : b));
}

export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // not allowed on pages without HTTPS: the old way, through a selection
    const area = el("textarea", { class: "hidden", value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(...before), 1200);
}

function prose(text) {
  return text.split(/\n{2,}/).map((paragraph) => {
    const parts = paragraph.split(/(`[^`\n]+`)/);
    const nodes = parts.map((part, i) => (i % 2 ? el("code", {}, part.slice(1, -1)) : part));
    return el("p", {}, ...nodes.filter((node) => node !== ""));
  });
}

function code({ language, text }) {
  const button = iconButton("copy", "Copy the code", () => copyText(text, button));
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", {}, language || "code"), button),
    el("pre", { tabindex: "0" }, el("code", {}, text)));
}

export function show(element, text) {
  element.replaceChildren(...blocks(text).flatMap((block) => (block.code ? [code(block)] : prose(block.text))));
}
