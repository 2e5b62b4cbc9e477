// What a person sets for every chat, kept in the browser; and how it goes into a request.

import { $, show } from "./dom.js";
import { local, parsed } from "./kept.js";

const KEPT = "pumice.settings";
const NUMBERS = { temperature: "temperature", seed: "seed", limit: "num_predict" };
const FIELDS = ["schema", "temperature", "seed", "limit", "system", "keep-alive"];
const LENGTH_OF_TIME = /^-?(\d+(\.\d+)?(ns|us|µs|ms|s|m|h))+$/;
const EXAMPLE = {
  type: "object",
  properties: { title: { type: "string" }, objects: { type: "array", items: { type: "string" } } },
  required: ["title", "objects"],
};

const form = () => document.querySelector('input[name="form"]:checked')?.value ?? "text";

/** Fills the fields with what was kept and calls `changed()` at every change. */
export function begin(changed) {
  const kept = parsed(KEPT, {});
  for (const id of FIELDS) $(id).value = kept[id] ?? "";
  for (const choice of document.querySelectorAll('input[name="form"]')) choice.checked = choice.value === (kept.form ?? "text");
  const update = () => {
    const values = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
    local.setItem(KEPT, JSON.stringify({ ...values, form: form() }));
    review();
    changed();
  };
  $("settings").addEventListener("input", update);
  $("schema-example").addEventListener("click", () => {
    $("schema").value = JSON.stringify(EXAMPLE, null, 2);
    update();
  });
  $("reset").addEventListener("click", () => {
    for (const id of FIELDS) $(id).value = "";
    document.querySelector('input[name="form"][value="text"]').checked = true;
    update();
  });
  review();
}

/** Says at once what a field cannot mean. */
function review() {
  $("schema-part").hidden = form() !== "schema";
  const { problem } = schema();
  $("schema").setAttribute("aria-invalid", String(Boolean(problem)));
  note("schema-problem", problem ?? "Valid JSON.", problem);
  const keepAlive = keepAliveProblem();
  $("keep-alive").setAttribute("aria-invalid", String(Boolean(keepAlive)));
  note("keep-alive-problem", keepAlive ?? "", keepAlive);
}

function note(id, text, bad) {
  if ($(id).textContent !== text) $(id).textContent = text;
  $(id).classList.toggle("bad", Boolean(bad));
}

function schema() {
  const text = $("schema").value.trim();
  if (!text) return { problem: "Write a JSON schema, or put in the example." };
  try {
    const value = JSON.parse(text);
    if (value === null || typeof value !== "object" || Array.isArray(value)) {
      return { problem: "A JSON schema is an object: { … }." };
    }
    return { value };
  } catch (error) {
    return { problem: `This is not JSON: ${error.message}` };
  }
}

function keepAliveProblem() {
  const text = $("keep-alive").value.trim();
  if (text === "" || text === "0" || LENGTH_OF_TIME.test(text)) return null;
  return "Write a time with its unit: 30s, 5m, 1h30m, 0, or -1m.";
}

/** Words for what keeps a question from being sent, or null. */
export function problem() {
  if (form() === "schema" && schema().problem) return { field: "schema", words: schema().problem };
  if (keepAliveProblem()) return { field: "keep-alive", words: keepAliveProblem() };
  const wrong = Object.keys(NUMBERS).find((id) => !$(id).validity.valid);
  return wrong ? { field: wrong, words: `${$(wrong).labels[0].firstChild.textContent.trim()}: ${$(wrong).validationMessage}` } : null;
}

/** The form that answers must have, as the request says it: null, "json" or a schema. */
export function format() {
  if (form() === "text") return null;
  return form() === "json" ? "json" : schema().value;
}

/** Words for a form other than text, or null. */
export function formWords() {
  return { text: null, json: "JSON", schema: "JSON by a schema" }[form()];
}

export function toText() {
  const text = document.querySelector('input[name="form"][value="text"]');
  text.checked = true;
  text.dispatchEvent(new Event("input", { bubbles: true }));
}

/** What a request carries of the settings, but for its form. */
export function ofRequest() {
  const options = {};
  for (const [id, name] of Object.entries(NUMBERS)) if ($(id).value !== "") options[name] = $(id).valueAsNumber;
  const kept = { options };
  const keepAlive = $("keep-alive").value.trim();
  if (keepAlive) kept.keep_alive = keepAlive === "0" ? 0 : keepAlive;
  return kept;
}

export const system = () => $("system").value.trim();

/** Opens the settings, at one field when it is named. */
export function open(field) {
  const closed = show($("settings"));
  if (field) $(field).focus();
  return closed;
}
