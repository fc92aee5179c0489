"""The folder of a store: what is in it, how much more may be, and who is writing to it."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgetune.checkpoint.files import TEMP_PREFIX
from edgetune.features.chunks import CHUNK_SUFFIX
from edgetune.units import format_bytes

# A temporary file lives for as long as a chunk takes to be written.
_LEFT_BEHIND_SECONDS = 3600.0
_WAIT_SECONDS = 0.02
# What a file system takes for a file besides its bytes: the last block, the name, the map of blocks.
_FILE_OVERHEAD_BYTES = 64 * 1024


@contextmanager
def locked(folder: Path, *, wait_seconds: float) -> Iterator[bool]:
    """Hold `folder` against other writers, so that two of them together stay within one limit.

    Yields whether it is held. It may be not, where a file system has no locks or another holds it for longer than
    `wait_seconds`; writing is safe even then, as files have names of their own. The kernel gives the lock back however
    a process ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, wait_seconds)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait_seconds: float) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    end = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EWOULDBLOCK, errno.EACCES} or time.monotonic() >= end:
                return False
            time.sleep(_WAIT_SECONDS)
        else:
            return True


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of killed processes, as far as that goes.

    Who writes holds the lock, so with the lock in hand there is nobody they could belong to; without it, age tells.
    """
    with locked(folder, wait_seconds=0.0) as held:
        for name in os.listdir(folder):  # noqa: PTH208 - names alone, which are short
            if name.startswith(TEMP_PREFIX):
                with suppress(OSError):
                    path = folder / name
                    if held or time.time() - path.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                        path.unlink()


def chunk_names(folder: Path) -> list[str]:
    if not folder.exists():
        return []
    return sorted(name for name in os.listdir(folder) if name.endswith(CHUNK_SUFFIX))  # noqa: PTH208


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if another process has removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def bytes_in(folder: Path) -> int:
    """Bytes of all files in `folder`, whosever they are; 0 if it is not there."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # renamed meanwhile
                total += entry.stat().st_size
    return total


def room_bytes(folder: Path, limit_bytes: int | None, keep_free_bytes: int) -> tuple[int, str]:
    """Bytes that may be added to `folder`, and what stands in the way of more."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    # Some network file systems report a size of zero: writing will tell.
    disk = usage.free - keep_free_bytes - _FILE_OVERHEAD_BYTES if usage.total else 2**62
    reason = os.strerror(errno.ENOSPC)
    if keep_free_bytes:
        reason += f" ({format_bytes(keep_free_bytes)} are kept free for the run)"
    if limit_bytes is not None and limit_bytes - bytes_in(folder) < disk:
        return limit_bytes - bytes_in(folder), f"--cache-limit {format_bytes(limit_bytes)}"
    return disk, reason
