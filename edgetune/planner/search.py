"""The best plan under a cap. Pure, no torch, no numpy.

The search is exact: no draw, and no other choice of the space that `choices.py` writes down, is better. Tests hold it
against trying everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from edgetune.cost import Recompute, StepCost, ViTShape, step_cost
from edgetune.errors import DoesNotFit
from edgetune.planner.choices import check, lossy_choices, lossy_families
from edgetune.planner.explain import does_not_fit_message, explain, format_cap
from edgetune.planner.phases import (
    cache_batch,
    evaluation_batch,
    kept_free_bytes,
    needed_bytes,
    phases,
    training_live_bytes,
)
from edgetune.planner.prefix import cached_prefix, pays
from edgetune.planner.setups import ever_trained_blocks, setup_of
from edgetune.planner.tokens import floor_of
from edgetune.planner.values import Lossless, Lossy, Plan, PlanRequest, accumulation_of
from edgetune.planner.ways import Ways, seconds_of
from edgetune.planner.worst import worst_draw
from edgetune.units import format_bytes


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
    larger: tuple[PlanRequest, Lossy] | None = None  # the last that did not fit
    for way in cache_ways(request):
        found, larger = _best(way, larger)
        if found is not None:
            return found
    smallest = smallest_cap_bytes(request)
    raise DoesNotFit(_refusal(request, smallest, smaller_models), smallest)


def cache_ways(request: PlanRequest) -> Iterator[PlanRequest]:
    """The request as it is and, where that does not fit, the other way round with the cache: making one takes memory of
    its own, and a prefix that has left memory makes room. What was asked for, or is there already, stays.
    """
    yield request
    cache = request.cache
    if cache is None or cache.asked or cache.blocks is not None:
        return
    if pays(request, cache):
        yield msgspec.structs.replace(request, cache=None, no_cache_because="making it takes more memory than there is")
    else:
        yield msgspec.structs.replace(request, cache=msgspec.structs.replace(cache, asked=True))


def _best(
    request: PlanRequest, larger: tuple[PlanRequest, Lossy] | None
) -> tuple[Plan | None, tuple[PlanRequest, Lossy] | None]:
    """The best plan that fits, and the last choice before it that did not."""
    for family in lossy_families(request):
        if not Ways(request, family[-1]).may_fit():  # and so none of them does
            larger = request, family[-1]
            continue
        for lossy in family:
            ways = Ways(request, lossy)
            found, faster = ways.fastest()
            if found is None:
                larger = request, lossy
            elif faster:
                return _finish(request, lossy, found, _refused(request, lossy, ways.cheapest(faster))), larger
            else:
                refused = _refused(*larger, Ways(*larger).cheapest()) if larger else None
                return _finish(request, lossy, found, refused), larger
    return None, larger


def smallest_cap_bytes(request: PlanRequest) -> int:
    """The least cap under which this method, batch and floor have a plan."""
    check(request)
    return min(map(_least_cap, cache_ways(request)))


def _least_cap(request: PlanRequest) -> int:
    """Of one split's lossy choices the last needs least: dropped state, fewer blocks, fewer tokens never cost more."""
    last = {(lossy.embeddings_train, lossy.split_block): lossy for lossy in lossy_choices(request)}
    least: int | None = None
    for lossy in reversed(last.values()):
        ways = Ways(request, lossy)
        if least is None or needed_bytes(request, lossy, ways.least_live_bytes()) < least:
            live, _ = ways.cheapest()
            needed = needed_bytes(request, lossy, live)
            least = needed if least is None else min(least, needed)
    assert least is not None
    return least


def _refused(request: PlanRequest, lossy: Lossy, needs: tuple[int, Lossless]) -> Refused:
    live, lossless = needs
    return Refused(lossy, lossless, needed_bytes(request, lossy, live))


def _finish(request: PlanRequest, lossy: Lossy, lossless: Lossless, refused: Refused | None) -> Plan:
    live, worst = worst_draw(request, lossy, lossless)
    setup = setup_of(request, lossy, lossless)
    step: StepCost = step_cost(request.shape, worst, setup)
    resting = Ways(request, lossy).resting_bytes(lossless)
    training = training_live_bytes(request, lossy, lossless.micro_batch, live, resting)
    predicted = phases(request, lossy, training)
    seconds = seconds_of(request, lossy, lossless)
    peak = max(predicted.values())
    return plan_of(
        request,
        lossy,
        lossless,
        step,
        predicted,
        evaluation_batch=evaluation_batch(request, lossy, training),
        cache_batch=cache_batch(request, lossy, training),
        memory_binds=refused is not None,
        step_seconds=seconds if request.peak_flops_per_s else None,
        explanation=explain(
            request,
            lossy,
            lossless,
            peak,
            plainer=_plainer(request, lossy, lossless, peak, seconds),
            faster=_faster(request, lossy, lossless, seconds),
            refused=None if refused is None else (refused.lossy, refused.lossless, refused.peak_bytes),
        ),
    )


def plan_of(
    request: PlanRequest,
    lossy: Lossy,
    lossless: Lossless,
    step: StepCost,
    phases: dict[str, int],
    *,
    evaluation_batch: int,
    cache_batch: int,
    memory_binds: bool,
    step_seconds: float | None,
    explanation: tuple[str, ...],
) -> Plan:
    """These choices as the plan of a run. `phases`: predicted peak of the process in each, bytes."""
    return Plan(
        model=request.shape.name,
        method=request.space.name,
        optimizer=request.optimizer,
        split_block=lossy.split_block,
        trained_blocks=lossy.trained_blocks,
        ever_trained_blocks=ever_trained_blocks(request, lossy),
        embeddings_train=lossy.embeddings_train,
        draws=request.space.draws,
        token_ceiling=lossy.token_ceiling,
        token_floor=floor_of(request, lossy.split_block),
        token_score=request.token_score,
        batch_size=request.batch_size,
        micro_batch=lossless.micro_batch,
        accumulation=accumulation_of(request, lossless.micro_batch),
        recompute=lossless.recompute,
        recompute_frozen=lossless.recompute_frozen,
        updates_in_backward=lossless.updates_in_backward,
        keeps_state=lossy.keeps_state,
        half_frozen=request.half_frozen,
        evaluation_batch=evaluation_batch,
        prefix=cached_prefix(request, lossy),
        cache_batch=cache_batch,
        overlaps=request.overlaps,
        memory_binds=memory_binds,
        kept_free_bytes=kept_free_bytes(request, lossy),
        threads=request.threads,
        cap_bytes=request.cap_bytes,
        runtime_bytes=request.runtime_bytes,
        predicted=step,
        predicted_peak_bytes=max(phases.values()),
        predicted_phase_bytes=phases,
        predicted_step_seconds=step_seconds,
        explanation=explanation,
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
    resting = Ways(request, lossy).resting_bytes(plain)
    worst, _ = worst_draw(request, lossy, plain)
    live = training_live_bytes(request, lossy, plain.micro_batch, worst, resting)
    return max(phases(request, lossy, live).values()) - peak, seconds / seconds_of(request, lossy, plain) - 1


def _faster(request: PlanRequest, lossy: Lossy, lossless: Lossless, seconds: float) -> float | None:
    """How many times as fast the cached prefix makes a step, by the estimate."""
    if cached_prefix(request, lossy) is None:
        return None
    return seconds_of(msgspec.structs.replace(request, cache=None), lossy, lossless) / seconds


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


def _refusal(request: PlanRequest, smallest_cap: int, smaller_models: Iterable[ViTShape]) -> str:
    tries = [f"--ram-cap {format_cap(smallest_cap)}"]
    for smaller in sorted(smaller_models, key=lambda other: -other.parameters):
        if _could_run(request, smaller):
            other = msgspec.structs.replace(request, shape=smaller)
            if smallest_cap_bytes(other) <= request.cap_bytes:
                tries.append(f"--model {smaller.name}, which fits")
                break
    depth = request.shape.depth
    head = msgspec.structs.replace(
        request.space,
        name="head",
        splits=(depth,),
        trained_blocks={depth: (0,)},
        embeddings=(False,),
        prunes_tokens=False,
        draws=False,
    )
    if smallest_cap_bytes(msgspec.structs.replace(request, space=head)) <= request.cap_bytes:
        tries.append("--method head, which fits")
    return does_not_fit_message(request, smallest_cap, tries)


def _could_run(request: PlanRequest, smaller: ViTShape) -> bool:
    """Whether the same request makes sense for a smaller model: its blocks are as many, and built as the method needs."""
    if smaller.parameters >= request.shape.parameters or smaller.depth != request.shape.depth:
        return False
    if request.space.prunes_tokens and not (smaller.class_token and smaller.token_pool and smaller.fused_qkv):
        return False
    return smaller.mlp_half or request.recompute != "mlp"
