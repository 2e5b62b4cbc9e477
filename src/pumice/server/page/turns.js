// The chat on the page: questions, answers while they are written, and what can be done with an answer.

import { $, el, icon, iconButton, announce } from "./dom.js";
import { codeBlock, rendered } from "./markdown.js";
import { address } from "./pictures.js";
import { timingsView } from "./timings.js";

const PAUSE_MS = 60; // between two drawings of an answer that is being written

const views = new WeakMap(); // answer -> its <article>
const waiting = new Set();

/** One question with its answers; `act` has what buttons do: see(turn), again(turn). */
export function turnView(turn, pictures, act) {
  const shown = turn.pictures.map((id) => pictures.get(id)).filter(Boolean);
  const answers = turn.answers.map((answer) => {
    const view = el("article", { class: "answer", "aria-label": `Answer of ${answer.model}` });
    views.set(answer, view);
    draw(answer, turn, act);
    return view;
  });
  return el(
    "section",
    { class: "turn" },
    el(
      "div",
      { class: "asked" },
      el("h2", { class: "sr" }, "You asked"),
      shown.length ? el("ul", { class: "pictures" }, shown.map((picture) => el("li", {}, pictureButton(picture, () => act.see(turn))))) : null,
      turn.text ? el("p", { class: "bubble" }, turn.text) : null,
      turn.format ? el("p", { class: "quiet" }, "to be answered as JSON") : null,
    ),
    el("div", { class: answers.length > 1 ? "answers two" : "answers" }, answers),
  );
}

/** A picture, small; pressing it shows what the model sees of it. */
export function pictureButton(picture, onclick) {
  return el(
    "button",
    { type: "button", class: "picture", "aria-label": `What the model sees of ${picture.name}`, title: picture.name, onclick },
    face(picture),
  );
}

export function face(picture) {
  const from = address(picture);
  if (from) return el("img", { src: from, alt: "", width: picture.width || null, height: picture.height || null });
  return el("span", { class: "no-face" }, icon("picture"), picture.name.split(".").pop().toUpperCase());
}

/** Draws an answer anew, at once when it has ended and else a few times a second. */
export function redraw(answer, turn, act) {
  if (answer.state !== "writing") draw(answer, turn, act);
  else if (!waiting.has(answer)) {
    waiting.add(answer);
    setTimeout(() => {
      waiting.delete(answer);
      if (answer.state === "writing") draw(answer, turn, act);
    }, PAUSE_MS);
  }
}

function draw(answer, turn, act) {
  const view = views.get(answer);
  if (!view) return;
  const follows = atEnd();
  const writing = answer.state === "writing" || answer.state === "queued";
  view.setAttribute("aria-busy", String(writing));
  view.replaceChildren(
    el("h3", { class: "who" }, answer.model),
    el("div", { class: writing ? "text writing" : "text" }, content(answer, turn)),
    ...ending(answer, turn, act),
  );
  if (follows) toEnd();
}

function content(answer, turn) {
  if (answer.state === "queued") return [el("p", { class: "quiet" }, "Waits until the first has answered, so that the times are fair.")];
  if (answer.state === "writing" && !answer.text) return [el("p", { class: "quiet thinking" }, turn.pictures.length ? "Looking…" : "Reading…")];
  if (answer.state === "done" && !answer.text) return [el("p", { class: "quiet" }, "The model answered with no words.")];
  if (!turn.format) return rendered(answer.text);
  if (answer.state !== "done") return answer.text ? [codeBlock(answer.text)] : [];
  try {
    return [codeBlock(JSON.stringify(JSON.parse(answer.text), null, 2))];
  } catch {
    return [codeBlock(answer.text), el("p", { class: "quiet" }, "This is not whole JSON.")];
  }
}

function ending(answer, turn, act) {
  if (answer.state === "writing" || answer.state === "queued") return [];
  const nodes = [];
  if (answer.state === "failed") nodes.push(el("p", { class: "problem" }, answer.error));
  if (answer.state === "stopped") nodes.push(el("p", { class: "quiet" }, "Stopped."));
  if (answer.note) nodes.push(el("p", { class: "quiet" }, answer.note));
  const copy = answer.text && navigator.clipboard ? iconButton("copy", "Copy the answer", () => copied(answer.text)) : null;
  const again = iconButton("again", "Ask again", () => act.again(turn));
  again.classList.add("again");
  nodes.push(el("footer", {}, answer.timings ? timingsView(answer.timings) : null, el("div", { class: "actions" }, copy, again)));
  return nodes;
}

async function copied(text) {
  await navigator.clipboard.writeText(text);
  announce("Copied.");
}

/** What a screen reader says when an answer has ended. */
export function announceAnswer(answer) {
  const ends = { failed: answer.error, stopped: "Stopped." }[answer.state] ?? "";
  announce(`${answer.model}: ${answer.text.slice(0, 4000)} ${ends}`);
}

const NEAR_PX = 80;

export function atEnd() {
  const main = $("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < NEAR_PX;
}

export function toEnd() {
  $("main").scrollTop = $("main").scrollHeight;
}
