"""A plan for a run whose memory ran out, another run's plan, and a plan as a file."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import capped, make_request, requests

from edgetune.errors import DoesNotFit
from edgetune.planner import Plan, PlanRequest, plan, replayed, smallest_cap_bytes, tightened
from edgetune.planner.search import TIGHTENED_SHARE
from edgetune.units import MIB


def _growth(chosen: Plan) -> int:
    return chosen.predicted_peak_bytes - chosen.runtime_bytes


@given(requests(max_depth=6), st.floats(0, 1))
@settings(deadline=None)
def test_a_tightened_plan_adds_at_most_four_fifths_three_times_over(request: PlanRequest, share: float) -> None:
    smallest = smallest_cap_bytes(request)
    cap = smallest + int(share * 3 * smallest)
    current = plan(capped(request, cap))
    for _ in range(3):
        try:
            tighter = tightened(capped(request, cap), current)
        except DoesNotFit as refusal:
            # Rightly so: there is no plan that adds as little.
            assert smallest - request.runtime_bytes > int(TIGHTENED_SHARE * _growth(current))
            assert refusal.smallest_cap_bytes == smallest
            return
        assert _growth(tighter) <= 0.8 * _growth(current)
        # The batch and the cap that the run answers for stay what they are.
        assert (tighter.cap_bytes, tighter.batch_size) == (cap, current.batch_size)
        current = tighter


def test_a_tightened_plan_keeps_what_is_learnt_while_another_way_to_run_it_is_left() -> None:
    request = make_request("full")
    first = plan(request)
    second = tightened(request, first)
    assert (second.split_block, second.trained_blocks, second.embeddings_train) == (
        first.split_block, first.trained_blocks, first.embeddings_train,
    )  # fmt: skip
    assert second.micro_batch < first.micro_batch or any(second.recompute)


def test_a_plan_is_tightened_against_the_runtime_that_was_measured() -> None:
    request = make_request("alast", cap_mib=700)
    current = plan(msgspec.structs.replace(request, runtime_bytes=300 * MIB))
    tighter = tightened(request, current)  # the request knows the runtime before it was measured
    assert tighter.runtime_bytes == 300 * MIB
    cap = 300 * MIB + int(0.8 * _growth(current))
    wanted = plan(msgspec.structs.replace(request, runtime_bytes=300 * MIB, cap_bytes=cap))
    assert tighter == msgspec.structs.replace(wanted, cap_bytes=request.cap_bytes)


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
