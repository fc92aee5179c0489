"""Bytes and durations: parse and format. The only place that converts units; everywhere else they stand in names."""

from __future__ import annotations

import re

from edgetune.errors import UsageError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
}  # fmt: skip
_BYTES = re.compile(r"\s*(\d{1,20})(\.\d{1,20})?\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """`"512MiB"`, `"1.5 GB"`, `"900M"` (binary, as in docker) or a plain number of bytes -> bytes.

    Raises: UsageError for anything else, zero included.
    """
    match = _BYTES.fullmatch(text)
    factor = _FACTORS.get(match.group(3).lower()) if match else None
    # Whole numbers stay integers: a float loses bytes from 2**53 on.
    size = int(match.group(1)) * factor + round(float(match.group(2) or 0) * factor) if match and factor else 0
    if not 0 < size < 2**62:
        raise UsageError(f"{text!r} is not a size in bytes. Try 512MiB, 1.5GB or 536870912.")
    return size


def format_bytes(size: float) -> str:
    """Bytes -> `"412 MiB"`; three significant figures, binary units."""
    if size < 0:
        return "-" + format_bytes(-size)
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor * (10 if unit == "GiB" else 1):
            value = size / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{size:.0f} B" if size < KIB else f"{size / KIB:.1f} KiB"


def format_memory(used_bytes: float, cap_bytes: float) -> str:
    """`"412 MiB of 900 (46 %)"`, as the progress line shows it."""
    return f"{format_bytes(used_bytes)} of {cap_bytes / MIB:.0f} ({100 * used_bytes / cap_bytes:.0f} %)"


def format_seconds(seconds: float) -> str:
    """Seconds -> `"8.3 s"`, `"2 min 05 s"`, `"1 h 12 min"`."""
    if seconds < 59.95:  # what would be shown as 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(value: float) -> str:
    """Large counts with an SI suffix: `1.2 T`, `340 G`, `5.7 M`."""
    for suffix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:  # what rounds up to it in three figures
            return f"{value / factor:.3g} {suffix}"
    return f"{value:.3g}"
