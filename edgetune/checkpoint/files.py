"""Files that are either whole or not there: written aside in the same folder, fsynced, renamed.

The order matters after a power cut: the bytes must be on the disk before the name points at them (fsync, then rename),
and the folder must be too before anybody relies on the name (rename, then fsync of the folder).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from edgetune.errors import RunFolderError
from edgetune.units import format_bytes

# What is half-made starts with this, so that whoever opens the folder next knows what to remove.
TEMP_PREFIX = ".tmp-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def write_atomically(
    path: Path, data: bytes | Callable[[BinaryIO], object], *, expected_bytes: int | None = None
) -> None:
    """Write `path` so that it holds either what it held before or all of `data`, whatever happens meanwhile.

    `data` may be a function that writes to the binary file it is given; `expected_bytes` then says how many, so that a
    disk with less free is refused before anything is written. A new file gets the mode `open` would give it.

    Raises: RunFolderError for a full or read-only disk and everything else the system refuses; `path` is as before and
    nothing half-written is left.
    """
    size = len(data) if isinstance(data, bytes) else expected_bytes or 0
    require_free_bytes(path.parent, size)
    with disk_errors(path):
        temporary = temporary_path(path.parent)
        try:
            with temporary.open("xb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    data(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def require_free_bytes(folder: Path, needed_bytes: int) -> None:
    """Raises: RunFolderError if the disk of `folder` has less than `needed_bytes` free, naming both."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return  # writing will tell why
    if usage.total and usage.free < needed_bytes:  # some network file systems report a size of zero
        raise RunFolderError(
            f"{folder} needs {format_bytes(needed_bytes)}, its disk has {format_bytes(usage.free)} free. "
            "Free some space, or choose a folder on another disk."
        )


def sync_folder(folder: Path) -> None:
    """Put names made, renamed or removed in `folder` on the disk; where a system syncs no folders, nothing happens."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)


def temporary_path(folder: Path) -> Path:
    """A new name in `folder`; short, so that it is allowed wherever the final name is."""
    return folder / f"{TEMP_PREFIX}{os.urandom(6).hex()}"


def remove_half_made(folder: Path) -> None:
    """Remove what a killed process left half-made in `folder`, as far as that goes.

    Only for who holds the run folder's lock.
    """
    if not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        if entry.name.startswith(TEMP_PREFIX):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):
                    entry.unlink()


@contextmanager
def disk_errors(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn what the system refuses into a RunFolderError that says what to try."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "Free some space, or choose a folder on another disk."
        elif error.errno in _FORBIDDEN:
            hint = "Check the permissions, or choose another folder."
        elif error.errno == errno.EIO:
            hint = "The disk may be failing; choose a folder on another one."
        else:
            hint = "Check the path."
        raise RunFolderError(f"{path} can't be {verb}: {error.strerror or error}. {hint}") from error
