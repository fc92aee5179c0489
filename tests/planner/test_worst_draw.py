"""The draw that the planner takes for the worst is the worst of all, and its bound from below is one."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import OPTIMIZERS, every_draw, make_request, shapes, step_of, worst_by_trying

from edgetune.cost import Recompute, step_cost, step_peak_bytes
from edgetune.planner import PlanRequest, ceilings
from edgetune.planner.setups import setup_of
from edgetune.planner.values import Lossless, Lossy
from edgetune.planner.worst import Peaks, worst_draw

LEVELS = st.sampled_from(list(Recompute))


@st.composite
def _choices(draw: st.DrawFn) -> tuple[PlanRequest, Lossy, Lossless]:
    """Any lossy choice run in any way, those that the planner would never look at among them."""
    shape = draw(shapes(max_depth=7))
    method = draw(st.sampled_from(["alast", "alast", "random-k", "full"]))
    split = draw(st.integers(0, shape.depth - 1)) if method != "full" else 0
    count = draw(st.integers(1, shape.depth - split)) if method != "full" else shape.depth
    tokens = (shape.patch_tokens,) * shape.depth
    if method == "alast":
        any_tokens = st.lists(st.integers(1, shape.patch_tokens), min_size=shape.depth, max_size=shape.depth)
        tokens = draw(
            any_tokens.map(lambda counts: tuple(sorted(counts, reverse=True)))
            | st.floats(0.3, 1).map(lambda ratio: ceilings(shape, split, ratio))
        )
    accumulation = draw(st.integers(1, 3))
    micro_batch = draw(st.integers(1, 8))
    request = make_request(
        method,
        shape=shape,
        batch_size=micro_batch * accumulation,
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        half_frozen=draw(st.booleans()),
        threads=draw(st.integers(1, 4)),
    )
    lossy = Lossy(split, count, tokens, draw(st.booleans()), draw(st.booleans()))
    levels = tuple(draw(st.lists(LEVELS, min_size=shape.depth, max_size=shape.depth)))
    in_backward = accumulation == 1 and draw(st.booleans())
    return request, lossy, Lossless(micro_batch, levels, draw(LEVELS), in_backward)


@given(_choices())
@settings(deadline=None, max_examples=300)
def test_the_worst_draw_is_the_worst_of_all_draws(choice: tuple[PlanRequest, Lossy, Lossless]) -> None:
    request, lossy, lossless = choice
    peak, selection = worst_draw(request, lossy, lossless)
    assert peak == worst_by_trying(request, lossy, lossless)
    # And it is a draw of the plan, whose cost is the peak.
    assert selection.trains in set(every_draw(request, lossy))
    assert step_cost(request.shape, selection, setup_of(request, lossy, lossless)).peak_bytes == peak


@given(_choices(), st.integers(-1, 1))
@settings(deadline=None)
def test_whether_all_draws_fit_is_said_to_the_byte(choice: tuple[PlanRequest, Lossy, Lossless], more: int) -> None:
    lossless, peaks = choice[2], _peaks(*choice)
    worst = worst_by_trying(*choice)
    within = peaks.all_within(worst + more, lossless.recompute, lossless.recompute_frozen)
    assert within == (more >= 0)
    assert peaks.first(lossless.recompute, lossless.recompute_frozen) <= worst


@given(_choices())
@settings(deadline=None)
def test_the_peak_of_any_draw_is_the_cost_of_its_step(choice: tuple[PlanRequest, Lossy, Lossless]) -> None:
    request, lossy, lossless = choice
    peaks, setup = _peaks(*choice), setup_of(request, lossy, lossless)
    for trains in every_draw(request, lossy):
        selection = step_of(trains, lossy, lossless)
        peak = peaks.of(trains, lossless.recompute, lossless.recompute_frozen)
        assert peak == step_peak_bytes(request.shape, selection, setup)


@given(_choices(), st.lists(LEVELS, min_size=1, unique=True), st.data())
@settings(deadline=None)
def test_no_choice_of_levels_goes_below_the_floor(
    choice: tuple[PlanRequest, Lossy, Lossless], levels: list[Recompute], data: st.DataObject
) -> None:
    depth = choice[0].shape.depth
    one_of = st.sampled_from(levels)
    lossless = msgspec.structs.replace(
        choice[2],
        recompute=tuple(data.draw(st.lists(one_of, min_size=depth, max_size=depth))),
        recompute_frozen=data.draw(one_of),
    )
    floor = _peaks(*choice).floor(levels)
    assert floor <= _peaks(*choice).first(lossless.recompute, lossless.recompute_frozen)


def _peaks(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> Peaks:
    return Peaks(request.shape, request.space.draws, lossy, setup_of(request, lossy, lossless))
