"""The CPU allocator's own events: the truth that the memory model is held to. What reads them is in benchmarks/."""

from __future__ import annotations

import sys
from pathlib import Path

_BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
if _BENCHMARKS not in sys.path:
    sys.path.append(_BENCHMARKS)

from memory_model import live_growth_bytes, peak_growth_bytes, resting_bytes

__all__ = ["live_growth_bytes", "peak_growth_bytes", "resting_bytes"]
