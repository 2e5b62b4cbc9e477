// The page as a whole: which chat is open, sending and stopping, and what happens when the server goes or wants a key.

import * as api from "./api.js";
import * as composer from "./composer.js";
import { $, announce, el, show } from "./dom.js";
import * as history from "./history.js";
import { local } from "./kept.js";
import * as models from "./models.js";
import { see } from "./see.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import { ask } from "./talk.js";
import { announceAnswer, atEnd, redraw, toEnd, turnView } from "./turns.js";

const SAMPLES = [
  { text: "What does the sign say?", picture: "sample-sign.png" },
  { text: "Describe the picture.", picture: "sample-shapes.png" },
];
const SAVE_EVERY_MS = 1000; // while an answer is written
const TITLE = "New chat";
const NO_MODEL = "There is no model on this server yet: pull one with Models, above.";

let chat = null; // the open one
let pictures = new Map(); // its pictures by id
let running = null; // {chat, pictures, controller, ended} while answers come; `ended` resolves when the last is saved

let sending = false; // while a question waits for its pictures, or for answers that were stopped

const act = { see: seeTurn, again };

// ---- chats

function fresh() {
  chat = { id: history.newId(), title: TITLE, created: Date.now(), changed: Date.now(), models: [], turns: [] };
  pictures = new Map();
  setAddress("");
  draw();
  $("question").focus();
}

async function open(id) {
  if (running?.chat.id === id) ({ chat, pictures } = running);
  else {
    const kept = await history.load(id);
    if (!kept) return fresh();
    for (const answer of kept.turns.flatMap((turn) => turn.answers)) {
      if (answer.state === "writing" || answer.state === "queued") answer.state = "stopped"; // the page was closed
    }
    pictures = new Map((await history.pictures(id)).map((picture) => [picture.id, picture]));
    chat = kept;
  }
  models.choose(chat.models);
  setAddress(id);
  draw();
  toEnd();
}

function setAddress(id) {
  const hash = id ? `#${id}` : "";
  if (location.hash !== hash) window.history.pushState(null, "", location.pathname + hash);
}

async function openByAddress() {
  const id = location.hash.slice(1);
  if (!id) return fresh();
  if (id !== chat?.id) await open(id);
}

function draw() {
  $("welcome").hidden = chat.turns.length > 0;
  $("turns").replaceChildren(...chat.turns.map((turn) => turnView(turn, pictures, act)));
  drawTitle();
  scrolled();
}

function drawTitle() {
  $("chat-title").textContent = chat.title;
  document.title = chat.turns.length ? `${chat.title} · pumice` : "pumice";
  sidebar.draw();
}

/** Draws a turn that is new, or asked again, at the end; the others stay as they are. */
function drawLast(turn) {
  const view = turnView(turn, pictures, act);
  const shown = $("turns").children;
  if (shown.length === chat.turns.length) shown[shown.length - 1].replaceWith(view);
  else $("turns").append(view);
  $("welcome").hidden = true;
  drawTitle();
  toEnd();
}

async function keep(which, added = []) {
  if (which.removed) return;
  try {
    await history.save(which, added);
  } catch {
    composer.trouble("The browser has no room left for this chat: it is gone when the page is closed. Delete older chats.");
  }
}

function forget(id) {
  if (running && (!id || running.chat.id === id)) {
    running.chat.removed = true;
    running.controller.abort();
  }
  if (!id || chat.id === id) fresh();
}

// ---- asking

async function send() {
  if (sending) return;
  sending = true;
  const asked = chat;
  try {
    await composer.ready();
    await stopped();
  } finally {
    sending = false;
  }
  if (chat !== asked) return; // another was opened meanwhile: what was written waits in the composer
  const nothing = !$("question").value.trim() && !composer.pictures().length;
  const problem = unready() ?? (nothing ? "Write a question, or add a picture." : null);
  if (problem) return composer.trouble(problem);
  const { text, pictures: added } = composer.taken();
  const turn = { text, pictures: added.map(({ id }) => id), format: settings.format(), answers: [] };
  if (!chat.turns.length) chat.title = composer.titleOf({ text, pictures: added });
  chat.turns.push(turn);
  for (const picture of added) pictures.set(picture.id, picture);
  setAddress(chat.id);
  await run(turn, added);
}

/** Waits for answers that were told to stop: only their saving is left. */
async function stopped() {
  if (running?.controller.signal.aborted) await running.ended;
}

/** Words for why nothing can be asked now, or null. */
function unready() {
  if (running) return "An answer is still being written: wait for it, or stop it.";
  if (!models.chosen().length) return NO_MODEL;
  const setting = settings.problem();
  if (!setting) return null;
  settings.open(setting.field);
  return setting.words;
}

async function again(turn) {
  const asked = chat;
  await stopped();
  if (chat !== asked) return;
  const problem = unready();
  if (problem) return composer.trouble(problem);
  composer.trouble("");
  turn.format = settings.format();
  await run(turn);
}

/** Asks each chosen model in turn: at once they would compete, and their times would mean nothing. */
async function run(turn, added = []) {
  const asked = chat;
  const shown = pictures;
  turn.answers = models.chosen().map((model) => ({ model, text: "", state: "queued", error: null, note: null, timings: null }));
  asked.models = models.chosen();
  asked.changed = Date.now();
  let end;
  const ended = new Promise((resolve) => (end = resolve));
  running = { chat: asked, pictures: shown, controller: new AbortController(), ended };
  composer.busy(true);
  try {
    announce(`Asked ${asked.models.join(" and ")}.`);
    drawLast(turn);
    await keep(asked, added);
    for (const column of turn.answers.keys()) await answer(asked, turn, column, shown);
  } finally {
    running = null;
    end();
    composer.busy(false);
    sidebar.draw();
  }
}

async function answer(asked, turn, column, shown) {
  const { signal } = running.controller;
  let saved = performance.now();
  const changed = (each) => {
    if (each.state !== "writing") return;
    redraw(each, turn, act);
    if (performance.now() - saved < SAVE_EVERY_MS) return;
    saved = performance.now();
    keep(asked);
  };
  const request = settings.ofRequest();
  await ask({ chat: asked, turn, column, pictures: shown, settings: { request, system: settings.system() }, signal, changed });
  // What is shown as ended is kept: a page that is loaded anew has it.
  asked.changed = Date.now();
  await keep(asked);
  redraw(turn.answers[column], turn, act);
  announceAnswer(turn.answers[column]);
}

function seeTurn(turn) {
  const names = turn.answers.map((each) => each.model);
  return see(names.length ? names : models.chosen(), turn, pictures);
}

function seeAttached() {
  if (!models.chosen().length) return composer.trouble(NO_MODEL);
  const attached = composer.pictures();
  const shown = new Map(attached.map((picture) => [picture.id, picture]));
  return see(models.chosen(), { pictures: [...shown.keys()] }, shown);
}

// ---- the page around it

function samples() {
  for (const { text, picture } of SAMPLES) {
    const address = new URL(picture, import.meta.url);
    const onclick = async () => {
      composer.write(text);
      if (composer.pictures().length) return; // it is asked about the person's own
      const blob = await (await fetch(address)).blob();
      await composer.add([new File([blob], picture, { type: blob.type })]);
    };
    $("samples").append(el("button", { type: "button", class: "sample", onclick }, el("img", { src: address, alt: "", width: 72, height: 72 }), el("span", {}, el("strong", {}, text), el("span", { class: "quiet" }, "a sample picture, or yours"))));
  }
}

function promise() {
  const here = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  $("promise").textContent = here
    ? "A model that sees runs on this machine. Your pictures stay on it: nothing is uploaded, and chats are kept in this browser only."
    : `Your pictures go to the pumice server at ${location.host} and nowhere else. Chats are kept in this browser only.`;
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const tell = () => $("theme").setAttribute("aria-pressed", String(isDark()));
  $("theme").addEventListener("click", () => {
    const chosen = isDark() ? "light" : "dark";
    if ((chosen === "dark") === dark.matches) {
      delete root.dataset.theme; // as the system has it, so the system decides again
      local.removeItem("pumice.theme");
    } else {
      root.dataset.theme = chosen;
      local.setItem("pumice.theme", chosen);
    }
    tell();
  });
  dark.addEventListener("change", tell);
  tell();
}

function chip() {
  const words = settings.formWords();
  $("form-chip").hidden = !words;
  $("form-chip").textContent = words ? `${words} ×` : "";
  $("form-chip").setAttribute("aria-label", `Answers come as ${words}. Press for plain text.`);
}

async function askForKey(why) {
  $("key-why").textContent = why;
  $("key-why").hidden = !why;
  $("key-value").value = "";
  const closed = show($("key"));
  $("key-value").focus();
  return (await closed) === "yes" ? $("key-value").value : null;
}

function gone() {
  $("banner").hidden = false;
}

async function back() {
  $("banner").hidden = true;
  announce("The server is back.");
  await arrive();
}

/** What the page needs of the server before the first question. */
async function arrive() {
  try {
    const [{ version, offline }] = await Promise.all([api.get("pumice/info"), models.refresh()]);
    $("about").textContent = `pumice ${version}${offline ? " · offline" : ""}`;
  } catch (error) {
    if (!(error instanceof api.Gone)) composer.trouble(error.message); // a banner says that it is gone
  }
}

let isAtEnd = true;

function scrolled() {
  isAtEnd = atEnd();
  $("to-end").hidden = isAtEnd;
}

function wire() {
  api.onKeyNeeded(askForKey);
  api.presence.addEventListener("gone", gone);
  api.presence.addEventListener("back", back);
  settings.begin(chip);
  models.begin(() => {});
  composer.begin({ send, see: seeAttached });
  sidebar.begin({
    current: () => chat?.id,
    open,
    fresh,
    renamed: async (id, title) => {
      const which = [chat, running?.chat].find((each) => each?.id === id) ?? (await history.load(id));
      which.title = title;
      await keep(which);
      if (which === chat) drawTitle();
    },
    removed: async (id) => {
      forget(id);
      await history.remove(id);
    },
    removedAll: async () => {
      forget(null);
      await history.removeAll();
    },
  });
  $("open-settings").addEventListener("click", () => settings.open());
  $("form-chip").addEventListener("click", settings.toText);
  $("stop").addEventListener("click", () => running?.controller.abort());
  $("retry").addEventListener("click", api.look);
  for (const cancel of document.querySelectorAll(".cancel")) cancel.addEventListener("click", () => cancel.closest("dialog").close(""));
  $("to-end").addEventListener("click", toEnd);
  $("main").addEventListener("scroll", scrolled, { passive: true });
  new ResizeObserver(() => isAtEnd && toEnd()).observe($("main")); // as the composer grows, or a phone's keyboard comes
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.controller.abort();
  });
  addEventListener("popstate", openByAddress);
}

wire();
theme();
chip();
promise();
samples();
try {
  await history.open();
} catch {
  composer.trouble("This browser keeps no history: chats are gone when the page is closed.");
}
await openByAddress();
await arrive();
if (chat.models.length) models.choose(chat.models);
api.keepLooking();
