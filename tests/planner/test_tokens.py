"""Token ceilings and floors, and the shape of numbers that people read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from planner_cases import make_request, shapes
from shapes import make_shape

from edgetune.cost import ViTShape
from edgetune.planner import ceilings, default_token_floor, format_cap
from edgetune.planner.tokens import CEILING_STEPS, ceiling_ratios, floor_of, rounded_up
from edgetune.units import MIB, parse_bytes


def test_ceilings_keep_all_up_to_the_split_and_a_share_of_what_is_left_above_in_multiples() -> None:
    # 90, 81 and 72.9, each up to a multiple of eight.
    assert ceilings(make_shape(depth=5, grid=10), 1, 0.9) == (100, 100, 96, 88, 80)
    # A whole number is not pushed over the next multiple by rounding in the ratio.
    assert ceilings(make_shape(depth=2, grid=20), 0, 0.9) == (400, 360)
    assert ceilings(make_shape(depth=3, grid=10), 3, 0.5) == (100, 100, 100)
    assert ceilings(make_shape(depth=3, grid=1), 0, 0.1) == (1, 1, 1)


@given(shapes(max_depth=12), st.integers(0, 12), st.floats(0.05, 1), st.floats(0.05, 1))
def test_ceilings_never_rise_and_a_larger_share_never_lowers_them(
    shape: ViTShape, split: int, ratio: float, other: float
) -> None:
    fewer, more = (ceilings(shape, min(split, shape.depth), share) for share in sorted((ratio, other)))
    for counts in (fewer, more):
        assert len(counts) == shape.depth
        assert list(counts) == sorted(counts, reverse=True)
        assert set(counts[: split + 1]) == {shape.patch_tokens}
        assert all(1 <= count <= shape.patch_tokens for count in counts)
    assert all(one <= two for one, two in zip(fewer, more, strict=True))


@given(st.integers(1, 48), st.data())
def test_at_the_floor_of_every_block_a_quarter_of_the_tokens_reaches_the_last(depth: int, data: st.DataObject) -> None:
    split = data.draw(st.integers(0, depth))
    floor = default_token_floor(depth, split)
    assert 0.5 <= floor <= 1
    assert ceilings(make_shape(depth=depth, grid=16), split, floor)[-1] >= 0.25 * 256 - 1


def test_shares_go_from_the_ceiling_down_to_the_floor() -> None:
    ratios = ceiling_ratios(make_request("alast"), 0)
    assert len(ratios) == CEILING_STEPS + 1
    assert (ratios[0], ratios[-1]) == (1.0, floor_of(make_request("alast"), 0))
    assert list(ratios) == sorted(ratios, reverse=True)
    asked = ceiling_ratios(make_request("alast", token_floor=0.5, token_ceiling=0.8), 0)
    assert (asked[0], asked[-1]) == (0.8, 0.5)
    assert ceiling_ratios(make_request("alast", token_floor=1.0), 0) == (1.0,)
    # A ceiling below the default floor takes the floor down with it.
    assert ceiling_ratios(make_request("alast", token_ceiling=0.3), 0) == (0.3,)
    assert floor_of(make_request("alast", token_ceiling=0.3), 0) == 0.3


def test_a_method_that_prunes_nothing_has_no_shares_to_choose_from() -> None:
    request = make_request("random-k", token_floor=0.5)
    assert ceiling_ratios(request, 0) == (1.0,)
    assert floor_of(request, 0) == 1.0


@given(st.integers(1, 10_000))
def test_counts_go_up_to_a_multiple_of_eight(tokens: int) -> None:
    assert rounded_up(tokens) % 8 == 0
    assert tokens <= rounded_up(tokens) < tokens + 8


@given(st.integers(1, 2**50))
def test_a_cap_that_is_shown_is_never_below_the_need(size: int) -> None:
    assert size <= parse_bytes(format_cap(size)) <= size + MIB // 10 + 1
