"""Pictures as the model's preprocessing leaves them, on disk for this process alone: what the scan decodes is decoded once.

To decode and resize a photograph takes longer than a small model's frozen blocks do; to read 150 KB takes next to nothing.
The file has no name, so that nothing of it is left, however the process ends. What finds no room is decoded again.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from array import array
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgetune.data.preprocess import Preprocess

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)

_ABSENT = -1


class Pictures:
    """Of images 0, 1, 2 ..., those that were put here. Several threads may ask at once; no error reaches them."""

    def __init__(self, folder: Path, preprocess: Preprocess, limit_bytes: int) -> None:
        """`folder` exists and is on the disk that is to hold them; no more than `limit_bytes` are written."""
        self._shape = (preprocess.height_px, preprocess.width_px, 3)
        self._bytes = preprocess.height_px * preprocess.width_px * 3
        self._room = limit_bytes // self._bytes
        self._slots = array("i")  # of each image, its place in the file
        self._count = 0
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        if self._room > 0:
            try:
                self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115 - as long as this lives
            except OSError:
                return
            self._closed = weakref.finalize(self, self._file.close)

    @property
    def written_bytes(self) -> int:
        return self._count * self._bytes

    def get(self, image: int) -> Pixels | None:
        with self._lock:
            if self._file is None or image >= len(self._slots) or self._slots[image] == _ABSENT:
                return None
            pixels = np.empty(self._shape, np.uint8)
            try:
                self._file.seek(self._slots[image] * self._bytes)
                whole = self._file.readinto(pixels.data) == self._bytes  # type: ignore[attr-defined]
            except OSError:
                whole = False
            return pixels if whole else None

    def put(self, image: int, pixels: Image.Image) -> None:
        """`pixels`: as `resize_and_crop` makes them."""
        with self._lock:
            if self._file is None or self._count >= self._room:
                return
            self._slots.extend([_ABSENT] * (image + 1 - len(self._slots)))
            if self._slots[image] != _ABSENT:
                return
            try:
                self._file.seek(self._count * self._bytes)
                whole = self._file.write(pixels.tobytes()) == self._bytes
            except OSError:  # a full disk: what is there stays
                whole = False
            if not whole:
                self._room = self._count
                return
            self._slots[image] = self._count
            self._count += 1

    def close(self) -> None:
        """Give the disk back. What is asked for from now on is not here."""
        with self._lock:
            if self._file is not None:
                self._closed()
                self._file = None
