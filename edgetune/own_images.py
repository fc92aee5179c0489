"""Which images a run is of: kept in its folder by name and content, so that a run that goes on can say what has changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote_to_bytes

from edgetune.checkpoint import write_atomically
from edgetune.data import DataFolder, shown, some

IMAGES_FILE = "images.txt"


def images_sha256(data: DataFolder) -> str:
    """What tells a set of images from another: relative paths, sizes and labels, in the order that numbers them."""
    digest = hashlib.sha256()
    for images in (data.train, data.val):
        for path, label in zip(images.paths, images.labels, strict=True):
            try:
                size = os.stat(os.path.join(images.root, path)).st_size  # noqa: PTH116, PTH118 - names may be no text
            except OSError:
                size = -1
            digest.update(b"%d %d %s\0" % (label, size, os.fsencode(path)))
        digest.update(b"\0")
    return digest.hexdigest()


def write_images(folder: Path, data: DataFolder) -> None:
    """A line an image: the digest of its bytes and its path, as a URL has it, for names that are no text.

    Raises: RunFolderError.
    """

    def write(file: BinaryIO) -> None:
        file.writelines(_lines(data))

    write_atomically(folder / IMAGES_FILE, write)


def changes(folder: Path, data: DataFolder) -> str | None:
    """What became of the images that the run in `folder` started with, in words: the first of each kind by name. None where
    nothing did, or it can't be told: an earlier version kept no such file.
    """
    try:
        with (folder / IMAGES_FILE).open("rb") as file:
            if all(there == now for there, now in zip_longest(file, _lines(data))):
                return None
            file.seek(0)
            before = dict(map(_parsed, file))
    except (OSError, ValueError):
        return None
    return _compared(before, dict(map(_parsed, _lines(data))), {bad.path for bad in data.bad}) if before else None


def _compared(before: dict[str, bytes], now: dict[str, bytes], unreadable: set[str]) -> str | None:
    """Both by path; `unreadable` as they are printed."""
    lost = [path for path in before if path not in now]
    kinds = {
        "changed": [path for path, digest in before.items() if now.get(path, digest) != digest],
        "unreadable": [path for path in lost if shown(path) in unreadable],
        "not there any more": [path for path in lost if shown(path) not in unreadable],
        "new": [path for path in now if path not in before],
    }
    told = [f"{some([shown(path) for path in paths], 1)} ({kind})" for kind, paths in kinds.items() if paths]
    return ", ".join(told) or None


def _lines(data: DataFolder) -> Iterator[bytes]:
    for images in (data.train, data.val):
        for path, content in zip(images.paths, images.contents, strict=True):
            digest = content.partition("/")[0]  # at whatever scale it is decoded
            yield f"{digest} {quote(os.fsencode(path))}\n".encode("ascii")


def _parsed(line: bytes) -> tuple[str, bytes]:
    """Raises: ValueError for a line that is none."""
    digest, path = line.split()
    return os.fsdecode(unquote_to_bytes(path)), digest
