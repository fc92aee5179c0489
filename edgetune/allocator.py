"""glibc keeps freed blocks, which a cap on resident memory counts; this makes it give them back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from edgetune.units import GIB, KIB, MIB, format_bytes

# Measured by `benchmarks/allocators.py`, whose table says what each threshold costs: of the default's peak this one
# leaves 0.78 on DeiT-Tiny at 1.4 times the CPU time, and 0.91 on the bundled model at 1.6 times. A small model's tensors
# lie below 64 KiB once tokens are pruned, and their changing sizes leave holes where they are not mapped one by one.
MMAP_THRESHOLD_BYTES = 32 * KIB
MALLOC_ARENAS = 2
# The largest that glibc takes (half of an arena's heap, on 64 bits), and more than any heap has free at its top.
_KEPT_THRESHOLDS_BYTES = 32 * MIB, GIB
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h (glibc 2.33 and newer)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def heap_bytes() -> int | None:
    """What the C heap has in use now, freed blocks that it keeps not counted; None where glibc can't tell."""
    mallinfo = _mallinfo()
    if mallinfo is None:
        return None
    info = mallinfo()
    return int(info.uordblks) + int(info.hblkhd)


@lru_cache(maxsize=1)
def _mallinfo() -> Any:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    function.restype = _MallInfo
    return function


def limit_allocator(mmap_threshold_bytes: int = MMAP_THRESHOLD_BYTES) -> str:
    """Make glibc give freed blocks of this size and larger back to the kernel; returns what was done, for the report.

    Call it before other threads start: the arenas they have made stay. It saves peak and costs time, see
    MMAP_THRESHOLD_BYTES.
    """
    libc = _glibc()
    if libc is None:
        return "unchanged: the C library is not glibc"
    # The threshold first: some versions refuse one above half a heap (32 MiB), and then nothing was changed.
    settings = (
        (_M_MMAP_THRESHOLD, mmap_threshold_bytes),
        (_M_TRIM_THRESHOLD, mmap_threshold_bytes),
        (_M_ARENA_MAX, MALLOC_ARENAS),
    )
    if not all(libc.mallopt(option, value) for option, value in settings):
        return f"unchanged: glibc refuses a threshold of {format_bytes(mmap_threshold_bytes)}"
    return f"glibc returns freed blocks from {format_bytes(mmap_threshold_bytes)} on, {MALLOC_ARENAS} arenas"


@contextmanager
def freed_blocks_kept(most_bytes: int) -> Iterator[Callable[[], None]]:
    """While this is entered, glibc keeps what is freed for what comes next: no page of it is asked for twice.

    For work that takes the same sizes again and again. What it leaves for good, however small, can lie between what is
    freed, which then is of no use to larger blocks, and the heap grows: so the function that is yielded is to be called
    after each turn, and once the heap has grown by more than `most_bytes` all is given back, now and from then on.
    """
    libc, before = _glibc(), arena_bytes()
    if libc is None or before is None:
        yield lambda: None
        return
    kept = True

    def give_back() -> None:
        nonlocal kept
        kept = False
        limit_allocator()
        libc.malloc_trim(0)

    def check() -> None:
        if kept and (arena_bytes() or 0) - before > most_bytes:
            give_back()

    threshold, top = _KEPT_THRESHOLDS_BYTES
    libc.mallopt(_M_MMAP_THRESHOLD, threshold)
    libc.mallopt(_M_TRIM_THRESHOLD, top)
    try:
        yield check
    finally:
        if kept:
            give_back()


def arena_bytes() -> int | None:
    """What the C heap has of the system beside blocks that are mapped one by one; None where glibc can't tell."""
    mallinfo = _mallinfo()
    return None if mallinfo is None else int(mallinfo().arena)


def _glibc() -> Any:
    """The C library, if it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - a symbol only glibc has
    except (AttributeError, OSError, TypeError):
        return None
    return libc
