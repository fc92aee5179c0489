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
_MAX_HEADER_BYTES = 16 * 1024**2  # thousands of tensors need less than one MiB
_METADATA = "__metadata__"


class _Entry(msgspec.Struct, frozen=True):
    """One tensor in a header; offsets are bytes from the end of the header."""

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
    with disk_errors(path, "read"), path.open("rb") as file:
        for name, entry in _read_header(path, file, digest):
            try:
                tensor = np.empty(entry.shape, f"<{_CODES[entry.dtype]}")
            except (ValueError, OverflowError) as error:  # negative, or more or longer than numpy has
                raise _damaged(path, f"tensor {name!r} has an impossible shape") from error
            buffer = tensor.reshape(-1).view(np.uint8).data
            if file.readinto(buffer) != len(buffer):
                raise _damaged(path, "it ends too early")
            if sha256 is not None:
                digest.update(buffer)
            yield name, tensor
            del tensor, buffer  # whoever has dropped it by now has only the next one
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _damaged(path, "its bytes are not those that were written (SHA-256 differs)")


def _layout(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None) -> tuple[dict[str, _Entry], bytes]:
    """Where each tensor goes, in the order of writing, and the header that says so."""
    plain = []
    for name, tensor in tensors.items():
        dtype = _NAMES.get(f"{tensor.dtype.kind}{tensor.dtype.itemsize}")
        if dtype is None or name == _METADATA:
            raise ValueError(f"tensor {name!r} of dtype {tensor.dtype} can't be stored as safetensors")
        plain.append((_ORDER[dtype], name, dtype, tensor.shape, tensor.nbytes))
    entries: dict[str, _Entry] = {}
    end = 0
    for _, name, dtype, shape, size in sorted(plain):
        entries[name] = _Entry(dtype, shape, (end, end + size))
        end += size
    content: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps(content | msgspec.to_builtins(entries), ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return entries, len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Array, dtype: str) -> memoryview:
    """The tensor's bytes, little-endian and row by row; a copy only where it does not lie so already."""
    return np.ascontiguousarray(tensor, f"<{_CODES[dtype]}").reshape(-1).view(np.uint8).data


def _read_header(path: Path, file: BinaryIO, digest: Any) -> list[tuple[str, _Entry]]:
    """The tensors in the order of their bytes, after checking that they cover the rest of the file exactly."""
    file_bytes = os.fstat(file.fileno()).st_size
    start = file.read(8)
    header_bytes = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES):
        raise _damaged(path, "it is no safetensors file, or cut short")
    text = file.read(header_bytes)
    digest.update(start + text)
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop(_METADATA, None)
        entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _damaged(path, f"its header can't be read ({error})") from error
    end = 0
    ordered = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    for name, entry in ordered:
        code = _CODES.get(entry.dtype)
        if code is None:
            raise RunFolderError(f"{path}: tensor {name!r} is {entry.dtype}, a dtype edgetune does not write or read.")
        size = math.prod(entry.shape) * int(code[1])
        if entry.data_offsets != (end, end + size):
            raise _damaged(path, f"the place of tensor {name!r} does not fit its shape")
        end += size
    if end != file_bytes - 8 - header_bytes:
        raise _damaged(path, f"its tensors need {end} bytes, it holds {file_bytes - 8 - header_bytes}")
    return ordered


def _damaged(path: Path, reason: str) -> RunFolderError:
    return RunFolderError(f"{path} is damaged: {reason}. Take it from a copy, or start a new run.")
