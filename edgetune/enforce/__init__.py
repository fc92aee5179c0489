"""A memory limit that the kernel holds (limits.py), the signs that it was met (signs.py), and what makes meeting it
cost nothing (rehearsal.py).

How a failed step is replayed is the training loop's business.
"""

from __future__ import annotations

from edgetune.enforce.limits import EnforceKind, Limit, by_rlimit, enforce, left_bytes, room_bytes, short_of_memory
from edgetune.enforce.rehearsal import rehearse
from edgetune.enforce.signs import is_out_of_memory

__all__ = [
    "EnforceKind",
    "Limit",
    "by_rlimit",
    "enforce",
    "is_out_of_memory",
    "left_bytes",
    "rehearse",
    "room_bytes",
    "short_of_memory",
]
