"""A run's folder: made before any training, never an existing one's overwriting, written by one process at a time."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from edgetune.checkpoint.files import TEMP_PREFIX, disk_errors, remove_half_made, sync_folder, write_atomically
from edgetune.errors import RunFolderError

_LOCK = ".lock"
_MAX_NAME = 64
_MAX_SAME_SECOND = 1000


def create_run_folder(
    base: Path | None, model: str, device: str, output: Path | None, now: datetime | None = None
) -> Path:
    """Make the folder of a new run and try that files can be written there.

    It is `output` exactly (which may exist if it is empty), else `<base>/<time>-<model>-<device>` with `runs` as the
    default base, and `-2`, `-3` ... behind it when that exists.

    Raises: RunFolderError if `output` holds anything, or the folder can't be made or written.
    """
    if output is not None:
        folder = output
        with _path_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(entry.name != _LOCK and not entry.name.startswith(TEMP_PREFIX) for entry in folder.iterdir()):
                raise RunFolderError(
                    f"{folder} is not empty, and a run is never overwritten. Name another folder for --output, or go "
                    f"on with the run in it: --resume {folder}."
                )
    else:
        moment = datetime.now() if now is None else now
        name = f"{moment:%Y%m%d-%H%M%S}-{_plain(model, 'model')}-{_plain(device, 'device')}"
        folder = _make_new((base or Path("runs")) / name)
    with _path_errors(folder):
        sync_folder(folder.parent)
        probe = folder / f"{TEMP_PREFIX}probe"
        write_atomically(probe, b"edgetune")
        probe.unlink(missing_ok=True)
    return folder


@contextmanager
def open_run_folder(folder: Path) -> Iterator[Path]:
    """Hold a run folder for writing, and clear away what a killed process left half-made in it.

    The lock is the kernel's: it goes with the process however that ends. A file system without locks gives none.

    Raises: RunFolderError if it is no folder, can't be written, or another process holds it.
    """
    with _path_errors(folder):
        if not folder.is_dir():
            raise RunFolderError(f"{folder} is not a run folder. Name the folder that a run printed when it started.")
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _path_errors(folder):
            _lock(descriptor, folder)
            remove_half_made(folder)
            remove_half_made(folder / "checkpoints")
        yield folder
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            return  # some network file systems lock nothing
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        raise RunFolderError(
            f"{folder} is being written by another run (process {holder or 'unknown'}). "
            "Wait until it ends, or choose another folder."
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _make_new(wanted: Path) -> Path:
    with _path_errors(wanted):
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, _MAX_SAME_SECOND):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    raise RunFolderError(f"{wanted} and {_MAX_SAME_SECOND} more like it exist. Name a folder with --output.")


def _plain(name: str, fallback: str) -> str:
    """`name` as a part of a folder's name: no slashes, no spaces, nothing a shell or another system trips over."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_MAX_NAME].strip("-.") or fallback


@contextmanager
def _path_errors(folder: Path) -> Iterator[None]:
    try:
        with disk_errors(folder):
            yield
    except ValueError as error:  # a NUL in the path
        raise RunFolderError(f"{str(folder)!r} is not a path: {error}. Name another folder.") from error
