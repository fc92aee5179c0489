"""What a single step needs less of than its plan allows: the plan is for the worst draw at the token ceilings."""

from __future__ import annotations

import msgspec

from edgetune.cost import Recompute, Selection, StepSetup, ViTShape, step_peak_bytes
from edgetune.planner.values import Plan


def lightened(shape: ViTShape, selection: Selection, plan: Plan) -> Selection:
    """The same step with the least recompute that stays within the plan's peak: fewer tokens leave room to keep more.

    Recompute is taken back block by block, the top ones first; what is computed stays the same.
    """
    if not selection.recompute:
        return selection
    setup = StepSetup(
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        optimizer=plan.optimizer,
        ever_trained_blocks=plan.ever_trained_blocks,
        updates_in_backward=plan.updates_in_backward,
        half_blocks=plan.split_block if plan.half_frozen else 0,
        threads=plan.threads,
    )
    levels = selection.recompute
    for kept in range(selection.lowest_trained_block, shape.depth):
        lighter = msgspec.structs.replace(
            selection, recompute=levels[:kept] + (Recompute.NOTHING,) * (shape.depth - kept)
        )
        if step_peak_bytes(shape, lighter, setup) <= plan.predicted.peak_bytes:
            return lighter
    return selection
