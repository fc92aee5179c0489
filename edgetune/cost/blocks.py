"""What one block holds while it runs forward and backward. Pure arithmetic.

timm's plain block is walked line by line; one that is built otherwise was run once (`vit/probe.py`), and what that showed
is scaled to the tokens and images at hand.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from edgetune.cost.backward import block_backward
from edgetune.cost.forward import attention_half, mlp_half
from edgetune.cost.probed import ProbedPart, amounts, block_way, most, total
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
    z = block_sizes(shape, patch_tokens + shape.prefix_tokens, batch)
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


@lru_cache(maxsize=65536)
def probed_walk(
    part: ProbedPart,
    state: BlockState,
    level: Recompute,
    tokens: int,
    leaving: int | None,
    batch: int,
    lowest: bool,
    mode: Mode,
    held: bool = False,
) -> BlockWalk:
    """`block_walk` of a block that was probed. Tokens are all tokens, prefix tokens among them.

    `held`: its input was read from the cache, and stands to the end of the step.
    """
    trained = state is BlockState.TRAINED
    walk = part.walk(
        block_way(
            state,
            Recompute.NOTHING if state is BlockState.BELOW else level,
            pruned=leaving is not None,
            lowest=lowest and trained,
            gradients=mode.gradients_way if trained else 0,
            half=mode.half_weights and state is BlockState.BELOW,
        ),
        batch,
        held=held and lowest and trained,
    )
    of = amounts(batch, tokens, tokens if leaving is None else leaving, 0, mode.threads)
    return BlockWalk(
        forward_peak=most(walk.forward, of),
        kept=total(walk.kept, of),
        backward_peak=most(walk.backward, of),
        gradients=total(walk.left, of),
    )
