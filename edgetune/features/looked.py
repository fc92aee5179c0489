"""What looking for the split put through the blocks below it already: for the cache to take instead of computing it again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgetune.scratch import Scratch

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]


class LookedFeatures:
    """Of some images, in order: all tokens that leave block `blocks`, and how the class token attends to each in it.

    On disk, for this process alone, in the cache's own precision: to the bit what the cache would hold.
    """

    def __init__(
        self,
        folder: Path,
        images: Places,
        *,
        blocks: int,
        tokens: int,
        width: int,
        precision: Literal["float16", "float32"],
        limit_bytes: int,
    ) -> None:
        """`images`: those that will be added, by their place in the data set. `folder`, `limit_bytes`: as for `Scratch`."""
        self.blocks, self.precision, self.has_class_rows = blocks, precision, True
        self._images = images
        self._record = np.dtype([("values", precision, (tokens, width)), ("class_row", np.float32, (tokens,))])
        self._records = Scratch(folder, self._record.itemsize, limit_bytes)

    @property
    def written_bytes(self) -> int:
        return self._records.written_bytes

    def add(self, values: Floats, class_rows: Floats) -> None:
        """The next images': (n, tokens, width), and (n, tokens) or nothing. What comes after one with a value that the
        precision can't hold is left out.
        """
        self.has_class_rows &= class_rows.size > 0
        rows = class_rows if class_rows.size else np.zeros(values.shape[:2], np.float32)
        for value, row in zip(values, rows, strict=True):
            record = np.empty((), self._record)
            with np.errstate(over="ignore"):
                record["values"][...] = value
            record["class_row"][...] = row
            if np.any(np.isinf(record["values"]) & np.isfinite(value)) or self._records.add(record.tobytes()) is None:
                self._records.limit_to_what_is_there()
                return

    def has(self, images: Places) -> npt.NDArray[np.bool_]:
        """Which of `images` are here."""
        return np.isin(images, self._images[: self._records.count])

    def read(self, images: Places) -> tuple[Floats, Floats] | None:
        """(values, class rows) of images that are here; None if they can't be read back."""
        numbers = {int(image): number for number, image in enumerate(self._images[: self._records.count])}
        found = np.empty(len(images), self._record)
        for place, image in enumerate(images):
            if not self._records.read(numbers[int(image)], found[place : place + 1]):
                return None
        return found["values"].astype(np.float32), np.ascontiguousarray(found["class_row"])

    def close(self) -> None:
        """Give the disk back: nothing is here any more."""
        self._images = self._images[:0]
        self._records.close()
