// Chats and their pictures, kept in this browser (IndexedDB) and nowhere else.
//
// A chat:    {id, title, created, changed, models, turns: [turn]}
// A turn:    {text, pictures: [id], format, answers: [answer]}      one answer a model
// An answer: {model, text, state, error, timings}                   state: writing, done, stopped, failed

const STORES = ["chats", "pictures"];
let database = null;

export const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;

/** Opens the store. Rejects where the browser keeps nothing, as in some private windows. */
export function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("pumice", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" });
      request.result.createObjectStore("pictures", { keyPath: "id" }).createIndex("chat", "chat");
    };
    request.onsuccess = () => {
      database = request.result;
      database.onversionchange = () => database.close();
      resolve();
    };
    request.onerror = () => reject(request.error);
  });
}

/** Runs `work` on the two stores in one transaction: all of it is kept, or nothing. */
function transaction(mode, work) {
  if (!database) return Promise.resolve(undefined);
  return new Promise((resolve, reject) => {
    const running = database.transaction(STORES, mode);
    const request = work(...STORES.map((name) => running.objectStore(name)));
    running.oncomplete = () => resolve(request?.result);
    running.onabort = () => reject(running.error);
  });
}

/** All chats, the last changed first. */
export async function list() {
  const chats = (await transaction("readonly", (kept) => kept.getAll())) ?? [];
  return chats.sort((a, b) => b.changed - a.changed);
}

export const load = (id) => transaction("readonly", (kept) => kept.get(id));

export const pictures = (chat) => transaction("readonly", (_, kept) => kept.index("chat").getAll(chat));

/** Keeps a chat, and pictures that are new in it. */
export function save(chat, added = []) {
  return transaction("readwrite", (chats, kept) => {
    chats.put(chat);
    for (const { id, name, blob, thumb, width, height } of added) {
      kept.put({ id, chat: chat.id, name, blob, thumb, width, height });
    }
  });
}

export function remove(id) {
  return transaction("readwrite", (chats, kept) => {
    chats.delete(id);
    const cursor = kept.index("chat").openKeyCursor(id);
    cursor.onsuccess = () => {
      if (!cursor.result) return;
      kept.delete(cursor.result.primaryKey);
      cursor.result.continue();
    };
  });
}

export function removeAll() {
  return transaction("readwrite", (chats, kept) => {
    chats.clear();
    kept.clear();
  });
}
