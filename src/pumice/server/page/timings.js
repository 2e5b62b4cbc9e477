// Where the time of an answer went: one line, and behind it a bar and a table.

import { el, number, plural, seconds } from "./dom.js";

function rate(tokens, s) {
  if (!(tokens > 0 && s > 0)) return "";
  return tokens / s < 100 ? (tokens / s).toFixed(1) : number(Math.round(tokens / s));
}

/** A <details> for an answer's timings. */
export function timingsView(t) {
  const speed = rate(t.answerTokens, t.writeS);
  const line = [seconds(t.totalS), speed && `${speed} tokens/s`].filter(Boolean).join(" · ");
  const opened = (event) => event.target.open && event.target.scrollIntoView({ block: "nearest" });
  return el("details", { class: "timings", ontoggle: opened }, el("summary", {}, line), body(t));
}

function phases(t) {
  const pictureTokens = t.imageTokens.reduce((sum, each) => sum + each, 0);
  const fresh = Math.max(0, t.promptTokens - t.cachedTokens);
  const known = [
    { name: "Load the model", kind: "load", s: t.loadS },
    { name: "Look at pictures", kind: "look", s: t.encodeS, tokens: pictureTokens },
    { name: "Read the prompt", kind: "read", s: t.readS, tokens: fresh, speed: rate(fresh, t.readS) },
    { name: "Write the answer", kind: "write", s: t.writeS, tokens: t.answerTokens, speed: rate(t.answerTokens, t.writeS) },
  ];
  const rest = t.totalS - known.reduce((sum, each) => sum + each.s, 0);
  return rest > 0.0005 ? [...known, { name: "Wait and the rest", kind: "rest", s: rest }] : known;
}

function body(t) {
  const rows = phases(t);
  const bar = el("div", { class: "phases", "aria-hidden": "true" });
  for (const { kind, s } of rows) {
    if (s <= 0) continue;
    const part = el("span", { class: `phase ${kind}` });
    part.style.flexGrow = String(s / t.totalS);
    bar.append(part);
  }
  const table = el(
    "table",
    {},
    el("caption", { class: "sr" }, "Time by phase"),
    el("thead", {}, el("tr", {}, ["Phase", "Time", "Tokens", "Tokens/s"].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map(row)),
  );
  return el("div", { class: "timings-body" }, bar, table, el("p", { class: "quiet" }, remarks(t)));
}

const row = ({ name, kind, s, tokens, speed }) =>
  el(
    "tr",
    {},
    el("th", { scope: "row" }, el("span", { class: `dot ${kind}`, "aria-hidden": "true" }), name),
    el("td", {}, seconds(s)),
    el("td", {}, tokens ? number(tokens) : ""),
    el("td", {}, speed ?? ""),
  );

function remarks(t) {
  const said = [];
  if (t.firstS !== null) said.push(`First word after ${seconds(t.firstS)}.`);
  if (t.imageTokens.length) said.push(`Pictures: ${t.imageTokens.map(number).join(" + ")} of ${plural(t.promptTokens, "prompt token")}.`);
  if (t.cachedTokens) said.push(`${plural(t.cachedTokens, "token")} of the prompt ${t.cachedTokens === 1 ? "was" : "were"} known from before.`);
  return said.join(" ");
}
