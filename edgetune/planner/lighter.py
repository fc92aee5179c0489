"""What a single step needs less of than its plan allows: the plan is for the worst draw at the token ceilings."""

from __future__ import annotations

import msgspec

from edgetune.cost import Recompute, Selection, ViTShape, step_peak_bytes
from edgetune.planner.setups import setup_of_plan
from edgetune.planner.values import Plan


def lightened(shape: ViTShape, selection: Selection, plan: Plan) -> Selection:
    """The same step with the least recompute that stays within the plan's peak: fewer tokens leave room to keep more.

    Recompute is taken back block by block, the top ones first; what is computed stays the same.
    """
    if not selection.recompute:
        return selection
    setup = setup_of_plan(plan)
    levels = selection.recompute
    for kept in range(selection.lowest_trained_block, shape.depth):
        lighter = msgspec.structs.replace(
            selection, recompute=levels[:kept] + (Recompute.NOTHING,) * (shape.depth - kept)
        )
        if step_peak_bytes(shape, lighter, setup) <= plan.predicted.peak_bytes:
            return lighter
    return selection
