"""What a whole process holds in each phase, and what of it is whose."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import RUNTIME, capped, make_request, requests

from edgetune.cost import FLOAT_BYTES
from edgetune.methods import METHODS
from edgetune.planner import parts_of, plan, process_bytes, smallest_cap_bytes
from edgetune.planner.choices import lossy_choices
from edgetune.planner.phases import (
    READ_BYTES,
    evaluation_batch,
    evaluation_live_bytes,
    kept_free_bytes,
    most_live_bytes,
    needed_bytes,
    pass_batch,
    phases,
    prefetched_bytes,
    resting_bytes,
)
from edgetune.planner.values import (
    ALLOCATOR_SHARE,
    HOLES_BYTES,
    LIMIT_BYTES,
    PASS_TOKENS,
    PREFETCHED_BATCHES,
    PROCESS_BYTES,
    TOKEN_HOLES_BYTES,
    Lossy,
    Plan,
    PlanRequest,
)
from edgetune.units import MIB


def test_a_process_holds_its_runtime_and_a_little_more_than_what_is_live() -> None:
    live = 1000 * MIB
    for kept_free in (0, MIB):
        assert process_bytes(RUNTIME, 0, kept_free) == RUNTIME + PROCESS_BYTES + kept_free
        assert process_bytes(RUNTIME, live, kept_free) == (
            RUNTIME + PROCESS_BYTES + kept_free + round((1 + ALLOCATOR_SHARE) * live)
        )


def test_more_is_kept_free_for_more_blocks_that_train_for_changing_tokens_and_for_a_limit() -> None:
    tokens = (196,) * 12

    def kept(method: str, lossy: Lossy, **options: object) -> int:
        return kept_free_bytes(make_request(method, **options), lossy)

    assert kept("last-k", Lossy(8, 4, tokens, False, True)) == HOLES_BYTES // 3
    assert kept("head", Lossy(12, 0, tokens, False, True)) == 0
    assert kept("random-k", Lossy(0, 4, tokens, False, True)) == HOLES_BYTES  # any of them is drawn
    assert kept("alast", Lossy(0, 4, tokens, False, True)) == HOLES_BYTES + TOKEN_HOLES_BYTES
    assert kept("head", Lossy(12, 0, tokens, False, True), by_limit=True) == LIMIT_BYTES


@given(st.integers(1, 2**62), st.integers(0, 2**40))
def test_the_most_live_bytes_are_under_the_cap_and_one_more_is_not(cap_bytes: int, runtime_bytes: int) -> None:
    request = capped(make_request("last-k", runtime_bytes=runtime_bytes), cap_bytes)
    for lossy in lossy_choices(request):
        live = most_live_bytes(request, lossy)
        assert live >= -1
        assert live == -1 or needed_bytes(request, lossy, live) <= cap_bytes
        assert needed_bytes(request, lossy, live + 1) > cap_bytes


def _resting_bytes(chosen: Plan) -> int:
    return chosen.predicted.weights_bytes + chosen.predicted.optimizer_bytes + chosen.predicted.inputs_bytes


def _waiting_bytes(chosen: Plan, request: PlanRequest) -> int:
    """What is beside a step, as the design says it."""
    images = PREFETCHED_BATCHES * chosen.predicted.inputs_bytes + request.decode_bytes
    prefix = chosen.prefix
    if prefix is None:
        return images
    features = chosen.micro_batch * prefix.stored_tokens * prefix.width * FLOAT_BYTES
    if not prefix.whole:
        return images + PREFETCHED_BATCHES * features
    # Where next to nothing trains, reading the next micro-batch beside the one before is the peak.
    return READ_BYTES + max(0, _resting_bytes(chosen) + features - chosen.predicted.peak_bytes)


@given(requests(max_depth=6), st.floats(0, 1))
@settings(deadline=None)
def test_no_phase_passes_the_cap_and_the_peak_is_the_largest(request: PlanRequest, share: float) -> None:
    request = msgspec.structs.replace(request, overlaps=True)
    smallest = smallest_cap_bytes(request)
    cap = smallest + int(share * smallest)
    chosen = plan(capped(request, cap))
    expected = {"data", "load", "train", "evaluate", "save", "resume"}
    assert set(chosen.predicted_phase_bytes) == expected | ({"cache"} if chosen.prefix is not None else set())
    assert chosen.predicted_peak_bytes == max(chosen.predicted_phase_bytes.values()) <= cap
    # What waits to be trained on and the margin are in it.
    waiting = _waiting_bytes(chosen, request)
    assert chosen.predicted_phase_bytes["train"] == process_bytes(
        RUNTIME, chosen.predicted.peak_bytes + waiting, chosen.kept_free_bytes
    )


def test_images_loaded_between_steps_do_not_stand_beside_one() -> None:
    beside = plan(make_request("full", decode_bytes=40 * MIB))
    between = plan(make_request("full", decode_bytes=40 * MIB, overlaps=False))
    without = plan(make_request("full"))
    assert between.predicted_phase_bytes["train"] < without.predicted_phase_bytes["train"]
    assert beside.predicted_phase_bytes["train"] > without.predicted_phase_bytes["train"] + 40 * MIB
    assert (beside.overlaps, between.overlaps) == (True, False)
    # A photograph that takes more than all else decides all the same.
    vast = plan(make_request("full", decode_bytes=4000 * MIB, overlaps=False))
    assert vast.predicted_phase_bytes["train"] > RUNTIME + 4000 * MIB
    assert vast.predicted_phase_bytes["evaluate"] > RUNTIME + 4000 * MIB


@given(requests(max_depth=5))
@settings(deadline=None, max_examples=50)
def test_loading_between_steps_never_takes_more(request: PlanRequest) -> None:
    between = msgspec.structs.replace(request, overlaps=False)
    assert smallest_cap_bytes(between) <= smallest_cap_bytes(msgspec.structs.replace(request, overlaps=True))


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_takes_no_more_than_training_already_did(method: str) -> None:
    chosen = plan(make_request(method))
    assert chosen.evaluation_batch == 4  # of 197 tokens
    assert chosen.predicted_phase_bytes["evaluate"] <= chosen.predicted_phase_bytes["train"]
    tight = plan(capped(make_request(method), smallest_cap_bytes(make_request(method))))
    assert 1 <= tight.evaluation_batch <= chosen.evaluation_batch


@given(requests(max_depth=4), st.integers(0, 2**33))
@settings(deadline=None)
def test_an_evaluation_batch_is_the_largest_power_of_two_that_costs_nothing(request: PlanRequest, live: int) -> None:
    lossy = Lossy(0, 1, (request.shape.patch_tokens,) * request.shape.depth, False, True)
    batch = evaluation_batch(request, lossy, live)
    assert batch.bit_count() == 1
    assert batch == 1 or batch * request.shape.all_tokens <= PASS_TOKENS
    assert batch == 1 or evaluation_live_bytes(request, lossy, batch) <= live
    assert batch == pass_batch(request.shape) or evaluation_live_bytes(request, lossy, 2 * batch) > live


def test_weights_below_the_split_are_stored_in_two_bytes_where_that_is_asked_for() -> None:
    shape = make_request().shape
    lossy = Lossy(8, 4, (196,) * 12, False, True)
    whole, state = resting_bytes(make_request("random-k"), lossy)
    half, same_state = resting_bytes(make_request("random-k", half_frozen=True), lossy)
    assert whole == FLOAT_BYTES * shape.parameters
    assert whole - half == 8 * shape.block_parameters * 2
    assert state == same_state == 2 * FLOAT_BYTES * (shape.head_parameters + 4 * shape.block_parameters)


def test_loading_takes_as_many_copies_of_the_weights_as_the_file_needs() -> None:
    once, twice = (plan(make_request(load_copies=copies)).predicted_phase_bytes["load"] for copies in (1.0, 2.0))
    weights = FLOAT_BYTES * make_request().shape.parameters
    assert twice - once == pytest.approx((1 + ALLOCATOR_SHARE) * weights, abs=2)


def test_what_waits_is_two_micro_batches_and_the_image_being_decoded() -> None:
    request = make_request(decode_bytes=7 * MIB)
    lossy = Lossy(8, 4, (196,) * 12, False, True)
    assert prefetched_bytes(request, lossy, 4) == 2 * 4 * 3 * 224 * 224 * 4 + 7 * MIB


@given(requests(max_depth=6), st.floats(0, 1))
@settings(deadline=None)
def test_the_parts_cover_the_peak_of_training(request: PlanRequest, share: float) -> None:
    request = msgspec.structs.replace(request, overlaps=True)
    smallest = smallest_cap_bytes(request)
    chosen = plan(capped(request, smallest + int(share * smallest)))
    parts = parts_of(chosen)
    assert list(parts) == [
        "runtime", "weights", "gradients", "optimizer", "activations", "workspace", "inputs", "margin",
    ]  # fmt: skip
    assert all(size >= 0 for size in parts.values())
    assert sum(parts.values()) >= chosen.predicted_phase_bytes["train"]
    assert parts["runtime"] == chosen.runtime_bytes
    assert parts["weights"] == chosen.predicted.weights_bytes
    waiting = _waiting_bytes(chosen, request)
    assert parts["inputs"] - chosen.predicted.inputs_bytes == pytest.approx(waiting, abs=1)
    assert parts["margin"] == pytest.approx(
        PROCESS_BYTES + chosen.kept_free_bytes + ALLOCATOR_SHARE * (chosen.predicted.peak_bytes + waiting),
        abs=2,
    )
    # What stays through a whole step is under its peak.
    assert _resting_bytes(chosen) + chosen.predicted.gradients_bytes <= chosen.predicted.peak_bytes


def test_the_phases_of_a_choice_are_those_of_its_plan() -> None:
    request = make_request("last-k")
    chosen = plan(request)
    lossy = Lossy(8, 4, (196,) * 12, False, True)
    live = chosen.predicted.peak_bytes + prefetched_bytes(request, lossy, 32)
    assert phases(request, lossy, live) == chosen.predicted_phase_bytes


def test_a_pass_takes_as_many_images_as_its_tokens_allow() -> None:
    assert pass_batch(make_request().shape) == 4  # 197 tokens
    assert pass_batch(msgspec.structs.replace(make_request().shape, prefix_tokens=2000)) == 1
