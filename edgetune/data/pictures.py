"""Pictures as the model's preprocessing leaves them, on disk for this process alone: what the scan decodes is decoded once.

To decode and resize a photograph takes longer than a small model's frozen blocks do; to read 150 KB takes next to nothing.
What finds no room is decoded again.
"""

from __future__ import annotations

import threading
from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgetune.data.preprocess import Preprocess
from edgetune.scratch import Scratch

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)

_ABSENT = -1


class Pictures:
    """Of images 0, 1, 2 ..., those that were put here. Several threads may ask at once; no error reaches them."""

    def __init__(self, folder: Path, preprocess: Preprocess, limit_bytes: int) -> None:
        """`folder` exists and is on the disk that is to hold them; no more than `limit_bytes` are written."""
        self._shape = (preprocess.height_px, preprocess.width_px, 3)
        self._records = Scratch(folder, preprocess.height_px * preprocess.width_px * 3, limit_bytes)
        self._numbers = array("i")  # of each image, that of its record
        self._lock = threading.Lock()

    @property
    def written_bytes(self) -> int:
        return self._records.written_bytes

    def get(self, image: int) -> Pixels | None:
        with self._lock:
            if image >= len(self._numbers) or self._numbers[image] == _ABSENT:
                return None
            pixels = np.empty(self._shape, np.uint8)
            return pixels if self._records.read(self._numbers[image], pixels.reshape(-1)) else None

    def put(self, image: int, pixels: Image.Image) -> None:
        """`pixels`: as `resize_and_crop` makes them."""
        with self._lock:
            self._numbers.extend([_ABSENT] * (image + 1 - len(self._numbers)))
            if self._numbers[image] != _ABSENT:
                return
            number = self._records.add(pixels.tobytes())
            if number is not None:
                self._numbers[image] = number

    def close(self) -> None:
        """Give the disk back. What is asked for from now on is not here."""
        with self._lock:
            self._records.close()
