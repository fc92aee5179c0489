"""The space a plan is chosen from. Pure, no torch, no numpy.

Lossy choices, most preferred first; the first for which any lossless choice fits wins:

1. optimizer state is kept: dropping it restarts a block's moments whenever it comes back, so it is the last resort;
2. the embeddings train, where everything is to train; then nothing is frozen (split block 0);
3. the lowest split block: more blocks may ever train, and accuracy on hard tasks falls with the split;
4. the most blocks a step (K, down to half of those above the split): fewer trained blocks learn slower;
5. the highest token ceiling: one share that every block above the split may pass on, from all down to the floor.

Lossless choices, of which the fastest that fits is taken, by `cost.time` (of those as fast, to 5 %, the one with the
largest micro-batch, then the first named here):

- recompute of blocks that train: one level for all, or a deeper level below some block and a lighter one from it on;
- recompute of frozen blocks that gradient passes through: as if they trained, or whole;
- the micro-batch: the batch cut into 1, 2, 3 ... nearly equal parts;
- the optimizer's update inside the backward, where there is one micro-batch.

So every lossless lever is spent before a lossy one moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from edgetune.cost import Recompute
from edgetune.errors import UsageError
from edgetune.planner.tokens import ceiling_ratios, ceilings
from edgetune.planner.values import Lossless, Lossy, PlanRequest, accumulation_of

# Beyond any use, and the ways to cut it into micro-batches are still few enough to look at all.
MAX_BATCH_SIZE = 65_536
_LEVELS = {"none": Recompute.NOTHING, "mlp": Recompute.MLP, "block": Recompute.BLOCK}

# Levels of blocks that train, and the least level of frozen blocks that gradient passes through.
Pattern = tuple[tuple[Recompute, ...], Recompute]


def check(request: PlanRequest) -> None:
    """Raises: UsageError for what makes no sense together."""
    if not 1 <= request.batch_size <= MAX_BATCH_SIZE:
        raise UsageError(f"the batch size must be at least 1 and at most {MAX_BATCH_SIZE}, not {request.batch_size}.")
    if request.accumulation is not None and not 1 <= request.accumulation <= request.batch_size:
        raise UsageError(
            f"--grad-accum-steps must be between 1 and the batch size {request.batch_size}, not {request.accumulation}."
        )
    if request.updates_in_backward and (request.accumulation or 1) > 1:
        raise UsageError(
            "--step-in-backward leaves no gradient to add to, so it goes with one micro-batch only: leave "
            "--grad-accum-steps out."
        )
    for flag, share in (
        ("--token-floor", request.token_floor),
        ("--token-ceiling", request.token_ceiling),
        ("--split-tokens", request.split_tokens),
    ):
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"{flag} is a share above 0 and up to 1, not {share}.")
    if request.token_floor and request.token_ceiling and request.token_floor > request.token_ceiling:
        raise UsageError(
            f"--token-floor {request.token_floor} is above --token-ceiling {request.token_ceiling}: swap them."
        )
    if request.recompute == "mlp" and not request.shape.mlp_half:
        raise UsageError(
            f"--recompute mlp: the blocks of {request.shape.name} have no second half of their own. Try --recompute block."
        )


def lossy_families(request: PlanRequest) -> Iterator[list[Lossy]]:
    """Lossy choices in their order, in lists that differ in tokens alone. The last of a list never needs more memory
    than another of it.
    """
    shape, space = request.shape, request.space
    drops = space.draws and request.keeps_state is not True
    states = (True,) if not drops else (True, False) if request.keeps_state is None else (False,)
    for keeps_state in states:
        for embeddings in space.embeddings:
            for split in space.splits:
                if embeddings and split:  # nothing below a split trains
                    continue
                at_split = request.split_tokens or 1.0
                cached = None if request.cache is None else request.cache.blocks
                ratios = ceiling_ratios(request, split)
                tokens = [ceilings(shape, split, ratio, at_split, cached) for ratio in ratios]
                for count in space.trained_blocks[split]:
                    yield [Lossy(split, count, ceiling, embeddings, keeps_state) for ceiling in tokens]


def lossy_choices(request: PlanRequest) -> Iterator[Lossy]:
    """Most preferred first."""
    for family in lossy_families(request):
        yield from family


def lossless_choices(request: PlanRequest, lossy: Lossy) -> Iterator[Lossless]:
    """All ways to run the same step."""
    for pattern in recompute_choices(request, lossy):
        yield from lossless_of(request, pattern, micro_batches(request))


def lossless_of(request: PlanRequest, pattern: Pattern, sizes: list[int]) -> Iterator[Lossless]:
    asked = request.updates_in_backward
    for micro_batch in sizes:
        for in_backward in (False, True) if asked is None else (asked,):
            if not in_backward or accumulation_of(request, micro_batch) == 1:
                yield Lossless(micro_batch, *pattern, in_backward)


def micro_batches(request: PlanRequest) -> list[int]:
    """Micro-batch sizes, largest first: the batch cut into 1, 2, 3 ... nearly equal parts."""
    if request.accumulation is not None:
        return [-(-request.batch_size // request.accumulation)]
    if request.updates_in_backward:
        return [request.batch_size]
    sizes, parts = [], 1
    while parts <= request.batch_size:
        sizes.append(-(-request.batch_size // parts))
        # The next number of parts that makes them smaller.
        parts = (request.batch_size - 1) // (sizes[-1] - 1) + 1 if sizes[-1] > 1 else request.batch_size + 1
    return sizes


def extreme_micro_batches(request: PlanRequest) -> list[int]:
    """The sizes of which one needs least: the whole batch, at which no gradient waits for others, or the smallest."""
    sizes = micro_batches(request)
    return sizes if len(sizes) == 1 else [sizes[0], sizes[-1]]


def levels_allowed(request: PlanRequest) -> list[Recompute]:
    if request.recompute != "auto":
        return [_LEVELS[request.recompute]]
    return [level for level in Recompute if request.shape.mlp_half or level is not Recompute.MLP]


def recompute_choices(request: PlanRequest, lossy: Lossy) -> tuple[Pattern, ...]:
    depth = request.shape.depth
    carries = lossy.trained_blocks > 0 or lossy.embeddings_train
    first = 0 if lossy.embeddings_train else lossy.split_block
    frozen = carries and request.space.draws and lossy.trained_blocks < depth - lossy.split_block
    return _patterns(depth, first, carries, frozen, tuple(levels_allowed(request)))


@lru_cache(maxsize=256)
def _patterns(
    depth: int, first: int, carries: bool, frozen_blocks: bool, levels: tuple[Recompute, ...]
) -> tuple[Pattern, ...]:
    """`first`: the lowest block that gradient may reach. `frozen_blocks`: it may pass through frozen ones."""
    nothing = (Recompute.NOTHING,) * depth
    if not carries:
        return ((nothing, Recompute.NOTHING),)
    if len(levels) == 1:  # asked for
        return (((levels[0],) * depth, levels[0]),)
    patterns = [(level,) * depth for level in levels]
    for low in levels:
        for high in levels[: levels.index(low)]:
            patterns += [(low,) * block + (high,) * (depth - block) for block in range(first + 1, depth)]
    frozen = (Recompute.NOTHING, Recompute.BLOCK) if frozen_blocks else (Recompute.NOTHING,)
    whole = (Recompute.BLOCK,) * depth
    return tuple(
        (pattern, level) for pattern in patterns for level in frozen if level is Recompute.NOTHING or pattern != whole
    )
