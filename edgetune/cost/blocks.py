"""What one block holds while it runs forward and backward, allocation by allocation. Pure arithmetic.

The walk follows timm's `Block`, `Attention` and `Mlp` under fused CPU attention as the CPU allocator's events show them:
each line takes or gives back one tensor. A block that is built otherwise tells what autograd keeps of it
(`vit/probe.py`); what that is more than a plain block's is counted with its hidden layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from edgetune.cost.values import BlockState, Recompute, ViTShape

FLOAT_BYTES = 4
INDEX_BYTES = 8
# State of torch's generator, kept where a recomputed block may draw from it.
RANDOM_STATE_BYTES = 5056


class Mode(NamedTuple):
    """How a step treats gradients, and with how many threads it runs."""

    accumulates: bool = False  # a weight's new gradient is added to one that is there, and goes
    updates_in_backward: bool = False  # a weight's gradient goes as soon as the weight is updated
    threads: int = 1

    @property
    def gradients_stay(self) -> bool:
        return not (self.accumulates or self.updates_in_backward)


class Tape:
    """Live bytes now and at most."""

    __slots__ = ("live", "peak")

    def __init__(self) -> None:
        self.live = self.peak = 0

    def take(self, size: int) -> None:
        self.live += size
        if self.live > self.peak:
            self.peak = self.live

    def free(self, size: int) -> None:
        self.live -= size

    def touch(self, size: int) -> None:
        """Take and give back."""
        if self.live + size > self.peak:
            self.peak = self.live + size


class BlockWalk(NamedTuple):
    """One block in one step, in bytes.

    Forward: from its input alive to its output alive (after pruning). Backward: from its output's gradient alive to its
    input's. Peaks are above what is live at the start of each. `kept`: what lies between the two, its input included.
    `gradients`: of its weights, what stays after the backward.
    """

    forward_peak: int
    kept: int
    backward_peak: int
    gradients: int


class _Sizes(NamedTuple):
    stream: int  # (B, T, D)
    attention: int  # (B, T, A)
    hidden: int  # (B, T, M), of a gated MLP both halves
    activated: int  # (B, T, M)
    extra: int  # what the activation keeps beyond its input
    statistic: int  # one float a token
    head_statistic: int  # one float a token and head
    query_rows: int  # rows of queries that a thread of fused attention works on at once
    tokens: int
    batch: int


def _sizes(shape: ViTShape, tokens: int, batch: int, trained: bool) -> _Sizes:
    token = batch * tokens * FLOAT_BYTES
    extra = 0
    if shape.block_saved_floats is not None:
        extra = max(0, shape.block_saved_floats[trained] - plain_saved_floats(shape, trained))
    rows = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    return _Sizes(
        stream=token * shape.width,
        attention=token * shape.attention_width,
        hidden=token * shape.mlp_width * (2 if shape.gated_mlp else 1),
        activated=token * shape.mlp_width,
        extra=token * extra,
        statistic=token,
        head_statistic=token * shape.heads,
        query_rows=min(rows, tokens),
        tokens=tokens,
        batch=batch,
    )


def plain_saved_floats(shape: ViTShape, trained: bool) -> int:
    """Floats a token that autograd keeps of timm's plain `Block` (frozen on the path, or trained)."""
    width, mlp, attention = shape.width, shape.mlp_width, shape.attention_width
    # Inputs of both norms; q, k, v; attention's output; mean and rstd of both norms; log-sum-exp of each head's rows.
    floats = 2 * width + 4 * attention + 4 + shape.heads
    if shape.qk_norm:
        floats += 2 * attention + 4 * shape.heads + (attention if trained else 0)
    # The activation's input. A gated MLP keeps both halves and the activated one.
    floats += 3 * mlp if shape.gated_mlp else mlp
    if trained:
        floats += 2 * width + mlp + (2 * width if shape.layer_scale else 0)  # inputs of qkv, fc1, fc2 and the scales
    return floats


def _attention_half(
    tape: Tape, shape: ViTShape, z: _Sizes, *, grad: bool, trained: bool, pruned: bool, mode: Mode
) -> None:
    """norm1, attention, residual: from the input to the middle of the block."""
    tape.take(z.stream + 2 * z.statistic)  # norm1
    qkv = 3 * z.attention
    tape.take(qkv)
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
    if shape.qk_norm and not trained:
        tape.free(z.attention)
    if not grad:
        tape.free(z.attention + held + 2 * z.statistic)
    if not trained:
        tape.free(z.stream)  # norm1's output
    if shape.layer_scale:
        tape.take(z.stream)
        if not trained:
            tape.free(z.stream)
    tape.take(z.stream)  # the sum
    tape.free(z.stream)


def _mlp_half(tape: Tape, shape: ViTShape, z: _Sizes, *, grad: bool, trained: bool, part: bool) -> None:
    """norm2, MLP, residual: from the middle of the block to its output. `part`: norm2 and MLP alone run recomputed."""
    kept, own = grad and not part, trained and not part
    tape.take(z.stream + 2 * z.statistic)  # norm2
    tape.take(z.hidden)
    if part:
        tape.free(z.stream)
    _activation(tape, shape, z)
    if not kept:
        tape.free(z.hidden + z.extra)
    tape.take(z.stream)  # fc2
    if not own:
        tape.free(z.activated + (0 if part else z.stream))
    if not kept:
        tape.free(2 * z.statistic)
    if shape.layer_scale:
        tape.take(z.stream)
        if not trained:
            tape.free(z.stream)
    tape.take(z.stream)  # the sum
    tape.free(z.stream)


def _activation(tape: Tape, shape: ViTShape, z: _Sizes) -> None:
    """From the hidden layer to the activated one, both alive at the end, with what it keeps beyond them."""
    if shape.hidden_layers > 2:  # several kernels: what each makes stands beside the others
        tape.take(z.extra)
        tape.touch((shape.hidden_layers - 2) * z.activated)
        tape.take(z.activated)
    else:
        tape.take(z.extra + z.activated)


def _recompute(tape: Tape, shape: ViTShape, z: _Sizes, level: Recompute, trained: bool, mode: Mode) -> None:
    """What the backward makes again, up to the last tensor it needs: at the end all that a kept block would hold."""
    if trained:
        tape.take(RANDOM_STATE_BYTES)
    if level is Recompute.BLOCK:
        _attention_half(tape, shape, z, grad=True, trained=trained, pruned=False, mode=mode)
    tape.take(z.stream + 2 * z.statistic)
    tape.take(z.hidden)
    if level is Recompute.MLP and not trained:
        tape.free(z.stream)
    _activation(tape, shape, z)
    if not trained:
        tape.free(z.activated)
        if level is Recompute.BLOCK:
            tape.free(z.stream)
    if level is Recompute.BLOCK and shape.layer_scale:
        tape.take(z.stream)  # fc2's output
        if not trained:
            tape.free(z.stream)
    if trained:
        tape.free(RANDOM_STATE_BYTES)


class _Weights:
    """Gradients of the weights as a backward makes them."""

    def __init__(self, tape: Tape, mode: Mode, trained: bool) -> None:
        self._tape, self._stay, self._trained = tape, mode.gradients_stay, trained
        self.bytes = 0

    def made(self, floats: int) -> int:
        """Take the gradient; returns what goes once it is added or used."""
        if not self._trained:
            return 0
        size = floats * FLOAT_BYTES
        self._tape.take(size)
        if self._stay:
            self.bytes += size
            return 0
        return size


def _norm_backward(tape: Tape, weights: _Weights, shape: ViTShape, z: _Sizes, *, inner: bool, mode: Mode) -> None:
    """A norm's backward; `inner`: its input's gradient is needed. Its output's gradient and statistics go."""
    tape.take(z.stream if inner else 0)
    gone = weights.made(2 * shape.width)
    tape.touch(mode.threads * 2 * shape.width * FLOAT_BYTES)
    tape.free(z.stream + 2 * z.statistic + gone)


def _linear_backward(tape: Tape, weights: _Weights, wide_in: int, rows: int, columns: int) -> int:
    """A linear's backward: its input's gradient (bytes), weight's and bias's. Returns what goes when they are added."""
    tape.take(wide_in)
    return weights.made(rows * columns + rows)


def _scale_backward(tape: Tape, weights: _Weights, shape: ViTShape, z: _Sizes, trained: bool) -> None:
    """A layer scale's: the gradient of what it scaled stays beside the residual stream's."""
    tape.take(z.stream)
    if trained:
        tape.touch(z.stream)
        tape.free(weights.made(shape.width) + z.stream)


def _backward(
    tape: Tape, shape: ViTShape, z: _Sizes, level: Recompute, state: BlockState, lowest: bool, mode: Mode
) -> int:
    """From the output's gradient alive to the input's alive, all that was kept gone. Returns the gradients that stay."""
    trained = state is BlockState.TRAINED
    weights = _Weights(tape, mode, trained)
    width, attention, hidden = shape.width, shape.attention_width, shape.mlp_width
    scaled = shape.layer_scale
    if scaled and level is not Recompute.BLOCK:
        _scale_backward(tape, weights, shape, z, trained)
    if level is not Recompute.NOTHING:
        _recompute(tape, shape, z, level, trained, mode)
    if scaled and level is Recompute.BLOCK:
        _scale_backward(tape, weights, shape, z, trained)
    gone = _linear_backward(tape, weights, z.activated, width, hidden)  # fc2
    tape.free(gone + (z.activated if trained else 0) + (z.stream if scaled else 0))
    _activation_backward(tape, shape, z)
    gone = _linear_backward(tape, weights, z.stream, hidden * (2 if shape.gated_mlp else 1), width)  # fc1
    tape.free(gone + z.hidden + (z.stream if trained else 0))
    _norm_backward(tape, weights, shape, z, inner=True, mode=mode)
    tape.free(z.stream)  # the two gradients of the middle become one
    tape.free(z.stream)  # the middle itself
    if level is Recompute.MLP and trained:
        tape.free(RANDOM_STATE_BYTES)
    if scaled:
        _scale_backward(tape, weights, shape, z, trained)
    gone = _linear_backward(tape, weights, z.attention, width, attention)  # proj
    tape.free(gone + (z.stream if scaled else 0) + (z.attention if trained and shape.qk_norm else 0))
    if lowest:
        tape.free(z.stream)  # nothing needs the residual stream's gradient any more
    tape.take(3 * z.attention)
    tape.touch(mode.threads * z.query_rows * 2 * min(512, z.tokens) * FLOAT_BYTES)
    qkv = 3 * z.attention
    tape.free(2 * z.attention + z.head_statistic)  # its output and the output's gradient
    if shape.qk_norm:
        tape.free(2 * z.attention)  # the normed q and k
        for _ in range(2):
            tape.take(z.attention)
            tape.take(z.attention)
            tape.touch(z.attention)
            tape.free(2 * z.attention + 2 * z.head_statistic)
    tape.free(qkv)
    tape.take(qkv)  # joined
    tape.free(qkv)
    tape.touch(qkv)  # laid out as qkv wrote it
    gone = _linear_backward(tape, weights, 0 if lowest and not trained else z.stream, 3 * attention, width)  # qkv
    tape.free(gone + qkv + (z.stream if trained else 0))
    _norm_backward(tape, weights, shape, z, inner=not lowest, mode=mode)
    tape.free(z.stream)  # the block's input
    if not lowest:
        tape.free(z.stream)  # two gradients become one
    if level is Recompute.BLOCK and trained:
        tape.free(RANDOM_STATE_BYTES)
    return weights.bytes


def _activation_backward(tape: Tape, shape: ViTShape, z: _Sizes) -> None:
    """From the activated layer's gradient to the hidden layer's; what the activation kept goes."""
    if shape.hidden_layers > 2:
        tape.touch(2 * z.activated)
    tape.take(z.hidden)
    tape.free(z.activated + z.hidden + z.extra)


@lru_cache(maxsize=65536)
def block_walk(
    shape: ViTShape,
    state: BlockState,
    level: Recompute,
    patch_tokens: int,
    leaving: int | None,
    batch: int,
    lowest: bool,
    mode: Mode,
) -> BlockWalk:
    """One block in one step. `leaving`: patch tokens that go on, None where the block prunes nothing.

    `lowest`: the block's input needs no gradient.
    """
    grad, trained = state is not BlockState.BELOW, state is BlockState.TRAINED
    z = _sizes(shape, patch_tokens + shape.prefix_tokens, batch, trained)
    if not grad:
        level = Recompute.NOTHING
    tape = Tape()
    whole = level is Recompute.BLOCK
    kept_random = RANDOM_STATE_BYTES if trained and level is not Recompute.NOTHING else 0
    if whole:
        tape.take(kept_random)
    pruned = leaving is not None
    _attention_half(tape, shape, z, grad=grad and not whole, trained=trained and not whole, pruned=pruned, mode=mode)
    if level is Recompute.MLP:
        tape.take(kept_random)
    _mlp_half(tape, shape, z, grad=grad and not whole, trained=trained and not whole, part=level is Recompute.MLP)
    if not grad or whole:
        tape.free(z.stream)  # the middle, which norm2 read
    if not grad:
        tape.free(z.stream)  # the input, which norm1 read
    out = z.stream
    index = 0
    if leaving is not None:
        left = batch * (leaving + shape.prefix_tokens)
        index = left * INDEX_BYTES
        out = left * shape.width * FLOAT_BYTES
        tape.take(2 * index + out)
        tape.free(z.stream + index + z.statistic)
        if not grad:
            tape.free(index)
    # What is live now is the output and what lies in between; at the start the input was live, which counts as kept.
    kept = tape.live + z.stream - out
    forward_peak = tape.peak
    if not grad:
        return BlockWalk(forward_peak, kept, 0, 0)
    back = Tape()
    if leaving is not None:
        back.take(z.stream)
        back.free(out + index)
    gradients = _backward(back, shape, z, level, state, lowest, mode)
    return BlockWalk(forward_peak, kept, back.peak, gradients)
