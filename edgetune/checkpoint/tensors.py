"""safetensors files, written and read one tensor at a time by plain reads and writes.

The library's own `save` builds the whole file in memory and its loader maps the file, whose pages then count as this
process's memory. Under a cap neither will do. The files are the library's to the byte, and its loader reads them.

Source of the format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from edgetune.checkpoint.files import disk_errors, write_atomically
from edgetune.errors import RunFolderError

Array = npt.NDArray[Any]

# numpy's kind and size -> the format's name, in the order in which the library lays tensors out (widest first).
_NAMES = {
    "u8": "U64", "i8": "I64", "f8": "F64", "f4": "F32", "u4": "U32", "i4": "I32", "f2": "F16", "u2": "U16", "i2": "I16",
    "i1": "I8", "u1": "U8", "b1": "BOOL",
}  # fmt: skip
_CODES = {name: code for code, name in _NAMES.items()}
_ORDER = {name: place for place, name in enumerate(_CODES)}
# Bytes an element, the types that numpy lacks among them.
_ITEM_BYTES = {name: int(code[1]) for name, code in _CODES.items()} | {
    "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 16 * 1024**2  # thousands of tensors need less than one MiB
_METADATA = "__metadata__"
_CHUNK_BYTES = 256 * 1024


class NotSafetensors(ValueError):
    """Why a file can't be read as safetensors, as words that go on from "it is damaged:"."""


class Entry(msgspec.Struct, frozen=True):
    """One tensor in a header; offsets are bytes from the end of the header. `dtype` is the format's name."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def save_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> str:
    """Write `tensors` to a safetensors file, whole or not at all; returns the file's SHA-256.

    Needs at most one tensor's bytes on top of `tensors`, and none for those that lie contiguous. The same tensors give
    the same bytes. `tensors` is gone through twice; a mapping that makes its arrays on the fly is fine.

    Raises: RunFolderError as `write_atomically`; ValueError for a dtype the format (or numpy) does not have.
    """
    entries, header = _layout(tensors, metadata)
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        file.write(header)
        digest.update(header)
        for name, entry in entries.items():
            data = _bytes_of(tensors[name], entry.dtype)
            file.write(data)
            digest.update(data)

    data_bytes = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    write_atomically(path, write, expected_bytes=len(header) + data_bytes)
    return digest.hexdigest()


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, Array]:
    """All tensors of a safetensors file in fresh arrays: memory for the tensors and nothing more.

    Raises: as `read_tensors`.
    """
    return dict(read_tensors(path, sha256))


def read_tensors(path: Path, sha256: str | None = None) -> Iterator[tuple[str, Array]]:
    """(name, tensor) after (name, tensor), each in a fresh array, so that a model can be filled without a second copy.

    One tensor's memory if the caller drops each before the next, else two.

    With `sha256` the file's digest is checked after the last tensor: rely on nothing until the iterator has ended.

    Raises: RunFolderError for a file that is missing, unreadable, damaged, cut short or not safetensors.
    """
    digest = hashlib.sha256()
    with _reading(path), path.open("rb") as file:
        header, entries = read_layout(file)
        digest.update(header)
        for name, entry in entries:
            tensor = _read_array(file, name, entry)
            if sha256 is not None:
                digest.update(_buffer_of(tensor))
            yield name, tensor
            del tensor  # whoever has dropped it by now has only the next one
        _check_digest(digest, sha256)


def open_tensors(path: Path, sha256: str) -> Mapping[str, Array]:
    """The tensors of a file, each read into a fresh array whenever it is asked for: none waits in memory.

    The whole file is gone through first, so that what is handed over later is known to be good.

    Raises: as `read_tensors`, here and when a tensor is asked for.
    """
    digest = hashlib.sha256()
    with _reading(path), path.open("rb") as file:
        header, entries = read_layout(file)
        digest.update(header)
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        _check_digest(digest, sha256)
    return _StoredTensors(path, len(header), dict(entries))


class _StoredTensors(Mapping[str, Array]):
    def __init__(self, path: Path, header_bytes: int, entries: dict[str, Entry]) -> None:
        self._path, self._header_bytes, self._entries = path, header_bytes, entries

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        with _reading(self._path), self._path.open("rb") as file:
            file.seek(self._header_bytes + entry.data_offsets[0])
            return _read_array(file, name, entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_layout(file: BinaryIO) -> tuple[bytes, list[tuple[str, Entry]]]:
    """The header as it stands in the file, and the tensors in the order of their bytes, where the file then stands.

    Raises: NotSafetensors unless they are of known dtypes and cover the rest of the file exactly; OSError.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    start = file.read(8)
    header_bytes = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES):
        raise NotSafetensors("it is no safetensors file, or cut short")
    text = file.read(header_bytes)
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop(_METADATA, None)
        entries = {name: msgspec.json.decode(value, type=Entry) for name, value in raw.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise NotSafetensors(f"its header can't be read ({error})") from error
    end = 0
    ordered = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    for name, entry in ordered:
        if entry.dtype not in _ITEM_BYTES:
            raise NotSafetensors(f"tensor {name!r} is {entry.dtype}, a dtype edgetune does not know")
        size = math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]
        if entry.data_offsets != (end, end + size):
            raise NotSafetensors(f"the place of tensor {name!r} does not fit its shape")
        end += size
    if end != file_bytes - 8 - header_bytes:
        raise NotSafetensors(f"its tensors need {end} bytes, it holds {file_bytes - 8 - header_bytes}")
    return start + text, ordered


def read_into(file: BinaryIO, array: Array) -> None:
    """Fill an array that lies contiguous with the file's next bytes. Raises: NotSafetensors if there are too few."""
    buffer = _buffer_of(array)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]  # typeshed: BinaryIO lacks it
        raise NotSafetensors("it ends too early")


def _read_array(file: BinaryIO, name: str, entry: Entry) -> Array:
    code = _CODES.get(entry.dtype)
    if code is None:
        raise NotSafetensors(f"tensor {name!r} is {entry.dtype}, a dtype edgetune does not write")
    try:
        array = np.empty(entry.shape, f"<{code}")
    except (ValueError, OverflowError) as error:  # negative, or more or longer than numpy has
        raise NotSafetensors(f"tensor {name!r} has an impossible shape") from error
    read_into(file, array)
    return array


def _buffer_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _check_digest(digest: Any, sha256: str | None) -> None:
    if sha256 is not None and digest.hexdigest() != sha256:
        raise NotSafetensors("its bytes are not those that were written (SHA-256 differs)")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with disk_errors(path, "read"):
            yield
    except NotSafetensors as error:
        raise RunFolderError(f"{path} is damaged: {error}. Take it from a copy, or start a new run.") from error


def _layout(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None) -> tuple[dict[str, Entry], bytes]:
    """Where each tensor goes, in the order of writing, and the header that says so."""
    plain = []
    for name, tensor in tensors.items():
        dtype = _NAMES.get(f"{tensor.dtype.kind}{tensor.dtype.itemsize}")
        if dtype is None or name == _METADATA:
            raise ValueError(f"tensor {name!r} of dtype {tensor.dtype} can't be stored as safetensors")
        plain.append((_ORDER[dtype], name, dtype, tensor.shape, tensor.nbytes))
    entries: dict[str, Entry] = {}
    end = 0
    for _, name, dtype, shape, size in sorted(plain):
        entries[name] = Entry(dtype, shape, (end, end + size))
        end += size
    content: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps(content | msgspec.to_builtins(entries), ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return entries, len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Array, dtype: str) -> memoryview:
    """The tensor's bytes, little-endian and row by row; a copy only where it does not lie so already."""
    return _buffer_of(np.ascontiguousarray(tensor, f"<{_CODES[dtype]}"))
