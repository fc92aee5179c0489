"""The bundled sample: scikit-learn's digits as PNGs in class folders, unpacked once into the user's cache folder."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
import zlib
from importlib import resources
from pathlib import Path, PurePosixPath

from edgetune import system
from edgetune.errors import DataError

_LARGEST_SAMPLE_BYTES = 64 * 2**20  # unpacked; the sample has a few hundred KiB
_REINSTALL = "The installation is damaged: install edgetune again."


def bundled_sample(cache_dir: Path | None = None) -> Path:
    """The folder of the sample (`train/` and `val/`), unpacked if it is not there yet and mended if it was damaged.

    It lies in `cache_dir`, else in $EDGETUNE_CACHE_DIR, else in the user's cache folder, under a name that holds the
    archive's hash. Raises: DataError when the archive is damaged or the cache folder can't be written.
    """
    try:
        archive = (resources.files("edgetune") / "assets" / "digits.zip").read_bytes()
    except OSError as error:
        raise DataError(f"the bundled sample is missing ({error.strerror}). {_REINSTALL}") from error
    return unpack(archive, cache_dir or system.cache_dir())


def unpack(archive: bytes, cache_dir: Path) -> Path:
    """Unpack a zip of images beside its target and rename it there; whoever comes first of several processes wins."""
    members = _members(archive)
    target = cache_dir / f"sample-{hashlib.sha256(archive).hexdigest()[:16]}"
    if _complete(target, members):
        return target
    temporary = None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache_dir, prefix="unpacking-"))
        fresh = temporary / "fresh"
        _write(fresh, members)
        _put_in_place(fresh, target, temporary / "damaged", members)
    except OSError as error:
        raise DataError(
            f"the sample can't be unpacked into {cache_dir}: {error.strerror or error}. "
            "Set EDGETUNE_CACHE_DIR to a folder that can be written."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _members(archive: bytes) -> dict[str, bytes]:
    """What the archive holds: path -> bytes. Nothing in it may point outside its folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            infos = [info for info in file.infolist() if not info.is_dir()]
            if sum(info.file_size for info in infos) > _LARGEST_SAMPLE_BYTES:
                raise DataError(f"the bundled sample is larger than it can be. {_REINSTALL}")
            for info in infos:
                path = PurePosixPath(info.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
                    raise DataError(
                        f"the bundled sample names a file outside its folder: {info.filename!r}. {_REINSTALL}"
                    )
            return {info.filename: file.read(info) for info in infos}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DataError(f"the bundled sample can't be read: {error}. {_REINSTALL}") from error


def _complete(target: Path, members: dict[str, bytes]) -> bool:
    """Whether every file is there with the right bytes, and no other: a stray image would be trained on."""
    try:
        found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        return found == set(members) and all((target / name).read_bytes() == data for name, data in members.items())
    except OSError:
        return False


def _write(folder: Path, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _put_in_place(fresh: Path, target: Path, aside: Path, members: dict[str, bytes]) -> None:
    """Rename `fresh` to `target`; what is damaged there goes `aside` first. Another process may be doing the same."""
    for attempt in range(3):
        try:
            fresh.rename(target)
            return
        except OSError:
            if _complete(target, members):
                return
            if attempt == 2:
                raise
        if os.path.lexists(target):
            try:
                target.rename(aside.with_name(f"{aside.name}-{attempt}"))
            except FileNotFoundError:  # the other process was quicker
                continue
