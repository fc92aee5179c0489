"""Records of one size on disk, for this process alone: what was worked out once and is wanted again.

The file has no name, so that nothing of it is left, however the process ends. No error reaches whoever uses it: what finds
no room, or can't be read back, is not there.
"""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt


class Scratch:
    """Records 0, 1, 2 ... in the order they were added. Not for several threads at once."""

    def __init__(self, folder: Path, record_bytes: int, limit_bytes: int) -> None:
        """`folder` exists and is on the disk that is to hold them; no more than `limit_bytes` are written."""
        self._bytes, self._room = record_bytes, max(0, limit_bytes) // record_bytes
        self.count = 0
        self._file: BinaryIO | None = None
        if self._room > 0:
            try:
                self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115 - as long as this lives
            except OSError:
                return
            self._closed = weakref.finalize(self, self._file.close)

    @property
    def written_bytes(self) -> int:
        return self.count * self._bytes

    def add(self, record: bytes) -> int | None:
        """The record's number, or None where there is no room."""
        assert len(record) == self._bytes
        if self._file is None or self.count >= self._room:
            return None
        try:
            self._file.seek(self.count * self._bytes)
            whole = self._file.write(record) == self._bytes
        except OSError:  # a full disk: what is there stays
            whole = False
        if not whole:
            self.limit_to_what_is_there()
            return None
        self.count += 1
        return self.count - 1

    def limit_to_what_is_there(self) -> None:
        self._room = self.count

    def read(self, number: int, into: npt.NDArray[np.generic[Any]]) -> bool:
        """Whether the record is there; then `into`, contiguous, holds its bytes."""
        if self._file is None or number >= self.count:
            return False
        try:
            self._file.seek(number * self._bytes)
            return bool(self._file.readinto(into.view(np.uint8).data) == self._bytes)  # type: ignore[attr-defined]
        except OSError:
            return False

    def close(self) -> None:
        """Give the disk back. What is asked for from now on is not here."""
        if self._file is not None:
            self._closed()
            self._file = None
