"""A ledger of the tensors that a part of a model takes and gives back, of a run on torch's meta device.

There a tensor has a size and no memory, so that batch and token counts can be large primes: each size then says by its
factors what it grows with. What a CPU kernel takes inside itself is not seen there, and is added by rules.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
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
    """The sizes that are unknown: images, all tokens, those that leave, each with and without prefix tokens."""

    def __init__(self, prefix_tokens: int, images: int = IMAGES) -> None:
        self.prefix_tokens, self.images = prefix_tokens, images
        self._found: dict[int, Bytes] = {}
        token = Bytes(token=1), Bytes(leaving=1)
        self._tokens = [
            (size - without, unit, without)
            for size, unit in zip((TOKENS, LEAVING), token, strict=True)
            for without in ({0, prefix_tokens})
        ]

    def bytes_of(self, size: int) -> Bytes:
        """A tensor's bytes, by what they grow with."""
        found = self._found.get(size)
        if found is None:
            found = self._found[size] = self._split(size)
        return found

    def _split(self, size: int) -> Bytes:
        image = size % self.images == 0 and size > 0
        size //= self.images if image else 1
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
        before = self.live
        for tensor in _tensors(result):
            self.take(tensor)
        rule = _SCRATCH.get(packet)
        if rule is not None:
            for scratch in rule(self._dimensions, args, result):
                self.tops.append(added(self.live, scratch))
        elif self.live is not before:
            self.tops.append(self.live)
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
        if dropout_p or others.get("enable_gqa") or q.shape[-1] != v.shape[-1]:  # what the kernel has not
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


def _layout(images: Tensor) -> torch.memory_format:
    """The layout in which a convolution reads its images and writes its output."""
    last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not images.is_contiguous() else torch.contiguous_format


def _convolved(images: Tensor, kernel: Tensor, *others: Any, **named: Any) -> Tensor:
    output: Tensor = aten.convolution.default(images, kernel, *others, **named)
    return torch.empty_like(output, memory_format=_layout(images))


def _convolved_backward(gradient: Tensor, images: Tensor, *others: Any, **named: Any) -> list[Tensor | None]:
    made = list(aten.convolution_backward.default(gradient, images, *others, **named))
    if made[0] is not None:
        made[0] = torch.empty_like(made[0], memory_format=_layout(images))
    return made


_ANSWERS = {
    aten.convolution: _convolved,
    aten.convolution_backward: _convolved_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# What they take inside


def _copies(dimensions: Dimensions, *tensors: Any, layout: torch.memory_format = torch.contiguous_format) -> Bytes:
    """Of tensors that a kernel lays out anew before it reads them."""
    found = Bytes()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_contiguous(memory_format=layout):
            found = added(found, dimensions.bytes_of(tensor.numel() * tensor.element_size()))
    return found


def _norm(dimensions: Dimensions, args: Any, _result: Any) -> list[Bytes]:
    return [_copies(dimensions, args[0])]


def _layer_norm_backward(dimensions: Dimensions, args: Any, _result: Any) -> list[Bytes]:
    copies = _copies(dimensions, args[0], args[1])
    # A thread's sums for the weight's and the bias's gradient.
    return [copies._replace(thread=copies.thread + 2 * prod(args[2]) * 4)]


def _convolution(dimensions: Dimensions, args: Any, result: Any) -> list[Bytes]:
    images, kernel, groups = args[0], args[1], args[8]
    return [_columns(dimensions, images, kernel, result, args[3], args[4], groups, [result])]


def _convolution_backward(dimensions: Dimensions, args: Any, result: Any) -> list[Bytes]:
    gradient, images, kernel, groups = args[0], args[1], args[2], args[9]
    found = _columns(dimensions, images, kernel, gradient, args[4], args[5], groups, _tensors(result[:2]))
    return [added(found, _copies(dimensions, gradient, layout=_layout(images)))]


def _columns(
    dimensions: Dimensions,
    images: Tensor,
    kernel: Tensor,
    output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    made: Iterable[Tensor],
) -> Bytes:
    """The images laid out as a matrix of patches, of all images at once; groups one after another, then joined."""
    if groups > 1:
        found = Bytes()
        for each in made:
            found = added(found, dimensions.bytes_of(each.numel() * 4))
        return found
    layout = _layout(images)
    copies = _copies(dimensions, images, *([kernel] if layout is torch.channels_last else []), layout=layout)
    if all(side == 1 for side in (*kernel.shape[2:], *stride)) and not any(padding):
        return copies
    columns = images.shape[0] * prod(kernel.shape[1:]) * prod(output.shape[2:])
    return added(copies, dimensions.bytes_of(columns * 4))


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


def _safe_softmax(dimensions: Dimensions, args: Any, result: Any) -> list[Bytes]:
    return [dimensions.bytes_of(result.numel())]  # a byte for each score: whether it is masked


_SCRATCH: dict[Any, Any] = {
    aten._safe_softmax: _safe_softmax,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_layer_norm: _norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_scratch,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_scratch,
}
