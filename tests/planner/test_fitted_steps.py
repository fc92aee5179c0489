"""Every step is fitted before it runs: whatever ALaST asks for, and however short a batch is, the plan's peak holds."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import capped, make_request, requests, setup_of_plan, shapes

from edgetune import alast
from edgetune.alast import AlastSettings, AlastState
from edgetune.cost import Recompute, Selection, ViTShape, step_peak_bytes
from edgetune.methods import METHODS, proposer
from edgetune.planner import Plan, PlanRequest, fit, lightened, plan, smallest_cap_bytes
from edgetune.planner.values import TOKEN_MULTIPLE

ALAST_SETTINGS = st.builds(
    AlastSettings,
    initial_budget=st.floats(0, 1),
    layer_choice=st.sampled_from(["multinomial", "top"]),
    token_share=st.sampled_from(["compound", "absolute"]),
)


def _plan_at(request: PlanRequest, share: float) -> Plan:
    """A plan under a cap from the smallest that fits (share 0) to one that does not bind (share 1)."""
    smallest = smallest_cap_bytes(request)
    free = plan(capped(request, 2**50)).predicted_peak_bytes
    return plan(capped(request, smallest + int(share * (free - smallest))))


def _reached(state: AlastState, chosen: Plan, rng: random.Random, steps: int) -> AlastState:
    for _ in range(steps):
        deltas = [rng.expovariate(1) for _ in state.budgets]
        alast.update(state, deltas, alpha=rng.choice([0.01, 0.3, 5.0]), floor=chosen.token_floor)
    return state


def _short_batches(chosen: Plan) -> set[tuple[int, int]]:
    """(images in the largest micro-batch, micro-batches) of every batch that an epoch may end with."""
    return {
        (min(images, chosen.micro_batch), -(-images // chosen.micro_batch))
        for images in range(1, chosen.batch_size + 1)
    }


@given(requests(), st.floats(0, 1), ALAST_SETTINGS, st.integers(0, 2**32))
@settings(deadline=None)
def test_no_reachable_budgets_and_no_draw_give_a_step_over_the_plan(
    request: PlanRequest, share: float, choices: AlastSettings, seed: int
) -> None:
    chosen = _plan_at(request, share)
    assert chosen.predicted_peak_bytes <= chosen.cap_bytes
    setup, rng = setup_of_plan(chosen), random.Random(seed)
    state = alast.initial_state(request.shape.depth, chosen.token_floor, choices)
    propose = proposer(METHODS[chosen.method], chosen, state, choices)
    for step in range(8):
        _reached(state, chosen, rng, step)
        fitted = fit(propose(rng), chosen)
        assert step_peak_bytes(request.shape, fitted, setup) <= chosen.predicted.peak_bytes


@given(requests(), st.floats(0, 1), st.integers(0, 2**32))
@settings(deadline=None)
def test_any_proposal_fitted_is_under_the_plan_and_so_is_every_short_batch_of_it(
    request: PlanRequest, share: float, seed: int
) -> None:
    chosen, rng = _plan_at(request, share), random.Random(seed)
    shape = request.shape
    tokens = sorted((rng.randint(1, shape.patch_tokens) for _ in range(shape.depth)), reverse=True)
    trains = tuple(rng.random() < 0.7 for _ in range(shape.depth))
    fitted = fit(Selection(trains, tuple(tokens), rng.random() < 0.5), chosen)
    lighter = lightened(shape, fitted, chosen)
    for micro_batch, accumulation in _short_batches(chosen):
        setup = setup_of_plan(chosen, micro_batch=micro_batch, accumulation=accumulation)
        assert step_peak_bytes(shape, fitted, setup) <= chosen.predicted.peak_bytes
        as_run = msgspec.structs.replace(setup, may_prune=False)
        for selection in (fitted, lighter):
            assert step_peak_bytes(shape, selection, as_run) <= chosen.predicted.peak_bytes


@given(requests(), st.integers(0, 2**32))
@settings(deadline=None)
def test_fit_clips_to_the_plan(request: PlanRequest, seed: int) -> None:
    chosen = plan(capped(request, 2**50))
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
        assert count % TOKEN_MULTIPLE == 0 or count == chosen.token_ceiling[block]
        assert block == 0 or count <= fitted.tokens[block - 1]
    assert fitted.embeddings_train == chosen.embeddings_train
    assert fit(fitted, chosen) == fitted


@given(shapes(least_depth=3, max_depth=5), st.integers(0, 2**32))
@settings(deadline=None)
def test_a_step_recomputes_what_the_plan_says(shape: ViTShape, seed: int) -> None:
    base = plan(make_request("random-k", shape=shape, trained_blocks=1, split_block=1, recompute="none"))
    rng = random.Random(seed)
    levels = tuple(rng.choice(list(Recompute)) for _ in range(shape.depth))
    chosen = msgspec.structs.replace(base, recompute=levels, recompute_frozen=rng.choice(list(Recompute)))
    trained = rng.randrange(1, shape.depth)
    proposed = Selection(tuple(block == trained for block in range(shape.depth)), (1,) * shape.depth)
    fitted = fit(proposed, chosen)
    for block in range(shape.depth):
        if block < trained:  # nothing is kept of it, so nothing is made again
            assert fitted.level(block) is Recompute.NOTHING
        elif block == trained:
            assert fitted.level(block) is levels[block]
        else:
            assert fitted.level(block) is max(levels[block], chosen.recompute_frozen)
