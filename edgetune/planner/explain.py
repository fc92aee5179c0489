"""A plan in words: what was chosen, which limit bound, what a little more memory would allow."""

from __future__ import annotations

from edgetune.cost import Recompute
from edgetune.planner.prefix import cached_prefix, entry_bytes, why_not
from edgetune.planner.tokens import floor_of
from edgetune.planner.values import Lossless, Lossy, PlanRequest, accumulation_of
from edgetune.units import MIB, format_bytes

_WHAT = {Recompute.NOTHING: "nothing", Recompute.MLP: "the MLP half", Recompute.BLOCK: "whole blocks"}


def explain(
    request: PlanRequest,
    lossy: Lossy,
    lossless: Lossless,
    peak_bytes: int,
    *,
    plainer: tuple[int, float] | None,
    faster: float | None,
    refused: tuple[Lossy, Lossless, int] | None,
) -> tuple[str, ...]:
    """`plainer`: (bytes that recompute saves, share of time that it costs). `faster`: what a cached prefix gains."""
    shape, space = request.shape, request.space
    lines = [
        f"cap {format_bytes(request.cap_bytes)}; runtime {format_bytes(request.runtime_bytes)}; "
        f"{format_bytes(request.cap_bytes - request.runtime_bytes)} left for training; "
        f"predicted peak {format_bytes(peak_bytes)}"
    ]
    if refused is None:
        lines.append("memory does not bind: the method runs as it likes best")
    else:
        lines.append(
            f"memory binds: the next larger plan ({describe(request, refused[0], refused[1])}) "
            f"needs {format_bytes(refused[2])}"
        )
    what = describe(request, lossy, lossless)
    if space.prunes_tokens:
        what += f"; a block keeps at least {floor_of(request, lossy.split_block):.0%} of the patch tokens it is given"
    lines.append(f"chosen: {what}")
    if plainer is not None:
        lines.append(
            f"{_recompute(request, lossy, lossless)} (saves {format_bytes(max(0, plainer[0]))}, costs {plainer[1]:.0%} "
            "more time, changes no result)"
        )
    if request.split_tokens is not None and request.split_tokens < 1 and not lossy.split_block:
        lines.append("no token is dropped at the split: nothing is frozen below one")
    if request.token_score != "attention" and lossy.token_ceiling[-1] < shape.patch_tokens:
        lines.append("the patch tokens that go on are those farthest from the mean of all")
    if lossless.updates_in_backward:
        lines.append("each weight is updated inside the backward: no gradient outlives its use")
    if not lossy.keeps_state:
        lines.append("optimizer state of blocks that a step does not train is dropped")
    if request.half_frozen and lossy.split_block:
        lines.append(f"the frozen weights of the {lossy.split_block} blocks below the split are stored as bfloat16")
    if not request.overlaps:
        lines.append("images are loaded between steps, so that decoding one does not stand beside a step")
    lines += _prefix_lines(request, lossy, faster)
    if lossy.trained_blocks and lossy.split_block and not space.draws:
        lines.append(f"the lowest trained block is {lossy.split_block} of {shape.depth}: nothing below it is kept")
    return tuple(lines)


def _prefix_lines(request: PlanRequest, lossy: Lossy, faster: float | None) -> list[str]:
    prefix, reason = cached_prefix(request, lossy), why_not(request, lossy)
    if prefix is None:
        return [f"prefix not cached: {reason}"] if reason else []
    each = entry_bytes(prefix.stored_tokens, prefix.width, prefix.float_bytes) * prefix.views
    what = "the class token" if prefix.pooled else f"{prefix.stored_tokens} tokens"
    in_views = f" in {prefix.views} views" if prefix.views > 1 else ""
    gain = "" if faster is None or faster < 1.05 else f", steps {faster:.1f}x faster once it is there (an estimate)"
    line = f"prefix cached: {what} below block {prefix.blocks}, {format_bytes(each)} an image{in_views}, "
    lines = [line + f"{format_bytes(prefix.total_bytes)} in all written to disk{gain}"]
    if not prefix.whole:
        assert request.cache is not None
        limit = format_bytes(request.cache.limit_bytes or 0)
        lines.append(
            f"only {limit} of it may be kept: the rest is computed anew each time, and the prefix stays in memory"
        )
    return lines


def describe(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> str:
    depth, space = request.shape.depth, request.space
    parts = accumulation_of(request, lossless.micro_batch)
    batch = f"batch {request.batch_size}" + (
        f" in {parts} micro-batches of {lossless.micro_batch}" if parts > 1 else " at once"
    )
    if lossy.trained_blocks == 0:
        blocks = "head only"
    elif space.draws:
        blocks = f"{lossy.trained_blocks} of the {depth - lossy.split_block} blocks from {lossy.split_block} up"
    else:
        blocks = f"the last {lossy.trained_blocks} of {depth} blocks"
    if len(space.embeddings) > 1 and not lossy.embeddings_train:
        blocks += ", embeddings frozen"
    elif lossy.embeddings_train and space.draws:
        blocks += " and the embeddings"
    tokens = ""
    if space.prunes_tokens:
        tokens = f", at most {lossy.token_ceiling[-1]} of {request.shape.patch_tokens} patch tokens in the last block"
    elif lossy.token_ceiling[-1] < request.shape.patch_tokens:
        tokens = f", {lossy.token_ceiling[-1]} of {request.shape.patch_tokens} patch tokens from the split on"
    recompute = _recompute(request, lossy, lossless)
    return f"{batch}, {blocks}{tokens}{', ' if recompute else ''}{recompute}"


def _recompute(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> str:
    """`recompute whole blocks below 6, the MLP half from it on; frozen blocks whole`."""
    levels = lossless.recompute
    depth = request.shape.depth
    first = min(lossy.split_block, depth - 1)
    low, high = levels[first], levels[-1]
    words = []
    if low is not high:
        boundary = levels.index(high)
        words.append(f"{_WHAT[low]} below {boundary}")
        if high is not Recompute.NOTHING:
            words.append(f"{_WHAT[high]} from it on")
    elif low is not Recompute.NOTHING:
        words.append(f"{_WHAT[low]}" + (" everywhere" if low is Recompute.MLP else ""))
    if lossless.recompute_frozen is Recompute.BLOCK and high is not Recompute.BLOCK:
        words.append("frozen blocks whole")
    return "recompute " + ", ".join(words) if words else ""


def does_not_fit_message(request: PlanRequest, smallest_cap_bytes: int, tries: list[str]) -> str:
    shape = request.shape
    return (
        f"{shape.name} with method {request.space.name}, batch {request.batch_size} and "
        f"{request.optimizer} needs at least {format_cap(smallest_cap_bytes)}; the cap is "
        f"{format_cap(request.cap_bytes)} (of which the runtime takes {format_bytes(request.runtime_bytes)}). "
        "Try " + " or ".join(tries) + "."
    )


def format_cap(size: int) -> str:
    """Bytes as a `--ram-cap` value that is not below them: `612.4MiB`, rounded up to a tenth."""
    tenths = -(-size * 10 // MIB)
    return f"{tenths / 10:.1f}MiB"
