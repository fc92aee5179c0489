"""The planner's choice is the best of its space, held against trying everything on small spaces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import best_of, capped, choices_of, every_plan, requests

from edgetune.cost import block_forward_flops
from edgetune.errors import DoesNotFit
from edgetune.planner import PlanRequest, plan, smallest_cap_bytes
from edgetune.planner.ways import seconds_of


@given(requests(max_depth=3, max_batch=4, max_grid=8), st.lists(st.floats(0, 1), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_a_plan_is_the_best_that_fits_and_the_smallest_cap_the_least_that_has_one(
    request: PlanRequest, places: list[float]
) -> None:
    tried = every_plan(request)
    peaks = sorted({one.peak_bytes for one in tried})
    smallest = peaks[0]
    assert smallest_cap_bytes(request) == smallest
    for place in places:
        peak = peaks[int(place * (len(peaks) - 1))]
        for cap in (peak, peak - 1):  # as much as one plan needs, and one byte less
            if cap < smallest:
                continue
            best = best_of(tried, cap)
            chosen = plan(capped(request, cap))
            assert choices_of(chosen) == (best.lossy, best.lossless)
            assert chosen.predicted_peak_bytes == best.peak_bytes
    for cap in (smallest - 1, request.runtime_bytes, 1):
        with pytest.raises(DoesNotFit) as refused:
            plan(capped(request, cap))
        assert refused.value.smallest_cap_bytes == smallest


@given(requests(max_depth=6))
@settings(deadline=None)
def test_a_time_is_predicted_only_for_a_device_whose_speed_is_known(request: PlanRequest) -> None:
    chosen = plan(request)
    lossy, lossless = choices_of(chosen)
    seconds = seconds_of(request, lossy, lossless)
    assert chosen.predicted_step_seconds == (seconds if request.peak_flops_per_s else None)
    if request.peak_flops_per_s:
        cached = chosen.prefix.blocks if chosen.prefix is not None and chosen.prefix.whole else 0
        forward = sum(block_forward_flops(request.shape, tokens) for tokens in chosen.token_ceiling[cached:])
        assert seconds > request.batch_size * forward / request.peak_flops_per_s
