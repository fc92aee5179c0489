"""What the runtime of a run cost here, kept by the versions it was made of: measured by each run, read by `edgetune plan`.

A small JSON file in the cache folder. One that is missing, damaged or of other versions is as good as none: a plan then
says that its figure is a default.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import msgspec

from edgetune import system

_FILE = "runtimes.json"
_MOST_ENTRIES = 32


# What a runtime is made of: timm is imported only for models that it alone can build.
TORCH: tuple[str, ...] = ("torch",)
TORCH_AND_TIMM: tuple[str, ...] = ("torch", "timm")
ORT: tuple[str, ...] = ("onnxruntime-training-cpu",)


def versions(packages: tuple[str, ...] = TORCH) -> str | None:
    """`torch 2.14.1 + timm 1.0.31, Python 3.11 on x86_64`, without importing them; None where one is not installed."""
    from importlib import metadata

    try:
        made_of = " + ".join(f"{name} {metadata.version(name)}" for name in packages)
    except metadata.PackageNotFoundError:
        return None
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{made_of}, Python {python} on {platform.machine()}"


def remembered(versions: str | None, folder: Path | None = None) -> int | None:
    """Bytes that the last run with these versions measured here."""
    return None if versions is None else _read(folder or system.cache_dir()).get(versions)


def remember(versions: str | None, runtime_bytes: int, folder: Path | None = None) -> None:
    """Keep a measured runtime. A folder that can't be written is left as it is."""
    if versions is None:
        return
    folder = folder or system.cache_dir()
    known = _read(folder)
    if known.get(versions) == runtime_bytes:
        return
    known.pop(versions, None)
    known = dict([*known.items(), (versions, runtime_bytes)][-_MOST_ENTRIES:])
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_FILE}-{os.getpid()}"
        temporary.write_bytes(msgspec.json.encode(known))
        temporary.replace(folder / _FILE)


def _read(folder: Path) -> dict[str, int]:
    try:
        found = msgspec.json.decode((folder / _FILE).read_bytes(), type=dict[str, int])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
    return {name: size for name, size in found.items() if 0 < size < 2**44}
