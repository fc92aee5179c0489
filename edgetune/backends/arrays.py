"""numpy arrays with the few methods of torch's tensors by which `optim.py` updates: one set of rules for both backends.

Whatever is computed on the way goes through a small buffer, piece by piece: an update of any parameter allocates nothing
of its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
_PIECE = 16 * 1024
_BUFFER = np.empty(_PIECE, np.float32)
_BUFFER_TOO = np.empty(_PIECE, np.float32)


class ArrayTensor:
    """float32 values, in place. `grad` is another one, or None."""

    device = "cpu"

    def __init__(self, values: Values, grad: ArrayTensor | None = None) -> None:
        self.values = values
        self.grad = grad

    # ---------------------------------------------------------------------------------------------------- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def numel(self) -> int:
        return self.values.size

    def item(self) -> float:
        return float(self.values)

    def numpy(self) -> Values:
        return self.values

    def new_empty(self, shape: tuple[int, ...]) -> ArrayTensor:
        return ArrayTensor(np.empty(shape, np.float32))

    def __getitem__(self, place: Any) -> ArrayTensor:
        return ArrayTensor(self.values[place])

    def view(self, shape: tuple[int, ...]) -> ArrayTensor:
        return ArrayTensor(self.values.reshape(shape))

    # ------------------------------------------------------------------------------------------------------- in place

    def zero_(self) -> ArrayTensor:
        self.values.fill(0)
        return self

    def copy_(self, other: ArrayTensor) -> ArrayTensor:
        np.copyto(self.values, other.values)
        return self

    def mul_(self, other: Any) -> ArrayTensor:
        np.multiply(self.values, _value(other), out=self.values)
        return self

    def div_(self, other: Any) -> ArrayTensor:
        np.divide(self.values, _value(other), out=self.values)
        return self

    def add_(self, other: Any, alpha: float = 1.0) -> ArrayTensor:
        if alpha == 1:
            np.add(self.values, _value(other), out=self.values)
            return self
        for own, theirs, buffer, _ in _pieces(self.values, other.values):
            np.multiply(theirs, np.float32(alpha), out=buffer)
            np.add(own, buffer, out=own)
        return self

    def lerp_(self, end: ArrayTensor, weight: float) -> ArrayTensor:
        for own, theirs, buffer, _ in _pieces(self.values, end.values):
            np.subtract(theirs, own, out=buffer)
            if weight < 0.5:
                np.multiply(buffer, np.float32(weight), out=buffer)
                np.add(own, buffer, out=own)
            else:
                np.multiply(buffer, np.float32(1 - weight), out=buffer)
                np.subtract(theirs, buffer, out=own)
        return self

    def addcmul_(self, one: ArrayTensor, other: ArrayTensor, value: float) -> ArrayTensor:
        return self._add_combined(np.multiply, one, other, value)

    def addcdiv_(self, one: ArrayTensor, other: ArrayTensor, value: float) -> ArrayTensor:
        return self._add_combined(np.divide, one, other, value)

    def _add_combined(self, combine: np.ufunc, one: ArrayTensor, other: ArrayTensor, value: float) -> ArrayTensor:
        for own, first, buffer, second in _pieces(self.values, one.values, other.values):
            np.multiply(first, np.float32(value), out=buffer)
            combine(buffer, second, out=buffer)
            np.add(own, buffer, out=own)
        return self

    def sqrt_(self) -> ArrayTensor:
        np.sqrt(self.values, out=self.values)
        return self

    def rsqrt_(self) -> ArrayTensor:
        np.sqrt(self.values, out=self.values)
        np.reciprocal(self.values, out=self.values)
        return self

    def square_(self) -> ArrayTensor:
        np.square(self.values, out=self.values)
        return self

    def clamp_(self, min: float) -> ArrayTensor:
        np.maximum(self.values, np.float32(min), out=self.values)
        return self

    # ---------------------------------------------------------------------------------------------------- new and small

    def lerp(self, end: ArrayTensor, weight: float) -> ArrayTensor:
        return ArrayTensor(self.values.copy()).lerp_(end, weight)

    def sum(self) -> ArrayTensor:
        return ArrayTensor(np.asarray(self.values.sum(dtype=np.float64), np.float32))

    def mean(self, dim: int, keepdim: bool) -> ArrayTensor:
        return ArrayTensor(np.asarray(self.values.mean(axis=dim, keepdims=keepdim), np.float32))

    def norm(self, order: int, dim: int | None = None, keepdim: bool = False) -> ArrayTensor:
        """The Euclidean norm (`order` 2), of everything or over one dimension."""
        if dim is None:
            total = sum(float(np.einsum("i,i->", piece, piece)) for piece in _flat_pieces(self.values))
            return ArrayTensor(np.asarray(total**0.5, np.float32))
        squares = np.einsum("...i,...i->...", *[np.moveaxis(self.values, dim, -1)] * 2)
        return ArrayTensor(np.sqrt(np.expand_dims(squares, dim) if keepdim else squares))


def _value(other: Any) -> Any:
    return other.values if isinstance(other, ArrayTensor) else np.float32(other)


def _flat_pieces(values: Values) -> Iterator[Values]:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE]


def _pieces(own: Values, *others: Values) -> Iterator[tuple[Values, Values, Values, Values]]:
    """Views of the same piece of each array, in step: (own, the first other, a buffer, the second other or a buffer)."""
    flat = [array.reshape(-1) for array in (own, *others)]
    for start in range(0, own.size, _PIECE):
        parts = [array[start : start + _PIECE] for array in flat]
        size = parts[0].size
        yield parts[0], parts[1], _BUFFER[:size], parts[2] if len(parts) > 2 else _BUFFER_TOO[:size]
