// A cap that holds: the runtime's heap may grow up to it, less what the page itself holds, and no further.

import { PageError, mebibytes } from "./errors.js";

const WASM_PAGE_BYTES = 65536;
export const RUNTIME_LIMIT_BYTES = 65535 * WASM_PAGE_BYTES; // of the runtime's own: 32-bit addresses

const RUNTIME_START_BYTES = 256 * WASM_PAGE_BYTES;

export class Budget {
  constructor(capBytes) {
    this.capBytes = Math.min(capBytes ?? RUNTIME_LIMIT_BYTES, RUNTIME_LIMIT_BYTES);
    this.heldBytes = 0; // by the page, outside of the heap: pictures and cached features
    this.memory = null;
    this.refused = null; // the last growth that was refused, until one is granted
  }

  get heapBytes() {
    return this.memory === null ? 0 : this.memory.buffer.byteLength;
  }

  // Count what the page is about to hold. Throws where it would pass the cap.
  hold(bytes, what) {
    this.check(bytes, what);
    this.heldBytes += bytes;
  }

  check(bytes, what) {
    const wanted = this.heapBytes + this.heldBytes + bytes;
    if (wanted > this.capBytes) {
      throw new PageError(
        `No room for ${what}: ${mebibytes(wanted)} would be in use and the cap is ${mebibytes(this.capBytes)}. ` +
          "Try fewer or smaller pictures.",
      );
    }
  }

  release(bytes) {
    this.heldBytes = Math.max(0, this.heldBytes - bytes);
  }
}

// Before the runtime is imported: it makes its memory with `new WebAssembly.Memory`, grows it by that object's `grow`,
// and tells nobody how large it is.
export function capRuntimeMemory(budget) {
  if (budget.capBytes < RUNTIME_START_BYTES) {
    throw new PageError(
      `The runtime begins with ${mebibytes(RUNTIME_START_BYTES)} and the cap is ${mebibytes(budget.capBytes)}. ` +
        "Export the page again with a larger --ram-cap.",
      { fatal: true },
    );
  }
  const Plain = WebAssembly.Memory;
  function Memory(descriptor) {
    if (!descriptor.maximum) return new Plain(descriptor); // the runtime looks for the class of shared buffers so
    const pages = Math.floor(budget.capBytes / WASM_PAGE_BYTES);
    const maximum = Math.max(descriptor.initial, Math.min(descriptor.maximum, pages));
    const memory = new Plain({ ...descriptor, maximum });
    memory.grow = (more) => {
      const wantedBytes = memory.buffer.byteLength + more * WASM_PAGE_BYTES + budget.heldBytes;
      if (wantedBytes > budget.capBytes) {
        budget.refused = { wantedBytes, capBytes: budget.capBytes };
        throw new RangeError("over the cap");
      }
      const before = Plain.prototype.grow.call(memory, more);
      budget.refused = null;
      return before;
    };
    budget.memory = memory;
    return memory;
  }
  Memory.prototype = Plain.prototype;
  WebAssembly.Memory = Memory;
}
