"""The share of a GPU's memory that torch's allocator may take, where there is one.

edgetune trains on the CPU; this bounds what else of the process might allocate on a GPU. On a board whose GPU shares the
RAM that is what the cap is about. Source: torch.cuda.set_per_process_memory_fraction, past which an allocation fails as an
error (`signs.py` knows its words).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def gpu_fraction(growth_bytes: int) -> Iterator[str]:
    """Bound torch's allocator on every GPU to `growth_bytes` for the length of a with block; what to say of it, "" without.

    Only where torch is loaded already, and sees a GPU.
    """
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_available():
        yield ""
        return
    said = []
    for number in range(cuda.device_count()):
        share = min(1.0, growth_bytes / cuda.get_device_properties(number).total_memory)
        cuda.set_per_process_memory_fraction(share, number)
        said.append(f"{share:.1%}")
    try:
        yield f", at most {', '.join(said)} of the GPU's memory"
    finally:
        for number in range(cuda.device_count()):
            cuda.set_per_process_memory_fraction(1.0, number)
