"""ALaST's rule, held to what can be said about it: budgets telescope, draws are near uniform, tokens never come back."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.alast import (
    AlastSettings,
    AlastState,
    draw_blocks,
    initial_state,
    keep_tokens,
    propose,
    step_rng,
    update,
)

DEPTH = 12
unit = st.floats(0.01, 1.0)


def _run(deltas: list[list[float]], *, alpha: float, floor: float, initial: float = 0.9) -> AlastState:
    state = initial_state(len(deltas[0]), floor, AlastSettings(initial_budget=initial))
    for step in deltas:
        update(state, step, alpha=alpha, floor=floor)
    return state


@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=20), st.floats(0, 0.04))
def test_without_clipping_a_budget_is_an_affine_function_of_the_current_delta(
    deltas: list[list[float]], alpha: float
) -> None:
    # The largest change is 10, so alpha up to 0.04 never leaves [0.1, 0.9]: what is clipped here is nothing.
    state = _run(deltas, alpha=alpha, floor=0.05, initial=0.5)
    expected = [0.5 + alpha * (last - first) for first, last in zip(deltas[0], deltas[-1], strict=True)]
    assert state.budgets == pytest.approx(expected, abs=1e-9)


@given(
    st.lists(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=1, max_size=10),
    st.floats(0, 100),
    unit,
    unit,
)
def test_budgets_never_leave_their_range(deltas: list[list[float]], alpha: float, floor: float, initial: float) -> None:
    assert all(floor <= budget <= 1 for budget in _run(deltas, alpha=alpha, floor=floor, initial=initial).budgets)


def test_the_first_step_moves_no_budget() -> None:
    state = _run([[5.0, 1.0]], alpha=1.0, floor=0.5)
    assert state.budgets == [0.9, 0.9]
    assert state.last_deltas == [5.0, 1.0]


def test_a_rising_delta_raises_its_own_budget_only() -> None:
    state = _run([[1.0, 1.0, 1.0], [1.0, 1.5, 0.5]], alpha=0.1, floor=0.5)
    assert state.budgets == pytest.approx([0.9, 0.95, 0.85])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_delta_that_is_no_number_moves_nothing(bad: float) -> None:
    state = _run([[1.0, 2.0], [2.0, 1.0]], alpha=0.01, floor=0.5)
    budgets, deltas = list(state.budgets), list(state.last_deltas or [])
    update(state, [3.0, bad], alpha=0.01, floor=0.5)
    assert (state.budgets, state.last_deltas) == (budgets, deltas)
    # And the next good step goes on from the last good one.
    update(state, [2.0, 2.0], alpha=0.01, floor=0.5)
    assert state.budgets == pytest.approx([budgets[0], budgets[1] + 0.01])


def test_deltas_must_be_as_many_as_blocks() -> None:
    with pytest.raises(ValueError, match="3 deltas for 2 blocks"):
        update(AlastState([0.9, 0.9]), [1.0, 1.0, 1.0], alpha=0.1, floor=0.5)


@pytest.mark.parametrize(("floor", "initial", "budget"), [(0.5, 0.9, 0.9), (0.95, 0.9, 0.95), (0.5, 3.0, 1.0)])
def test_the_initial_budget_is_clipped_as_any_other(floor: float, initial: float, budget: float) -> None:
    assert initial_state(2, floor, AlastSettings(initial_budget=initial)).budgets == [budget, budget]


@given(
    st.lists(unit, min_size=1, max_size=24),
    st.data(),
    st.sampled_from(["multinomial", "top"]),
    st.integers(0, 2**32),
)
def test_a_draw_is_k_distinct_blocks_above_the_split(
    budgets: list[float], data: st.DataObject, choice: str, seed: int
) -> None:
    split = data.draw(st.integers(0, len(budgets)))
    count = data.draw(st.integers(0, len(budgets) + 2))
    drawn = draw_blocks(budgets, split, count, choice, random.Random(seed))  # type: ignore[arg-type]
    assert len(drawn) == len(budgets)
    assert sum(drawn) == min(count, len(budgets) - split)
    assert not any(drawn[:split])


def _first_draws(budgets: list[float], draws: int) -> Counter[int]:
    rng = random.Random(20240815)
    return Counter(draw_blocks(budgets, 0, 1, "multinomial", rng).index(True) for _ in range(draws))


def test_a_single_draw_follows_the_softmax_of_the_budgets() -> None:
    budgets = [0.5, 1.0, 0.7, 0.9, 0.6, 0.8]
    weights = [math.exp(budget) for budget in budgets]
    seen = _first_draws(budgets, 20_000)
    expected = [20_000 * weight / sum(weights) for weight in weights]
    chi_square = sum((seen[block] - want) ** 2 / want for block, want in enumerate(expected))
    assert chi_square < 20.5  # 5 degrees of freedom: one in a thousand
    uniform = sum((seen[block] - 20_000 / 6) ** 2 / (20_000 / 6) for block in range(6))
    assert uniform > 100  # so the test can tell the rule from a uniform draw


@given(st.floats(0.5, 1), st.floats(0.5, 1))
def test_weights_of_budgets_from_a_half_to_one_are_close_to_uniform(one: float, other: float) -> None:
    assert math.exp(one) / math.exp(other) <= math.exp(0.5) + 1e-9


def test_with_equal_budgets_every_block_above_the_split_trains_equally_often() -> None:
    rng, seen = random.Random(7), Counter[int]()
    for _ in range(4000):
        drawn = draw_blocks([0.9] * DEPTH, 4, 3, "multinomial", rng)
        seen.update(block for block, trained in enumerate(drawn) if trained)
    assert set(seen) == set(range(4, DEPTH))
    # 3 of 8 without replacement: 1500 each, with a standard deviation of sqrt(4000 * 3/8 * 5/8) = 31.
    assert all(abs(count - 1500) < 4 * 31 for count in seen.values())


def test_top_takes_the_largest_budgets_above_the_split() -> None:
    budgets = [1.0, 0.6, 0.9, 0.9, 0.7, 0.95]
    assert draw_blocks(budgets, 1, 3, "top", random.Random(0)) == (False, False, True, True, False, True)


@given(
    st.lists(unit, min_size=1, max_size=24), st.integers(1, 4096), st.data(), st.sampled_from(["compound", "absolute"])
)
def test_dropped_tokens_never_come_back_and_the_prefix_keeps_all(
    budgets: list[float], patch_tokens: int, data: st.DataObject, share: str
) -> None:
    split = data.draw(st.integers(0, len(budgets)))
    tokens = keep_tokens(budgets, patch_tokens, split, share)  # type: ignore[arg-type]
    assert len(tokens) == len(budgets)
    assert all(count == patch_tokens for count in tokens[: split + 1])
    assert all(before >= after >= 1 for before, after in pairwise(tokens))


@given(st.lists(unit, min_size=2, max_size=12), unit)
def test_the_last_block_prunes_nothing(budgets: list[float], last: float) -> None:
    assert keep_tokens(budgets, 196, 0, "compound") == keep_tokens([*budgets[:-1], last], 196, 0, "compound")


def test_a_compound_share_is_of_what_is_left_and_an_absolute_one_of_all() -> None:
    budgets = [0.9, 0.8, 1.0, 0.9]
    assert keep_tokens(budgets, 100, 0, "compound") == (100, 90, 72, 72)
    assert keep_tokens(budgets, 100, 0, "absolute") == (100, 90, 80, 80)
    assert keep_tokens(budgets, 100, 2, "compound") == (100, 100, 100, 100)


def test_as_published_nine_tenths_a_block_is_rounded_block_by_block() -> None:
    assert keep_tokens([0.9] * 12, 196, 0, "compound") == (196, 176, 158, 142, 128, 115, 104, 94, 85, 76, 68, 61)


def test_a_proposal_obeys_the_settings() -> None:
    state = AlastState([0.5, 0.6, 0.7, 1.0])
    settings = AlastSettings(layer_choice="top", token_share="absolute")
    selection = propose(state, patch_tokens=10, split_block=1, count=1, settings=settings, rng=random.Random(0))
    assert selection.trains == (False, False, False, True)
    assert selection.tokens == (10, 10, 6, 6)
    assert not selection.embeddings_train


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_a_steps_randomness_is_a_function_of_seed_and_step(seed: int, step: int) -> None:
    assert step_rng(seed, step).random() == step_rng(seed, step).random()


def test_steps_and_seeds_draw_differently() -> None:
    pairs = [(seed, step) for seed in range(12) for step in range(112)]
    assert len({step_rng(seed, step).random() for seed, step in pairs}) == len(pairs)
