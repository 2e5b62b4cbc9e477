// The models of the server: choosing one or two, what is there, and pulling more.

import * as api from "./api.js";
import { $, announce, bytes, el, seconds, show } from "./dom.js";
import { local, parsed } from "./kept.js";

const KEPT = "pumice.models";
let installed = [];
let comparing = false;
let pulling = null;

export const isComparing = () => comparing;

/** The names to ask: one, or two when two are compared. */
export function chosen() {
  return [$("model").value, ...(comparing ? [$("second").value] : [])].filter(Boolean);
}

/** Wires the pickers; `changed()` after every choice. */
export function begin(changed) {
  const kept = () => {
    local.setItem(KEPT, JSON.stringify(chosen()));
    changed();
  };
  $("model").addEventListener("change", kept);
  $("second").addEventListener("change", kept);
  $("compare").addEventListener("click", () => {
    compare(!comparing);
    kept();
  });
  $("open-models").addEventListener("click", open);
  $("pull").addEventListener("submit", (event) => {
    event.preventDefault();
    pull($("pull-name").value.trim());
  });
  $("pull-stop").addEventListener("click", () => pulling?.abort());
}

function compare(on) {
  comparing = on;
  $("second-picker").hidden = !on;
  $("compare").setAttribute("aria-pressed", String(on));
}

/** Models that answer: embedding models are listed, and asked elsewhere. */
const answering = () => installed.filter(({ capabilities }) => !capabilities?.includes("embedding"));

/** Chooses the models of an opened chat, those of them that are still here. */
export function choose(names) {
  const here = names.filter((name) => answering().some((model) => model.name === name));
  if (here[0]) $("model").value = here[0];
  if (here[1]) $("second").value = here[1];
  compare(here.length > 1);
}

/** Asks the server anew which models it has. */
export async function refresh() {
  const before = installed.length ? chosen() : parsed(KEPT, []);
  installed = (await api.get("api/tags")).models;
  for (const id of ["model", "second"]) {
    const options = answering().map(({ name }) => el("option", { value: name }, name));
    $(id).replaceChildren(...(options.length ? options : [el("option", { value: "" }, "no model yet")]));
  }
  const second = answering()[1];
  if (second) $("second").value = second.name;
  choose(before);
  $("compare").disabled = answering().length === 0;
  return installed;
}

async function open() {
  $("pull-note").textContent = "";
  const closed = show($("models"));
  $("pull-name").focus();
  await fill();
  return closed;
}

async function fill() {
  try {
    const [{ offline }] = await Promise.all([api.get("pumice/info"), refresh()]);
    if (offline) $("pull-note").textContent = "The server was started offline: it opens no connection, and pulls nothing.";
    const { models: loaded } = await api.get("api/ps");
    $("installed").replaceChildren(...installed.map((model) => line(model, loaded)));
    if (!installed.length) $("installed").append(el("li", { class: "quiet" }, "None yet."));
  } catch (error) {
    problem(error.message);
  }
}

function line({ name, size, details }, loaded) {
  const inMemory = loaded.some((each) => each.name === name);
  const facts = [details?.parameter_size, details?.quantization_level, bytes(size)].filter(Boolean).join(" · ");
  return el("li", {}, el("span", { class: "name" }, name), el("span", { class: "quiet" }, facts), inMemory ? el("span", { class: "badge" }, "in memory") : null);
}

function problem(words) {
  $("pull-problem").textContent = words;
  $("pull-problem").hidden = !words;
}

async function pull(name) {
  if (pulling) return;
  pulling = new AbortController();
  busy(true);
  problem("");
  $("layers").replaceChildren();
  const layers = new Map();
  try {
    let last = "";
    for await (const step of api.stream("api/pull", { model: name, stream: true, insecure: $("pull-insecure").checked }, pulling.signal)) {
      last = step.status;
      if (step.digest) layer(layers, step);
      else $("pull-state").textContent = `${name}: ${step.status}`;
      if (step.digest) $("models-word").textContent = share(layers);
    }
    if (last !== "success") throw new api.Refused("The pull broke off. Pull again: it goes on where it stopped.");
    $("pull-state").textContent = `${name} is here.`;
    announce(`${name} is here.`);
    $("pull-name").value = "";
    await refresh();
    choose([name, `${name}:latest`].filter((each) => installed.some((model) => model.name === each)));
    await fill();
  } catch (error) {
    $("pull-state").textContent = "";
    problem(error.name === "AbortError" ? `Stopped. Pull ${name} again and it goes on where it stopped.` : error.message);
  } finally {
    pulling = null;
    busy(false);
  }
}

function busy(on) {
  $("pull-go").disabled = on;
  $("pull-go").hidden = on;
  $("pull-stop").hidden = !on;
  $("models-word").textContent = "Models";
}

function share(layers) {
  let total = 0;
  let completed = 0;
  for (const each of layers.values()) {
    total += each.total;
    completed += each.completed;
  }
  return total ? `${Math.floor((completed / total) * 100)} %` : "Models";
}

/** Draws the bar of one file of a model, with its speed since it began and the time that is left. */
function layer(layers, { digest, status, total = 0, completed = 0 }) {
  let kept = layers.get(digest);
  if (!kept) {
    const short = digest.replace("sha256:", "").slice(0, 12);
    const bar = el("progress", { max: 1, value: 0, "aria-label": `File ${short}` });
    const facts = el("span", { class: "quiet" });
    $("layers").append(el("li", {}, el("span", {}, el("code", {}, short), " ", facts), bar));
    kept = { bar, facts, began: performance.now(), from: completed };
    layers.set(digest, kept);
  }
  Object.assign(kept, { total, completed });
  kept.bar.max = total || 1;
  kept.bar.value = completed;
  $("pull-state").textContent = status;
  const speed = (completed - kept.from) / ((performance.now() - kept.began) / 1000);
  const words = [`${bytes(completed)} of ${bytes(total)}`];
  if (completed < total && speed > 0) words.push(`${bytes(speed)}/s`, `${seconds((total - completed) / speed)} left`);
  kept.facts.textContent = words.join(" · ");
}

