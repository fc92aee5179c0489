// The worker, from the page's side: calls that return promises, and a new worker where the old one can't go on.

import { PageError } from "./core/errors.js";

export class Work {
  constructor(told) {
    this.told = told;
    this.waiting = new Map();
    this.start();
  }

  start() {
    this.worker?.terminate();
    this.failAll(new PageError("The worker was started anew."));
    this.worker = new Worker(new URL(`worker.js${location.search}`, import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => {
      if (data.told) return this.told(data);
      const { resolve, reject } = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (data.error) reject(new PageError(data.error.message, data.error));
      else resolve(data.value);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      this.failAll(new PageError(`The worker failed: ${event.message ?? "it can't be loaded"}.`, { fatal: true }));
    };
  }

  failAll(error) {
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }

  call(task, request = {}) {
    const id = crypto.randomUUID?.() ?? String(Math.random());
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, task, ...request });
    });
  }
}
