"""The arithmetic of a step, without torch: what must hold for every shape. What is measured is in test_cost_measured."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import DEIT_TINY, make_shape

from edgetune import cost
from edgetune.cost import (
    BlockState,
    Recompute,
    Selection,
    StepCost,
    StepSetup,
    ViTShape,
    all_tokens_kept,
    step_cost,
)
from edgetune.cost.blocks import block_walk
from edgetune.cost.tape import Mode
from edgetune.cost.time import speed_of, step_seconds, work_of

MIB = 1024**2
DEPTH = DEIT_TINY.depth
NONE = (False,) * DEPTH
ALL = (True,) * DEPTH
OPTIMIZERS = ("adamw", "momentum", "sgd", "adafactor")


def _setup(trained: int, **options: Any) -> StepSetup:
    defaults: dict[str, Any] = {
        "micro_batch": 16,
        "accumulation": 1,
        "optimizer": "adamw",
        "ever_trained_blocks": trained,
    }
    return StepSetup(**(defaults | options))


def _cost(selection: Selection, shape: ViTShape = DEIT_TINY, **options: Any) -> StepCost:
    return step_cost(shape, selection, _setup(sum(selection.trains), **options))


def _top(count: int) -> tuple[bool, ...]:
    return tuple(block >= DEPTH - count for block in range(DEPTH))


def test_deit_tiny_has_as_many_parameters_as_timm_says() -> None:
    assert DEIT_TINY.parameters == 5_717_416


def test_full_fine_tuning_of_deit_tiny_needs_a_little_over_half_a_gigabyte() -> None:
    # 529 MiB measured, as the table in the design notes has it, with the batch's 9 MiB of images among it.
    peak = _cost(all_tokens_kept(make_shape(), ALL, embeddings_train=True)).peak_bytes
    assert peak / MIB == pytest.approx(529, rel=0.05)


def test_deit_tiny_takes_2_5_gigaflops_forward() -> None:
    embed = 2 * 196 * 768 * 192
    forward = 12 * cost.block_forward_flops(DEIT_TINY, 196) + embed
    assert forward / 1e9 == pytest.approx(2.51, rel=0.01)  # 1.26 G multiply-adds


@given(st.lists(st.booleans(), min_size=1, max_size=16), st.booleans())
def test_the_lowest_trained_block_decides_what_is_held(trains: list[bool], embeddings: bool) -> None:
    selection = Selection(tuple(trains), (4,) * len(trains), embeddings)
    states = cost.block_states(selection)
    lowest = 0 if embeddings else trains.index(True) if True in trains else len(trains)
    assert selection.lowest_trained_block == lowest
    assert all((state is BlockState.BELOW) == (block < lowest) for block, state in enumerate(states))
    assert all((state is BlockState.TRAINED) == trained for state, trained in zip(states, trains, strict=True))


def test_freezing_scattered_blocks_hardly_saves_but_raising_the_lowest_does() -> None:
    every_second = tuple(block % 2 == 0 for block in range(DEPTH))
    everything = _cost(all_tokens_kept(DEIT_TINY, ALL)).activations_bytes
    assert _cost(all_tokens_kept(DEIT_TINY, every_second)).activations_bytes > 0.75 * everything
    assert _cost(all_tokens_kept(DEIT_TINY, _top(6))).activations_bytes < 0.55 * everything


def test_a_block_below_every_trained_one_keeps_nothing() -> None:
    for level in Recompute:
        walk = block_walk(DEIT_TINY, BlockState.BELOW, level, 196, None, 16, False, Mode())
        assert (walk.kept, walk.backward_peak, walk.gradients) == (0, 0, 0)
        assert walk.forward_peak > 0


def test_the_head_alone_keeps_what_the_head_needs() -> None:
    step = _cost(all_tokens_kept(DEIT_TINY, NONE))
    stream = 16 * 197 * 192 * 4
    logits = 16 * 1000 * 4
    # The tokens that reach the final norm, the norm's output and statistics, logits and their log-softmax.
    assert step.activations_bytes == 2 * stream + 2 * 16 * 197 * 4 + 2 * logits


@given(st.integers(0, DEPTH), st.integers(1, 196), st.sampled_from(OPTIMIZERS), st.integers(1, 64))
@settings(deadline=None)
def test_the_peak_covers_what_is_there_at_once(trained: int, last: int, optimizer: str, batch: int) -> None:
    tokens = (196,) * (DEPTH - 1) + (last,)
    step = _cost(Selection(_top(trained), tokens), optimizer=optimizer, micro_batch=batch)
    resting = step.weights_bytes + step.optimizer_bytes + step.inputs_bytes
    assert step.peak_bytes >= resting + step.gradients_bytes
    assert step.peak_bytes >= resting + step.activations_bytes
    assert step.peak_bytes <= resting + step.gradients_bytes + step.activations_bytes + step.workspace_bytes


def test_each_level_of_recompute_keeps_less_than_the_one_before() -> None:
    for trains in (ALL, tuple(block % 3 == 0 for block in range(DEPTH))):
        kept = [
            _cost(Selection(trains, (196,) * DEPTH, recompute=(level,) * DEPTH)).activations_bytes
            for level in Recompute
        ]
        assert kept[0] > kept[1] > kept[2]
        # Of a block that is made again whole, its input alone is kept.
    assert kept[2] < 1.5 * (DEPTH + 2) * 16 * 197 * 192 * 4


def test_recomputing_every_block_of_deit_tiny_takes_a_quarter_of_the_memory() -> None:
    # 147 of 529 MiB measured in the design notes, without the images.
    plain = _cost(all_tokens_kept(make_shape(), ALL, embeddings_train=True)).peak_bytes
    whole = _cost(Selection(ALL, (196,) * DEPTH, True, (Recompute.BLOCK,) * DEPTH), make_shape()).peak_bytes
    assert whole / plain == pytest.approx(0.28, abs=0.03)


def test_optimizer_state_is_of_every_block_that_ever_trains() -> None:
    selection = all_tokens_kept(DEIT_TINY, _top(2))
    trained = 4 * (DEIT_TINY.head_parameters + 2 * DEIT_TINY.block_parameters)
    rest = 4 * (DEIT_TINY.head_parameters + 12 * DEIT_TINY.block_parameters)
    for optimizer, copies in (("adamw", 2), ("momentum", 1), ("sgd", 0)):
        step = _cost(selection, optimizer=optimizer, ever_trained_blocks=12)
        assert step.optimizer_bytes == copies * rest
        assert step.gradients_bytes == trained
    # Rows and columns instead of whole matrices.
    assert 0 < _cost(selection, optimizer="adafactor", ever_trained_blocks=12).optimizer_bytes < 0.03 * rest


def test_an_update_inside_the_backward_leaves_no_gradient() -> None:
    selection = Selection(ALL, (196,) * DEPTH, True, (Recompute.BLOCK,) * DEPTH)
    inside, after = (_cost(selection, updates_in_backward=inside, micro_batch=1) for inside in (True, False))
    assert inside.gradients_bytes == 0
    assert after.gradients_bytes == 4 * DEIT_TINY.parameters
    assert inside.peak_bytes < after.peak_bytes - 0.5 * after.gradients_bytes


def test_gradients_of_the_blocks_above_are_there_while_the_lowest_one_is_made() -> None:
    whole = Selection(ALL, (196,) * DEPTH, recompute=(Recompute.BLOCK,) * DEPTH)
    step = _cost(whole, optimizer="sgd", micro_batch=2)
    lowest = block_walk(DEIT_TINY, BlockState.TRAINED, Recompute.BLOCK, 196, None, 2, True, Mode())
    resting = step.weights_bytes + step.optimizer_bytes + step.inputs_bytes
    above = 4 * (DEIT_TINY.head_parameters + (DEPTH - 1) * DEIT_TINY.block_parameters)
    assert step.peak_bytes >= resting + above + lowest.kept + lowest.backward_peak


def test_half_stored_weights_take_two_bytes() -> None:
    selection = all_tokens_kept(DEIT_TINY, _top(4))
    whole, half = (_cost(selection, half_blocks=blocks) for blocks in (0, 8))
    assert whole.weights_bytes - half.weights_bytes == 2 * 8 * DEIT_TINY.block_parameters


def test_a_step_in_micro_batches_costs_as_many_flops_and_fewer_bytes() -> None:
    selection = all_tokens_kept(DEIT_TINY, ALL, embeddings_train=True)
    at_once, in_four = _cost(selection), _cost(selection, micro_batch=4, accumulation=4)
    assert in_four.flops == at_once.flops
    assert in_four.peak_bytes < 0.4 * at_once.peak_bytes


def test_flops_fall_with_every_frozen_block_and_dropped_token() -> None:
    flops = [_cost(all_tokens_kept(DEIT_TINY, _top(count))).flops for count in range(DEPTH + 1)]
    assert all(less < more for less, more in pairwise(flops))
    tokens = [_cost(Selection(ALL, (196,) * 6 + (count,) * 6)).flops for count in range(8, 197, 8)]
    assert all(less < more for less, more in pairwise(tokens))
    # A forward pass is a third of full fine-tuning.
    full = cost.full_fine_tuning_flops(DEIT_TINY, 16)
    assert flops[0] / full == pytest.approx(1 / 3, abs=0.01)
    assert flops[-1] < full


def test_recomputing_a_whole_model_is_up_to_one_forward_more() -> None:
    flops = [_cost(Selection(ALL, (196,) * DEPTH, recompute=(level,) * DEPTH)).flops for level in Recompute]
    forward = flops[0] / 3
    assert flops[0] < flops[1] < flops[2] <= flops[0] + forward
    assert flops[2] - flops[0] > 0.6 * forward


def test_token_share_is_the_mean_over_blocks() -> None:
    assert cost.token_share(DEIT_TINY, all_tokens_kept(DEIT_TINY, NONE)) == 1
    assert cost.token_share(DEIT_TINY, Selection(NONE, (196,) * 6 + (98,) * 6)) == 0.75


@pytest.mark.parametrize(
    "selection",
    [Selection((True,), (196,)), Selection(ALL, (196,) * 11), Selection((), ())],
    ids=["one block", "eleven token counts", "empty"],
)
def test_a_selection_of_another_depth_is_refused(selection: Selection) -> None:
    with pytest.raises(ValueError, match="for a model of depth 12"):
        _cost(selection)


def test_a_gradient_that_is_gone_can_not_be_added_to() -> None:
    with pytest.raises(ValueError, match="no gradient left to add to"):
        _cost(all_tokens_kept(DEIT_TINY, ALL), accumulation=2, updates_in_backward=True)


def test_evaluation_needs_less_than_training() -> None:
    for batch in (1, 16, 64):
        training = _cost(all_tokens_kept(DEIT_TINY, NONE), micro_batch=batch)
        assert training.weights_bytes + cost.evaluation_peak_bytes(DEIT_TINY, batch) <= training.peak_bytes


def _seconds(selection: Selection, speed: tuple[float, float] = (1e10, 1e10), **options: Any) -> float:
    setup = _setup(sum(selection.trains), **options)
    return step_seconds(work_of(DEIT_TINY, selection, setup), 16, setup, speed)


def test_a_step_takes_longer_with_each_level_of_recompute_and_each_cut_of_the_batch() -> None:
    recomputed = [_seconds(Selection(ALL, (196,) * DEPTH, recompute=(level,) * DEPTH)) for level in Recompute]
    assert recomputed == sorted(set(recomputed))
    plain = all_tokens_kept(DEIT_TINY, ALL)
    cut = [_seconds(plain, micro_batch=16 // parts, accumulation=parts) for parts in (1, 2, 4, 8, 16)]
    assert cut == sorted(set(cut))


def test_a_step_takes_as_long_as_computing_and_moving_after_each_other() -> None:
    plain = all_tokens_kept(DEIT_TINY, ALL)
    computing, moving = _seconds(plain, (1e10, 1e30)), _seconds(plain, (1e30, 1e10))
    assert _seconds(plain) == pytest.approx(computing + moving)
    assert _seconds(plain, (2e10, 2e10)) == pytest.approx(_seconds(plain) / 2)
    flops = _cost(plain).flops
    assert flops / 1e10 < computing < 1.1 * flops / 1e10


def test_a_speed_that_nobody_stated_is_filled_in_from_the_other() -> None:
    assert speed_of(8e10, 1e10) == (8e10, 1e10)
    assert speed_of(8e10, None) == (8e10, 1e10)
    assert speed_of(None, 1e10) == (8e10, 1e10)
    flops, moved = speed_of(None, None)
    assert flops == 8 * moved
