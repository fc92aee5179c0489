"""The best plan of a run from artifacts: which variant, how large a micro-batch, how many tokens. Pure.

The counterpart of `planner`, which knows torch's memory: here a variant's memory is what it was measured to take when it
was exported. The order is the same: micro-batches first, which change no result, then tokens, then the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from edgetune import cost
from edgetune.artifacts.manifest import Manifest, Measured, MeasuredPeak, Variant, cuts
from edgetune.cost import FLOAT_BYTES, Recompute, Selection
from edgetune.errors import ArtifactsError, DoesNotFit, UsageError
from edgetune.planner import CachedPrefix, Plan, PlanRequest, ceilings, format_cap, process_bytes
from edgetune.planner.choices import check, micro_batches
from edgetune.planner.phases import READ_BYTES, WRITE_BYTES, fit_bytes, kept_free_bytes, largest_batch, pass_batch
from edgetune.planner.prefix import cached_prefix
from edgetune.planner.search import plan_of
from edgetune.planner.setups import ever_trained_blocks, setup_of
from edgetune.planner.tokens import ceiling_ratios
from edgetune.planner.values import PREFETCHED_BATCHES, Lossless, Lossy, accumulation_of
from edgetune.units import format_bytes


class Choice(NamedTuple):
    """A variant and how it is run."""

    variant: Variant
    lossy: Lossy
    micro_batch: int


def plan(manifest: Manifest, request: PlanRequest) -> Plan:
    """The most preferred choice whose predicted peak is at most the cap.

    Raises: DoesNotFit, naming the smallest cap for these artifacts, method and batch; UsageError for what artifacts can't
    do, and a split that they were not cut at.
    """
    check(request)
    _refuse_levers(request)
    refused: tuple[Choice, int] | None = None
    smallest: int | None = None
    for choice in choices(manifest, request):
        phases = predicted_phases(manifest, request, choice)
        peak = max(phases.values())
        if peak <= request.cap_bytes:
            return _finish(manifest, request, choice, phases, refused)
        smallest = peak if smallest is None else min(smallest, peak)
        refused = (choice, peak)
    if smallest is None:
        raise UsageError(_no_such_variant(manifest, request))
    raise DoesNotFit(
        f"{manifest.model} from these artifacts ({', '.join(each.name for each in manifest.variants)}) needs at least "
        f"{format_cap(smallest)} with --method {request.space.name}; the cap is {format_cap(request.cap_bytes)} (of which "
        f"the runtime takes {format_bytes(request.runtime_bytes)}). Try --ram-cap {format_cap(smallest)}, a smaller "
        "--batch-size, or --method head.",
        smallest,
    )


def choices(manifest: Manifest, request: PlanRequest) -> Iterator[Choice]:
    """Everything that may be tried, most preferred first."""
    shape, space = request.shape, request.space
    by_cut = {(variant.split_block, variant.embeddings_train): variant for variant in manifest.variants}
    for embeddings in space.embeddings:
        for split in space.splits:
            variant = by_cut.get((split, embeddings))
            if variant is None or _cached_blocks(request) not in (None, split):
                continue  # what is cached is what enters this graph
            for count in space.trained_blocks[split]:
                for ratio in ceiling_ratios(request, split):
                    tokens = ceilings(shape, split, ratio, request.split_tokens or 1.0, _cached_blocks(request))
                    lossy = Lossy(split, count, tokens, embeddings, request.keeps_state is not False)
                    for size in micro_batches(request):
                        yield Choice(variant, lossy, size)


def _cached_blocks(request: PlanRequest) -> int | None:
    return None if request.cache is None else request.cache.blocks


def variants_that_fit(manifest: Manifest, room_bytes: int) -> tuple[Variant, ...]:
    """Those that train one image at once in so many bytes above the runtime, without optimizer state.

    Raises: DoesNotFit if none does.
    """
    needs = {
        variant.name: process_bytes(0, _peak_at(_measured(variant).train, 1, 1.0)) for variant in manifest.variants
    }
    kept = tuple(variant for variant in manifest.variants if needs[variant.name] <= room_bytes)
    if not kept:
        least = min(needs.values())
        raise DoesNotFit(
            f"the smallest variant of {manifest.model} needs {format_cap(least)} beside the runtime; there are "
            f"{format_cap(room_bytes)}. Try a larger --ram-cap, or a smaller --model.",
            least,
        )
    return kept


def predicted_phases(manifest: Manifest, request: PlanRequest, choice: Choice) -> dict[str, int]:
    """Predicted peak of the process in each phase, bytes."""
    training = _training_bytes(request, choice)
    live = {
        "data": request.decode_bytes,
        "train": training,
        "evaluate": _evaluation_bytes(request, choice, _evaluation_batch(request, choice, training)),
    }
    if _caches(request, choice):
        live["cache"] = _caching_bytes(request, choice, _cache_batch(request, choice, training))
    if request.fits_head:
        live["head"] = _fitting_bytes(request, choice, _evaluation_batch(request, choice, training))
    kept_free = kept_free_bytes(request, choice.lossy)
    return {phase: process_bytes(request.runtime_bytes, size, kept_free) for phase, size in live.items()}


def _training_bytes(request: PlanRequest, choice: Choice) -> int:
    shape, variant, size = request.shape, choice.variant, choice.micro_batch
    measured = _measured(variant)
    above = choice.lossy.token_ceiling[variant.split_block :]
    share = sum(above) / (len(above) * shape.patch_tokens) if above else 1.0
    return (
        _peak_at(measured.train, size, share)
        + cost.optimizer_bytes(
            shape, request.optimizer, ever_trained_blocks(request, choice.lossy), choice.lossy.embeddings_train
        )
        + cost.update_scratch_bytes(shape, request.optimizer, True, choice.lossy.embeddings_train)
        + _beside(request, choice, size)
    )


def _evaluation_bytes(request: PlanRequest, choice: Choice, size: int) -> int:
    state = cost.optimizer_bytes(
        request.shape, request.optimizer, ever_trained_blocks(request, choice.lossy), choice.lossy.embeddings_train
    )
    gradients = cost.trained_parameters(
        request.shape, request.shape.depth - choice.variant.split_block, choice.lossy.embeddings_train
    )
    measured = _peak_at(_measured(choice.variant).evaluate, size, 1.0)
    return measured + state + FLOAT_BYTES * gradients + _beside(request, choice, size)


def _fitting_bytes(request: PlanRequest, choice: Choice, size: int) -> int:
    """While the classifier is fitted: an evaluation beside the fit's sums; 0 where it is not."""
    if not request.fits_head:
        return 0
    return _evaluation_bytes(request, choice, size) + fit_bytes(request.shape.width, request.shape.classes, size)


def _caching_bytes(request: PlanRequest, choice: Choice, size: int) -> int:
    shape = request.shape
    out = 2 * size * shape.all_tokens * shape.width * FLOAT_BYTES
    images = PREFETCHED_BATCHES * cost.input_bytes(shape, size) + request.decode_bytes
    return _peak_at(_measured(choice.variant).prefix, size, 1.0) + out + images + WRITE_BYTES


def _beside(request: PlanRequest, choice: Choice, size: int) -> int:
    """What is there beside the suffix's step: the prefix where it is not cached, and what waits to be trained on."""
    shape, prefix = request.shape, cached_prefix(request, choice.lossy)
    if prefix is not None and prefix.whole:
        return PREFETCHED_BATCHES * size * shape.all_tokens * shape.width * FLOAT_BYTES + READ_BYTES
    through = _measured(choice.variant).prefix
    images = PREFETCHED_BATCHES * cost.input_bytes(shape, size) + request.decode_bytes
    return images + (_peak_at(through, size, 1.0) if through else 0)


def _caches(request: PlanRequest, choice: Choice) -> bool:
    return cached_prefix(request, choice.lossy) is not None


def _evaluation_batch(request: PlanRequest, choice: Choice, training: int) -> int:
    return largest_batch(
        pass_batch(request.shape),
        training,
        lambda size: max(_evaluation_bytes(request, choice, size), _fitting_bytes(request, choice, size)),
    )


def _cache_batch(request: PlanRequest, choice: Choice, training: int) -> int:
    return largest_batch(pass_batch(request.shape), training, lambda size: _caching_bytes(request, choice, size))


def _measured(variant: Variant) -> Measured:
    if variant.measured is None or not variant.measured.train or not variant.measured.evaluate:
        raise ArtifactsError(
            f"variant {variant.name} was exported without measurements: no cap can be held. Export it again."
        )
    return variant.measured


def _peak_at(points: tuple[MeasuredPeak, ...], batch: int, share: float) -> int:
    """Bytes at a batch and a share of the tokens: straight lines through what was measured, never below the smallest.

    Attention grows with the square of the tokens, so between two shares a line lies above it; below the smallest share
    that was measured, that one counts.
    """
    by_share: dict[float, list[MeasuredPeak]] = {}
    for point in points:
        by_share.setdefault(point.tokens_share, []).append(point)
    shares = sorted(by_share)
    at = {each: _line(by_share[each], batch) for each in shares}
    if share <= shares[0] or len(shares) == 1:
        return round(at[shares[0]] if share <= shares[0] else at[shares[-1]])
    low, high = shares[0], shares[-1]
    part = min(1.0, (share - low) / (high - low))
    return round(at[low] + part * (at[high] - at[low]))


def _line(points: list[MeasuredPeak], batch: int) -> float:
    first, last = min(points, key=lambda each: each.batch), max(points, key=lambda each: each.batch)
    if first.batch == last.batch:
        return float(last.bytes)
    slope = max(0.0, (last.bytes - first.bytes) / (last.batch - first.batch))
    return max(first.bytes, last.bytes + slope * (batch - last.batch))


def _refuse_levers(request: PlanRequest) -> None:
    if request.recompute not in ("auto", "none"):
        raise UsageError(f"--recompute {request.recompute}: ONNX Runtime recomputes nothing. Leave it out.")
    if request.updates_in_backward:
        raise UsageError("--step-in-backward: ONNX Runtime's backward has no place for it. Leave it out.")
    if request.half_frozen:
        raise UsageError("--frozen-weights bfloat16: artifacts hold float32 weights. Leave it out.")


def _no_such_variant(manifest: Manifest, request: PlanRequest) -> str:
    wanted = ", ".join(map(str, request.space.splits[:4]))
    return (
        f"--method {request.space.name} would begin to train at block {wanted}; these artifacts hold {cuts(manifest)}. "
        f"{_ways(manifest, request.shape.depth)}, or export with --split N."
    )


def _ways(manifest: Manifest, depth: int) -> str:
    """The flags under which the variants train."""
    blocks = [str(each.split_block) for each in manifest.variants if not each.embeddings_train]
    flags = (
        [f"--split {' or '.join(block for block in blocks if block != str(depth))}"]
        if set(blocks) - {str(depth)}
        else []
    )
    flags += ["--method head"] if str(depth) in blocks else []
    flags += ["--method full"] if any(each.embeddings_train for each in manifest.variants) else []
    return f"Choose {', '.join(flags)}"


def _finish(
    manifest: Manifest, request: PlanRequest, choice: Choice, phases: dict[str, int], refused: tuple[Choice, int] | None
) -> Plan:
    lossy, depth = choice.lossy, request.shape.depth
    peak = max(phases.values())
    training = _training_bytes(request, choice)
    prefix = cached_prefix(request, lossy)
    lossless = Lossless(choice.micro_batch, (Recompute.NOTHING,) * depth, Recompute.NOTHING, False)
    worst = Selection(tuple(block >= depth - lossy.trained_blocks for block in range(depth)), lossy.token_ceiling)
    # Torch's arithmetic tells the parts from one another; their peak is what was measured.
    setup = msgspec.structs.replace(setup_of(request, lossy, lossless), threads=1)
    step = msgspec.structs.replace(cost.step_cost(request.shape, worst, setup), peak_bytes=training)
    return plan_of(
        request,
        lossy,
        lossless,
        step,
        phases,
        evaluation_batch=_evaluation_batch(request, choice, training),
        cache_batch=_cache_batch(request, choice, training) if prefix is not None else 1,
        memory_binds=refused is not None,
        step_seconds=None,
        explanation=tuple(_explained(request, choice, peak, prefix, refused)),
    )


def _explained(
    request: PlanRequest, choice: Choice, peak: int, prefix: CachedPrefix | None, refused: tuple[Choice, int] | None
) -> Iterator[str]:
    yield (
        f"cap {format_bytes(request.cap_bytes)}; runtime {format_bytes(request.runtime_bytes)}; "
        f"{format_bytes(request.cap_bytes - request.runtime_bytes)} left for training; predicted peak {format_bytes(peak)} "
        "(of what was measured at export)"
    )
    if refused is not None:
        yield f"memory binds: the next larger plan ({_in_words(request, refused[0])}) needs {format_bytes(refused[1])}"
    yield f"chosen: {_in_words(request, choice)}"
    if prefix is not None:
        total = format_bytes(prefix.total_bytes)
        yield f"prefix cached: what lies below block {prefix.blocks} is computed once ({total} on disk)"


def _in_words(request: PlanRequest, choice: Choice) -> str:
    lossy, parts = choice.lossy, accumulation_of(request, choice.micro_batch)
    cut = f" in {parts} micro-batches of {choice.micro_batch}" if parts > 1 else ""
    last = lossy.token_ceiling[-1]
    return (
        f"variant {choice.variant.name}, batch {request.batch_size}{cut}, {lossy.trained_blocks} of the "
        f"{request.shape.depth - lossy.split_block} blocks from {lossy.split_block} up, at most {last} of "
        f"{request.shape.patch_tokens} patch tokens in the last block"
    )
