"""A block's forward, allocation by allocation, and what a recompute makes again of it. Pure arithmetic.

It follows timm's `Block`, `Attention` and `Mlp` under fused CPU attention as the CPU allocator's events show them: each
line takes or gives back one tensor.
"""

from __future__ import annotations

from edgetune.cost.tape import FLOAT_BYTES, RANDOM_STATE_BYTES, Mode, Sizes, Tape
from edgetune.cost.values import Recompute, ViTShape


def attention_half(
    tape: Tape, shape: ViTShape, z: Sizes, *, grad: bool, trained: bool, pruned: bool, mode: Mode
) -> None:
    """norm1, attention, residual: from the input to the middle of the block."""
    tape.take(z.stream + 2 * z.statistic)  # norm1
    qkv = 3 * z.attention
    tape.take(qkv)
    _used(tape, mode, shape.width, 3 * shape.attention_width)
    if pruned:  # the class token's row: q and k normed anew, k laid out for the product
        tape.touch((3 if shape.qk_norm else 1) * z.attention)
        tape.take(z.statistic)
    held = 0
    if shape.qk_norm:
        for _ in range(2):
            tape.take(z.attention)  # laid out for the norm
            tape.take(z.attention + 2 * z.head_statistic)
            tape.free(z.attention)
        held += 2 * z.attention + 4 * z.head_statistic
    tape.take(z.attention + z.head_statistic)
    # A thread's scores, their maxima and sums, and its part of the output (512 keys at a time).
    row = min(512, z.tokens) + 2 + shape.head_width
    tape.touch(mode.threads * z.query_rows * row * FLOAT_BYTES)
    held += z.head_statistic + qkv
    if shape.qk_norm:
        tape.take(z.attention)  # attention's output as proj reads it
    tape.take(z.stream)  # proj
    _used(tape, mode, shape.attention_width, shape.width)
    if shape.qk_norm and not trained:
        tape.free(z.attention)
    if not grad:
        tape.free(z.attention + held + 2 * z.statistic)
    if not trained:
        tape.free(z.stream)  # norm1's output
    _residual(tape, shape, z, trained)


def _residual(tape: Tape, shape: ViTShape, z: Sizes, trained: bool) -> None:
    """From what a half has computed, which is alive, to its sum with the residual stream, alive in its place."""
    if shape.layer_scale:
        tape.take(z.stream)
        if not trained:
            tape.free(z.stream)
    tape.take(z.stream)  # the sum
    tape.free(z.stream)


def _used(tape: Tape, mode: Mode, columns: int, rows: int) -> None:
    """The float32 copy of a linear's weight and bias, which is there while its output is made."""
    if mode.half_weights:
        tape.touch(rows * (columns + 1) * FLOAT_BYTES)


def mlp_half(tape: Tape, shape: ViTShape, z: Sizes, *, grad: bool, trained: bool, part: bool, mode: Mode) -> None:
    """norm2, MLP, residual: from the middle of the block to its output. `part`: norm2 and MLP alone run recomputed."""
    kept, own = grad and not part, trained and not part
    tape.take(z.stream + 2 * z.statistic)  # norm2
    tape.take(z.hidden)
    _used(tape, mode, shape.width, shape.mlp_width)
    if part:
        tape.free(z.stream)
    tape.take(z.hidden)  # activated
    if not kept:
        tape.free(z.hidden)
    tape.take(z.stream)  # fc2
    _used(tape, mode, shape.mlp_width, shape.width)
    if not own:
        tape.free(z.hidden + (0 if part else z.stream))
    if not kept:
        tape.free(2 * z.statistic)
    _residual(tape, shape, z, trained)


def made_again(tape: Tape, shape: ViTShape, z: Sizes, level: Recompute, trained: bool, mode: Mode) -> None:
    """What the backward makes again, up to the last tensor it needs: at the end all that a kept block would hold."""
    if trained:
        tape.take(RANDOM_STATE_BYTES)
    if level is Recompute.BLOCK:
        attention_half(tape, shape, z, grad=True, trained=trained, pruned=False, mode=mode)
    tape.take(z.stream + 2 * z.statistic)
    tape.take(z.hidden)
    if level is Recompute.MLP and not trained:
        tape.free(z.stream)
    tape.take(z.hidden)  # activated
    if not trained:
        tape.free(z.hidden)
        if level is Recompute.BLOCK:
            tape.free(z.stream)
    if level is Recompute.BLOCK and shape.layer_scale:
        tape.take(z.stream)  # fc2's output
        if not trained:
            tape.free(z.stream)
    if trained:
        tape.free(RANDOM_STATE_BYTES)
