"""Which entry lies where: arrays only, no object for an image, so that a large data set's index stays small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune.features.chunks import ID_TYPE, Crcs, Ids
from edgetune.features.keys import ID_BYTES

_ABSENT, _STAGED = -1, -2

Ranks = npt.NDArray[np.int32]


class Stored(NamedTuple):
    """Where to find one of the entries asked for."""

    position: int  # in what was asked
    slot: int  # in its chunk
    crc: int


class Index:
    """Places (an image's number in the data set) and ranks (its id's number among the sorted ids).

    An image that occurs twice has two places and one rank; entries are held by rank. 13 bytes a place, and 16 more
    until `drop_ids`.
    """

    def __init__(self, ids: Sequence[bytes] | npt.NDArray[np.uint8]) -> None:
        """Raises: ValueError if an id has not 16 bytes."""
        self._ids, self.ranks = _sorted_once(_id_array(ids))
        # The entry of rank r lies in row `_row[r]`, counted through all chunks; chunk c has the rows from `_starts[c]`.
        self._row = np.full(len(self._ids), _ABSENT, np.int32)
        self._crc = np.zeros(len(self._ids), np.uint32)
        self._starts = np.zeros(1, np.int64)
        self._names: list[str] = []
        self.present = np.zeros(len(self.ranks), np.bool_)

    def missing_of(self, ids: Ids) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Ranks of those of a chunk's ids that are in the data set and not stored yet, and their slots in that chunk."""
        if not len(self._ids):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        ranks = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        slots = np.flatnonzero((self._ids[ranks] == ids) & (self._row[ranks] < 0))
        return ranks[slots], slots

    def enter(self, name: str, ranks: npt.NDArray[Any], slots: npt.NDArray[Any], crcs: Crcs, count: int) -> None:
        """The entries `ranks` are at `slots` of the chunk `name`, which holds `count` in all."""
        start = self._starts[-1]
        # In this order, as another thread may be reading: it must find the chunk that a row points into.
        self._names.append(name)
        self._starts = np.append(self._starts, start + count)
        self._crc[ranks] = crcs
        self._row[ranks] = start + slots

    def stage(self, rank: int) -> bool:
        """Note that this entry waits to be written; False if it does already, or is stored."""
        if self._row[rank] != _ABSENT:
            return False
        self._row[rank] = _STAGED
        return True

    def is_staged(self, ranks: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        staged: npt.NDArray[np.bool_] = self._row[ranks] == _STAGED
        return staged

    def unstage(self, ranks: npt.NDArray[Any]) -> None:
        """Of these, what was not entered is absent again."""
        self._row[ranks[self._row[ranks] == _STAGED]] = _ABSENT

    def update_present(self) -> None:
        self.present[:] = self._row[self.ranks] >= 0

    def forget(self) -> None:
        self._row[:] = _ABSENT
        self.update_present()

    def ids(self, ranks: npt.NDArray[Any]) -> Ids:
        ids: Ids = self._ids[ranks]
        return ids

    def drop_ids(self) -> None:
        """Nothing more will be entered."""
        self._ids = self._ids[:0].copy()

    def by_chunk(self, places: npt.NDArray[np.int64]) -> Iterator[tuple[str, int, list[Stored]]]:
        """For each chunk needed: its name, how many entries it holds, and those asked for.

        Raises: ValueError if one is not stored.
        """
        ranks = self.ranks[places]
        rows = self._row[ranks]
        if np.any(rows < 0):
            raise ValueError(f"the features of image {places[int(np.argmax(rows < 0))]} are not stored")
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            start, end = (int(row) for row in self._starts[number : number + 2])
            asked = np.flatnonzero(numbers == number)
            found = [Stored(int(i), int(rows[i]) - start, int(self._crc[ranks[i]])) for i in asked]
            yield self._names[number], end - start, found


def _id_array(ids: Sequence[bytes] | npt.NDArray[np.uint8]) -> Ids:
    if isinstance(ids, np.ndarray):
        if ids.dtype != np.uint8 or ids.shape[1:] != (ID_BYTES,):
            raise ValueError(f"ids are {ids.dtype} {ids.shape}, wanted uint8 (n, {ID_BYTES}): 16 bytes each")
        return np.ascontiguousarray(ids).reshape(-1).view(ID_TYPE)
    if any(len(one) != ID_BYTES for one in ids):
        raise ValueError(f"an id has {ID_BYTES} bytes")
    return np.frombuffer(b"".join(ids), ID_TYPE)


def _sorted_once(ids: Ids) -> tuple[Ids, Ranks]:
    """The ids sorted, each once, and for each place its rank among them. As numpy's unique, in half the memory."""
    order = np.argsort(ids)
    ids = ids[order]
    is_first = np.ones(len(ids), np.bool_)
    is_first[1:] = ids[1:] != ids[:-1]
    ranks = np.empty(len(ids), np.int32)
    ranks[order] = np.cumsum(is_first, dtype=np.int32) - 1
    return ids if is_first.all() else ids[is_first], ranks
