"""The best plan under a cap. Pure, no torch, no numpy.

The space. Lossy choices, most preferred first; the first for which any lossless choice fits wins:

1. optimizer state is kept: dropping it restarts a block's moments whenever it comes back, so it is the last resort;
2. the embeddings train, where the method trains everything;
3. the lowest split block: more blocks may ever train, and accuracy on hard tasks falls with the split;
4. the most blocks a step (K, down to half of those above the split): fewer trained blocks learn slower;
5. the highest token ceiling: one share that every block above the split may pass on, from all down to the floor.

Lossless choices, of which the fastest that fits is taken, by `cost.time`:

- the micro-batch: the batch cut into 1, 2, 3 ... nearly equal parts;
- recompute of blocks that train: one level for all, or a deeper level below some block and a lighter one from it on;
- recompute of frozen blocks that gradient passes through: as if they trained, or whole;
- the optimizer's update inside the backward, where there is one micro-batch.

So every lossless lever is spent before a lossy one moves, and the search is exact: no draw, and no other choice of the
space, is better. Tests hold it against trying everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import msgspec

from edgetune.cost import FLOAT_BYTES, Recompute, StepCost, ViTShape, step_cost, step_flops, step_peak_bytes
from edgetune.cost.time import speed_of, start_flops, step_seconds, step_traffic_bytes
from edgetune.errors import DoesNotFit, UsageError
from edgetune.planner.explain import does_not_fit_message, explain, format_cap
from edgetune.planner.phases import (
    evaluation_batch,
    least_other_live_bytes,
    most_live_bytes,
    phases,
    prefetched_bytes,
    process_bytes,
)
from edgetune.planner.tokens import ceiling_ratios, ceilings, floor_of
from edgetune.planner.values import Lossless, Lossy, Plan, PlanRequest, accumulation_of, setup_of
from edgetune.planner.worst import first_draw, fits, selected, worst_draw
from edgetune.units import format_bytes

_LEVELS = {"none": Recompute.NOTHING, "mlp": Recompute.MLP, "block": Recompute.BLOCK}


class Refused(NamedTuple):
    """The next larger plan: what was preferred or faster, and the peak of the process that ruled it out."""

    lossy: Lossy
    lossless: Lossless
    peak_bytes: int


def plan(request: PlanRequest, smaller_models: Iterable[ViTShape] = ()) -> Plan:
    """The most preferred plan whose predicted peak is at most the cap, and the fastest way to run it.

    Raises: DoesNotFit, naming the smallest cap for this method, batch and floor, and the first of `smaller_models`
    (largest first) that fits the cap; UsageError for a batch or a share that makes no sense.
    """
    check(request)
    larger: Lossy | None = None
    for lossy in lossy_choices(request):
        found, refused = _fastest(request, lossy)
        if found is not None:
            if refused is None and larger is not None:
                refused = _cheapest(request, larger)
            return _finish(request, lossy, found, refused)
        larger = lossy
    smallest = smallest_cap_bytes(request)
    raise DoesNotFit(_refusal(request, smallest, smaller_models), smallest)


def smallest_cap_bytes(request: PlanRequest) -> int:
    """The least cap under which this method, batch and floor have a plan.

    Of the lossy choices the last ones need least: fewer blocks, fewer tokens, a higher split and dropped state never
    cost more.
    """
    *_, last = lossy_choices(request)
    return _cheapest(request, last).peak_bytes


def lossy_choices(request: PlanRequest) -> Iterator[Lossy]:
    """Most preferred first, and each no dearer than the one before within its split."""
    shape, space = request.shape, request.space
    drops = space.draws and request.keeps_state is not True
    states = (True,) if not drops else (True, False) if request.keeps_state is None else (False,)
    for keeps_state in states:
        for embeddings in space.embeddings:
            for split in space.splits:
                for count in space.trained_blocks[split]:
                    for ratio in ceiling_ratios(request, split):
                        yield Lossy(split, count, ceilings(shape, split, ratio), embeddings, keeps_state)


def lossless_choices(request: PlanRequest, lossy: Lossy) -> Iterator[Lossless]:
    """All ways to run the same step."""
    sizes = micro_batches(request)
    for levels, frozen in _recompute_choices(request, lossy):
        yield from lossless_of(request, levels, frozen, sizes)


def lossless_of(
    request: PlanRequest, levels: tuple[Recompute, ...], frozen: Recompute, sizes: list[int]
) -> Iterator[Lossless]:
    asked = request.updates_in_backward
    for micro_batch in sizes:
        for in_backward in (False, True) if asked is None else (asked,):
            if not in_backward or accumulation_of(request, micro_batch) == 1:
                yield Lossless(micro_batch, levels, frozen, in_backward)


def micro_batches(request: PlanRequest) -> list[int]:
    """Micro-batch sizes, largest first: the batch cut into 1, 2, 3 ... nearly equal parts."""
    if request.accumulation is not None:
        return [-(-request.batch_size // request.accumulation)]
    if request.updates_in_backward:
        return [request.batch_size]
    parts = range(1, request.batch_size + 1)
    return sorted({-(-request.batch_size // count) for count in parts}, reverse=True)


def _recompute_choices(request: PlanRequest, lossy: Lossy) -> list[tuple[tuple[Recompute, ...], Recompute]]:
    shape, space = request.shape, request.space
    carries = lossy.trained_blocks > 0 or lossy.embeddings_train
    first = 0 if lossy.embeddings_train else lossy.split_block
    frozen_blocks = carries and (space.draws and lossy.trained_blocks < shape.depth - lossy.split_block)
    return list(_patterns(shape.depth, first, carries, frozen_blocks, shape.mlp_half, request.recompute))


@lru_cache(maxsize=256)
def _patterns(
    depth: int, first: int, carries: bool, frozen_blocks: bool, mlp_half: bool, asked: str
) -> tuple[tuple[tuple[Recompute, ...], Recompute], ...]:
    """(levels of blocks that train, least level of frozen ones on the path)."""
    nothing = (Recompute.NOTHING,) * depth
    if not carries:
        return ((nothing, Recompute.NOTHING),)
    if asked != "auto":
        level = _LEVELS[asked]
        return (((level,) * depth, level),)
    levels = [level for level in Recompute if mlp_half or level is not Recompute.MLP]
    patterns = [(level,) * depth for level in levels]
    for low in levels:
        for high in levels[: levels.index(low)]:
            patterns += [(low,) * block + (high,) * (depth - block) for block in range(first + 1, depth)]
    frozen = (Recompute.NOTHING, Recompute.BLOCK) if frozen_blocks else (Recompute.NOTHING,)
    whole = (Recompute.BLOCK,) * depth
    return tuple(
        (pattern, level) for pattern in patterns for level in frozen if level is Recompute.NOTHING or pattern != whole
    )


def seconds_of(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> float:
    """Estimated time of a typical step: drawn blocks spread evenly."""
    depth, split, count = request.shape.depth, lossy.split_block, lossy.trained_blocks
    trains = first_draw(depth, lossy, request.space.draws)
    if request.space.draws and count:
        spread = {split + place * (depth - split) // count for place in range(count)}
        trains = tuple(block in spread for block in range(depth))
    selection = selected(trains, lossy, lossless)
    setup = setup_of(request, lossy, lossless)
    return step_seconds(
        step_flops(request.shape, selection, request.batch_size) + start_flops(selection, setup),
        step_traffic_bytes(request.shape, selection, setup),
        speed_of(request.peak_flops_per_s, request.memory_bandwidth_bytes_per_s),
    )


def _room(request: PlanRequest, micro_batch: int) -> int:
    """Live bytes that a training step may have, what waits beside it taken off."""
    return most_live_bytes(request) - prefetched_bytes(request, micro_batch)


def _fastest(request: PlanRequest, lossy: Lossy) -> tuple[Lossless | None, Refused | None]:
    """The fastest lossless choice that fits, and of the faster ones that do not the one that needs least."""
    if least_other_live_bytes(request, lossy) > most_live_bytes(request) or _never_fits(request, lossy):
        return None, None
    choices = list(lossless_choices(request, lossy))
    # Mostly everything fits: the fastest conceivable is tried before the others are timed.
    plain = [choice for choice in choices if choice.micro_batch == choices[0].micro_batch and not any(choice.recompute)]
    ranked = sorted(plain, key=lambda choice: (seconds_of(request, lossy, choice), choice.updates_in_backward))
    if (
        ranked
        and not ranked[0].recompute_frozen
        and fits(request, lossy, ranked[0], _room(request, ranked[0].micro_batch))
    ):
        return ranked[0], None
    timed = sorted(
        ((seconds_of(request, lossy, choice), number, choice) for number, choice in enumerate(choices)),
        key=lambda entry: entry[:2],
    )
    refused: list[Lossless] = []
    found = None
    for _, _, choice in timed:
        if fits(request, lossy, choice, _room(request, choice.micro_batch)):
            found = choice
            break
        refused.append(choice)
    if found is None:
        return None, None
    if not refused:
        return found, None
    least = min(refused, key=lambda choice: _quick_peak(request, lossy, choice))
    return found, Refused(lossy, least, _process_peak(request, lossy, least))


def _never_fits(request: PlanRequest, lossy: Lossy) -> bool:
    """Quickly, whether no lossless choice can fit: a bound from below on all of them.

    Every block keeps at least what it keeps recomputed; where a step peaks, one block is there with all it needs.
    """
    whole = (Recompute.BLOCK,) * request.shape.depth
    # What a recomputed block holds at its peak beyond a kept one's: the incoming gradient, statistics, a state.
    tokens = max(lossy.token_ceiling) + request.shape.prefix_tokens
    slack = FLOAT_BYTES * tokens * (2 * request.shape.width + request.shape.mlp_width)
    ends = {micro_batches(request)[0], micro_batches(request)[-1]}
    for choice in lossless_of(request, whole, Recompute.BLOCK, sorted(ends)):
        peak = _quick_peak(request, lossy, choice) - choice.micro_batch * slack - 2**16
        if peak <= most_live_bytes(request):
            return False
    return True


def _quick_peak(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> int:
    first = selected(first_draw(request.shape.depth, lossy, request.space.draws), lossy, lossless)
    peak = step_peak_bytes(request.shape, first, setup_of(request, lossy, lossless))
    return peak + prefetched_bytes(request, lossless.micro_batch)


def _process_peak(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> int:
    live = worst_draw(request, lossy, lossless)[0] + prefetched_bytes(request, lossless.micro_batch)
    return max(phases(request, lossy, live).values())


def _cheapest(request: PlanRequest, lossy: Lossy) -> Refused:
    """The lossless choice with the least peak, and that peak."""
    sizes = micro_batches(request)
    ends = {sizes[0], sizes[-1]}  # smaller is less, but the whole batch at once carries no gradients
    best: tuple[int, Lossless] | None = None
    choices = [choice for choice in lossless_choices(request, lossy) if choice.micro_batch in ends]
    for choice in sorted(choices, key=lambda choice: _quick_peak(request, lossy, choice)):
        if best is not None and _quick_peak(request, lossy, choice) >= best[0]:
            break
        live = worst_draw(request, lossy, choice)[0] + prefetched_bytes(request, choice.micro_batch)
        if best is None or live < best[0]:
            best = (live, choice)
    assert best is not None
    live = max(best[0], least_other_live_bytes(request, lossy))
    return Refused(lossy, best[1], process_bytes(request.runtime_bytes, live))


def check(request: PlanRequest) -> None:
    """Raises: UsageError for what makes no sense together."""
    if request.batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {request.batch_size}.")
    if request.accumulation is not None and not 1 <= request.accumulation <= request.batch_size:
        raise UsageError(
            f"--grad-accum-steps must be between 1 and the batch size {request.batch_size}, not {request.accumulation}."
        )
    if request.updates_in_backward and (request.accumulation or 1) > 1:
        raise UsageError(
            "--step-in-backward leaves no gradient to add to, so it goes with one micro-batch only: leave "
            "--grad-accum-steps out."
        )
    for flag, share in (("--token-floor", request.token_floor), ("--token-ceiling", request.token_ceiling)):
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"{flag} is a share above 0 and up to 1, not {share}.")
    if request.token_floor and request.token_ceiling and request.token_floor > request.token_ceiling:
        raise UsageError(
            f"--token-floor {request.token_floor} is above --token-ceiling {request.token_ceiling}: swap them."
        )
    if request.recompute == "mlp" and not request.shape.mlp_half:
        raise UsageError(
            f"--recompute mlp: the blocks of {request.shape.name} have no second half of their own. Try --recompute block."
        )


def _finish(request: PlanRequest, lossy: Lossy, lossless: Lossless, refused: Refused | None) -> Plan:
    shape, space = request.shape, request.space
    live, worst = worst_draw(request, lossy, lossless)
    setup = setup_of(request, lossy, lossless)
    step: StepCost = step_cost(shape, worst, setup)
    training = live + prefetched_bytes(request, lossless.micro_batch)
    predicted = phases(request, lossy, training)
    seconds = seconds_of(request, lossy, lossless)
    peak = max(predicted.values())
    return Plan(
        model=shape.name,
        method=space.name,
        optimizer=request.optimizer,
        split_block=lossy.split_block,
        trained_blocks=lossy.trained_blocks,
        ever_trained_blocks=setup.ever_trained_blocks,
        embeddings_train=lossy.embeddings_train,
        draws=space.draws,
        token_ceiling=lossy.token_ceiling,
        token_floor=floor_of(request, lossy.split_block),
        batch_size=request.batch_size,
        micro_batch=lossless.micro_batch,
        accumulation=setup.accumulation,
        recompute=lossless.recompute,
        recompute_frozen=lossless.recompute_frozen,
        updates_in_backward=lossless.updates_in_backward,
        keeps_state=lossy.keeps_state,
        half_frozen=request.half_frozen,
        evaluation_batch=evaluation_batch(request, lossy, training),
        threads=request.threads,
        cap_bytes=request.cap_bytes,
        runtime_bytes=request.runtime_bytes,
        predicted=step,
        predicted_peak_bytes=peak,
        predicted_phase_bytes=predicted,
        predicted_step_seconds=seconds if request.peak_flops_per_s else None,
        explanation=explain(
            request,
            lossy,
            lossless,
            peak,
            plainer=_plainer(request, lossy, lossless, peak, seconds),
            refused=None if refused is None else (refused.lossy, refused.lossless, refused.peak_bytes),
        ),
    )


def _plainer(
    request: PlanRequest, lossy: Lossy, lossless: Lossless, peak: int, seconds: float
) -> tuple[int, float] | None:
    """(bytes that recompute saves, share of time that it costs), or None where nothing is recomputed."""
    if not any(lossless.recompute) and lossless.recompute_frozen is Recompute.NOTHING:
        return None
    plain = msgspec.structs.replace(
        lossless, recompute=(Recompute.NOTHING,) * request.shape.depth, recompute_frozen=Recompute.NOTHING
    )
    return _process_peak(request, lossy, plain) - peak, seconds / seconds_of(request, lossy, plain) - 1


def replayed(plan: Plan, *, cap_bytes: int, runtime_bytes: int) -> Plan:
    """Another run's plan under this run's cap and runtime: what training adds stays as it was predicted.

    Raises: DoesNotFit if that passes the cap.
    """
    shift = runtime_bytes - plan.runtime_bytes
    peak = plan.predicted_peak_bytes + shift
    if peak > cap_bytes:
        raise DoesNotFit(
            f"the plan needs {format_cap(peak)} here; the cap is {format_cap(cap_bytes)} (of which the runtime takes "
            f"{format_bytes(runtime_bytes)}). Try --ram-cap {format_cap(peak)}, or leave --plan out.",
            peak,
        )
    return msgspec.structs.replace(
        plan,
        cap_bytes=cap_bytes,
        runtime_bytes=runtime_bytes,
        predicted_peak_bytes=peak,
        predicted_phase_bytes={phase: size + shift for phase, size in plan.predicted_phase_bytes.items()},
    )


# What is left of the predicted growth each time that memory ran out all the same.
TIGHTENED_SHARE = 0.8


def tightened(request: PlanRequest, current: Plan) -> Plan:
    """A plan that adds less than this one, for a run whose memory ran out; the cap it answers to stays what it is.

    Raises: DoesNotFit if nothing needs as little.
    """
    growth = current.predicted_peak_bytes - current.runtime_bytes
    cap = current.runtime_bytes + int(growth * TIGHTENED_SHARE)
    tighter = plan(msgspec.structs.replace(request, cap_bytes=cap, runtime_bytes=current.runtime_bytes))
    return msgspec.structs.replace(tighter, cap_bytes=current.cap_bytes)


def _refusal(request: PlanRequest, smallest_cap: int, smaller_models: Iterable[ViTShape]) -> str:
    shape = request.shape
    tries = [f"--ram-cap {format_cap(smallest_cap)}"]
    for smaller in sorted(smaller_models, key=lambda other: -other.parameters):
        if smaller.parameters >= shape.parameters or smaller.depth != shape.depth:
            continue
        other = msgspec.structs.replace(request, shape=smaller)
        if smallest_cap_bytes(other) <= request.cap_bytes:
            tries.append(f"--model {smaller.name}, which fits")
            break
    head = msgspec.structs.replace(
        request.space,
        name="head",
        splits=(shape.depth,),
        trained_blocks={shape.depth: (0,)},
        embeddings=(False,),
        prunes_tokens=False,
        draws=False,
    )
    if smallest_cap_bytes(msgspec.structs.replace(request, space=head)) <= request.cap_bytes:
        tries.append("--method head, which fits")
    return does_not_fit_message(request, smallest_cap, tries)
