// A question to a model, and its answer while it comes. Nothing here touches the page.

import { stream } from "./api.js";
import { base64 } from "./pictures.js";

const encoded = new WeakMap(); // a picture's blob -> its base64

/** The conversation up to and with `turn`, as model number `column` of the chat had it. */
async function messages(chat, turn, column, pictures, system) {
  const told = system ? [{ role: "system", content: system }] : [];
  for (const each of chat.turns) {
    const answer = each.answers[column] ?? each.answers[0];
    if (each !== turn && !answer?.text) continue; // a question that got no answer was not part of the talk
    told.push({ role: "user", content: each.text, images: await images(each, pictures) });
    if (each === turn) return told;
    told.push({ role: "assistant", content: answer.text });
  }
  return told;
}

/** The base64 texts of a turn's pictures. */
export async function images(turn, pictures) {
  const texts = [];
  for (const id of turn.pictures) {
    const { blob } = pictures.get(id);
    if (!encoded.has(blob)) encoded.set(blob, await base64(blob));
    texts.push(encoded.get(blob));
  }
  return texts;
}

/**
 * Asks one model and writes into its answer as pieces come; `changed(answer)` after each.
 * Never rejects: how it ended stands in the answer's `state`, `error` and `note`.
 */
export async function ask({ chat, turn, column, pictures, settings, signal, changed }) {
  const answer = turn.answers[column];
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  Object.assign(answer, { text: "", state: "writing", error: null, note: null, timings: null });
  changed(answer);
  try {
    const body = { model: answer.model, stream: true, ...settings.request };
    body.messages = await messages(chat, turn, column, pictures, settings.system);
    if (turn.format) body.format = turn.format;
    let first = null;
    for await (const part of stream("api/chat", body, signal)) {
      const piece = part.message?.content ?? "";
      if (piece) first ??= since();
      answer.text += piece;
      if (part.done) finish(answer, part, first, since());
      changed(answer);
    }
    if (answer.state === "writing") fail(answer, "The answer broke off: the server closed the connection.");
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else fail(answer, error.message);
  }
  changed(answer);
}

function fail(answer, words) {
  answer.state = "failed";
  answer.error = words;
}

function finish(answer, part, firstS, wholeS) {
  answer.state = "done";
  if (part.done_reason === "length") answer.note = "It ends here because it reached the most tokens allowed.";
  const inSeconds = (nanoseconds) => (nanoseconds ?? 0) / 1e9;
  const encodeS = inSeconds(part.pumice?.encode_duration);
  answer.timings = {
    firstS,
    totalS: inSeconds(part.total_duration) || wholeS,
    loadS: inSeconds(part.load_duration),
    encodeS,
    readS: Math.max(0, inSeconds(part.prompt_eval_duration) - encodeS), // Ollama's figure holds the pictures too
    writeS: inSeconds(part.eval_duration),
    promptTokens: part.prompt_eval_count ?? 0,
    cachedTokens: part.pumice?.cached_tokens ?? 0,
    imageTokens: part.pumice?.image_tokens ?? [],
    answerTokens: part.eval_count ?? 0,
  };
}
