// The server: one way to ask it, what it says when it fails, and whether it is there at all.

import { session } from "./kept.js";

const ROOT = new URL("../", import.meta.url); // the page may lie behind a proxy under a path of its own
const KEY = "pumice.key";
const FIRST_PAUSE_S = 2;
const LONGEST_PAUSE_S = 15;
const PULSE_S = 20; // how often a visible page looks whether the server is still there

/** The server refused, in its own words. */
export class Refused extends Error {}
/** No answer came, or it broke off: the server is gone, or the way to it. */
export class Gone extends Error {}

/** Sends `gone` and `back`. */
export const presence = new EventTarget();

let isGone = false;
let pause = FIRST_PAUSE_S;
let timer = 0;
let askForKey = async () => null;
let asking = null;

/** `ask(words)` asks the person for a key and resolves with it, or with null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const get = async (path, signal) => (await request(path, { signal })).json();
export const post = async (path, body, signal) => (await request(path, { method: "POST", body, signal })).json();

/** The objects of a streamed answer as they come. An object with `error` is thrown as Refused. */
export async function* stream(path, body, signal) {
  const response = await request(path, { method: "POST", body, signal });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = done ? "" : lines.pop();
      for (const line of lines) if (line.trim()) yield parsed(line);
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    leave();
    throw new Gone("The connection to the server broke before the answer was whole.");
  }
}

function parsed(line) {
  let object;
  try {
    object = JSON.parse(line);
  } catch {
    throw new Refused("The server sent a line that is not JSON. Is something else listening at this address?");
  }
  if (object.error) throw new Refused(wordsOf(object));
  return object;
}

async function request(path, { method = "GET", body, signal }) {
  for (;;) {
    const key = session.getItem(KEY);
    const response = await fetched(path, method, body, signal, key);
    if (response.status === 401) {
      await newKey(key, await words(response));
      continue;
    }
    if (!response.ok) throw new Refused(await words(response));
    return response;
  }
}

async function fetched(path, method, body, signal, key) {
  const headers = { Accept: "application/json, application/x-ndjson" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    const text = body === undefined ? undefined : JSON.stringify(body);
    const response = await fetch(new URL(path, ROOT), { method, headers, body: text, signal, cache: "no-store" });
    come();
    return response;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    leave();
    throw new Gone("The server does not answer.");
  }
}

/** Several requests may be refused at once; the person is asked once. `used` is the key that was refused. */
async function newKey(used, why) {
  if (session.getItem(KEY) !== used) return; // another request has a new one already
  asking ??= askForKey(used ? why : "").finally(() => (asking = null));
  const key = await asking;
  if (key === null) throw new Refused(why);
  session.setItem(KEY, key);
}

async function words(response) {
  const text = await response.text().catch(() => "");
  try {
    const said = wordsOf(JSON.parse(text));
    if (said) return said;
  } catch {
    // Not JSON: a proxy's page, or nothing.
  }
  return `The server answered with ${response.status}${response.statusText ? ` (${response.statusText})` : ""}.`;
}

function wordsOf({ error, detail }) {
  const said = error?.message ?? error ?? detail;
  return typeof said === "string" ? said : said ? JSON.stringify(said) : "";
}

function come() {
  pause = FIRST_PAUSE_S;
  if (!isGone) return;
  isGone = false;
  clearTimeout(timer);
  presence.dispatchEvent(new Event("back"));
}

function leave() {
  if (isGone) return;
  isGone = true;
  presence.dispatchEvent(new Event("gone"));
  wait();
}

function wait() {
  clearTimeout(timer);
  timer = setTimeout(look, pause * 1000);
  pause = Math.min(pause * 1.5, LONGEST_PAUSE_S);
}

/** Looks whether the server is there. Any answer of its own will do, also a refusal. */
export async function look() {
  try {
    const response = await fetch(new URL("api/version", ROOT), { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if ([502, 503, 504].includes(response.status)) throw new Gone();
    come();
  } catch {
    if (isGone) wait();
    else leave();
  }
}

/** From now on a page in view notices by itself that the server went. */
export function keepLooking() {
  const seen = () => document.visibilityState === "visible" && !isGone && look();
  setInterval(seen, PULSE_S * 1000);
  document.addEventListener("visibilitychange", seen);
  addEventListener("online", look);
}
