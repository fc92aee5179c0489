"""What an ONNX file says of itself, read without onnx: inputs, outputs, and which tensors it wants from other files.

A walk over protobuf's wire format in bounded memory: what holds no name or size is stepped over, tensors' bytes too. It looks
wherever onnx.proto lets a tensor be, because a runtime opens whatever file a tensor names. Pure Python: importing onnx
would cost a device more memory than the walk reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from edgetune.checkpoint.files import disk_errors
from edgetune.errors import ArtifactsError

Sides = tuple[int | str, ...]


class Value(NamedTuple):
    """An input or output: onnx's number of its element type (0: not said), sides (a word may change, "" is not said)."""

    name: str
    element_type: int
    sides: Sides


class OutsideTensor(NamedTuple):
    """A tensor whose bytes are in another file. `places`: its entries, such as location, offset and length, as they stand."""

    name: str
    element_type: int
    sides: Sides
    places: tuple[tuple[str, str], ...]


class Graph(NamedTuple):
    """What a graph takes and gives, in its order."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    outside: tuple[OutsideTensor, ...]


# The messages of onnx.proto that can hold a tensor, by the numbers of their fields (a test compares them with onnx's own):
# https://github.com/onnx/onnx/blob/v1.16.0/onnx/onnx.proto. `model` holds `graph`; those below are of `inner` kind.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "inner", 2: "inner"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 11: "input", 12: "output", 15: "sparse"},
    "inner": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "inner", 10: "tensor", 11: "inner", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "place"},
    "place": {},
    "input": {2: "type"},
    "output": {2: "type"},
    "type": {1: "tensor_type"},
    "tensor_type": {2: "sides"},
    "sides": {1: "side"},
    "side": {},
}
# Their fields that are wanted besides: text, and whole numbers.
_TEXTS = {"tensor": {8}, "place": {1, 2}, "input": {1}, "output": {1}, "side": {2}}
_NUMBERS = {"tensor": {1, 2, 14}, "tensor_type": {1}, "side": {1}}
_SIDES, _EXTERNAL = 1, 1  # a tensor's sides may lie packed; data_location of a tensor in another file

# Far above what any model needs, and low enough that nothing hostile takes long or much memory.
_MOST_FIELDS, _MOST_FOUND, _MOST_DEPTH, _MOST_SIDES = 5_000_000, 10_000, 64, 64
_MOST_NAME_BYTES, _MOST_TEXT_BYTES = 4096, 8 * 1024**2
_VARINT, _FIXED_64, _MESSAGE, _FIXED_32 = 0, 1, 2, 5


def read_graph(path: Path) -> Graph:
    """Raises: ArtifactsError if it is no ONNX file; RunFolderError if it can't be read."""
    with disk_errors(path, "read"), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        walk = _Walk(file)
        try:
            walk.message("model", size, 0)
        except _NoGraph as error:
            raise ArtifactsError(f"{path} is no ONNX graph: {error} (byte {walk.at}). Export it again.") from error
    if not walk.outputs:
        raise ArtifactsError(f"{path} is no ONNX graph: it gives nothing. Export it again.")
    return Graph(tuple(walk.inputs), tuple(walk.outputs), tuple(walk.outside))


class _NoGraph(ValueError):
    """Why bytes can't be read, in words."""


class _Walk:
    """A place in a file, and what was found up to there."""

    def __init__(self, file: BinaryIO) -> None:
        self.at = 0
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.outside: list[OutsideTensor] = []
        self._file = file
        self._fields = self._text_bytes = 0

    def message(self, kind: str, end: int, depth: int) -> dict[int, list[Any]]:
        """Go through a message of a kind up to its end; its wanted fields by their numbers."""
        if depth > _MOST_DEPTH:
            raise _NoGraph("its graphs lie too deep in one another")
        inner, texts, numbers = MESSAGES[kind], _TEXTS.get(kind, ()), _NUMBERS.get(kind, ())
        found: dict[int, list[Any]] = {}
        while self.at < end:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise _NoGraph("it has more parts than any model")
            tag = self._varint(end)
            number, wire = tag >> 3, tag & 7
            if not 1 <= number < 2**29:
                raise _NoGraph("a field without a number")
            if wire == _VARINT:
                value = self._varint(end)
                if number in numbers:
                    _keep(found, number, value)
            elif wire == _MESSAGE:
                length = self._varint(end)
                if length > end - self.at:
                    raise _NoGraph("it is cut short")
                if number in inner:
                    self._inner(inner[number], length, depth, found, number)
                elif number in texts:
                    _keep(found, number, self._read(length).decode("utf-8", "backslashreplace"))
                elif (kind, number) == ("tensor", _SIDES):
                    packed = self.at + length
                    while self.at < packed:
                        _keep(found, number, self._varint(packed))
                else:
                    self._skip(length)
            elif wire in (_FIXED_64, _FIXED_32):
                self._skip_fixed(8 if wire == _FIXED_64 else 4, end)
            else:
                raise _NoGraph("a field of no known kind")
        return found

    def _inner(self, kind: str, length: int, depth: int, found: dict[int, list[Any]], number: int) -> None:
        own = self.message(kind, self.at + length, depth + 1)
        if kind in ("input", "output"):
            values = self.inputs if kind == "input" else self.outputs
            values.append(_value(own))
            _bounded(values, _MOST_FOUND)
        elif kind == "tensor":
            if 13 in own or _EXTERNAL in own.get(14, ()):
                places = tuple((_last(entry, 1, ""), _last(entry, 2, "")) for entry in own.get(13, ()))
                self.outside.append(
                    OutsideTensor(_last(own, 8, ""), _last(own, 2, 0), tuple(own.get(_SIDES, ())), places)
                )
                _bounded(self.outside, _MOST_FOUND)
        elif kind in ("place", "type", "tensor_type", "sides", "side"):
            _keep(found, number, own)

    def _varint(self, end: int) -> int:
        value, shift = 0, 0
        while True:
            if self.at >= end or not (byte := self._file.read(1)):
                raise _NoGraph("it is cut short")
            self.at += 1
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise _NoGraph("a number of more than ten bytes")

    def _read(self, length: int) -> bytes:
        self._text_bytes += length
        if length > _MOST_NAME_BYTES or self._text_bytes > _MOST_TEXT_BYTES:
            raise _NoGraph("its names are longer than any model's")
        self.at += length
        data = self._file.read(length)
        if len(data) < length:
            raise _NoGraph("it is cut short")
        return data

    def _skip(self, length: int) -> None:
        self.at += length
        self._file.seek(length, 1)

    def _skip_fixed(self, length: int, end: int) -> None:
        if length > end - self.at:
            raise _NoGraph("it is cut short")
        self._skip(length)


def _keep(found: dict[int, list[Any]], number: int, value: Any) -> None:
    values = found.setdefault(number, [])
    values.append(value)
    _bounded(values, _MOST_SIDES)


def _bounded(values: list[Any], most: int) -> None:
    if len(values) > most:
        raise _NoGraph("it has more parts than any model")


def _last(found: dict[int, list[Any]], number: int, default: Any) -> Any:
    """Of a field that came more than once, the last counts."""
    return found[number][-1] if number in found else default


def _value(found: dict[int, list[Any]]) -> Value:
    tensor = _last(_last(found, 2, {}), 1, {})
    sides = _last(tensor, 2, {}).get(1, ())
    return Value(
        _last(found, 1, ""),
        _last(tensor, 1, 0),
        tuple(_last(side, 1, None) if 1 in side else _last(side, 2, "") for side in sides),
    )
