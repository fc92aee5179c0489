// What can go wrong, in words: what was wanted, what was found, what to try.

export class PageError extends Error {
  // `fatal`: the runtime is in no known state afterwards, a new worker is needed.
  constructor(message, { fatal = false } = {}) {
    super(message);
    this.name = "PageError";
    this.fatal = fatal;
  }
}

export const MIB = 1024 * 1024;

export function mebibytes(bytes) {
  return `${(bytes / MIB).toFixed(bytes < 10 * MIB ? 1 : 0)} MiB`;
}

// C++ errors arrive as bare numbers, or as text of the runtime's source. `budget` knows whether memory was refused.
export function inWords(error, doing, budget) {
  if (error instanceof PageError) return error;
  if (budget?.refused) {
    const { wantedBytes, capBytes } = budget.refused;
    return new PageError(
      `Memory was refused while ${doing}: ${mebibytes(wantedBytes)} were wanted and the cap is ` +
        `${mebibytes(capBytes)}. Try a smaller batch, fewer pictures, or to train less of the model.`,
      { fatal: true },
    );
  }
  const text = typeof error === "number" ? `error ${error}` : String(error?.message ?? error);
  if (/out of memory|bad_alloc|allocation failed|could not allocate|Array buffer allocation/i.test(text)) {
    return new PageError(
      `The browser refused memory while ${doing} (${text}). Close other tabs, or try a smaller batch or to train less of ` +
        "the model.",
      { fatal: true },
    );
  }
  return new PageError(`The runtime stopped while ${doing}: ${text.slice(0, 300)}.`, { fatal: true });
}
