// The question that is being written: its text, and the pictures that came by drop, paste or choice.

import { $, announce, bytes, el, icon, plural } from "./dom.js";
import { NoPicture, prepared } from "./pictures.js";
import { face } from "./turns.js";

let attached = [];
let reading = Promise.resolve();

export const pictures = () => attached;

/** Resolves when all files given so far are pictures, or were refused. */
export const ready = () => reading;

/** Wires the composer; `send()` and `see()` are what its buttons do. */
export function begin({ send, see }) {
  const question = $("question");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    if (event.isComposing || event.keyCode === 229) return; // a word is being composed; 229 is how Safari says it
    event.preventDefault();
    send();
  });
  question.addEventListener("input", grow);
  $("add").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    add([...$("files").files]);
    $("files").value = "";
  });
  $("see").addEventListener("click", see);
  document.addEventListener("paste", pasted);
  receiveDrops();
}

function pasted(event) {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  add(files);
}

function receiveDrops() {
  let depth = 0;
  const over = (by) => {
    depth = Math.max(0, depth + by);
    $("drop").hidden = depth === 0;
  };
  const holds = (event) => [...event.dataTransfer.types].some((type) => type === "Files" || type === "text/uri-list");
  addEventListener("dragenter", (event) => holds(event) && over(1));
  addEventListener("dragleave", (event) => holds(event) && over(-1));
  addEventListener("dragover", (event) => holds(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    over(-depth);
    const files = [...event.dataTransfer.files];
    if (files.length) add(files);
    else trouble("That is a link to a picture, and this page fetches nothing. Save the picture, then drop the file.");
  });
}

/** Takes files, one after the other, so that large ones are not all in memory at once. */
export function add(files) {
  trouble("");
  reading = reading.then(async () => {
    for (const file of files) {
      const waiting = el("li", { class: "waiting" }, el("span", { class: "quiet" }, "reading…"));
      $("attached").append(waiting);
      $("attached").hidden = false;
      await take(file);
      waiting.remove();
    }
    draw();
  });
  $("question").focus();
  return reading;
}

async function take(file) {
  try {
    const picture = await prepared(file);
    attached = [...attached, picture];
    announce(`${picture.name} is attached.`);
  } catch (error) {
    if (!(error instanceof NoPicture)) throw error;
    trouble(error.message);
  }
}

function draw() {
  $("attached").replaceChildren(...attached.map(item));
  $("attached").hidden = attached.length === 0;
  $("see").hidden = attached.length === 0;
}

function item(picture) {
  const remove = () => {
    attached = attached.filter((each) => each !== picture);
    draw();
    $("question").focus();
    announce(`${picture.name} is removed.`);
  };
  const size = picture.width ? `${picture.width} × ${picture.height}` : bytes(picture.blob.size);
  const scaled = picture.scaledFrom ? `scaled down from ${picture.scaledFrom.join(" × ")}` : null;
  return el(
    "li",
    {},
    el("span", { class: "picture", title: picture.name }, face(picture)),
    el("span", { class: "picture-facts" }, el("span", { class: "name" }, picture.name), el("span", { class: "quiet" }, size), scaled ? el("span", { class: "quiet" }, scaled) : null),
    el("button", { type: "button", class: "icon-button remove", "aria-label": `Remove ${picture.name}`, title: "Remove", onclick: remove }, icon("close")),
  );
}

/** Empties the composer and returns what was in it. */
export function taken() {
  const whole = { text: $("question").value.trim(), pictures: attached };
  attached = [];
  $("question").value = "";
  trouble("");
  draw();
  grow();
  return whole;
}

/** Puts a text into the composer. */
export function write(text) {
  $("question").value = text;
  grow();
  $("question").focus();
}

/** Says in words why something did not work; "" takes it back. */
export function trouble(words) {
  $("trouble").textContent = words;
  $("trouble").hidden = !words;
}

/** Shows Stop in place of Send while an answer comes. */
export function busy(on) {
  const hadFocus = document.activeElement === $("stop") || document.activeElement === $("send");
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (hadFocus) $(on ? "stop" : "question").focus();
}

function grow() {
  const question = $("question");
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, innerHeight * 0.4)}px`;
}

/** What a chat is called until it is renamed. */
export function titleOf({ text, pictures: shown }) {
  const line = text.replace(/\s+/g, " ");
  if (line) return line.length > 60 ? `${line.slice(0, 59)}…` : line;
  return shown[0]?.name ?? plural(shown.length, "picture");
}
