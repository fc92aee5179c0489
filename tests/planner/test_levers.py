"""Each lever that is asked for is obeyed, under any cap; what contradicts itself is refused by the flag's name."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import capped, make_request, requests
from shapes import make_shape

from edgetune.cost import Recompute
from edgetune.errors import UsageError
from edgetune.planner import Plan, PlanRequest, plan, smallest_cap_bytes
from edgetune.planner.choices import MAX_BATCH_SIZE

CAPS_MIB = (100_000, 500, 350, 300, 280)


def _plans(method: str, **options: object) -> list[Plan]:
    """Plans from an ample cap down to the smallest."""
    request = make_request(method, **options)  # type: ignore[arg-type]
    smallest = smallest_cap_bytes(request)
    caps = [max(smallest, cap * 2**20) for cap in CAPS_MIB] + [smallest]
    return [plan(capped(request, cap)) for cap in caps]


@given(requests(max_depth=6), st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_whatever_is_asked_for_is_in_the_plan_under_any_cap(request: PlanRequest, share: float) -> None:
    smallest = smallest_cap_bytes(request)
    chosen = plan(capped(request, smallest + int(share**3 * smallest)))
    if request.recompute != "auto":
        level = {"none": Recompute.NOTHING, "mlp": Recompute.MLP, "block": Recompute.BLOCK}[request.recompute]
        if chosen.trained_blocks or chosen.embeddings_train:
            assert set(chosen.recompute) == {level}
            assert chosen.recompute_frozen is level
    if request.accumulation is not None:
        assert chosen.micro_batch == -(-request.batch_size // request.accumulation)
        assert chosen.accumulation <= request.accumulation
    if request.updates_in_backward is not None:
        assert chosen.updates_in_backward == request.updates_in_backward
    if request.keeps_state is not None and request.space.draws:
        assert chosen.keeps_state == request.keeps_state
    if request.space.prunes_tokens:
        _check_tokens(request, chosen.token_ceiling, chosen.token_floor, chosen.split_block)
    assert chosen.updates_in_backward <= (chosen.accumulation == 1)
    assert chosen.half_frozen == request.half_frozen
    assert chosen.batch_size == request.batch_size
    assert (chosen.accumulation - 1) * chosen.micro_batch < request.batch_size
    assert request.batch_size <= chosen.accumulation * chosen.micro_batch


def _check_tokens(request: PlanRequest, ceiling: tuple[int, ...], floor: float, split: int) -> None:
    if request.token_floor is not None:
        assert floor == request.token_floor
    if request.token_ceiling is not None:
        assert floor <= request.token_ceiling
        # At most that share of what a block is given goes on, counted up to a multiple of eight.
        left = float(request.shape.patch_tokens)
        for tokens in ceiling[split + 1 :]:
            left *= request.token_ceiling
            assert tokens <= left + 8


@pytest.mark.parametrize("asked", ["none", "mlp", "block"])
def test_recompute_as_asked(asked: str) -> None:
    for chosen in _plans("alast", recompute=asked):
        assert {level.name.lower().replace("nothing", "none") for level in chosen.recompute} == {asked}


def test_an_update_inside_the_backward_goes_with_the_whole_batch_at_once() -> None:
    for chosen in _plans("full", updates_in_backward=True, batch_size=4):
        assert (chosen.accumulation, chosen.updates_in_backward) == (1, True)


def test_left_to_itself_the_planner_updates_inside_the_backward_where_that_is_what_fits() -> None:
    asked = smallest_cap_bytes(make_request("full", batch_size=1, updates_in_backward=True))
    assert asked < smallest_cap_bytes(make_request("full", batch_size=1, updates_in_backward=False))
    request = make_request("full", batch_size=1)
    assert plan(capped(request, asked)).updates_in_backward
    assert not plan(request).updates_in_backward


@pytest.mark.parametrize("keeps", [True, False])
def test_the_state_of_blocks_that_left_is_kept_or_dropped_as_asked(keeps: bool) -> None:
    for chosen in _plans("alast", keeps_state=keeps):
        assert chosen.keeps_state == keeps
        above = 12 - chosen.split_block
        assert chosen.ever_trained_blocks == (above if keeps else chosen.trained_blocks)


def test_state_is_dropped_last_of_all_where_it_is_left_to_the_planner() -> None:
    kept = smallest_cap_bytes(make_request("alast", keeps_state=True, split_block=6))
    free = make_request("alast", split_block=6)
    assert plan(capped(free, kept)).keeps_state
    assert not plan(capped(free, kept - 1)).keeps_state


def test_methods_that_draw_nothing_have_no_state_to_drop() -> None:
    for method in ("full", "head", "last-k"):
        for chosen in _plans(method, keeps_state=False):
            assert chosen.keeps_state


def test_embeddings_train_freeze_or_are_the_first_thing_given_up() -> None:
    trained = _plans("full", embeddings="train")
    frozen = _plans("full", embeddings="freeze")
    assert all(chosen.embeddings_train for chosen in trained)
    assert not any(chosen.embeddings_train for chosen in frozen)
    free = make_request("full")
    needed = smallest_cap_bytes(make_request("full", embeddings="train"))
    assert plan(capped(free, needed)).embeddings_train
    assert not plan(capped(free, needed - 1)).embeddings_train


def test_half_stored_weights_below_the_split_make_room() -> None:
    for method in ("last-k", "head"):
        half = smallest_cap_bytes(make_request(method, half_frozen=True))
        assert half <= smallest_cap_bytes(make_request(method))
    whole, half = (plan(make_request("last-k", half_frozen=asked)).predicted.weights_bytes for asked in (False, True))
    assert whole - half == 8 * make_request().shape.block_parameters * 2


def test_a_split_and_a_number_of_blocks_are_kept() -> None:
    for chosen in _plans("alast", split_block=6, trained_blocks=2):
        assert (chosen.split_block, chosen.trained_blocks) == (6, 2)


def test_a_block_without_a_second_half_of_its_own_is_recomputed_whole_or_not_at_all() -> None:
    shape = make_shape(mlp_half=False)
    request = make_request("full", shape=shape)
    smallest = smallest_cap_bytes(request)
    for extra in range(0, 200 * 2**20, 10 * 2**20):
        assert Recompute.MLP not in plan(capped(request, smallest + extra)).recompute


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "the batch size must be at least 1"),
        ({"batch_size": -3}, "not -3"),
        ({"batch_size": MAX_BATCH_SIZE + 1}, "at most 65536"),
        ({"batch_size": 4, "accumulation": 5}, "--grad-accum-steps must be between 1 and the batch size 4, not 5"),
        ({"accumulation": 0}, "--grad-accum-steps"),
        ({"accumulation": 2, "updates_in_backward": True}, "--step-in-backward"),
        ({"token_floor": 0.0}, "--token-floor"),
        ({"token_floor": 1.5}, "--token-floor"),
        ({"token_floor": float("nan")}, "--token-floor"),
        ({"token_ceiling": 0.0}, "--token-ceiling"),
        ({"token_ceiling": float("inf")}, "--token-ceiling"),
        ({"token_floor": 0.9, "token_ceiling": 0.5}, "--token-floor 0.9 is above --token-ceiling 0.5"),
        ({"recompute": "mlp", "shape": make_shape(mlp_half=False)}, "--recompute block"),
    ],
)
def test_what_makes_no_sense_together_is_refused(options: dict[str, object], message: str) -> None:
    request = make_request(**options)  # type: ignore[arg-type]
    for ask in (plan, smallest_cap_bytes):
        with pytest.raises(UsageError, match=re.escape(message)):
            ask(request)


def test_one_micro_batch_that_is_asked_for_may_update_inside_the_backward() -> None:
    request = make_request("full", accumulation=1, updates_in_backward=True)
    assert plan(request).updates_in_backward
    assert plan(msgspec.structs.replace(request, accumulation=None)).updates_in_backward


def test_the_largest_batch_that_a_run_takes_has_a_plan() -> None:
    chosen = plan(make_request("last-k", batch_size=MAX_BATCH_SIZE, cap_mib=400))
    assert chosen.accumulation * chosen.micro_batch >= MAX_BATCH_SIZE
