// What a model sees of pictures: the whole picture as its tower gets it, the tiles, and the tokens they take.

import { post } from "./api.js";
import { $, el, plural, show } from "./dom.js";
import { images } from "./talk.js";

/** Opens the dialog for the pictures of a turn (or of the composer), once for each model. */
export async function see(models, turn, pictures) {
  const body = $("seen-body");
  const waiting = el("p", { class: "quiet", role: "status" }, "Cutting the pictures as the model does…");
  body.replaceChildren(waiting);
  const controller = new AbortController();
  const closed = show($("seen")).then(() => controller.abort());
  try {
    const texts = await images(turn, pictures);
    const names = turn.pictures.map((id) => pictures.get(id).name);
    for (const model of models) {
      const answer = await post("pumice/see", { model, images: texts }, controller.signal);
      waiting.before(modelView(model, answer.images, names, models.length > 1));
    }
  } catch (error) {
    if (error.name !== "AbortError") waiting.before(el("p", { class: "problem", role: "alert" }, error.message));
  }
  waiting.remove();
  return closed;
}

function modelView(model, seen, names, named) {
  const total = seen.reduce((sum, each) => sum + each.tokens, 0);
  const title = named || seen.length > 1 ? el("h3", {}, `${model}: ${plural(total, "token")}`) : null;
  return el("section", { "aria-label": `Seen by ${model}` }, title, seen.map((each, at) => pictureView(each, names[at])));
}

function pictureView({ width, height, tokens, rows, columns, views }, name) {
  const [whole, ...tiles] = views;
  const cut = tiles.length ? `the whole picture and ${columns} × ${rows} tiles` : "the whole picture, once";
  const grid = el("div", { class: "tiles", role: "group", "aria-label": `${columns} × ${rows} tiles` });
  grid.style.setProperty("--columns", columns);
  tiles.forEach((tile, at) => {
    const place = `row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}`;
    grid.append(el("img", { src: safe(tile), alt: `Tile in ${place} of ${name}` }));
  });
  return el(
    "figure",
    { class: "seen-picture" },
    el("figcaption", {}, el("strong", {}, name), ` ${width} × ${height} pixels. The model sees ${cut}: `, el("strong", {}, plural(tokens, "token")), "."),
    el(
      "div",
      { class: tiles.length ? "views" : "views single" },
      el("div", {}, el("p", { class: "small-caps" }, "Whole"), el("img", { class: "whole", src: safe(whole), alt: `${name}, whole, as the model sees it` })),
      tiles.length ? el("div", {}, el("p", { class: "small-caps" }, "Tiles"), grid) : null,
    ),
  );
}

/** Only pictures that came within the answer are shown. */
const safe = (address) => (String(address).startsWith("data:image/") ? address : "");
