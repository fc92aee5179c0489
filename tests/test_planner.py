"""A plan keeps its promise for every step that may come, prefers what learns best, and says what would help."""

from __future__ import annotations

import random
import re
from itertools import combinations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import DEIT_TINY, make_shape

from edgetune import cost, planner
from edgetune.cost import Selection, ViTShape
from edgetune.errors import DoesNotFit, UsageError
from edgetune.methods import METHODS, space_of
from edgetune.planner import Plan, PlanRequest, ceilings, fit, format_cap, plan, worst_draws
from edgetune.units import MIB, parse_bytes

RUNTIME = 200 * MIB


def _request(
    method: str = "alast",
    *,
    shape: ViTShape = DEIT_TINY,
    cap_mib: float = 100_000,
    trained_blocks: int | None = None,
    split_block: int | None = None,
    **options: object,
) -> PlanRequest:
    space = space_of(METHODS[method], shape, trained_blocks=trained_blocks, split_block=split_block)
    defaults: dict[str, object] = {"batch_size": 32, "optimizer": "adamw", "runtime_bytes": RUNTIME}
    return PlanRequest(shape=shape, space=space, cap_bytes=int(cap_mib * MIB), **(defaults | options))  # type: ignore[arg-type]


def _step_peak(chosen: Plan, shape: ViTShape, selection: Selection) -> int:
    return cost.step_cost(
        shape,
        selection,
        micro_batch=chosen.micro_batch,
        accumulation=chosen.accumulation,
        optimizer=chosen.optimizer,
        ever_trained_blocks=chosen.ever_trained_blocks,
    ).peak_bytes


@st.composite
def _shapes(draw: st.DrawFn, max_depth: int = 8) -> ViTShape:
    return make_shape(
        depth=draw(st.integers(1, max_depth)),
        width=8 * draw(st.integers(1, 64)),
        heads=1,
        grid=draw(st.integers(1, 16)),
        patch_px=draw(st.sampled_from([4, 16])),
        prefix_tokens=draw(st.integers(0, 5)),
        layer_scale=draw(st.booleans()),
    )


@st.composite
def _requests(draw: st.DrawFn) -> PlanRequest:
    shape = draw(_shapes())
    batch = draw(st.integers(1, 40))
    request = _request(
        draw(st.sampled_from(list(METHODS))),
        shape=shape,
        batch_size=batch,
        optimizer=draw(st.sampled_from(["adamw", "momentum", "sgd"])),
        accumulation=draw(st.none() | st.integers(1, batch)),
        token_floor=draw(st.none() | st.floats(0.05, 1)),
        decode_bytes=draw(st.integers(0, 30 * MIB)),
    )
    # Caps from where nothing fits to where anything does.
    share = draw(st.floats(0.8, 1.2) | st.floats(1, 20))
    needed = planner.smallest_cap_bytes(request) - RUNTIME - planner.PROCESS_BYTES
    return msgspec.structs.replace(request, cap_bytes=RUNTIME + planner.PROCESS_BYTES + int(needed * share))


@given(_requests(), st.integers(0, 2**32))
def test_a_plan_is_under_its_cap_and_so_is_every_step_fitted_to_it(request: PlanRequest, seed: int) -> None:
    shape = request.shape
    try:
        chosen = plan(request)
    except DoesNotFit as refusal:
        assert refusal.smallest_cap_bytes > request.cap_bytes
        return
    assert chosen.predicted_peak_bytes <= request.cap_bytes
    assert chosen.predicted_peak_bytes == max(chosen.predicted_phase_bytes.values())
    assert chosen.predicted.peak_bytes < chosen.predicted_phase_bytes["train"] - chosen.runtime_bytes
    rng = random.Random(seed)
    for _ in range(10):
        trains = [rng.random() < 0.7 for _ in range(shape.depth)]
        tokens = sorted((rng.randint(1, shape.patch_tokens) for _ in range(shape.depth)), reverse=True)
        proposed = Selection(tuple(trains), tuple(tokens), rng.random() < 0.5)
        assert _step_peak(chosen, shape, fit(proposed, chosen)) <= chosen.predicted.peak_bytes


@given(_shapes(max_depth=7), st.data(), st.integers(1, 16), st.integers(1, 2), st.floats(0.3, 1))
@settings(max_examples=200)
def test_the_worst_of_all_draws_is_among_those_looked_at(
    shape: ViTShape, data: st.DataObject, batch: int, accumulation: int, ratio: float
) -> None:
    split = data.draw(st.integers(0, shape.depth - 1))
    count = data.draw(st.integers(1, shape.depth - split))
    tokens = ceilings(shape, split, ratio)

    def peak(selection: Selection) -> int:
        return cost.step_cost(
            shape, selection, micro_batch=batch, accumulation=accumulation, optimizer="sgd",
            ever_trained_blocks=shape.depth,
        ).peak_bytes  # fmt: skip

    every = (
        Selection(tuple(block in chosen for block in range(shape.depth)), tokens)
        for chosen in combinations(range(split, shape.depth), count)
    )
    looked_at = worst_draws(shape.depth, split, count, tokens, embeddings=False)
    assert all(sum(draw.trains) == count and not any(draw.trains[:split]) for draw in looked_at)
    assert max(map(peak, every)) == max(map(peak, looked_at))


@given(_requests())
def test_the_smallest_cap_of_a_refusal_fits_and_one_mebibyte_less_does_not(request: PlanRequest) -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan(msgspec.structs.replace(request, cap_bytes=RUNTIME))
    smallest = refused.value.smallest_cap_bytes
    assert plan(msgspec.structs.replace(request, cap_bytes=smallest)).predicted_peak_bytes == smallest
    with pytest.raises(DoesNotFit):
        plan(msgspec.structs.replace(request, cap_bytes=smallest - MIB))
    # And what the message tells people to type fits too.
    asked = re.search(r"--ram-cap ([\d.]+MiB)", str(refused.value))
    assert asked
    plan(msgspec.structs.replace(request, cap_bytes=parse_bytes(asked.group(1))))


def _all_plans(request: PlanRequest) -> list[tuple[tuple[float, ...], int]]:
    """Every plan of a space as (what is given up, in order of reluctance; predicted peak), by brute force."""
    plans = []
    for split in request.space.splits:
        floor = request.token_floor or planner.default_token_floor(request.shape.depth, split)
        steps = range(planner.CEILING_STEPS + 1) if request.space.prunes_tokens and floor < 1 else (0,)
        for count in request.space.trained_blocks[split]:
            for step in steps:
                tokens = ceilings(request.shape, split, 1 - (1 - floor) * step / planner.CEILING_STEPS)
                candidate = planner._Candidate(split, count, tokens)
                for parts in range(1, request.batch_size + 1):
                    micro_batch = -(-request.batch_size // parts)
                    peak = planner.predicted_peak_bytes(request, candidate, micro_batch)
                    plans.append(((split, -count, -sum(tokens), -micro_batch), peak))
    return plans


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["alast", "random-k", "last-k"]), st.floats(0, 1))
@settings(max_examples=40)
def test_the_most_preferred_plan_that_fits_wins(depth: int, batch: int, method: str, place: float) -> None:
    shape = make_shape(depth=depth, width=192, grid=8)
    request = _request(method, shape=shape, batch_size=batch)
    plans = _all_plans(request)
    peaks = sorted(peak for _, peak in plans)
    cap = peaks[int(place * (len(peaks) - 1))]
    chosen = plan(msgspec.structs.replace(request, cap_bytes=cap))
    best = min(given_up for given_up, peak in plans if peak <= cap)
    assert (chosen.split_block, -chosen.trained_blocks, -sum(chosen.token_ceiling), -chosen.micro_batch) == best


def test_a_lossless_lever_is_spent_before_a_lossy_one() -> None:
    free = plan(_request("alast"))
    assert (free.accumulation, free.split_block, free.trained_blocks, free.token_ceiling[-1]) == (1, 0, 9, 196)
    # From here down, first the micro-batch shrinks, then tokens go, then blocks, then the split rises.
    seen = []
    for cap_mib in range(free.predicted_peak_bytes // MIB, 250, -4):
        try:
            chosen = plan(_request("alast", cap_mib=cap_mib))
        except DoesNotFit:
            break
        seen.append(chosen)
    splits = [chosen.split_block for chosen in seen]
    assert splits == sorted(splits)
    assert splits[-1] > 0
    lossless = [chosen for chosen in seen if chosen.token_ceiling[-1] == 196 and chosen.trained_blocks == 9]
    assert {chosen.micro_batch for chosen in lossless} >= {1, 2, 4, 8, 16}
    first_lossy = next(chosen for chosen in seen if chosen not in lossless)
    assert first_lossy.micro_batch <= 2
    assert first_lossy.split_block == 0
    assert first_lossy.trained_blocks == 9


def test_micro_batches_make_up_the_batch() -> None:
    for batch in (1, 2, 7, 32, 33):
        for size in planner._micro_batches(_request(batch_size=batch)):
            parts = -(-batch // size)
            assert (parts - 1) * size < batch <= parts * size
    assert planner._micro_batches(_request(batch_size=32, accumulation=5)) == [7]


@given(_requests(), st.integers(0, 2**32))
def test_fit_clips_to_the_plan(request: PlanRequest, seed: int) -> None:
    chosen = plan(msgspec.structs.replace(request, cap_bytes=2**50))
    rng, depth = random.Random(seed), request.shape.depth
    proposed = Selection(
        tuple(rng.random() < 0.5 for _ in range(depth)),
        tuple(rng.randint(-3, 2 * request.shape.patch_tokens) for _ in range(depth)),
        embeddings_train=True,
    )
    fitted = fit(proposed, chosen)
    assert not any(fitted.trains[: chosen.split_block])
    assert sum(fitted.trains) == min(chosen.trained_blocks, sum(proposed.trains[chosen.split_block :]))
    assert all(fits <= asked for fits, asked in zip(fitted.trains, proposed.trains, strict=True))
    for block, count in enumerate(fitted.tokens):
        assert 1 <= count <= chosen.token_ceiling[block]
        # Few different counts, so that the allocator meets few shapes.
        assert count % planner.TOKEN_MULTIPLE == 0 or count == chosen.token_ceiling[block]
        assert block == 0 or count <= fitted.tokens[block - 1]
    assert fitted.embeddings_train == chosen.embeddings_train
    assert fit(fitted, chosen) == fitted


def test_ceilings_keep_all_up_to_the_split_and_a_share_of_what_is_left_above_in_multiples() -> None:
    # 90, 81 and 72.9, each up to a multiple of eight.
    assert ceilings(make_shape(depth=5, grid=10), 1, 0.9) == (100, 100, 96, 88, 80)
    # A whole number is not pushed over the next multiple by rounding in the ratio.
    assert ceilings(make_shape(depth=2, grid=20), 0, 0.9) == (400, 360)
    assert ceilings(make_shape(depth=3, grid=10), 3, 0.5) == (100, 100, 100)
    assert ceilings(make_shape(depth=3, grid=1), 0, 0.1) == (1, 1, 1)


@given(st.integers(1, 48), st.data())
def test_at_the_floor_of_every_block_a_quarter_of_the_tokens_reaches_the_last(depth: int, data: st.DataObject) -> None:
    split = data.draw(st.integers(0, depth))
    floor = planner.default_token_floor(depth, split)
    assert 0.5 <= floor <= 1
    assert ceilings(make_shape(depth=depth, grid=16), split, floor)[-1] >= 0.25 * 256 - 1


@given(st.integers(1, 2**50))
def test_a_cap_that_is_shown_is_never_below_the_need(size: int) -> None:
    assert size <= parse_bytes(format_cap(size)) <= size + MIB // 10 + 1


def test_the_explanation_names_the_next_larger_plan_and_its_bytes() -> None:
    free = plan(_request("alast"))
    assert any("memory does not bind" in line for line in free.explanation)
    tight = plan(msgspec.structs.replace(_request("alast"), cap_bytes=free.predicted_peak_bytes - 1))
    (line,) = [line for line in tight.explanation if "the next larger plan" in line]
    assert "batch 32 at once" in line
    assert "9 of the 12 blocks from 0 up" in line
    assert planner.format_bytes(free.predicted_peak_bytes) in line
    assert any("2 micro-batches of 16" in line for line in tight.explanation)


def test_the_refusal_names_a_smaller_model_that_fits() -> None:
    def named(name: str, width: int) -> ViTShape:
        return make_shape(name=name, width=width)

    others = (named("base", 768), named("small", 384), named("tiny", 192), named("nano", 96), named("pico", 48))
    cap = planner.smallest_cap_bytes(_request("alast", shape=others[2]))
    request = msgspec.structs.replace(_request("alast", shape=others[0]), cap_bytes=cap)
    with pytest.raises(DoesNotFit) as refused:
        plan(request, others)
    match = re.search(r"--model (\w+), which fits", str(refused.value))
    assert match
    assert match.group(1) == "tiny"  # the largest of those that do
    plan(msgspec.structs.replace(request, shape=others[2]))


@pytest.mark.parametrize("fits", [False, True])
def test_the_head_alone_is_offered_only_where_it_fits(fits: bool) -> None:
    cap = planner.smallest_cap_bytes(_request("head")) - (not fits)
    with pytest.raises(DoesNotFit) as refused:
        plan(msgspec.structs.replace(_request("full"), cap_bytes=cap))
    assert ("--method head" in str(refused.value)) is fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"batch_size": 4, "accumulation": 5}, "between 1 and the batch size 4"),
        ({"accumulation": 0}, "--grad-accum-steps"),
        ({"token_floor": 0.0}, "token floor"),
        ({"token_floor": 1.5}, "token floor"),
        ({"token_floor": float("nan")}, "token floor"),
    ],
)
def test_a_batch_or_floor_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(_request(**options))  # type: ignore[arg-type]


def test_a_plan_survives_json() -> None:
    chosen = plan(_request("alast", cap_mib=330, peak_flops_per_s=1e10))
    assert msgspec.json.decode(msgspec.json.encode(chosen), type=Plan, strict=True) == chosen
    assert chosen.predicted_step_seconds == chosen.predicted.flops / 1e10
    assert plan(_request("alast", cap_mib=330)).predicted_step_seconds is None


def test_evaluation_takes_no_more_than_training_already_did() -> None:
    for method in METHODS:
        chosen = plan(_request(method))
        assert chosen.evaluation_batch >= 1
        assert chosen.predicted_phase_bytes["evaluate"] <= chosen.predicted_phase_bytes["train"]


def test_a_replayed_plan_is_held_against_the_new_cap_and_runtime() -> None:
    made = plan(_request(cap_mib=900))
    moved = planner.replayed(made, cap_bytes=2000 * MIB, runtime_bytes=made.runtime_bytes + 100 * MIB)
    assert moved.predicted_peak_bytes == made.predicted_peak_bytes + 100 * MIB
    assert moved.cap_bytes == 2000 * MIB
    assert moved.predicted == made.predicted
    with pytest.raises(DoesNotFit, match="the plan needs") as refused:
        planner.replayed(made, cap_bytes=made.predicted_peak_bytes - 1, runtime_bytes=made.runtime_bytes)
    assert refused.value.smallest_cap_bytes == made.predicted_peak_bytes
