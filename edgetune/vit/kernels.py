"""What torch's CPU kernels give and take that their stand-ins on the meta device do not show.

Checked against the CPU allocator's events (torch 2.14, oneDNN off as in every run): `tests/test_cost_measured.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from edgetune.cost.probed import Bytes, added
from edgetune.vit.dimensions import LEAVING, TOKENS, Dimensions

aten = torch.ops.aten


def tensors_of(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from tensors_of(each)


@contextmanager
def fused_attention() -> Iterator[None]:
    """While this is entered, attention is the CPU's fused kernel, which torch does not choose on the meta device.

    (A `TorchFunctionMode` would not see attention that is recomputed within `Tensor.backward`.)
    """
    functional: Any = torch.nn.functional
    own = functional.scaled_dot_product_attention

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        **others: Any,
    ) -> Tensor:
        if dropout_p or others.get("enable_gqa") or q.shape[-1] != v.shape[-1]:  # what the kernel has not
            output: Tensor = own(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **others)
        else:
            fused = aten._scaled_dot_product_flash_attention_for_cpu
            output = fused(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return output

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


# What the CPU's kernels give


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows = q.shape[:3]
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


ANSWERS = {
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
    found = _columns(dimensions, images, kernel, gradient, args[4], args[5], groups, tensors_of(result[:2]))
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
    q = args[0]
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


SCRATCH: dict[Any, Any] = {
    aten._safe_softmax: _safe_softmax,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_layer_norm: _norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_scratch,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_scratch,
}
