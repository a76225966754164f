// The side bar, which is a drawer on narrow screens.

const $ = (id) => document.getElementById(id);
export const NARROW = matchMedia("(max-width: 760px)");

export function closeSide() {
  if (!document.body.classList.contains("side-open")) return;
  setSide(false);
  $("open-side").focus();
}

function setSide(isOpen) {
  document.body.classList.toggle("side-open", isOpen);
  $("shade").hidden = !isOpen;
  $("open-side").setAttribute("aria-expanded", String(isOpen));
  document.querySelector("main").inert = isOpen;
  $("side").inert = NARROW.matches && !isOpen;
  if (isOpen) $("close-side").focus();
}

// newChat: what the buttons for it do.
export function initSide(newChat) {
  $("open-side").addEventListener("click", () => setSide(true));
  $("close-side").addEventListener("click", closeSide);
  $("shade").addEventListener("click", closeSide);
  NARROW.addEventListener("change", () => setSide(false));
  setSide(false);
  for (const id of ["new-chat", "new-chat-top"]) $(id).addEventListener("click", newChat);
}
