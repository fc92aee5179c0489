"""What the search stands on: of the choices it skips, none would have been better. And what comes before what."""

from __future__ import annotations

from itertools import pairwise

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import capped, make_request, requests

from edgetune.errors import DoesNotFit
from edgetune.planner import PlanRequest, plan
from edgetune.planner.choices import (
    extreme_micro_batches,
    lossless_choices,
    lossy_choices,
    lossy_families,
    micro_batches,
)
from edgetune.planner.values import Lossy, accumulation_of
from edgetune.planner.ways import Ways
from edgetune.units import MIB


def _least(request: PlanRequest, lossy: Lossy) -> int:
    return Ways(request, lossy).cheapest()[0]


@given(requests(max_depth=6))
@settings(deadline=None, max_examples=60)
def test_at_one_split_fewer_blocks_fewer_tokens_and_dropped_state_never_need_more(request: PlanRequest) -> None:
    needs = {lossy: _least(request, lossy) for lossy in lossy_choices(request)}
    for family in lossy_families(request):
        assert all(needs[more] >= needs[fewer] for more, fewer in pairwise(family))
    for lossy, need in needs.items():
        fewer_blocks = msgspec.structs.replace(lossy, trained_blocks=lossy.trained_blocks - 1)
        dropped = msgspec.structs.replace(lossy, keeps_state=False)
        assert all(needs[other] <= need for other in (fewer_blocks, dropped) if other in needs)


@given(requests(max_depth=5, max_batch=12))
@settings(deadline=None, max_examples=40)
def test_the_micro_batch_that_needs_least_is_the_largest_or_the_smallest(request: PlanRequest) -> None:
    lossy = next(lossy_choices(request))
    everything = lossless_choices(request, lossy)
    assert Ways(request, lossy).cheapest(everything)[0] == _least(request, lossy)


@given(requests(max_depth=5))
@settings(deadline=None, max_examples=60)
def test_a_bound_from_below_is_one_for_every_lossy_choice(request: PlanRequest) -> None:
    for lossy in lossy_choices(request):
        assert Ways(request, lossy).least_live_bytes() <= _least(request, lossy)


@given(requests())
@settings(deadline=None)
def test_choices_come_in_the_order_that_is_written_down(request: PlanRequest) -> None:
    def reluctance(lossy: Lossy) -> tuple[float, ...]:
        return (
            not lossy.keeps_state,
            not lossy.embeddings_train,
            lossy.split_block,
            -lossy.trained_blocks,
            -sum(lossy.token_ceiling),
        )

    ranks = [reluctance(lossy) for lossy in lossy_choices(request)]
    assert all(before <= after for before, after in pairwise(ranks))
    assert [lossy for family in lossy_families(request) for lossy in family] == list(lossy_choices(request))


def test_a_lossless_lever_is_spent_before_a_lossy_one() -> None:
    free = plan(make_request("alast"))
    assert (free.accumulation, free.split_block, free.trained_blocks, free.token_ceiling[-1]) == (1, 0, 9, 196)
    assert not any(free.recompute)
    # From here down, first more micro-batches and recompute, then fewer tokens and blocks, then a higher split.
    seen = []
    for cap_mib in range(free.predicted_peak_bytes // MIB, 200, -4):
        try:
            seen.append(plan(make_request("alast", cap_mib=cap_mib)))
        except DoesNotFit:
            break
    splits = [(not chosen.keeps_state, chosen.split_block) for chosen in seen]
    assert splits == sorted(splits)
    assert splits[-1][1] > 0
    lossless = [chosen for chosen in seen if chosen.token_ceiling[-1] == 196 and chosen.trained_blocks == 9]
    assert {chosen.micro_batch for chosen in lossless} >= {1, 2, 4, 8, 16}
    assert any(any(chosen.recompute) for chosen in lossless)
    first_lossy = next(chosen for chosen in seen if chosen not in lossless)
    assert first_lossy.micro_batch == 1
    assert all(first_lossy.recompute[:-1])


def test_a_plan_never_trains_less_under_a_larger_cap() -> None:
    chosen = []
    for cap_mib in range(248, 420, 2):
        made = plan(make_request("alast", cap_mib=cap_mib, batch_size=8))
        chosen.append((not made.keeps_state, made.split_block, -made.trained_blocks, -sum(made.token_ceiling)))
    assert chosen == sorted(chosen, reverse=True)
    assert len(set(chosen)) > 10


@given(st.integers(1, 64), st.none() | st.integers(1, 64))
def test_micro_batches_make_up_the_batch(batch: int, accumulation: int | None) -> None:
    asked = None if accumulation is None else min(accumulation, batch)
    request = make_request(batch_size=batch, accumulation=asked)
    sizes = micro_batches(request)
    assert sizes == sorted(set(sizes), reverse=True)
    for size in sizes:
        parts = accumulation_of(request, size)
        assert (parts - 1) * size < batch <= parts * size
    assert {sizes[0], sizes[-1]} == set(extreme_micro_batches(request))
    if asked is None:
        assert (sizes[0], sizes[-1]) == (batch, 1)


def test_five_parts_of_thirty_two_are_micro_batches_of_seven() -> None:
    assert micro_batches(make_request(batch_size=32, accumulation=5)) == [7]


def test_every_lossless_choice_is_another() -> None:
    request = make_request("alast", batch_size=8)
    for lossy in lossy_choices(request):
        choices = list(lossless_choices(request, lossy))
        assert len(set(choices)) == len(choices)


def test_a_cap_that_nothing_reaches_leaves_nothing_to_give_up() -> None:
    for method in ("full", "alast", "random-k", "last-k"):
        request = make_request(method, cap_mib=2**40)
        chosen, first = plan(request), next(lossy_choices(request))
        assert (chosen.split_block, chosen.trained_blocks, chosen.token_ceiling, chosen.embeddings_train) == (
            first.split_block, first.trained_blocks, first.token_ceiling, first.embeddings_train,
        )  # fmt: skip
        assert chosen == plan(capped(request, chosen.cap_bytes))
