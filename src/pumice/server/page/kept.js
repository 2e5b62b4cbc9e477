// Small things that the browser keeps. One that keeps nothing (some block all storage) has them until the page is closed.

function area(name) {
  try {
    const storage = window[name];
    storage.getItem("pumice");
    return storage;
  } catch {
    const values = new Map();
    return {
      getItem: (key) => values.get(key) ?? null,
      setItem: (key, value) => values.set(key, value),
      removeItem: (key) => values.delete(key),
    };
  }
}

/** Kept for good, and kept as long as the tab. */
export const local = area("localStorage");
export const session = area("sessionStorage");

/** A kept JSON value; `otherwise` where there is none, or where it was damaged. */
export function parsed(key, otherwise) {
  try {
    return JSON.parse(local.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
