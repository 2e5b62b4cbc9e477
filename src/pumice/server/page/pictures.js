// Picture files as they are sent: upright, at most 4096 pixels a side, in a format that the server reads.

import { newId } from "./history.js";

const LONGEST_SIDE_PX = 4096;
const THUMB_PX = 512; // longest side of what the chat shows
const LARGEST_PNG_BYTES = 16e6; // a scaled photo in PNG beyond this goes as JPEG
const SENT_AS_THEY_ARE = ["jpeg", "png", "webp", "gif", "bmp", "avif"]; // what every server reads

const KINDS = [
  ["jpeg", (b) => b[0] === 0xff && b[1] === 0xd8],
  ["png", (b) => text(b, 1, 4) === "PNG"],
  ["gif", (b) => text(b, 0, 4) === "GIF8"],
  ["webp", (b) => text(b, 0, 4) === "RIFF" && text(b, 8, 12) === "WEBP"],
  ["bmp", (b) => text(b, 0, 2) === "BM"],
  ["tiff", (b) => ["II*\0", "MM\0*"].includes(text(b, 0, 4))],
  ["avif", (b) => text(b, 4, 8) === "ftyp" && /^avi[fs]/.test(text(b, 8, 12))],
  ["heic", (b) => text(b, 4, 8) === "ftyp" && /^(he[iv][cxms]|mif1|msf1)/.test(text(b, 8, 12))],
];

const text = (b, from, to) => String.fromCharCode(...b.slice(from, to));

/** A file cannot become a picture; the message says why. */
export class NoPicture extends Error {}

/**
 * {id, name, blob, thumb, width, height, scaledFrom}; thumb is null where this browser cannot show the format, and the
 * server may know it. The file is read once and whole: on disk it may change or go before the question is sent.
 */
export async function prepared(given) {
  const name = given.name || "pasted picture";
  const file = await whole(given, name);
  const kind = await kindOf(file);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    if (kind === "heic" || kind === "tiff") return picture(name, file, null, 0, 0);
    if (kind) throw new NoPicture(`${name} could not be opened: it is damaged, or larger than this browser can show.`);
    throw new NoPicture(`${name} is not a picture that can be read. JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF and HEIC can.`);
  }
  const { width, height } = bitmap;
  try {
    const scale = Math.min(1, LONGEST_SIDE_PX / Math.max(width, height));
    const known = SENT_AS_THEY_ARE.includes(kind);
    const blob = scale === 1 && known ? file : await redrawn(bitmap, scale, kind);
    const thumb = await drawn(bitmap, Math.min(1, THUMB_PX / Math.max(width, height)), "image/jpeg");
    const kept = picture(name, blob, thumb, Math.round(width * scale), Math.round(height * scale));
    if (scale < 1) kept.scaledFrom = [width, height];
    return kept;
  } finally {
    bitmap.close();
  }
}

const picture = (name, blob, thumb, width, height) => ({ id: newId(), name, blob, thumb, width, height });

async function whole(file, name) {
  try {
    return new Blob([await file.arrayBuffer()], { type: file.type });
  } catch {
    throw new NoPicture(`${name} could not be read from this machine. Is it a folder, or gone?`);
  }
}

async function kindOf(file) {
  const head = new Uint8Array(await file.slice(0, 16).arrayBuffer());
  return KINDS.find(([, fits]) => fits(head))?.[0] ?? null;
}

async function redrawn(bitmap, scale, kind) {
  if (kind === "jpeg" || kind === "heic") return drawn(bitmap, scale, "image/jpeg");
  const png = await drawn(bitmap, scale, "image/png");
  return png.size > LARGEST_PNG_BYTES ? drawn(bitmap, scale, "image/jpeg") : png;
}

function drawn(bitmap, scale, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // what is transparent is white for the model too
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => {
    const done = (blob) => (blob ? resolve(blob) : reject(new NoPicture("The picture is too large for this browser.")));
    canvas.toBlob(done, type, 0.95);
  });
}

/** The bytes in base64, without a `data:` prefix: how Ollama's API takes a picture. */
export function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new NoPicture("A picture of this chat could not be read from the browser's store."));
    reader.readAsDataURL(blob);
  });
}

const addresses = new WeakMap();

/** An address for <img> of a picture's small form. */
export function address(of) {
  if (!of.thumb) return null;
  if (!addresses.has(of)) addresses.set(of, URL.createObjectURL(of.thumb));
  return addresses.get(of);
}
