"""What the planner's tests are made of: random models, random requests, and every plan of a small space by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import msgspec
from hypothesis import strategies as st
from shapes import DEIT_TINY, make_shape, probed_block

from edgetune.cost import Selection, StepSetup, ViTShape, step_peak_bytes
from edgetune.methods import METHODS, everything, space_of
from edgetune.planner import EmbeddingsChoice, Plan, PlanRequest, setups
from edgetune.planner.choices import lossless_choices, lossy_choices
from edgetune.planner.phases import phases, training_live_bytes
from edgetune.planner.search import cache_ways
from edgetune.planner.setups import setup_of
from edgetune.planner.values import CacheRequest, Lossless, Lossy, with_levels
from edgetune.planner.ways import AS_FAST, Ways, seconds_of
from edgetune.units import MIB

RUNTIME = 200 * MIB
OPTIMIZERS = ("adamw", "momentum", "sgd", "adafactor")


def make_request(
    method: str = "alast",
    *,
    shape: ViTShape = DEIT_TINY,
    cap_mib: float = 100_000,
    trained_blocks: int | None = None,
    split_block: int | None = None,
    embeddings: EmbeddingsChoice = "auto",
    **options: Any,
) -> PlanRequest:
    space = space_of(
        METHODS[method], shape, trained_blocks=trained_blocks, split_block=split_block, embeddings=embeddings
    )
    defaults: dict[str, Any] = {"batch_size": 32, "optimizer": "adamw", "runtime_bytes": RUNTIME}
    return PlanRequest(shape=shape, space=space, cap_bytes=int(cap_mib * MIB), **(defaults | options))


def capped(request: PlanRequest, cap_bytes: int) -> PlanRequest:
    return msgspec.structs.replace(request, cap_bytes=cap_bytes)


def setup_of_plan(chosen: Plan, *, micro_batch: int | None = None, accumulation: int | None = None) -> StepSetup:
    """How a step under a plan runs; of a short last batch, with fewer images or fewer micro-batches."""
    setup = setups.setup_of_plan(chosen, may_prune=chosen.method == "alast")
    return msgspec.structs.replace(
        setup,
        micro_batch=micro_batch or chosen.micro_batch,
        accumulation=accumulation or chosen.accumulation,
    )


@st.composite
def shapes(draw: st.DrawFn, *, least_depth: int = 1, max_depth: int = 8, max_grid: int = 16) -> ViTShape:
    heads = draw(st.sampled_from([1, 3]))
    shape = make_shape(
        depth=draw(st.integers(least_depth, max_depth)),
        width=8 * heads * draw(st.integers(1, 48)),
        heads=heads,
        mlp_ratio=draw(st.integers(1, 8)),
        grid=draw(st.integers(1, max_grid)),
        patch_px=draw(st.sampled_from([4, 16])),
        prefix_tokens=draw(st.integers(0, 5)),
        classes=draw(st.sampled_from([2, 1000])),
        layer_scale=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        gated_mlp=draw(st.booleans()),
        mlp_half=draw(st.sampled_from([True, True, False])),
    )
    # Blocks that are not plain: of one kind, or of two.
    hidden = draw(st.lists(st.sampled_from([300, 5000, 40_000]), max_size=2))
    if not hidden:
        return shape
    parts = tuple(probed_block(shape.width, floats, shape.block_parameters) for floats in hidden)
    kinds = draw(st.lists(st.integers(0, len(parts) - 1), min_size=shape.depth, max_size=shape.depth))
    return msgspec.structs.replace(shape, probed_blocks=parts, block_kinds=tuple(kinds))


@st.composite
def caches(draw: st.DrawFn) -> CacheRequest:
    return CacheRequest(
        train_images=draw(st.integers(1, 5000)),
        val_images=draw(st.integers(1, 500)),
        steps=draw(st.integers(1, 1000)),
        views=draw(st.integers(1, 3)),
        float_bytes=draw(st.sampled_from([2, 4])),
        limit_bytes=draw(st.sampled_from([None, None, MIB])),
        asked=draw(st.booleans()),
    )


@st.composite
def requests(draw: st.DrawFn, *, max_depth: int = 8, max_batch: int = 40, max_grid: int = 16) -> PlanRequest:
    """Any method on any model with any levers, under a cap that never binds."""
    shape = draw(shapes(max_depth=max_depth, max_grid=max_grid))
    batch = draw(st.integers(1, max_batch))
    floor, ceiling = sorted((draw(st.floats(0.05, 1)), draw(st.floats(0.05, 1))))
    levels = ["auto", "auto", "none", "mlp", "block"] if shape.mlp_half else ["auto", "none", "block"]
    accumulation = draw(st.none() | st.integers(1, batch))
    in_backward = draw(st.sampled_from([None, False, True]))
    request = make_request(
        draw(st.sampled_from(list(METHODS))),
        shape=shape,
        batch_size=batch,
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        accumulation=accumulation,
        token_floor=draw(st.none() | st.just(floor)),
        token_ceiling=draw(st.none() | st.just(ceiling)),
        recompute=draw(st.sampled_from(levels)),
        updates_in_backward=in_backward if (accumulation or 1) == 1 else None,
        keeps_state=draw(st.sampled_from([None, True, False])),
        half_frozen=draw(st.booleans()),
        decode_bytes=draw(st.integers(0, 30 * MIB)),
        overlaps=draw(st.sampled_from([True, True, False])),
        load_copies=draw(st.sampled_from([1.0, 2.0])),
        threads=draw(st.integers(1, 4)),
        split_tokens=draw(st.none() | st.floats(0.2, 1)),
        cache=draw(st.none() | caches()),
        peak_flops_per_s=draw(st.sampled_from([None, 1e10])),
        memory_bandwidth_bytes_per_s=draw(st.sampled_from([None, 4e9])),
    )
    if request.space.draws and draw(st.booleans()):
        return msgspec.structs.replace(request, space=everything(request.space, shape.depth))
    return request


def every_draw(request: PlanRequest, lossy: Lossy) -> Iterator[tuple[bool, ...]]:
    depth, count = request.shape.depth, lossy.trained_blocks
    above = range(lossy.split_block, depth) if request.space.draws else range(depth - count, depth)
    for chosen in combinations(above, count):
        yield tuple(block in chosen for block in range(depth))


def step_of(trains: tuple[bool, ...], lossy: Lossy, lossless: Lossless) -> Selection:
    return with_levels(
        trains, lossy.token_ceiling, lossy.embeddings_train, lossless.recompute, lossless.recompute_frozen
    )


def worst_by_trying(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> int:
    """Live bytes of the draw that needs most, of all there are."""
    setup = setup_of(request, lossy, lossless)
    return max(
        step_peak_bytes(request.shape, step_of(trains, lossy, lossless), setup) for trains in every_draw(request, lossy)
    )


class Tried(NamedTuple):
    """A plan of the space."""

    lossy_number: int
    seconds: float
    lossless_number: int
    peak_bytes: int  # of the process
    lossy: Lossy
    lossless: Lossless


def every_plan(request: PlanRequest) -> list[Tried]:
    """Every plan of a space, best first, whether or not it fits."""
    found = []
    for way in cache_ways(request):
        for lossy in lossy_choices(way):
            number = len(found)
            for place, lossless in enumerate(lossless_choices(way, lossy)):
                worst = worst_by_trying(way, lossy, lossless)
                resting = Ways(way, lossy).resting_bytes(lossless)
                live = training_live_bytes(way, lossy, lossless.micro_batch, worst, resting)
                peak = max(phases(way, lossy, live).values())
                found.append(Tried(number, seconds_of(way, lossy, lossless), place, peak, lossy, lossless))
    return sorted(found, key=lambda tried: tried[:3])


def best_of(tried: list[Tried], cap_bytes: int) -> Tried:
    """The plan that the planner has to choose, of all there are."""
    fits = [one for one in tried if one.peak_bytes <= cap_bytes]
    as_fast = [
        one for one in fits if one.lossy_number == fits[0].lossy_number and one.seconds <= AS_FAST * fits[0].seconds
    ]
    largest = max(one.lossless.micro_batch for one in as_fast)
    return next(one for one in as_fast if one.lossless.micro_batch == largest)


def choices_of(chosen: Plan) -> tuple[Lossy, Lossless]:
    """What a plan chose, as the planner's own values."""
    lossy = Lossy(
        chosen.split_block,
        chosen.trained_blocks,
        chosen.token_ceiling,
        chosen.embeddings_train,
        chosen.keeps_state,
    )
    return lossy, Lossless(chosen.micro_batch, chosen.recompute, chosen.recompute_frozen, chosen.updates_in_backward)
