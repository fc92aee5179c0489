"""How the steps of a choice, or of a plan, are run. Pure."""

from __future__ import annotations

from edgetune.cost import StepSetup
from edgetune.planner.prefix import cached_prefix
from edgetune.planner.values import CachedPrefix, Lossless, Lossy, Plan, PlanRequest, accumulation_of


def setup_of(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> StepSetup:
    shape, space = request.shape, request.space
    cached = _left_out(cached_prefix(request, lossy))
    return StepSetup(
        micro_batch=lossless.micro_batch,
        accumulation=accumulation_of(request, lossless.micro_batch),
        optimizer=request.optimizer,
        ever_trained_blocks=ever_trained_blocks(request, lossy),
        updates_in_backward=lossless.updates_in_backward,
        half_blocks=min(lossy.split_block, shape.depth) if request.half_frozen and not cached else 0,
        threads=request.threads,
        may_prune=space.prunes_tokens,
        cached_blocks=0 if cached is None else cached.blocks,
        pooled=cached is not None and cached.pooled,
    )


def ever_trained_blocks(request: PlanRequest, lossy: Lossy) -> int:
    """Blocks whose optimizer state there is: all that may be drawn, where state is kept."""
    keeps_all = request.space.draws and lossy.keeps_state
    return request.shape.depth - lossy.split_block if keeps_all else lossy.trained_blocks


def setup_of_plan(plan: Plan, *, may_prune: bool = False) -> StepSetup:
    cached = _left_out(plan.prefix)
    return StepSetup(
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        optimizer=plan.optimizer,
        ever_trained_blocks=plan.ever_trained_blocks,
        updates_in_backward=plan.updates_in_backward,
        half_blocks=plan.split_block if plan.half_frozen and not cached else 0,
        threads=plan.threads,
        may_prune=may_prune,
        cached_blocks=0 if cached is None else cached.blocks,
        pooled=cached is not None and cached.pooled,
    )


def _left_out(prefix: CachedPrefix | None) -> CachedPrefix | None:
    """A prefix that is in memory no more."""
    return prefix if prefix is not None and prefix.whole else None
