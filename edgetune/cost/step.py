"""Bytes of one training step, from arithmetic alone: no torch, no numpy, no model.

What comes in: a `ViTShape` (what the model is), a `Selection` (what this step does), a micro-batch.
What goes out: a `StepCost`, found by walking the step the way autograd does: forward, block by block, adding what each
keeps; backward, from the head down, with what is still held, the gradients made so far and the block's own workspace;
then the optimizer's update. `tests/test_cost_measured.py` and `benchmarks/memory_model.py` hold the result against the
CPU allocator's own events.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import msgspec

from edgetune.cost.blocks import BlockWalk, block_walk, probed_walk
from edgetune.cost.ends import EndWalk, embed_walk, evaluated_head_bytes, head_walk, input_bytes
from edgetune.cost.flops import step_flops
from edgetune.cost.tape import FLOAT_BYTES, Mode, Tape
from edgetune.cost.values import BlockState, Recompute, Selection, StepCost, ViTShape, block_states
from edgetune.cost.weights import optimizer_bytes, trained_parameters, update_scratch_bytes
from edgetune.optim import OptimizerName

# Class-token deltas: the class token before a block, its change, the change squared.
_DELTA_COPIES = 3


class StepSetup(msgspec.Struct, frozen=True, kw_only=True):
    """How a step is run, whatever it trains.

    `ever_trained_blocks`: blocks whose optimizer state there is. `half_blocks`: lowest blocks whose weights are stored
    as bfloat16. `may_prune`: count what pruning needs after every block, whether or not tokens are dropped there, so
    that fewer tokens never cost more. `cached_blocks`: lowest blocks that are not run, since what they put out is read
    from the prefix cache; neither they nor the embeddings are in memory. `pooled`: of what the last of them puts out,
    only the prefix tokens, one of which the head reads.
    """

    micro_batch: int
    accumulation: int
    optimizer: OptimizerName
    ever_trained_blocks: int
    updates_in_backward: bool = False
    half_blocks: int = 0
    threads: int = 1
    may_prune: bool = False
    cached_blocks: int = 0
    pooled: bool = False

    @property
    def mode(self) -> Mode:
        return Mode(self.accumulation > 1, self.updates_in_backward, self.threads)


class Frame(NamedTuple):
    """What a step holds whatever its blocks recompute and whichever of them train, in bytes.

    A peak is above what is live where it begins; `start` and `start_peak` count from nothing.
    """

    weights: int
    state: int
    gradients: int
    scratch: int
    before: int  # live when a micro-batch begins
    start: int  # live when the first block begins
    start_peak: int
    head_kept: int  # of final norm, classifier and loss
    head_peak: int  # their forward's and backward's, above what is live after the last block
    head_left: int  # live after their backward, less what was live before their forward
    embed_peak: int  # of the embeddings' backward, 0 where they are frozen
    update_peak: int  # of an update after the backward, from nothing
    first_block: int  # that is run
    viewed: int  # what a prefix token's gradient holds with it
    held_inputs: int  # what is read from the cache stands to the end of a step, whoever is done with it


@lru_cache(maxsize=4096)
def step_frame(
    shape: ViTShape,
    first_tokens: int,
    last_tokens: int,
    embeddings_train: bool,
    trained_blocks: int,
    setup: StepSetup,
) -> Frame:
    """The frame of a step in which so many blocks train, and so many patch tokens reach the first block that is run and
    the last.
    """
    batch, mode = setup.micro_batch, setup.mode
    weights = resident_weights_bytes(shape, setup.half_blocks, setup.cached_blocks)
    inputs = step_input_bytes(shape, batch, first_tokens, setup)
    head_tokens = 0 if setup.pooled else last_tokens
    state = optimizer_bytes(shape, setup.optimizer, setup.ever_trained_blocks, embeddings_train)
    gradients = FLOAT_BYTES * trained_parameters(shape, trained_blocks, embeddings_train)
    scratch = update_scratch_bytes(shape, setup.optimizer, trained_blocks > 0, embeddings_train)
    resting = weights + state + inputs
    # Of one image, a prefix token's gradient is a view of all tokens', which it keeps. Counted of more images too, so that
    # more never cost less.
    viewed = shape.all_tokens * shape.width * FLOAT_BYTES if embeddings_train else 0
    tape = Tape()
    tape.take(resting)
    if mode.accumulates:
        tape.take(gradients + viewed)  # of the micro-batches before
    if mode.updates_in_backward:
        tape.take(scratch)
    before = tape.live
    embed = EndWalk(0, 0, 0, 0)
    if not setup.cached_blocks:
        embed = embed_walk(shape, batch, mode, keeps=embeddings_train)
        tape.touch(embed.forward_peak)
        tape.take(embed.kept)
    inner, held = trained_blocks > 0 or embeddings_train, setup.cached_blocks == shape.depth
    head = head_walk(shape, head_tokens, batch, mode, inner=inner, held=held)
    return Frame(
        weights=weights,
        state=state,
        gradients=gradients,
        scratch=scratch,
        before=before,
        start=tape.live,
        start_peak=tape.peak,
        head_kept=head.kept,
        head_peak=max(head.forward_peak, head.kept + head.backward_peak),
        head_left=head.left,
        embed_peak=embed.backward_peak,
        update_peak=0 if mode.updates_in_backward else resting + gradients + viewed + scratch,
        first_block=setup.cached_blocks,
        held_inputs=inputs if setup.cached_blocks else 0,
        viewed=viewed,
    )


def resident_weights_bytes(shape: ViTShape, half_blocks: int, cached_blocks: int) -> int:
    """Weights in memory: all, or those above the cached prefix."""
    if cached_blocks:
        return shape.weight_bytes - FLOAT_BYTES * (shape.embed_parameters + cached_blocks * shape.block_parameters)
    return shape.weight_bytes - half_blocks * shape.block_parameters * (FLOAT_BYTES // 2)


def feature_tokens(shape: ViTShape, patch_tokens: int, *, pooled: bool) -> int:
    """Tokens of an image that the prefix cache holds."""
    return shape.prefix_tokens + (0 if pooled else patch_tokens)


def step_input_bytes(shape: ViTShape, batch: int, first_tokens: int, setup: StepSetup) -> int:
    """One micro-batch as float32: of images, or of what the cache holds of them."""
    if not setup.cached_blocks:
        return input_bytes(shape, batch)
    return batch * feature_tokens(shape, first_tokens, pooled=setup.pooled) * shape.width * FLOAT_BYTES


NOT_RUN = BlockWalk(0, 0, 0, 0)


def _first_tokens(selection: Selection, setup: StepSetup) -> int:
    """Patch tokens that reach the first block that is run (the head, where none is)."""
    return selection.tokens[min(setup.cached_blocks, selection.depth - 1)]


def placed_walk(
    shape: ViTShape,
    tokens: tuple[int, ...],
    setup: StepSetup,
    block: int,
    state: BlockState,
    level: Recompute,
    lowest: bool,
) -> BlockWalk:
    """A block's walk in its place in a step: what stands beside its forward, and the tokens that do not leave it."""
    batch = setup.micro_batch
    came = tokens[block]
    after = tokens[block + 1] if block + 1 < shape.depth else came
    prunes = after < came or (setup.may_prune and block + 1 < shape.depth)
    trained = state is BlockState.TRAINED
    # What a block that makes no gradient of its own holds does not depend on what is done with them.
    mode = setup.mode if trained else Mode(threads=setup.threads, half_weights=block < setup.half_blocks)
    part = shape.probed_block(block)
    if part is not None:
        prefix = shape.prefix_tokens
        leaving = after + prefix if prunes else None
        walk = probed_walk(
            part, state, level, came + prefix, leaving, batch, lowest, mode, block == setup.cached_blocks > 0
        )
    else:
        walk = block_walk(shape, state, level, came, after if prunes else None, batch, lowest, mode)
    beside = _DELTA_COPIES * batch * shape.width * FLOAT_BYTES
    moved = batch * (after - came) * shape.width * FLOAT_BYTES
    return walk._replace(forward_peak=walk.forward_peak + beside, kept=walk.kept + moved)


def walked_peak(frame: Frame, walks: Sequence[BlockWalk], lowest: int) -> int:
    """Peak of live bytes of a step whose blocks walk so. `lowest`: the first block that carries gradient."""
    live, peak = frame.start, frame.start_peak
    if lowest > frame.first_block and frame.held_inputs:
        # The first block is done with its input, and can't let it go.
        peak = max(peak, live + walks[frame.first_block].forward_peak)
        live += frame.held_inputs + walks[frame.first_block].kept
        forward = walks[frame.first_block + 1 :]
    else:
        forward = walks
    for forward_peak, kept, _, _ in forward:
        if live + forward_peak > peak:
            peak = live + forward_peak
        live += kept
    if live + frame.head_peak > peak:
        peak = live + frame.head_peak
    live += frame.head_left
    for _, kept, backward_peak, gradients in reversed(walks[lowest:]):
        if live + backward_peak > peak:
            peak = live + backward_peak
        live += gradients - kept
    if frame.embed_peak:
        peak = max(peak, live + frame.embed_peak)
    return max(peak, frame.update_peak)


def step_cost(shape: ViTShape, selection: Selection, setup: StepSetup) -> StepCost:
    """Cost of one optimizer step of `setup.accumulation` micro-batches.

    Raises: ValueError if the selection's depth is not the shape's, or gradients of several micro-batches can't wait.
    """
    frame, walks = _walk(shape, selection, setup)
    # Held after the embeddings and after each block: where tokens go, the most is not at the end.
    held = list(accumulate((walk.kept for walk in walks), initial=frame.start - frame.before))
    return StepCost(
        weights_bytes=frame.weights,
        gradients_bytes=0 if setup.updates_in_backward else frame.gradients,
        optimizer_bytes=frame.state,
        activations_bytes=max(*held, held[-1] + frame.head_kept) + frame.viewed,
        workspace_bytes=_workspace(frame, walks, setup.updates_in_backward),
        inputs_bytes=step_input_bytes(shape, setup.micro_batch, _first_tokens(selection, setup), setup),
        peak_bytes=walked_peak(frame, walks, selection.lowest_trained_block),
        flops=setup.accumulation * step_flops(shape, selection, setup.micro_batch, setup.cached_blocks),
    )


def _workspace(frame: Frame, walks: list[BlockWalk], updates_in_backward: bool) -> int:
    """The most that lives for an instant: in a block, at either end, in an update."""
    passes = max(
        frame.start_peak - frame.before,
        frame.head_peak,
        frame.embed_peak,
        *(max(walk.forward_peak, walk.backward_peak) for walk in walks),
    )
    return frame.scratch + passes if updates_in_backward else max(frame.scratch, passes)


def step_peak_bytes(shape: ViTShape, selection: Selection, setup: StepSetup) -> int:
    """`step_cost(...).peak_bytes`, and nothing else."""
    frame, walks = _walk(shape, selection, setup)
    return walked_peak(frame, walks, selection.lowest_trained_block)


def _walk(shape: ViTShape, selection: Selection, setup: StepSetup) -> tuple[Frame, list[BlockWalk]]:
    if selection.depth != shape.depth or len(selection.tokens) != shape.depth:
        raise ValueError(f"selection of depth {selection.depth} for a model of depth {shape.depth}")
    if setup.updates_in_backward and setup.accumulation > 1:
        raise ValueError("a weight updated inside the backward has no gradient left to add to")
    embeddings = selection.embeddings_train
    first = _first_tokens(selection, setup)
    frame = step_frame(shape, first, selection.tokens[-1], embeddings, sum(selection.trains), setup)
    lowest = selection.lowest_trained_block
    if setup.cached_blocks > lowest:
        raise ValueError(f"block {lowest} trains: what {setup.cached_blocks} blocks put out can't be read from a cache")
    walks = [
        NOT_RUN
        if block < setup.cached_blocks
        else placed_walk(
            shape,
            selection.tokens,
            setup,
            block,
            state,
            selection.level(block),
            block == lowest and not embeddings,
        )
        for block, state in enumerate(block_states(selection))
    ]
    return frame, walks


def evaluation_peak_bytes(
    shape: ViTShape, batch: int, *, threads: int = 1, half_blocks: int = 0, cached: bool = False
) -> int:
    """Live bytes of a forward pass on all tokens without gradient, above weights and optimizer state.

    `cached`: from what a prefix put out, else from images.
    """
    tape = Tape()
    mode = Mode(threads=threads, half_weights=half_blocks > 0)
    if cached:
        tape.take(2 * batch * shape.all_tokens * shape.width * FLOAT_BYTES)  # what was read stays beside the stream
    else:
        tape.take(input_bytes(shape, batch))
        embed = embed_walk(shape, batch, mode, keeps=False)
        tape.touch(embed.forward_peak)
        tape.take(embed.kept)
    below, nothing = BlockState.BELOW, Recompute.NOTHING
    walks = [
        probed_walk(part, below, nothing, shape.all_tokens, None, batch, False, mode) for part in shape.probed_blocks
    ]
    walks = walks or [block_walk(shape, below, nothing, shape.patch_tokens, None, batch, False, mode)]
    tape.touch(max(walk.forward_peak for walk in walks))
    tape.touch(evaluated_head_bytes(shape, batch, mode))
    return tape.peak
