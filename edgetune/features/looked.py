"""What looking for the split put through the blocks below it already: for the cache to take instead of computing it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgetune.scratch import Scratch

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]


class LookedFeatures:
    """Of some images, in order: all tokens that leave block `blocks`, and their scores, by which some may be dropped.

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
        scores: tuple[str, ...],
        precision: Literal["float16", "float32"],
        limit_bytes: int,
    ) -> None:
        """`scores`: their names, none where no token is dropped. `images`: those that will be added, by their place in the data set. `folder`, `limit_bytes`: as for `Scratch`."""
        self.blocks, self.scores, self.precision = blocks, scores, precision
        self._images = images
        self._record = np.dtype([("values", precision, (tokens, width)), ("scores", np.float32, (len(scores), tokens))])
        self._records = Scratch(folder, self._record.itemsize, limit_bytes)

    @property
    def written_bytes(self) -> int:
        return self._records.written_bytes

    @property
    def count(self) -> int:
        """Of the images, the first so many are here."""
        return self._records.count

    def add(self, values: Floats, scores: Mapping[Any, Floats]) -> None:
        """The next images': (n, tokens, width), and of each score (n, tokens). What comes after one with a value that the
        precision can't hold is left out.
        """
        for place, value in enumerate(values):
            record = np.empty((), self._record)
            with np.errstate(over="ignore"):
                record["values"][...] = value
            for number, name in enumerate(self.scores):
                record["scores"][number] = scores[name][place]
            if np.any(np.isinf(record["values"]) & np.isfinite(value)) or self._records.add(record.tobytes()) is None:
                self._records.limit_to_what_is_there()
                return

    def has(self, images: Places) -> npt.NDArray[np.bool_]:
        """Which of `images` are here."""
        return np.isin(images, self._images[: self._records.count])

    def read(self, images: Places) -> tuple[Floats, dict[str, Floats]] | None:
        """Values and scores, as they were added, of images that are here; None if they can't be read back."""
        numbers = {int(image): number for number, image in enumerate(self._images[: self._records.count])}
        found = np.empty(len(images), self._record)
        for place, image in enumerate(images):
            if not self._records.read(numbers[int(image)], found[place : place + 1]):
                return None
        scores = {name: np.ascontiguousarray(found["scores"][:, number]) for number, name in enumerate(self.scores)}
        return found["values"].astype(np.float32), scores

    def close(self) -> None:
        """Give the disk back: nothing is here any more."""
        self._images = self._images[:0]
        self._records.close()
