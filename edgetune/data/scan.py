"""Every image decoded once in full before the first step: half a JPEG passes `open` and `verify` and fails hours later.

Decoding is what the loader does, by the same function. What was found is kept by (path, size, mtime, inode), so the second
run on a folder starts at once. A digest of each file's bytes comes with it: it finds one picture in train and val,
linked or copied.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import msgspec
import PIL
from msgspec import Struct
from PIL import Image

from edgetune.data.files import Found
from edgetune.data.images import ImageHeader, UnreadableImage, check_size, decode
from edgetune.data.pictures import Pictures
from edgetune.data.preprocess import Preprocess, resize_and_crop

_CACHE_VERSION = 2


class Record(Struct, frozen=True, array_like=True):
    """What one decode told: the header and digest of a good image, or why it is bad (`reason` not empty)."""

    size: int
    mtime_ns: int
    digest: str = ""
    header: ImageHeader | None = None
    reason: str = ""
    inode: int = 0

    def is_of(self, image: Found) -> bool:
        """Whether the file is the one that was looked at, as far as can be told without reading it."""
        return (self.size, self.mtime_ns, self.inode) == (image.size, image.mtime_ns, image.inode)


class _Cache(Struct):
    version: int
    pillow: str  # another Pillow may read other files
    records: dict[str, Record]


def scan(
    root: str,
    images: Sequence[Found],
    *,
    preprocess: Preprocess | None = None,
    decode_budget_bytes: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    pictures: Pictures | None = None,
) -> list[Record]:
    """A record for each of `images`, in their order. `progress(done, total)` is called after each. `pictures` keeps what
    was decoded, as `preprocess` (which it then needs) leaves it, by the place in `images`.
    """
    cache_file = None if cache_dir is None else cache_dir / f"scan-{_folder_key(root)}.json"
    known = {} if cache_file is None else _read_cache(cache_file)
    records, news = [], 0
    try:
        for place, image in enumerate(images):
            key = quote(os.fsencode(image.path))
            record = known.get(key)
            if record is None or not record.is_of(image):
                record, keep, picture = _examine(root, image, preprocess, decode_budget_bytes)
                if keep:
                    known[key] = record
                    news += 1
                if picture is not None and pictures is not None and preprocess is not None:
                    with suppress(MemoryError):  # it is resized again where it is needed
                        pictures.put(place, resize_and_crop(picture, preprocess))
                del picture
            records.append(_checked(image.path, record, preprocess, decode_budget_bytes))
            if progress is not None:
                progress(place + 1, len(images))
    finally:  # an interrupted scan goes on where it stopped
        if cache_file is not None and news:
            _write_cache(cache_file, known)
    return records


def _examine(
    root: str, image: Found, preprocess: Preprocess | None, decode_budget_bytes: int | None
) -> tuple[Record, bool, Image.Image | None]:
    """Decode one image: what it told, whether another run may rely on that, and the picture."""
    path = Path(root, image.path)
    try:
        with warnings.catch_warnings():  # the scan runs before any thread is started
            warnings.simplefilter("ignore")  # what Pillow warns of is either refused here by name or harmless
            picture, header = decode(path, preprocess=preprocess, decode_budget_bytes=decode_budget_bytes)
        return Record(image.size, image.mtime_ns, _digest(path), header, inode=image.inode), True, picture
    except UnreadableImage as error:
        reason, lasting = error.reason, error.lasting
    except OSError as error:
        reason, lasting = error.strerror or "can't be read", False
    return Record(image.size, image.mtime_ns, reason=reason, inode=image.inode), lasting, None


def _checked(path: str, record: Record, preprocess: Preprocess | None, decode_budget_bytes: int | None) -> Record:
    """A remembered image may be over today's budget."""
    if record.header is None:
        return record
    try:
        check_size(path, record.header, preprocess, decode_budget_bytes)
    except UnreadableImage as error:
        return msgspec.structs.replace(record, digest="", header=None, reason=error.reason)
    return record


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _folder_key(root: str) -> str:
    return hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=12).hexdigest()


def _read_cache(path: Path) -> dict[str, Record]:
    """What an earlier scan found; nothing if there was none, or it is damaged, or another version's."""
    try:
        cache = msgspec.json.decode(path.read_bytes(), type=_Cache)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
    return cache.records if (cache.version, cache.pillow) == (_CACHE_VERSION, PIL.__version__) else {}


def _write_cache(path: Path, records: dict[str, Record]) -> None:
    """Written aside and renamed. A cache that can't be written costs time, not the run."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(_Cache(_CACHE_VERSION, PIL.__version__, records)))
        Path(temporary).replace(path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
