"""A memory limit that the kernel holds (limits.py), and the signs that it was met (signs.py).

How a failed step is replayed is the training loop's business.
"""

from __future__ import annotations

from edgetune.enforce.limits import EnforceKind, Limit, enforce, left_bytes, short_of_memory
from edgetune.enforce.signs import is_out_of_memory

__all__ = ["EnforceKind", "Limit", "enforce", "is_out_of_memory", "left_bytes", "short_of_memory"]
