"""Take anonymous memory until the kernel ends this process: the last line says how much one process can have here."""

from __future__ import annotations

import mmap

STEP_BYTES = 2**20


def main() -> None:
    held = []
    while True:
        memory = mmap.mmap(-1, STEP_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, STEP_BYTES, mmap.PAGESIZE):
            memory[page] = 1
        held.append(memory)
        print(len(held) * STEP_BYTES, flush=True)


if __name__ == "__main__":
    main()
