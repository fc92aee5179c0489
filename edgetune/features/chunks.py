"""A chunk: a file with the features of some images, which is whole or not there, and says itself whether it is damaged.

    magic 8 | format version 4 | count 4 | bytes of an entry 8 | SHA-256 of the key 32
    ids 16 each | CRC-32 of each entry 4 each | CRC-32 of all before 4 | entries

Numbers are little-endian. Every byte is under one of the checksums.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune.checkpoint.files import write_atomically
from edgetune.features.keys import FORMAT_VERSION, ID_BYTES

# What is collected before it is written: large enough that a flash card writes it at full speed, small beside a cap.
CHUNK_BYTES = 8 * 1024**2
CHUNK_SUFFIX = ".chunk"
# Entries are checked in pieces of about this size.
CHECK_BYTES = 1024**2

_MAGIC = b"ETFEATS\n"
_HEAD = struct.Struct("<8sIIQ32s")
_CRC = struct.Struct("<I")
# Fixed-width bytes: compared and sorted over all 16, zeros at the end included, as both sides are padded with zeros.
ID_TYPE = np.dtype(f"S{ID_BYTES}")
_CRC_TYPE = np.dtype("<u4")
INDEX_BYTES = ID_BYTES + _CRC.size

Ids = npt.NDArray[np.bytes_]
Crcs = npt.NDArray[np.uint32]


class DamagedChunk(Exception):
    """Never leaves this room. Says what is wrong; `entries` is how many images' features are lost by it, as far as that can be told."""

    def __init__(self, what: str, entries: int) -> None:
        super().__init__(what)
        self.entries = entries


class Header(NamedTuple):
    ids: Ids  # (count,)
    crcs: Crcs  # (count,)


def entries_per_chunk(entry_bytes: int, chunk_bytes: int | None = None) -> int:
    return max(1, (CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // entry_bytes)


def header_bytes(count: int) -> int:
    return _HEAD.size + INDEX_BYTES * count + _CRC.size


def fitting_entries(room_bytes: int, entry_bytes: int) -> int:
    """How many entries a chunk may have that takes no more than `room_bytes`."""
    return max(0, (room_bytes - header_bytes(0)) // (entry_bytes + INDEX_BYTES))


def new_chunk(folder: Path) -> Path:
    """A name that no other process comes upon, and that is not there."""
    return folder / f"{os.urandom(8).hex()}{CHUNK_SUFFIX}"


def write_chunk(
    path: Path, key_sha256: bytes, ids: Ids, entries: npt.NDArray[Any], wrote: Callable[[int], None]
) -> Crcs:
    """Write `entries` (count, stored_tokens, width), each contiguous, and return their checksums.

    `wrote` is told how many bytes went to the disk, those of a file that then failed included.
    Raises: RunFolderError if the system refuses; nothing half-written is left then.
    """
    crcs = np.array([zlib.crc32(entry.data) for entry in entries], dtype=_CRC_TYPE)
    head = _HEAD.pack(_MAGIC, FORMAT_VERSION, len(ids), entries[0].nbytes, key_sha256) + ids.tobytes() + crcs.tobytes()
    head += _CRC.pack(zlib.crc32(head))

    def write(file: BinaryIO) -> None:
        try:
            file.write(head)
            file.write(entries.reshape(-1).view(np.uint8).data)
            file.flush()
        finally:
            wrote(os.fstat(file.fileno()).st_size)

    write_atomically(path, write, expected_bytes=len(head) + entries.nbytes)
    return crcs


def read_header(file: BinaryIO, key_sha256: bytes, entry_bytes: int) -> Header:
    """Ids and checksums of an open chunk; the file then stands at the first entry.

    Raises: DamagedChunk if it is cut off, damaged, or belongs to another key.
    """
    size = os.fstat(file.fileno()).st_size
    # If the header can't be believed, the size still tells how much was in there.
    guess = fitting_entries(size, entry_bytes)
    start = file.read(_HEAD.size)
    if len(start) < _HEAD.size:
        raise DamagedChunk("is cut off", guess)
    magic, version, count, found_bytes, found_key = _HEAD.unpack(start)
    if magic != _MAGIC or version != FORMAT_VERSION:
        raise DamagedChunk("is no chunk of this format", guess)
    if size != header_bytes(count) + count * found_bytes:
        raise DamagedChunk(f"has {size} bytes, not what its header says", guess)
    index = file.read(INDEX_BYTES * count)
    stored = file.read(_CRC.size)
    if len(stored) < _CRC.size or _CRC.unpack(stored)[0] != zlib.crc32(index, zlib.crc32(start)):
        raise DamagedChunk("has a damaged header", guess)
    if found_key != key_sha256 or found_bytes != entry_bytes:
        raise DamagedChunk("belongs to another cache", 0)
    ids = np.frombuffer(index, ID_TYPE, count)
    return Header(ids, np.frombuffer(index, _CRC_TYPE, count, offset=ID_BYTES * count))


def check_entries(file: BinaryIO, header: Header, buffer: memoryview, entry_bytes: int) -> None:
    """Read all entries of an open chunk through `buffer`, which holds one of them or more.

    Raises: DamagedChunk if one does not match its checksum, or can't be read.
    """
    count, at_once = len(header.ids), len(buffer) // entry_bytes
    bad = 0
    for start in range(0, count, at_once):
        part = buffer[: min(at_once, count - start) * entry_bytes]
        if not read_fully(file, part):
            raise DamagedChunk("is cut off", count)
        bad += sum(
            zlib.crc32(part[offset : offset + entry_bytes]) != int(crc)
            for offset, crc in zip(range(0, len(part), entry_bytes), header.crcs[start : start + at_once], strict=True)
        )
    if bad:
        raise DamagedChunk(f"has {bad} damaged of {count} entries", count)


def read_fully(file: BinaryIO, buffer: memoryview) -> bool:
    """Fill `buffer` from an unbuffered file; False if the file ends before."""
    filled = 0
    while filled < len(buffer):
        got = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not got:
            return False
        filled += got
    return True
