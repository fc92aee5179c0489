"""What never costs more: a smaller step, a smaller micro-batch, less state. The planner's search stands on it."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import make_shape

from edgetune.cost import Recompute, Selection, StepSetup, ViTShape, step_cost, step_peak_bytes

OPTIMIZERS = ("adamw", "momentum", "sgd", "adafactor")


class _Pair(NamedTuple):
    """A step, and another that trains no block more and keeps no token more, with the same levels of recompute."""

    shape: ViTShape
    more: Selection
    fewer: Selection
    setup: StepSetup


@st.composite
def _setups(draw: st.DrawFn, depth: int) -> StepSetup:
    accumulation = draw(st.integers(1, 3))
    return StepSetup(
        ever_trained_blocks=depth,
        micro_batch=draw(st.integers(1, 8)),
        accumulation=accumulation,
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        updates_in_backward=accumulation == 1 and draw(st.booleans()),
        half_blocks=draw(st.integers(0, depth)),
        threads=draw(st.integers(1, 4)),
        may_prune=True,
    )


@st.composite
def _pairs(draw: st.DrawFn) -> _Pair:
    depth, grid = draw(st.integers(1, 6)), draw(st.integers(1, 30))
    shape = make_shape(
        depth=depth,
        width=8 * draw(st.integers(1, 48)),
        heads=1,
        grid=grid,
        patch_px=4,
        mlp_ratio=draw(st.integers(1, 6)),
        layer_scale=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        gated_mlp=draw(st.booleans()),
    )
    counts = st.lists(st.integers(1, grid**2), min_size=depth - 1, max_size=depth - 1).map(
        lambda some: [grid**2, *some]
    )
    flags = st.lists(st.booleans(), min_size=depth, max_size=depth)
    more_tokens = sorted(draw(counts), reverse=True)
    fewer_tokens = [min(pair) for pair in zip(more_tokens, sorted(draw(counts), reverse=True), strict=True)]
    more, mask = draw(flags), draw(flags)
    fewer = [one and other for one, other in zip(more, mask, strict=True)]
    embeddings, kept = draw(st.booleans()), draw(st.booleans())
    levels = tuple(draw(st.lists(st.sampled_from(list(Recompute)), min_size=depth, max_size=depth)))
    return _Pair(
        shape,
        Selection(tuple(more), tuple(more_tokens), embeddings, levels),
        Selection(tuple(fewer), tuple(fewer_tokens), embeddings and kept, levels),
        draw(_setups(depth)),
    )


@given(_pairs())
@settings(deadline=None, max_examples=200)
def test_the_parts_cover_the_peak_of_any_step(pair: _Pair) -> None:
    step = step_cost(pair.shape, pair.more, pair.setup)
    parts = (
        step.weights_bytes, step.gradients_bytes, step.optimizer_bytes, step.activations_bytes, step.workspace_bytes,
        step.inputs_bytes,
    )  # fmt: skip
    assert min(parts) >= 0
    assert sum(parts) >= step.peak_bytes
    assert step.peak_bytes == step_peak_bytes(pair.shape, pair.more, pair.setup)


@given(_pairs())
@settings(deadline=None, max_examples=300)
def test_a_smaller_step_never_costs_more(pair: _Pair) -> None:
    larger, smaller = (step_cost(pair.shape, selection, pair.setup) for selection in (pair.more, pair.fewer))
    assert smaller.peak_bytes <= larger.peak_bytes
    assert smaller.flops <= larger.flops
    assert smaller.activations_bytes <= larger.activations_bytes


def test_dropping_one_token_of_a_thousand_does_not_cost_more_than_it_saves_where_dropping_is_counted_on() -> None:
    # The indices of the kept tokens are more than one token of a narrow model.
    shape = make_shape(depth=2, width=8, heads=1, grid=32, patch_px=4)
    setup = StepSetup(micro_batch=1, accumulation=1, optimizer="sgd", ever_trained_blocks=2, may_prune=True)
    kept, dropped = (step_peak_bytes(shape, Selection((True, True), (1024, last)), setup) for last in (1024, 1023))
    assert dropped <= kept


@given(_pairs())
@settings(deadline=None)
def test_what_is_counted_for_dropping_tokens_is_never_less_than_without(pair: _Pair) -> None:
    plain = msgspec.structs.replace(pair.setup, may_prune=False)
    for selection in (pair.more, pair.fewer):
        assert step_peak_bytes(pair.shape, selection, plain) <= step_peak_bytes(pair.shape, selection, pair.setup)


@given(_pairs(), st.integers(2, 4))
@settings(deadline=None)
def test_a_larger_micro_batch_never_costs_less(pair: _Pair, accumulation: int) -> None:
    setup = msgspec.structs.replace(pair.setup, accumulation=accumulation, updates_in_backward=False)
    larger = msgspec.structs.replace(setup, micro_batch=setup.micro_batch + 1)
    assert step_peak_bytes(pair.shape, pair.more, setup) <= step_peak_bytes(pair.shape, pair.more, larger)


@given(_pairs())
@settings(deadline=None)
def test_gradients_that_wait_for_others_never_cost_less(pair: _Pair) -> None:
    once = msgspec.structs.replace(pair.setup, accumulation=1, updates_in_backward=False)
    waiting = msgspec.structs.replace(once, accumulation=2)
    assert step_peak_bytes(pair.shape, pair.more, once) <= step_peak_bytes(pair.shape, pair.more, waiting)


@given(_pairs(), st.integers(0, 6))
@settings(deadline=None)
def test_state_of_fewer_blocks_never_costs_more(pair: _Pair, blocks: int) -> None:
    fewer = msgspec.structs.replace(pair.setup, ever_trained_blocks=min(blocks, pair.shape.depth))
    assert step_peak_bytes(pair.shape, pair.more, fewer) <= step_peak_bytes(pair.shape, pair.more, pair.setup)
