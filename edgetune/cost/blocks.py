"""What one block holds while it runs forward and backward. Pure arithmetic.

A block that is built otherwise than timm's own tells what autograd keeps of it (`vit/probe.py`); what that is more than
a plain block's is counted with its hidden layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from edgetune.cost.backward import block_backward
from edgetune.cost.forward import attention_half, mlp_half
from edgetune.cost.tape import FLOAT_BYTES, INDEX_BYTES, RANDOM_STATE_BYTES, Mode, Tape, block_sizes
from edgetune.cost.values import BlockState, Recompute, ViTShape


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
    z = block_sizes(shape, patch_tokens + shape.prefix_tokens, batch, trained)
    if not grad:
        level = Recompute.NOTHING
    tape = Tape()
    whole = level is Recompute.BLOCK
    kept_random = RANDOM_STATE_BYTES if trained and level is not Recompute.NOTHING else 0
    if whole:
        tape.take(kept_random)
    pruned = leaving is not None
    attention_half(tape, shape, z, grad=grad and not whole, trained=trained and not whole, pruned=pruned, mode=mode)
    if level is Recompute.MLP:
        tape.take(kept_random)
    mlp_half(
        tape, shape, z, grad=grad and not whole, trained=trained and not whole, part=level is Recompute.MLP, mode=mode
    )
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
    gradients = block_backward(back, shape, z, level, state, lowest, mode)
    return BlockWalk(forward_peak, kept, back.peak, gradients)
