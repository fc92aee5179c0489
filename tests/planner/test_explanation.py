"""A plan says what was chosen and why, what recompute saves and costs, and what a little more memory would allow."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import Tried, best_of, capped, every_plan, make_request, requests
from shapes import make_shape

from edgetune.cost import Recompute
from edgetune.planner import Plan, PlanRequest, plan, smallest_cap_bytes
from edgetune.planner.explain import describe
from edgetune.planner.values import Lossless, Lossy
from edgetune.units import format_bytes


def _line(chosen: Plan, words: str) -> str:
    (line,) = [line for line in chosen.explanation if words in line]
    return line


def test_memory_that_does_not_bind_is_said_not_to() -> None:
    free = plan(make_request("alast"))
    assert _line(free, "memory does not bind")
    assert not any("next larger plan" in line or "recompute" in line for line in free.explanation)
    assert _line(free, "cap 97.7 GiB; runtime 200 MiB; 97.5 GiB left for training")


def test_the_next_larger_plan_is_named_with_its_bytes() -> None:
    free = plan(make_request("alast"))
    tight = plan(capped(make_request("alast"), free.predicted_peak_bytes - 1))
    line = _line(tight, "the next larger plan")
    assert line.startswith("memory binds: ")
    assert "batch 32 at once" in line
    assert "9 of the 12 blocks from 0 up" in line
    assert line.endswith(f"needs {format_bytes(free.predicted_peak_bytes)}")


def _refused(tried: list[Tried], request: PlanRequest, chosen: Plan) -> Tried | None:
    """By trying everything: of the faster ways to run the same, else of all ways of the choice before, the one that
    needs least.
    """
    fitting = next(one for one in tried if one.peak_bytes <= request.cap_bytes)
    before = [one for one in tried if one[:3] < fitting[:3]]
    best = best_of(tried, request.cap_bytes)
    assert (best.peak_bytes, best.lossless.micro_batch) == (chosen.predicted_peak_bytes, chosen.micro_batch)
    if not before:
        return None
    last = before[-1].lossy_number
    return min((one for one in before if one.lossy_number == last), key=lambda one: one.peak_bytes)


@given(requests(max_depth=3, max_batch=4, max_grid=8), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_next_larger_plan_is_one_that_was_really_refused(request: PlanRequest, share: float) -> None:
    tried = every_plan(request)
    peaks = sorted({one.peak_bytes for one in tried})
    request = capped(request, peaks[int(share * (len(peaks) - 1))])
    chosen = plan(request)
    refused = _refused(tried, request, chosen)
    if refused is None:
        assert _line(chosen, "memory does not bind")
        return
    assert refused.peak_bytes > request.cap_bytes
    line = _line(chosen, "the next larger plan")
    assert line.endswith(f"needs {format_bytes(refused.peak_bytes)}")


def test_where_no_way_to_run_it_is_left_the_choice_before_is_the_next_larger_plan() -> None:
    shape = make_shape(depth=4, width=96)
    request = make_request(
        "alast", shape=shape, batch_size=4, recompute="none", accumulation=2, updates_in_backward=False
    )
    tried = every_plan(request)  # one way for each choice
    binding = 0
    for peak in sorted({one.peak_bytes for one in tried}):
        chosen = plan(capped(request, peak))
        refused = _refused(tried, capped(request, peak), chosen)
        if refused is not None:
            binding += 1
            assert refused.lossless == tried[0].lossless
            what = f"({describe(request, refused.lossy, refused.lossless)}) needs {format_bytes(refused.peak_bytes)}"
            assert _line(chosen, "the next larger plan").endswith(what)
    assert binding > 10


def test_recompute_says_what_it_saves_and_costs() -> None:
    request = make_request("full", accumulation=1, peak_flops_per_s=1e10)
    plain = plan(msgspec.structs.replace(request, recompute="none"))
    whole = plan(msgspec.structs.replace(request, recompute="block"))
    saved = format_bytes(plain.predicted_peak_bytes - whole.predicted_peak_bytes)
    assert plain.predicted_step_seconds
    assert whole.predicted_step_seconds
    cost = f"{whole.predicted_step_seconds / plain.predicted_step_seconds - 1:.0%}"
    line = _line(whole, "changes no result")
    assert line == f"recompute whole blocks (saves {saved}, costs {cost} more time, changes no result)"
    assert not any("recompute" in line for line in plain.explanation)


NOTHING, MLP, BLOCK = Recompute


@pytest.mark.parametrize(
    ("levels", "frozen", "words"),
    [
        ((NOTHING,) * 4, NOTHING, None),
        ((MLP,) * 4, NOTHING, "recompute the MLP half everywhere"),
        ((BLOCK,) * 4, BLOCK, "recompute whole blocks"),
        ((MLP, MLP, NOTHING, NOTHING), NOTHING, "recompute the MLP half below 2"),
        ((BLOCK, MLP, MLP, MLP), NOTHING, "recompute whole blocks below 1, the MLP half from it on"),
        ((NOTHING,) * 4, BLOCK, "recompute frozen blocks whole"),
        ((MLP, NOTHING, NOTHING, NOTHING), BLOCK, "recompute the MLP half below 1, frozen blocks whole"),
        ((BLOCK, NOTHING, NOTHING, NOTHING), BLOCK, "recompute whole blocks below 1, frozen blocks whole"),
    ],
)
def test_levels_of_recompute_in_words(levels: tuple[Recompute, ...], frozen: Recompute, words: str | None) -> None:
    request = make_request("random-k", batch_size=8)
    request = msgspec.structs.replace(request, shape=msgspec.structs.replace(request.shape, depth=4))
    text = describe(request, Lossy(0, 3, (196,) * 4, False, True), Lossless(2, levels, frozen, False))
    assert text == "batch 8 in 4 micro-batches of 2, 3 of the 4 blocks from 0 up" + (f", {words}" if words else "")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("full", "chosen: batch 32 at once, the last 12 of 12 blocks"),
        ("head", "chosen: batch 32 at once, head only"),
        ("last-k", "chosen: batch 32 at once, the last 4 of 12 blocks"),
        ("random-k", "chosen: batch 32 at once, 9 of the 12 blocks from 0 up"),
        (
            "alast",
            "chosen: batch 32 at once, 9 of the 12 blocks from 0 up, at most 196 of 196 patch tokens in the last block; "
            "a block keeps at least 88% of the patch tokens it is given",
        ),
    ],
)
def test_what_was_chosen_in_words(method: str, words: str) -> None:
    assert words in plan(make_request(method)).explanation


def test_levers_that_were_pulled_are_named() -> None:
    needed = smallest_cap_bytes(make_request("full", embeddings="train"))
    frozen = plan(capped(make_request("full"), needed - 1))
    assert "embeddings frozen" in _line(frozen, "chosen")
    dropped = plan(make_request("alast", keeps_state=False))
    assert _line(dropped, "optimizer state of blocks that a step does not train is dropped")
    inside = plan(make_request("full", updates_in_backward=True))
    assert _line(inside, "each weight is updated inside the backward")
    half = plan(make_request("last-k", half_frozen=True))
    assert _line(half, "the frozen weights of the 8 blocks below the split are stored as bfloat16")
    assert _line(half, "the lowest trained block is 8 of 12: nothing below it is kept")


def test_a_head_alone_has_no_lowest_trained_block() -> None:
    assert not any("lowest trained block" in line for line in plan(make_request("head")).explanation)


@given(requests(max_depth=5), st.floats(0, 1))
@settings(deadline=None)
def test_no_line_is_empty_or_carries_raw_numbers(request: PlanRequest, share: float) -> None:
    smallest = smallest_cap_bytes(request)
    chosen = plan(capped(request, smallest + int(share * smallest)))
    for line in chosen.explanation:
        assert line.strip() == line != ""
        assert not re.search(r"-\d|nan|inf\b|None|Recompute", line.replace("micro-batch", ""))


def test_how_tokens_are_dropped_at_the_split_is_said_and_where_there_is_none() -> None:
    at_none, by_distance = "no token is dropped at the split", "farthest from the mean"

    def lines(method: str, split: int, **options: Any) -> str:
        request = make_request(method, split_block=split, **options)
        return " ".join(plan(request).explanation)

    assert at_none in lines("random-k", 0, split_tokens=0.4)
    assert at_none not in lines("random-k", 0)
    assert at_none not in lines("random-k", 8, split_tokens=0.4)
    assert by_distance in lines("random-k", 8, split_tokens=0.4, token_score="distance")
    assert by_distance not in lines("random-k", 8, split_tokens=0.4)
