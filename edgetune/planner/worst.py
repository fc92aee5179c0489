"""The draw of blocks with the largest peak, among all that a plan allows."""

from __future__ import annotations

from functools import lru_cache

from edgetune.cost import Recompute, Selection, StepSetup, ViTShape, step_peak_bytes
from edgetune.cost.blocks import BlockWalk, Mode, block_walk
from edgetune.cost.values import BlockState
from edgetune.planner.values import Lossless, Lossy, PlanRequest, setup_of, with_levels


def first_draw(depth: int, lossy: Lossy, draws: bool) -> tuple[bool, ...]:
    """The lowest blocks above the split where blocks are drawn, the top ones where they are not."""
    if draws:
        return tuple(lossy.split_block <= block < lossy.split_block + lossy.trained_blocks for block in range(depth))
    return tuple(block >= depth - lossy.trained_blocks for block in range(depth))


def selected(trains: tuple[bool, ...], lossy: Lossy, lossless: Lossless) -> Selection:
    return with_levels(
        trains, lossy.token_ceiling, lossy.embeddings_train, lossless.recompute, lossless.recompute_frozen
    )


def worst_draw(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> tuple[int, Selection]:
    """(peak of live bytes, the draw that has it) over all draws at the token ceilings."""
    setup = setup_of(request, lossy, lossless)
    return max(
        (
            (step_peak_bytes(request.shape, selection, setup), selection)
            for selection in (selected(trains, lossy, lossless) for trains in draws_to_check(request, lossy, lossless))
        ),
        key=lambda found: found[0],
    )


def fits(request: PlanRequest, lossy: Lossy, lossless: Lossless, most_bytes: int) -> bool:
    """Whether no draw passes so many live bytes. The first that does ends it."""
    setup = setup_of(request, lossy, lossless)
    first = selected(first_draw(request.shape.depth, lossy, request.space.draws), lossy, lossless)
    if step_peak_bytes(request.shape, first, setup) > most_bytes:
        return False
    return all(
        step_peak_bytes(request.shape, selected(trains, lossy, lossless), setup) <= most_bytes
        for trains in draws_to_check(request, lossy, lossless)
    )


def draws_to_check(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> list[tuple[bool, ...]]:
    """Draws of which one has the largest peak among all draws of K blocks above the split.

    A step peaks in some block's forward or backward, or between the two. Given the lowest trained block and the block of
    the peak, every other block adds a fixed amount to it when it trains instead of being frozen: below, what it keeps
    more; above, its gradients (or nothing, in the forward). So the worst draw for that pair takes the K - 1 blocks that
    add most, and the worst of all is the worst of some pair. Tests hold it against every draw.
    """
    depth = request.shape.depth
    if not request.space.draws or lossy.trained_blocks in (0, depth - lossy.split_block):
        return [first_draw(depth, lossy, request.space.draws)]
    setup = setup_of(request, lossy, lossless)
    mode = Mode(setup.accumulation > 1, setup.updates_in_backward, setup.threads)
    frozen_levels = tuple(max(level, lossless.recompute_frozen) for level in lossless.recompute)
    key = (request.shape, lossy, lossless.recompute, frozen_levels, setup, mode)
    return list(_draws(*key))


@lru_cache(maxsize=256)
def _draws(
    shape: ViTShape,
    lossy: Lossy,
    levels: tuple[Recompute, ...],
    frozen_levels: tuple[Recompute, ...],
    setup: StepSetup,
    mode: Mode,
) -> tuple[tuple[bool, ...], ...]:
    depth, split, count = shape.depth, lossy.split_block, lossy.trained_blocks
    tokens = lossy.token_ceiling

    def walk(block: int, state: BlockState, level: Recompute) -> BlockWalk:
        after = tokens[block + 1] if block + 1 < depth else tokens[block]
        prunes = after < tokens[block] or (setup.may_prune and block + 1 < depth)
        return block_walk(shape, state, level, tokens[block], after if prunes else None, setup.micro_batch, False, mode)

    above = range(split, depth)
    trained = {block: walk(block, BlockState.TRAINED, levels[block]) for block in above}
    frozen = {block: walk(block, BlockState.ON_PATH, frozen_levels[block]) for block in above}
    more_kept = {block: trained[block].kept - frozen[block].kept for block in above}
    found: dict[tuple[bool, ...], None] = {}

    def add(lowest: int, gains: dict[int, int]) -> None:
        others = sorted(range(lowest + 1, depth), key=lambda block: -gains[block])[: count - 1]
        if len(others) == count - 1:
            chosen = {lowest, *others}
            found[tuple(block in chosen for block in range(depth))] = None

    for lowest in range(split, depth - count + 1):
        add(lowest, more_kept)
        for peak in range(lowest, depth):
            backward = {
                block: more_kept[block] if block < peak else trained[block].gradients for block in range(lowest, depth)
            }
            backward[peak] = more_kept[peak] + trained[peak].backward_peak - frozen[peak].backward_peak
            add(lowest, backward)
            forward = {block: more_kept[block] if block < peak else 0 for block in range(lowest, depth)}
            forward[peak] = trained[peak].forward_peak - frozen[peak].forward_peak
            add(lowest, forward)
    return tuple(found)
