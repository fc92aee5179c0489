"""When the frozen prefix is cached, what that takes, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import capped, make_request, requests
from shapes import DEIT_TINY

from edgetune.cost import FLOAT_BYTES
from edgetune.planner import CacheRequest, PlanRequest, ceilings, entry_bytes, pinned, plan, smallest_cap_bytes
from edgetune.planner import phases as phases_module
from edgetune.planner.prefix import MAX_VIEWS, views_that_fit
from edgetune.units import MIB, format_bytes

CACHE = CacheRequest(train_images=1000, val_images=250, steps=320)


@dataclass(frozen=True)
class Case:
    what: str
    cache: dict[str, Any]
    method: str
    cached_blocks: int


@pytest.mark.parametrize(
    "case",
    [
        Case("ten epochs", {}, "last-k", 8),
        Case("ten epochs of the head", {}, "head", 12),
        Case("one epoch", {"steps": 32}, "last-k", 0),
        Case("an epoch and a step", {"steps": 33}, "last-k", 8),
        Case("ten epochs of ten views", {"views": 10}, "last-k", 0),
        Case("ten epochs of nine views", {"views": 9}, "last-k", 8),
        Case("one epoch, asked for", {"steps": 32, "asked": True}, "last-k", 8),
        Case("nothing is frozen", {}, "full", 0),
        Case("nothing is frozen, asked for", {"asked": True}, "alast", 0),
    ],
    ids=lambda case: case.what,
)
def test_it_is_cached_where_images_are_seen_more_often_than_they_are_computed(case: Case) -> None:
    made = plan(make_request(case.method, cache=msgspec.structs.replace(CACHE, **case.cache)))
    assert (0 if made.prefix is None else made.prefix.blocks) == case.cached_blocks
    if not case.cached_blocks:
        assert any("prefix not cached" in line for line in made.explanation)


def test_an_entry_is_the_tokens_at_the_split_and_a_little() -> None:
    made = plan(make_request("last-k", cache=CACHE))
    assert made.prefix is not None
    assert (made.prefix.stored_tokens, made.prefix.width, made.prefix.float_bytes) == (197, 192, 2)
    assert made.prefix.total_bytes == 1250 * entry_bytes(197, 192, 2)
    assert entry_bytes(197, 192, 2) - 197 * 192 * 2 < 100


def test_validation_has_all_tokens_and_those_of_training() -> None:
    made = plan(make_request("last-k", cache=CACHE, split_tokens=0.4))
    assert made.prefix is not None
    assert made.token_ceiling == (196,) * 8 + (80,) * 4
    assert made.prefix.train_bytes == 1000 * entry_bytes(81, 192, 2)
    assert made.prefix.val_bytes == 250 * (entry_bytes(81, 192, 2) + entry_bytes(197, 192, 2))


def test_a_head_keeps_the_prefix_tokens_alone() -> None:
    made = plan(make_request("head", cache=CACHE))
    assert made.prefix is not None
    assert made.prefix.pooled
    assert made.prefix.stored_tokens == 1
    averaging = msgspec.structs.replace(DEIT_TINY, token_pool=False)
    other = plan(make_request("head", shape=averaging, cache=CACHE))
    assert other.prefix is not None
    assert (other.prefix.pooled, other.prefix.stored_tokens) == (False, 197)


def test_once_it_is_whole_the_prefix_is_in_memory_no_more() -> None:
    without, cached = plan(make_request("last-k")), plan(make_request("last-k", cache=CACHE))
    below = FLOAT_BYTES * (DEIT_TINY.embed_parameters + 8 * DEIT_TINY.block_parameters)
    assert without.predicted.weights_bytes - cached.predicted.weights_bytes == below
    assert cached.predicted.peak_bytes < without.predicted.peak_bytes
    assert cached.predicted.flops < without.predicted.flops
    assert cached.predicted_phase_bytes["save"] < without.predicted_phase_bytes["save"]


def test_where_not_all_fits_on_the_disk_memory_is_planned_as_without() -> None:
    limit = msgspec.structs.replace(CACHE, limit_bytes=40 * MIB)
    without, part = plan(make_request("last-k")), plan(make_request("last-k", cache=limit))
    assert part.prefix is not None
    assert not part.prefix.whole
    assert part.predicted == without.predicted
    assert part.predicted_phase_bytes["train"] > without.predicted_phase_bytes["train"]  # what was read waits too
    assert any("only 40.0 MiB" in line for line in part.explanation)


def test_the_explanation_says_what_it_takes_and_gives() -> None:
    lines = " ".join(plan(make_request("last-k", cache=CACHE, peak_flops_per_s=1e10)).explanation)
    assert "prefix cached: 197 tokens below block 8, 73.9 KiB an image, 90.2 MiB in all written to disk" in lines
    assert "x faster once it is there (an estimate)" in lines


@given(requests(max_depth=6), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_a_later_plan_stands_on_the_cache_that_there_is(request: PlanRequest, share: float) -> None:
    smallest = smallest_cap_bytes(request)
    first = plan(capped(request, smallest + int(share * smallest)))
    if first.prefix is None:
        assert pinned(request, None).cache is None
        return
    space = request.space
    splits = tuple(split for split in space.splits if split >= first.split_block)
    again = msgspec.structs.replace(
        pinned(request, first.prefix), space=msgspec.structs.replace(space, splits=splits[-1:])
    )
    later = plan(capped(again, smallest_cap_bytes(again)))
    assert later.prefix is not None
    assert later.prefix.blocks == first.prefix.blocks
    assert later.prefix.whole == first.prefix.whole
    if first.prefix.blocks < request.shape.depth:
        assert later.token_ceiling[first.prefix.blocks] == first.prefix.patch_tokens


@given(st.integers(0, 12), st.floats(0.1, 1), st.floats(0.1, 1), st.none() | st.integers(1, 12))
def test_tokens_never_come_back_and_are_dropped_where_the_cache_ends(
    split: int, ratio: float, at_split: float, cached: int | None
) -> None:
    found = ceilings(DEIT_TINY, split, ratio, at_split, cached)
    assert len(found) == 12
    assert list(found) == sorted(found, reverse=True)
    below = split if cached is None else min(split, cached)
    assert set(found[: max(1, below)]) == {196}
    assert len(set(found[below : split + 1])) <= 1 or below == 0


def test_views_are_half_as_many_as_an_image_is_seen_as_far_as_the_disk_has_room() -> None:
    request = make_request("last-k", batch_size=32)
    each = entry_bytes(197, 192, 2)
    assert views_that_fit(request, CACHE) == (5, None)  # ten passes: each view is seen twice
    assert views_that_fit(request, msgspec.structs.replace(CACHE, steps=10_000)) == (MAX_VIEWS, None)
    room = msgspec.structs.replace(CACHE, limit_bytes=3 * 1000 * each + 250 * each)
    assert views_that_fit(request, room) == (3, None)


@pytest.mark.parametrize(
    ("epochs", "views_of_room", "why"),
    [
        (4, 2, None),
        (3, 2, "from 4 passes"),
        (10, 1, "no room for 2 views"),
        (10, 0, "no room"),
        (3, 1, "from 4 passes"),
    ],
)
def test_fewer_than_two_views_are_none_and_it_is_said_why(epochs: int, views_of_room: int, why: str | None) -> None:
    request, each = make_request("last-k", batch_size=32), entry_bytes(197, 192, 2)
    cache = msgspec.structs.replace(
        CACHE, steps=32 * epochs, limit_bytes=views_of_room * 1000 * each + (250 if views_of_room else 0) * each
    )
    views, too_few = views_that_fit(request, cache)
    assert (views < 2) == (why is not None)
    assert too_few is None if why is None else why in str(too_few)


def test_the_explanation_names_the_views() -> None:
    lines = " ".join(plan(make_request("last-k", cache=msgspec.structs.replace(CACHE, views=3))).explanation)
    assert f"{format_bytes(3 * entry_bytes(197, 192, 2))} an image in 3 views, " in lines


def test_what_waits_to_be_written_is_the_stores_own_figure() -> None:
    features = pytest.importorskip("edgetune.features")
    assert phases_module.WRITE_BYTES >= features.CHUNK_BYTES + MIB
