"""Which files of a folder are images: walks class folders in a stable order and counts what it leaves out.

Nothing is decoded here. Names are kept as the file system gives them; `images.shown` makes them fit to print.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

from msgspec import Struct

from edgetune.data.images import shown
from edgetune.errors import DataError

IMAGE_SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".mpo",
})  # fmt: skip
# Pictures all the same, that can't be read: losing them is losing data, unlike a text file beside the images.
PICTURE_SUFFIXES = frozenset({
    ".heic", ".heif", ".hif", ".avif", ".avifs", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".svg", ".svgz", ".raw",
    ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".psd", ".psb", ".xcf",
    ".eps", ".ico", ".tga", ".exr", ".hdr", ".dds", ".pcx", ".dcm", ".npy", ".npz", ".mat", ".qoi", ".fits",
})  # fmt: skip
_JUNK = frozenset({
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__", "@eadir", "#recycle",
    "$recycle.bin", "lost+found", "system volume information",
})  # fmt: skip
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")


class Found(Struct, frozen=True):
    """One image file. `path` is relative to the data folder, with "/"; `size` in bytes; `inode` is 0 where there is none."""

    path: str
    size: int
    mtime_ns: int
    inode: int = 0


class ClassFiles(Struct, frozen=True):
    """The files of one class folder: images in a stable order, and what was left out, counted a suffix or name."""

    images: tuple[Found, ...]
    pictures: Counter[str]
    others: Counter[str]
    junk: Counter[str]


def is_junk(name: str) -> bool:
    """Hidden files and folders (`.DS_Store`, `._x.jpg`, `.ipynb_checkpoints`) and what file managers leave behind."""
    return name.startswith(".") or name.casefold() in _JUNK


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What `folder` holds, sorted by name. Raises: DataError when it can't be read."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(folder)} can't be read: {reason}. Check the path and its permissions.") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one that can be followed."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, a share that is gone
        return False


def class_folders(folder: str) -> dict[str, list[str]]:
    """The class folders in `folder`: name -> paths, sorted by name.

    Names are composed (NFC): a Mac stores "é" as two characters, and its copies must not become other classes.
    """
    found: dict[str, list[str]] = {}
    for entry in entries(folder):
        if is_folder(entry) and not is_junk(entry.name):
            found.setdefault(unicodedata.normalize("NFC", entry.name), []).append(entry.path)
    return dict(sorted(found.items()))


def walk_class(root: str, folders: list[str]) -> ClassFiles:
    """All files under the folders of one class, sub-folders included; links are followed, each real folder once."""
    images: list[Found] = []
    pictures, others, junk = Counter[str](), Counter[str](), Counter[str]()
    for path, name in _files(folders, junk):
        suffix = PurePath(name).suffix.lower()
        try:
            status = Path(path).stat()
        except OSError:  # a link to nothing: named as a bad image later, if it claims to be one
            status = None
        if status is not None and not stat.S_ISREG(status.st_mode):
            others["not a regular file"] += 1
        elif suffix in IMAGE_SUFFIXES or _has_signature(path, name):
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            images.append(
                Found(relative, status.st_size, status.st_mtime_ns, status.st_ino) if status else Found(relative, 0, 0)
            )
        else:
            (pictures if suffix in PICTURE_SUFFIXES else others)[suffix or "no suffix"] += 1
    return ClassFiles(tuple(sorted(images, key=lambda image: image.path)), pictures, others, junk)


def _files(folders: list[str], junk: Counter[str]) -> Iterator[tuple[str, str]]:
    seen: set[tuple[int, int]] = set()
    waiting = list(reversed(folders))
    while waiting:
        folder = waiting.pop()
        try:
            status = Path(folder).stat()
        except OSError as error:
            raise DataError(f"{shown(folder)} can't be read: {error.strerror}.") from error
        # Some file systems have no inodes and say 0: their folders can't be told apart, and have no links either.
        if status.st_ino and (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        inner = []
        for entry in entries(folder):
            if is_junk(entry.name):
                junk["._ files" if entry.name.startswith("._") else entry.name] += 1
            elif is_folder(entry):
                inner.append(entry.path)
            else:
                yield entry.path, entry.name
        waiting += reversed(inner)


def _has_signature(path: str, name: str) -> bool:
    """Whether a file without a known suffix is an image by its first bytes. Editors' backups (`x.png~`) are not."""
    if name.lower().endswith(("~", ".bak", ".orig", ".tmp", ".part", ".crdownload")):
        return False
    try:
        with Path(path).open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def plural(count: int, thing: str) -> str:
    """`1 image`, `3 images`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def counted(counts: Counter[str]) -> str:
    """`.heic 3, .txt 1`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = f" and {len(ordered) - 8} other kinds" if len(ordered) > 8 else ""
    return ", ".join(f"{shown(name)} {count}" for name, count in ordered[:8]) + rest
