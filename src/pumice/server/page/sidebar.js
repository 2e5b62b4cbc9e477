// The list of earlier chats; on a phone it lies over the page.

import * as history from "./history.js";
import { $, confirmed, el, iconButton, show } from "./dom.js";

let wired = null;

/** `act` has: current() id, open(id), fresh(), renamed(id, title), removed(id), removedAll(). */
export function begin(act) {
  wired = act;
  $("new-chat").addEventListener("click", () => {
    drawer(false);
    act.fresh();
  });
  $("open-sidebar").addEventListener("click", () => drawer(true));
  $("close-sidebar").addEventListener("click", () => drawer(false));
  $("shade").addEventListener("click", () => drawer(false));
  $("sidebar").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !document.body.classList.contains("drawer")) return;
    event.stopPropagation(); // it closes the list, and does not stop an answer
    drawer(false);
  });
  matchMedia("(width < 56rem)").addEventListener("change", () => drawer(false, false));
  $("delete-all").addEventListener("click", removeAll);
  drawer(false, false);
}

const isNarrow = () => matchMedia("(width < 56rem)").matches;

/** Opens or closes the list where it is a drawer; what lies behind or outside cannot be reached by keyboard. */
function drawer(open, focus = true) {
  const over = open && isNarrow();
  document.body.classList.toggle("drawer", over);
  $("open-sidebar").setAttribute("aria-expanded", String(over));
  $("sidebar").inert = isNarrow() && !open;
  $("stage").inert = over;
  if (focus && isNarrow()) $(open ? "close-sidebar" : "open-sidebar").focus();
}

/** Draws the list anew. */
export async function draw() {
  const chats = await history.list();
  $("chats").replaceChildren(...chats.map(row));
  $("no-chats").hidden = chats.length > 0;
  $("delete-all").hidden = chats.length === 0;
}

function row(chat) {
  const isCurrent = chat.id === wired.current();
  const open = () => {
    drawer(false);
    wired.open(chat.id);
  };
  return el(
    "li",
    { class: isCurrent ? "current" : null },
    el("button", { type: "button", class: "chat", "aria-current": isCurrent ? "true" : null, title: chat.title, onclick: open }, chat.title),
    iconButton("pencil", `Rename ${chat.title}`, () => rename(chat)),
    iconButton("trash", `Delete ${chat.title}`, () => remove(chat)),
  );
}

async function rename(chat) {
  $("rename-value").value = chat.title;
  const closed = show($("rename"));
  $("rename-value").select();
  const title = (await closed) === "yes" ? $("rename-value").value.trim() : "";
  if (!title) return;
  await wired.renamed(chat.id, title);
  await draw();
  focusOn(title);
}

async function remove(chat) {
  if (!(await confirmed("Delete this chat?", `“${chat.title}” and its pictures are deleted from this browser.`, "Delete"))) return;
  await wired.removed(chat.id);
  await draw();
  $("new-chat").focus();
}

async function removeAll() {
  if (!(await confirmed("Delete all chats?", "Every chat and every picture kept in this browser is deleted.", "Delete all"))) return;
  await wired.removedAll();
  await draw();
  $("new-chat").focus();
}

/** The list was drawn anew: the keyboard stays at the chat it was at. */
function focusOn(title) {
  for (const each of $("chats").querySelectorAll(".chat")) if (each.title === title) each.focus();
}
