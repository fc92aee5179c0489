"""A ledger of the tensors that a part of a model takes and gives back, of a run on torch's meta device.

There a tensor has a size and no memory, so that batch and token counts can be large primes: each size then says by its
factors what it grows with. What a CPU kernel takes inside itself is not seen there, and is added by rules.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.cost.probed import Bytes, added

IMAGES, CLASSES = 10007, 20011
TOKENS, LEAVING = 1000003, 500009

aten = torch.ops.aten


class Dimensions:
    """The sizes that are unknown: all tokens, those that leave, each with and without prefix tokens."""

    def __init__(self, prefix_tokens: int) -> None:
        token = Bytes(token=1), Bytes(leaving=1)
        self._tokens = [
            (size - without, unit, without)
            for size, unit in zip((TOKENS, LEAVING), token, strict=True)
            for without in ({0, prefix_tokens})
        ]

    def bytes_of(self, size: int) -> Bytes:
        """A tensor's bytes, by what they grow with."""
        image = size % IMAGES == 0 and size > 0
        size //= IMAGES if image else 1
        if size and size % CLASSES == 0:
            size //= CLASSES
            return Bytes(logits=size) if image else Bytes(classes=size)
        counts: list[tuple[Bytes, int]] = []
        for dimension, unit, without in self._tokens:
            while size and size % dimension == 0:
                size //= dimension
                counts.append((unit, without))
        if not counts:
            return Bytes(image=size) if image else Bytes(once=size)
        if len(counts) > 1:
            # A pair of tokens: prefix tokens that are not among them are a few of a thousand.
            return Bytes(pair=size)
        (unit, without), = counts
        found = Bytes(*(size * each for each in unit))
        return found._replace(image=-size * without)


class Ledger(TorchDispatchMode):
    """While this is entered, what is live and what the peaks were."""

    def __init__(self, dimensions: Dimensions, known: Iterator[Tensor] | Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._dimensions = dimensions
        self._held: dict[int, tuple[Any, Bytes]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = Bytes()
        self.tops: list[Bytes] = []

    def begin(self) -> None:
        """Count peaks, and what is live, from here."""
        self.live = Bytes()
        self.tops = [self.live]

    def know(self, tensor: Tensor) -> None:
        """It was there before: not counted."""
        key = tensor.untyped_storage()._cdata
        self._known.add(key)
        _, size = self._held.pop(key, (None, Bytes()))
        self.live = added(self.live, size, -1)

    def take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._held:
            return
        size = self._dimensions.bytes_of(storage.nbytes())

        def gone(_reference: Any) -> None:
            if self._held.pop(key, None) is not None:
                self.live = added(self.live, size, -1)

        self._held[key] = weakref.ref(storage, gone), size
        self.live = added(self.live, size)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten.add and _is_engines_sum(args):
            # Where modes are watching, autograd adds up gradients out of place; in a run it does so in place.
            return args[0]
        answer = _ANSWERS.get(packet)
        result = answer(*args, **kwargs) if answer is not None else func(*args, **kwargs)
        for tensor in _tensors(result):
            self.take(tensor)
        rule = _SCRATCH.get(packet)
        if rule is None:
            self.tops.append(self.live)
        else:
            for scratch in rule(self._dimensions, args, result):
                self.tops.append(added(self.live, scratch))
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from _tensors(each)


def _is_engines_sum(args: Any) -> bool:
    """Whether autograd itself adds up what two nodes gave for one tensor, one of which nobody else holds."""
    if torch.is_grad_enabled() or torch._C._current_autograd_node() is None or len(args) != 2:
        return False
    if not all(isinstance(each, Tensor) for each in args) or args[0].shape != args[1].shape:
        return False
    return any(_held_alone(each) for each in args)


def _held_alone(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    # One for the tensor, one for `storage` here.
    return torch._C._storage_Use_Count(storage._cdata) <= 2 and storage.nbytes() == tensor.numel() * tensor.element_size()


@contextmanager
def fused_attention() -> Iterator[None]:
    """While this is entered, attention is the CPU's fused kernel, which torch does not choose on the meta device.

    (A `TorchFunctionMode` would not see attention that is recomputed within `Tensor.backward`.)
    """
    functional: Any = torch.nn.functional
    own = functional.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None, **others: Any) -> Tensor:
        if dropout_p or others.get("enable_gqa"):  # what the kernel has not
            return own(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **others)
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = fused(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return output

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


# What the CPU's kernels give


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    return torch.empty_like(q), torch.empty((batch, rows, heads), device="meta", dtype=torch.float32).transpose(1, 2)


def _attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(each.shape, device="meta", dtype=each.dtype) for each in (q, k, v))


_ANSWERS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# What they take inside


def _copies(dimensions: Dimensions, *tensors: Any) -> Bytes:
    """Of tensors that a kernel lays out anew before it reads them."""
    found = Bytes()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            found = added(found, dimensions.bytes_of(tensor.numel() * tensor.element_size()))
    return found


def _norm(dimensions: Dimensions, args: Any, _result: Any) -> list[Bytes]:
    return [_copies(dimensions, args[0])]


def _layer_norm_backward(dimensions: Dimensions, args: Any, _result: Any) -> list[Bytes]:
    copies = _copies(dimensions, args[0], args[1])
    # A thread's sums for the weight's and the bias's gradient.
    return [copies._replace(thread=copies.thread + 2 * prod(args[2]) * 4)]


def _attention_scratch(dimensions: Dimensions, args: Any, _result: Any) -> list[Bytes]:
    q, k = args[0], args[1]
    return [_fused(q, 1, 2 + q.shape[-1])]


def _attention_backward_scratch(dimensions: Dimensions, args: Any, _result: Any) -> list[Bytes]:
    return [_fused(args[1], 2, 0)]


def _fused(q: Tensor, scores: int, rows: int) -> Bytes:
    if q.shape[2] in (TOKENS, LEAVING):
        return Bytes(scores=4 * scores, rows=4 * rows)
    # Few queries (of pooling): as many keys at a time as there can be.
    return Bytes(thread=4 * q.shape[2] * (512 * scores + rows))


_SCRATCH: dict[Any, Any] = {
    aten.native_layer_norm: _norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_scratch,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_scratch,
}
