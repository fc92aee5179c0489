// What is kept in this browser (IndexedDB), under the artifacts it belongs to: parameters every epoch, pictures once.

const STORES = ["parameters", "pictures"];

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("edgetune", 1);
    request.onupgradeneeded = () => STORES.forEach((name) => request.result.createObjectStore(name));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function inStore(name, mode, work) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(name, mode);
      const request = work(transaction.objectStore(name));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = () => reject(transaction.error);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

export const keep = (store, key, value) => inStore(store, "readwrite", (object) => object.put(value, key));

export const kept = (store, key) => inStore(store, "readonly", (object) => object.get(key));

export async function forget(key) {
  for (const store of STORES) await inStore(store, "readwrite", (object) => object.delete(key));
}
