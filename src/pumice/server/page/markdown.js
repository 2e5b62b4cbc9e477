// A small, safe part of Markdown: paragraphs, headings (as bold lines), lists, bold, inline code, code blocks.
// Everything becomes text nodes. Links and pictures stay the text that they are: nothing is fetched, nothing can be clicked.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+-]*)/;
const HEADING = /^ {0,3}#{1,6}\s+(.*?)\s*#*$/;
const BULLET = /^(\s*)[-*+]\s+(.*)$/;
const NUMBERED = /^(\s*)(\d{1,9})[.)]\s+(.*)$/;

/** The nodes of a text. */
export function rendered(source) {
  const lines = source.split("\n");
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at += 1;
    else if (FENCE.test(line)) at = fence(lines, at, nodes);
    else if (BULLET.test(line) || NUMBERED.test(line)) at = list(lines, at, nodes);
    else at = paragraph(lines, at, nodes);
  }
  return nodes;
}

function fence(lines, start, nodes) {
  const mark = FENCE.exec(lines[start])[1];
  let end = start + 1;
  while (end < lines.length && !lines[end].trim().startsWith(mark)) end += 1;
  nodes.push(codeBlock(lines.slice(start + 1, end).join("\n")));
  return end + 1;
}

/** Can be reached by keyboard, since a long line scrolls. */
export function codeBlock(code) {
  return el("pre", { tabindex: "0", role: "group", "aria-label": "code" }, el("code", {}, code));
}

function list(lines, start, nodes) {
  const numbered = NUMBERED.exec(lines[start]);
  const first = numbered && Number(numbered[2]) !== 1 ? numbered[2] : null;
  const whole = el(numbered ? "ol" : "ul", { start: first });
  const shape = numbered ? NUMBERED : BULLET;
  const indent = shape.exec(lines[start])[1].length;
  let at = start;
  while (at < lines.length) {
    const item = BULLET.exec(lines[at]) ?? NUMBERED.exec(lines[at]);
    if (item && item[1].length > indent + 1 && whole.lastChild) {
      const inner = [];
      at = list(lines, at, inner);
      whole.lastChild.append(...inner);
    } else if (item && shape.test(lines[at]) && item[1].length >= indent - 1) {
      whole.append(el("li", {}, inline(item.at(-1))));
      at += 1;
    } else if (!item && lines[at].trim() && /^\s/.test(lines[at]) && whole.lastChild) {
      whole.lastChild.append(" ", ...inline(lines[at].trim())); // an item's text goes on in the next line
      at += 1;
    } else break;
  }
  nodes.push(whole);
  return at;
}

function paragraph(lines, start, nodes) {
  const heading = HEADING.exec(lines[start]);
  if (heading) {
    nodes.push(el("p", { class: "heading" }, el("strong", {}, inline(heading[1]))));
    return start + 1;
  }
  const whole = el("p");
  let at = start;
  while (at < lines.length && lines[at].trim() && (at === start || !begins(lines[at]))) {
    if (at > start) whole.append(el("br"));
    whole.append(...inline(lines[at]));
    at += 1;
  }
  nodes.push(whole);
  return at;
}

const begins = (line) => [FENCE, HEADING, BULLET, NUMBERED].some((shape) => shape.test(line));

function inline(source) {
  const nodes = [];
  let from = 0;
  for (const found of source.matchAll(/(`{1,3})(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*/g)) {
    if (found.index > from) nodes.push(source.slice(from, found.index));
    nodes.push(found[1] ? el("code", {}, found[2]) : el("strong", {}, inline(found[3])));
    from = found.index + found[0].length;
  }
  if (from < source.length) nodes.push(source.slice(from));
  return nodes;
}
