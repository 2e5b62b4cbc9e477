// Elements without markup: text becomes text nodes, so nothing that a model or a server writes is ever read as HTML.

export const $ = (id) => document.getElementById(id);

/** An element. Functions become listeners (`onclick`), true an empty attribute; false, null and undefined are left out. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** One of the symbols in index.html, for the eye only: the button around it has the words. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export const iconButton = (name, label, onclick) =>
  el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick }, icon(name));

/** Says something once to a screen reader. */
export function announce(text) {
  const line = el("p", {}, text);
  $("announcer").append(line);
  setTimeout(() => line.remove(), 60_000);
}

/** Shows a dialog; resolves with the value of the button that closed it, "" when it was dismissed. */
export function show(dialog) {
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** Asks yes or no. */
export async function confirmed(title, text, verb) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = verb;
  return (await show($("confirm"))) === "yes";
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = count;
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit && size < 100 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function seconds(value) {
  if (value >= 90) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  if (value >= 10) return `${Math.round(value)} s`;
  return value >= 0.0995 ? `${value.toFixed(1)} s` : `${Math.round(value * 1000)} ms`;
}

export const number = (value) => value.toLocaleString("en");
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
