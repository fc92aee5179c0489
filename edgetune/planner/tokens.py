"""Token ceilings and floors, and what clips a proposed step to the plan."""

from __future__ import annotations

from functools import lru_cache

from edgetune.cost import Selection, ViTShape
from edgetune.planner.values import TOKEN_MULTIPLE, Plan, PlanRequest, with_levels

# At the floor of every block, at least this share of the patch tokens reaches the last block (see docs/decisions).
LAST_BLOCK_TOKEN_SHARE = 0.25
CEILING_STEPS = 6


def fit(selection: Selection, plan: Plan) -> Selection:
    """Clip a proposal to the plan: no block below the split, at most K of them, no more tokens than the ceilings.

    Token counts go up to a multiple of TOKEN_MULTIPLE, so that a run meets few shapes: for each new one the allocator and
    oneDNN keep memory for good (16 MiB in 90 steps of the bundled model). Where the floor is all tokens, none is dropped:
    the plan has not counted what dropping takes; the first block sees all in any case. Recompute levels are the plan's.
    """
    room = plan.trained_blocks
    trains = []
    for block, trained in enumerate(selection.trains):
        allowed = trained and block >= plan.split_block and room > 0
        room -= allowed
        trains.append(allowed)
    wanted = selection.tokens if plan.token_floor < 1 else plan.token_ceiling
    tokens = [plan.token_ceiling[0]]
    for asked, ceiling in zip(wanted[1:], plan.token_ceiling[1:], strict=True):
        tokens.append(max(1, min(rounded_up(asked), ceiling, tokens[-1])))
    embeddings = plan.embeddings_train and selection.embeddings_train
    return with_levels(tuple(trains), tuple(tokens), embeddings, plan.recompute, plan.recompute_frozen)


def pruned_tokens(plan: Plan) -> tuple[int, ...] | None:
    """The tokens that each block sees where they are dropped at the split and nowhere else; None if none are there."""
    all_tokens, depth = plan.token_ceiling[0], len(plan.token_ceiling)
    if plan.split_block >= depth or plan.token_ceiling[plan.split_block] == all_tokens:
        return None
    first = next(block for block, tokens in enumerate(plan.token_ceiling) if tokens < all_tokens)
    return (all_tokens,) * first + (plan.token_ceiling[first],) * (depth - first)


@lru_cache(maxsize=1024)
def ceilings(
    shape: ViTShape, split_block: int, keep_ratio: float, split_tokens: float = 1.0, cached_blocks: int | None = None
) -> tuple[int, ...]:
    """Most patch tokens a block: all below the split, a share `split_tokens` of them in the split block, then a share
    `keep_ratio` of what is left.

    Each count goes up to a multiple of TOKEN_MULTIPLE. The first block sees all. With `cached_blocks` tokens are dropped
    where that cache ends, below the split.
    """
    at = split_block if cached_blocks is None else min(cached_blocks, split_block)
    counts = [shape.patch_tokens] * min(max(at, 1), shape.depth)
    left = shape.patch_tokens * (split_tokens if at else 1.0)
    counts += [min(counts[-1], rounded_up(left))] * (min(split_block + 1, shape.depth) - len(counts))
    while len(counts) < shape.depth:
        left *= keep_ratio
        counts.append(min(counts[-1], rounded_up(left)))
    return tuple(counts)


def rounded_up(tokens: float) -> int:
    # 1e-9: a ratio like 0.9 must not push a whole number over the next multiple.
    return TOKEN_MULTIPLE * max(1, -int(-(tokens - 1e-9) // TOKEN_MULTIPLE))


def default_token_floor(depth: int, split_block: int) -> float:
    """The least budget of a block: LAST_BLOCK_TOKEN_SHARE of the tokens are left where all blocks are at it."""
    prunings = max(1, depth - 1 - split_block)
    floor: float = max(0.5, LAST_BLOCK_TOKEN_SHARE ** (1 / prunings))
    return round(floor, 4)


def floor_of(request: PlanRequest, split_block: int) -> float:
    """The floor that was asked for, or the default's, at most the ceiling that was asked for."""
    if not request.space.prunes_tokens:
        return 1.0
    if request.token_floor is not None:
        return request.token_floor
    return min(default_token_floor(request.shape.depth, split_block), request.token_ceiling or 1.0)


def ceiling_ratios(request: PlanRequest, split_block: int) -> tuple[float, ...]:
    """Shares that a block may pass on at most, best first: from the ceiling asked for (or all) down to the floor."""
    if not request.space.prunes_tokens:
        return (1.0,)
    top = request.token_ceiling or 1.0
    floor = floor_of(request, split_block)
    if floor >= top:
        return (top,)
    return tuple(top - (top - floor) * step / CEILING_STEPS for step in range(CEILING_STEPS + 1))
