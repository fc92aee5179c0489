"""A block's backward, allocation by allocation, as `forward.py` does its forward. Pure arithmetic."""

from __future__ import annotations

from edgetune.cost.forward import made_again
from edgetune.cost.tape import FLOAT_BYTES, RANDOM_STATE_BYTES, Mode, Sizes, Tape
from edgetune.cost.values import BlockState, Recompute, ViTShape


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


def _norm_backward(tape: Tape, weights: _Weights, shape: ViTShape, z: Sizes, *, inner: bool, mode: Mode) -> None:
    """A norm's backward; `inner`: its input's gradient is needed. Its output's gradient and statistics go."""
    tape.take(z.stream if inner else 0)
    gone = weights.made(2 * shape.width)
    tape.touch(mode.threads * 2 * shape.width * FLOAT_BYTES)
    tape.free(z.stream + 2 * z.statistic + gone)


def _linear_backward(tape: Tape, weights: _Weights, wide_in: int, rows: int, columns: int) -> int:
    """A linear's backward: its input's gradient (bytes), weight's and bias's. Returns what goes when they are added."""
    tape.take(wide_in)
    return weights.made(rows * columns + rows)


def _scale_backward(tape: Tape, weights: _Weights, shape: ViTShape, z: Sizes, trained: bool) -> None:
    """A layer scale's: the gradient of what it scaled stays beside the residual stream's."""
    tape.take(z.stream)
    if trained:
        tape.touch(z.stream)
        tape.free(weights.made(shape.width) + z.stream)


def block_backward(
    tape: Tape, shape: ViTShape, z: Sizes, level: Recompute, state: BlockState, lowest: bool, mode: Mode
) -> int:
    """From the output's gradient alive to the input's alive, all that was kept gone. Returns the gradients that stay."""
    trained = state is BlockState.TRAINED
    weights = _Weights(tape, mode, trained)
    width, attention, hidden = shape.width, shape.attention_width, shape.mlp_width
    scaled = shape.layer_scale
    if scaled and level is not Recompute.BLOCK:
        _scale_backward(tape, weights, shape, z, trained)
    if level is not Recompute.NOTHING:
        made_again(tape, shape, z, level, trained, mode)
    if scaled and level is Recompute.BLOCK:
        _scale_backward(tape, weights, shape, z, trained)
    gone = _linear_backward(tape, weights, z.hidden, width, hidden)  # fc2
    tape.free(gone + (z.hidden if trained else 0) + (z.stream if scaled else 0))
    tape.take(z.hidden)
    tape.free(2 * z.hidden)  # what the activation kept, and its output's gradient
    gone = _linear_backward(tape, weights, z.stream, hidden, width)  # fc1
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
