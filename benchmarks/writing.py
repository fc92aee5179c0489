"""What every benchmark's table needs: the machine it was made on, and Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("edgetune", "torch", "timm", "numpy")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Raises: ValueError for a row with more or fewer cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} cells for {len(columns)} columns: {row}")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def machine() -> str:
    """The hardware and the versions that figures depend on, in a line."""
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = [f"{platform.system()} {platform.release()}", " ".join(platform.libc_ver()), f"huge pages {_huge_pages()}"]
    return f"{_processor()} ({platform.machine()}, {cores} cores), {', '.join(system)}; {', '.join(versions)}, Python {platform.python_version()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or "unknown processor"


def _huge_pages() -> str:
    """The kernel's setting: `always` rounds what an allocator maps up to 2 MiB."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return setting.partition("[")[2].partition("]")[0] or "unknown"
