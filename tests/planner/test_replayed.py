"""Another run's plan, and a plan as a file."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from planner_cases import make_request, requests

from edgetune.errors import DoesNotFit
from edgetune.planner import Plan, PlanRequest, plan, replayed
from edgetune.units import MIB


def test_a_replayed_plan_is_held_against_the_new_cap_and_runtime() -> None:
    made = plan(make_request(cap_mib=900))
    moved = replayed(made, cap_bytes=2000 * MIB, runtime_bytes=made.runtime_bytes + 100 * MIB)
    assert moved.predicted_peak_bytes == made.predicted_peak_bytes + 100 * MIB
    assert moved.predicted_peak_bytes == max(moved.predicted_phase_bytes.values())
    assert (moved.cap_bytes, moved.runtime_bytes) == (2000 * MIB, made.runtime_bytes + 100 * MIB)
    assert moved.predicted == made.predicted
    with pytest.raises(DoesNotFit, match="the plan needs") as refused:
        replayed(made, cap_bytes=made.predicted_peak_bytes - 1, runtime_bytes=made.runtime_bytes)
    assert refused.value.smallest_cap_bytes == made.predicted_peak_bytes


@given(requests(max_depth=4))
@settings(deadline=None, max_examples=30)
def test_a_plan_survives_json(request: PlanRequest) -> None:
    chosen = plan(request)
    assert msgspec.json.decode(msgspec.json.encode(chosen), type=Plan, strict=True) == chosen


def test_a_plan_with_a_field_that_nobody_knows_is_not_read() -> None:
    written = msgspec.to_builtins(plan(make_request()))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(written | {"swap_bytes": 1}, type=Plan)
