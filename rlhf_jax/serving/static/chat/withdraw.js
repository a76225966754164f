// Deleting all that a visitor said, after a dialog that asks whether they mean it.

import { call } from "./api.js";

const $ = (id) => document.getElementById(id);

// deleted: shows the page as a new visitor has it.
export function initWithdrawal(deleted) {
  const [dialog, error, count] = ["goodbye", "goodbye-error", "goodbye-count"].map($);
  $("withdraw").addEventListener("click", async () => {
    error.hidden = true;
    count.textContent = "";
    dialog.showModal();
    try {
      const { records } = await call("chat/data");
      const total = Object.values(records).reduce((sum, number) => sum + number, 0);
      count.textContent = total ? `That is ${total} records.` : "There is nothing of yours yet.";
    } catch (failure) {
      count.textContent = failure.message;
    }
  });
  $("withdraw-now").addEventListener("click", async () => {
    try {
      await call("chat/data/withdraw", { confirm: true });
    } catch (failure) {
      error.textContent = `${failure.message} Nothing was deleted.`;
      error.hidden = false;
      return;
    }
    const theme = localStorage.getItem("theme");
    localStorage.clear();
    sessionStorage.clear();
    if (theme) localStorage.setItem("theme", theme);
    dialog.close();
    await deleted();
  });
}
