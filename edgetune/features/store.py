"""The store of one key: which images' features are there, adding the others in chunks, reading any of them back.

Nothing here makes a run fail for want of space: what can't be stored is not there, and `full` says why.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgetune.checkpoint.files import write_atomically
from edgetune.errors import FeaturesDamaged, FeaturesOverflow, RunFolderError
from edgetune.features import chunks
from edgetune.features.folder import bytes_in, chunk_names, locked, remove_left_behind, room_bytes, size_of
from edgetune.features.index import Index
from edgetune.features.keys import FeatureKey

KEY_FILE = "key.json"
_UNREADABLE = "Cached features can't be read back:"

Progress = Callable[[int, int], None]
Places = Sequence[int] | npt.NDArray[np.integer[Any]]


class FeatureStore:
    """Features of the images `ids`, named by their place in that list; made by `open`.

    In memory: 13 bytes a place and 16 more until all are there, one entry to read into, and while entries are added
    one chunk (`chunk_bytes`, or an entry where that is larger); for as long as chunks are checked 1 MiB (or an entry)
    and a chunk's header. One thread may read while another adds.

    Several stores, of this process or of others, may add to one folder at once: each takes what the others wrote before
    it writes itself, so that an entry is written once.

    Attributes:
        folder: where the files of this key are.
        notes: what was wrong with the files that were found, a sentence each.
        present: (len(ids),) whether `read` has it; entries that wait in memory for their chunk are not.
        stored_bytes: on disk for this key as of the last look, entries of images not wanted included.
        written_bytes: written by this store since it was opened.
        full: why nothing more is stored, or None.
        meets_another: whether someone else has added entries that were missing here since it was opened.
    """

    notes: tuple[str, ...]
    present: npt.NDArray[np.bool_]
    stored_bytes: int
    written_bytes: int
    full: str | None
    meets_another: bool

    def __init__(
        self,
        folder: Path,
        key: FeatureKey,
        ids: Sequence[bytes] | npt.NDArray[np.uint8],
        limit_bytes: int | None,
        keep_free_bytes: int,
        chunk_bytes: int | None,
    ) -> None:
        self.folder, self.key, self.notes, self.full = folder, key, (), None
        self.stored_bytes = self.written_bytes = 0
        self.meets_another = False
        self._limit_bytes, self._keep_free_bytes = limit_bytes, keep_free_bytes
        self._chunk_bytes = chunk_bytes
        self._key_sha256, self._entry_bytes = key.sha256(), key.entry_bytes
        self._index = Index(ids)
        self.present = self._index.present
        self._seen: set[str] = set()  # names of chunks, those of no use included
        self._staging: npt.NDArray[Any] | None = None
        self._staged = np.empty(0, np.int32)  # ranks
        self._staged_count = 0
        self._buffer: npt.NDArray[np.uint8] | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        key: FeatureKey,
        ids: Sequence[bytes] | npt.NDArray[np.uint8],
        *,
        limit_bytes: int | None = None,
        keep_free_bytes: int = 0,
        chunk_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> FeatureStore:
        """The store of `key` below `folder`, after every checksum in it was checked.

        Damaged chunks, and those of another key, are removed and said in `notes`. Writes nothing, so that a folder that
        can't be written serves what it has.

        Args:
            ids: 16 bytes an image (see `entry_id`), as a list or an array (n, 16).
            limit_bytes: no more than this on disk for this key, all files counted. What is there already stays.
            keep_free_bytes: of the disk, for what else the run writes to it.
            chunk_bytes: what waits in memory while entries are added; 8 MiB where it is not said.
            progress: told the bytes checked and the bytes to check.

        Raises: ValueError if an id has not 16 bytes. Never for the disk: `full` says what is wrong with it.
        """
        store = cls(folder / key.folder_name(), key, ids, limit_bytes, keep_free_bytes, chunk_bytes)
        try:
            store._look(progress or (lambda done, total: None))
        except OSError as error:
            store._stop(_reason(error))
            store._update_present()
        return store

    def _look(self, progress: Progress) -> None:
        if self.folder.exists():
            remove_left_behind(self.folder)
            names = chunk_names(self.folder)
            sizes = [size_of(self.folder / name) for name in names]
            buffer = self._check_buffer()
            done, total = 0, sum(sizes)
            for name, size in zip(names, sizes, strict=True):
                self._take(name, buffer)
                done += size
                progress(done, total)
            self.stored_bytes = bytes_in(self.folder)
        self._update_present()
        if not self.is_whole:
            fits, reason = self._room()
            if not fits:
                self._stop(reason)

    def _check_buffer(self) -> memoryview:
        return memoryview(bytearray(self._entry_bytes * max(1, chunks.CHECK_BYTES // self._entry_bytes)))

    def _take(self, name: str, buffer: memoryview, *, useful_only: bool = False) -> bool:
        """Enter what a chunk holds into the index if all of it is whole; else remove it. Whether anything of it was missing.

        `useful_only`: where nothing was, its entries are not read.
        """
        path = self.folder / name
        self._seen.add(name)
        try:
            with path.open("rb", buffering=0) as file:
                header = chunks.read_header(file, self._key_sha256, self._entry_bytes)
                ranks, slots = self._index.missing_of(header.ids)
                if len(ranks) or not useful_only:
                    chunks.check_entries(file, header, buffer, self._entry_bytes)
        except FileNotFoundError:
            return False  # another process removed it meanwhile
        except (chunks.DamagedChunk, OSError) as error:
            what = str(error) if isinstance(error, chunks.DamagedChunk) else f"can't be read ({_reason(error)})"
            lost = error.entries if isinstance(error, chunks.DamagedChunk) else 0
            note = f"{path} {what}"
            note += f": up to {lost} entries are computed again." if lost else ": it is not used."
            self.notes += (note,)
            # What can't be read now may be later; what is damaged stays damaged.
            if isinstance(error, chunks.DamagedChunk):
                try:
                    path.unlink()
                except OSError as refused:
                    self.notes += (f"{path} can't be removed: {_reason(refused)}.",)
            return False
        if len(ranks):
            self._index.enter(name, ranks, slots, header.crcs[slots], len(header.ids))
        return bool(len(ranks))

    def _take_new(self) -> None:
        """What others have written since this store looked last."""
        names = [name for name in chunk_names(self.folder) if name not in self._seen]
        if names:
            buffer = self._check_buffer()
            taken = [self._take(name, buffer, useful_only=True) for name in names]
            self.meets_another |= any(taken)

    def _update_present(self) -> None:
        self._index.update_present()
        if self.is_whole:
            # Only what is added needs these.
            self._index.drop_ids()
            self._staging = None

    @property
    def is_whole(self) -> bool:
        """Whether every image's features can be read."""
        return bool(self.present.all())

    def missing(self) -> npt.NDArray[np.int64]:
        """Places to compute, in order; of images with the same id the first, as all of them are then there."""
        places = np.flatnonzero(~self.present)
        _, first = np.unique(self._index.ranks[places], return_index=True)
        return places[np.sort(first)].astype(np.int64)

    def add(self, indices: Places, values: npt.NDArray[np.float32]) -> None:
        """Keep `values` (n, stored_tokens, width) for the places `indices`; what is there already is left as it is.

        They are written a chunk at a time; `flush` writes the rest. Once `full` is set, nothing happens.

        Raises: FeaturesOverflow if a finite value turns infinite in float16 (from 65520 on); what came before it is
        kept. ValueError for another shape.
        """
        wanted = (len(indices), self.key.stored_tokens, self.key.width)
        if values.shape != wanted:
            raise ValueError(f"features have the shape {values.shape}, wanted {wanted}")
        for place, value in zip(indices, values, strict=True):
            if self.full is not None:
                return
            if self._staging is None:
                if self.is_whole:
                    return
                shape = (chunks.entries_per_chunk(self._entry_bytes, self._chunk_bytes), *wanted[1:])
                self._staging = np.empty(shape, self.key.dtype)
                self._staged = np.empty(len(self._staging), np.int32)
            rank = int(self._index.ranks[place])
            if not self._index.stage(rank):
                continue
            staged = self._staging[self._staged_count]
            with np.errstate(over="ignore"):
                staged[...] = value
            self._staged[self._staged_count] = rank
            if self.key.precision == "float16" and np.any(np.isinf(staged) & np.isfinite(value)):
                self._index.unstage(self._staged[self._staged_count : self._staged_count + 1])
                raise FeaturesOverflow(
                    f"A feature of image {int(place)} is {float(np.abs(value[np.isfinite(value)]).max()):.6g}, and "
                    "float16 ends at 65504. Keep the features in float32."
                )
            self._staged_count += 1
            if self._staged_count == len(self._staging):
                self.flush()

    def flush(self) -> None:
        """Write what was added and is not on the disk yet, by whoever, as far as it fits."""
        if self._staging is None or not self._staged_count:
            return
        ranks = self._staged[: self._staged_count]
        self._staged_count = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_new()  # may be much, for which no other should wait
            with locked(self.folder, wait_seconds=30.0):
                self._take_new()
                wanted = self._only_staged(ranks)
                fits, reason = self._room()
                stored = min(fits, wanted)
                self._write(ranks[:stored], self._staging[:stored])
                self.stored_bytes = bytes_in(self.folder)
                if stored < wanted:
                    self._stop(reason)
        except (OSError, RunFolderError) as error:
            self._stop(_reason(error))
        finally:
            self._index.unstage(ranks)
            self._update_present()

    def _only_staged(self, ranks: npt.NDArray[np.int32]) -> int:
        """Move what still waits to be written to the front, of `ranks` and of their entries. How many that are."""
        assert self._staging is not None
        waiting = np.flatnonzero(self._index.is_staged(ranks))
        for to, origin in enumerate(waiting):  # in place: a copy would be a second chunk in memory
            if to != origin:
                ranks[to], self._staging[to] = ranks[origin], self._staging[origin]
        return len(waiting)

    def _write(self, ranks: npt.NDArray[np.int32], entries: npt.NDArray[Any]) -> None:
        if not len(ranks):
            return
        key_file = self.folder / KEY_FILE
        if not key_file.exists():
            text = self.key.as_text()
            write_atomically(key_file, text)
            self._wrote(len(text))
        path = chunks.new_chunk(self.folder)
        self._seen.add(path.name)
        crcs = chunks.write_chunk(path, self._key_sha256, self._index.ids(ranks), entries, self._wrote)
        self._index.enter(path.name, ranks, np.arange(len(ranks)), crcs, len(ranks))

    def _wrote(self, size: int) -> None:
        self.written_bytes += size

    def _room(self) -> tuple[int, str]:
        """How many entries may be added now, and what stands in the way of more."""
        room, reason = room_bytes(self.folder, self._limit_bytes, self._keep_free_bytes)
        if not (self.folder / KEY_FILE).exists():
            room -= len(self.key.as_text())
        return chunks.fitting_entries(room, self._entry_bytes), reason

    def _stop(self, reason: str) -> None:
        self.full = reason
        self._staging = None

    def read(self, indices: Places, out: npt.NDArray[np.float32]) -> None:
        """Read the features of the places `indices` into `out` (n, stored_tokens, width).

        Raises: FeaturesDamaged if they are gone, no longer match their checksum or can't be read: what to do about it is
        the caller's to say. ValueError if they are not present or `out` has another shape.
        """
        wanted = (len(indices), self.key.stored_tokens, self.key.width)
        if out.shape != wanted:
            raise ValueError(f"features are read into the shape {out.shape}, wanted {wanted}")
        if self._buffer is None:
            self._buffer = np.empty(self._entry_bytes, np.uint8)
        values = self._buffer.view(self.key.dtype).reshape(wanted[1:])
        for name, count, asked in self._index.by_chunk(np.asarray(indices, np.int64)):
            path = self.folder / name
            try:
                with path.open("rb", buffering=0) as file:
                    for entry in asked:
                        offset = chunks.header_bytes(count) + entry.slot * self._entry_bytes
                        self._read_entry(file, offset, entry.crc)
                        out[entry.position] = values
            except FileNotFoundError as error:
                raise FeaturesDamaged(f"{_UNREADABLE} {path} is not there any more.") from error
            except OSError as error:
                raise FeaturesDamaged(f"{_UNREADABLE} {path} can't be read: {_reason(error)}.") from error
            except chunks.DamagedChunk as error:
                raise FeaturesDamaged(f"{_UNREADABLE} {path} {error}.") from error

    def _read_entry(self, file: BinaryIO, offset: int, crc: int) -> None:
        assert self._buffer is not None
        file.seek(offset)
        if not chunks.read_fully(file, self._buffer.data):
            raise chunks.DamagedChunk("is cut off", 1)
        if zlib.crc32(self._buffer.data) != crc:
            raise chunks.DamagedChunk("does not match its checksum", 1)

    def remove(self) -> None:
        """Delete all files of this key, as far as that goes: for features that turned out to be of no use."""
        self._staged_count = 0
        self._index.forget()
        self._stop("removed")
        with suppress(OSError):
            for name in (*chunk_names(self.folder), KEY_FILE):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        self.stored_bytes = bytes_in(self.folder)

    def close(self) -> None:
        """Write the rest; what is present can still be read."""
        self.flush()
        self._staging = None

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _reason(error: Exception) -> str:
    """What the system said, without the path."""
    cause = error.__cause__ if isinstance(error, RunFolderError) else error
    return os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error)
