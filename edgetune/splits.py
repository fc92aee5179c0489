"""A plan from what a look at the task found: where to split, how many tokens to keep there, within the cap."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import msgspec
import numpy as np

from edgetune.allocator import freed_blocks_kept
from edgetune.backends.base import Backend, Images
from edgetune.cost import FLOAT_BYTES, TokenScore, ViTShape, evaluation_peak_bytes, input_bytes
from edgetune.data import balanced_sample, load_batch
from edgetune.errors import DoesNotFit
from edgetune.features import LookedFeatures
from edgetune.job import Listener
from edgetune.look import CANDIDATES, LOOKED_PX, Found, Sample, find
from edgetune.methods import adaptive_obstacle, everything
from edgetune.planner import LEAST_LOOKED_AT, PREFETCHED_BATCHES, Plan, PlanRequest, pass_batch, process_bytes
from edgetune.planner import plan as make_plan
from edgetune.prepare import Setup, scratch_bytes, steps_of, tell_plan
from edgetune.settings import names_budgets
from edgetune.units import format_bytes

MOST_IMAGES = 384
# Of the images that the run sees, such a share is put through the whole model (no fewer than LEAST_TO_END of them): what is
# found costs in proportion to what it saves. What goes through the blocks below the split alone the cache takes over.
TO_END_OF_RUN = 1 / 8
LEAST_TO_END = LEAST_LOOKED_AT
# What the heap comes to where passes keep what they free, in what one of them holds: 3.5 measured (DeiT-Tiny, 4 images, and
# what is loaded meanwhile).
HEAP_OF_PASSES = 4


def look_bytes(shape: ViTShape, batch: int) -> int:
    """What looking holds beside the model and a forward pass of `batch` images."""
    streams = 4 * batch * shape.all_tokens * shape.width * FLOAT_BYTES
    summaries = (len(CANDIDATES) + 4) * MOST_IMAGES * 2 * shape.width * FLOAT_BYTES
    pixels = 2 * MOST_IMAGES * shape.channels * LOOKED_PX**2 * FLOAT_BYTES
    return streams + max(summaries, pixels) + pixels // 2 + 5 * MOST_IMAGES**2 * 8


def decide(setup: Setup, backend: Backend, listener: Listener) -> tuple[Setup, tuple[str, ...]]:
    """The setup with the split, and the tokens that are kept there, that a sample of the training images asks for; and what
    was found, in words.

    What the user named stays; so does what the cap leaves no choice in.
    """
    settings, shape = setup.settings, setup.shape
    size, peak_bytes, holes_bytes = _batch_that_fits(setup.request, setup.plan)
    if not size:
        why = f"split: not looked for, which takes {format_bytes(peak_bytes)}: the lowest that fits"
        listener.note(why)
        tell_plan(setup.plan, listener)
        return setup, (why,)
    sample = _sample(setup, size)
    prunes = settings.split_tokens is None and adaptive_obstacle(shape) is None
    scores: tuple[TokenScore, ...] = ()
    if prunes:
        scores = ("attention", "distance") if settings.token_score is None else (settings.token_score,)

    def kept(split: int) -> LookedFeatures | None:
        if setup.scratch_folder is None or split == 0:
            return None
        return LookedFeatures(
            setup.scratch_folder,
            sample.places,
            blocks=split,
            tokens=shape.all_tokens,
            width=shape.width,
            scores=scores,
            precision=settings.cache_precision,
            limit_bytes=scratch_bytes(setup.scratch_folder) // 2,
        )

    def progress(done: int, total: int) -> None:
        listener.progress("look for the split", done, total)

    with freed_blocks_kept(holes_bytes) if holes_bytes else nullcontext(lambda: None) as turned:
        sample = sample._replace(turned=turned)
        found = find(backend, shape, sample, kept, progress, lowest_split=setup.plan.split_block, scores=scores)
    lines = tuple(f"split: {line}" for line in found.lines)
    for line in lines:
        listener.note(line)
    request, plan = _planned(
        setup.request,
        found,
        prunes=prunes,
        budgets_asked=names_budgets(settings),
    )
    phases = plan.predicted_phase_bytes | {"look": peak_bytes}
    plan = msgspec.structs.replace(
        plan, predicted_phase_bytes=phases, predicted_peak_bytes=max(plan.predicted_peak_bytes, peak_bytes)
    )
    tell_plan(plan, listener)
    looked = found.looked
    if looked is not None and (plan.prefix is None or plan.prefix.blocks != looked.blocks):
        looked.close()  # no cache takes it
    return msgspec.structs.replace(setup, request=request, plan=plan, looked=looked), lines


def _sample(setup: Setup, batch: int) -> Sample:
    """Training images by seed: first those that are put through the whole model, then those that are not."""
    train, seed = setup.data.train, setup.settings.seed
    own = np.asarray(train.labels, np.int64)
    chosen = balanced_sample(train.labels, seed, MOST_IMAGES)
    seen = steps_of(setup.settings, setup.request, len(own)) * setup.request.batch_size
    first = balanced_sample(own[chosen].tolist(), seed, max(LEAST_TO_END, round(TO_END_OF_RUN * seen)))
    places = np.concatenate((chosen[first], np.delete(chosen, first)))

    def load(start: int, stop: int) -> Images:
        return load_batch(
            train,
            places[start:stop],
            setup.preprocess,
            seed=seed,
            epoch=0,
            decode_budget_bytes=setup.decode_budget_bytes,
            pictures=setup.pictures,
        )[0]

    return Sample(places, own[places], len(first), batch, load)


def _planned(
    request: PlanRequest, found: Found, *, prunes: bool, budgets_asked: bool = False
) -> tuple[PlanRequest, Plan]:
    """What was found as a request, and its plan. `budgets_asked`: how tokens are pruned was named."""
    space = request.space
    if not found.fits and space.draws and 0 in space.splits:
        # All tokens, too: blocks that fit badly do not know which ones they can do without.
        floor = request.token_floor if budgets_asked else 1.0
        whole = msgspec.structs.replace(request, space=everything(space, request.shape.depth), token_floor=floor)
        with suppress(DoesNotFit):
            return whole, make_plan(whole)
    splits = tuple(split for split in space.splits if split >= found.split_block)
    request = msgspec.structs.replace(
        request,
        space=msgspec.structs.replace(space, splits=splits or space.splits[-1:]),
        split_tokens=found.split_tokens if prunes else request.split_tokens,
        token_score=found.token_score if prunes else request.token_score,
    )
    return request, make_plan(request)


def _batch_that_fits(request: PlanRequest, before: Plan) -> tuple[int, int, int]:
    """(images at once, the process's predicted peak, bytes that the heap may grow by where what is freed is kept) of a look
    within the cap; `before`: the plan without it. 0 images where none is; 0 bytes where the cap has no room for it, and the
    look takes a third more time.
    """
    shape, peak = request.shape, 0
    for batch in sorted({pass_batch(shape), min(4, pass_batch(shape)), 1}, reverse=True):
        forward = evaluation_peak_bytes(shape, batch, threads=request.threads)
        waiting = (PREFETCHED_BATCHES * input_bytes(shape, batch) if request.overlaps else 0) + request.decode_bytes
        live = shape.parameters * FLOAT_BYTES + forward + waiting + look_bytes(shape, batch)
        peak = process_bytes(request.runtime_bytes, live)
        if peak <= request.cap_bytes:
            # Should none of it go, it stands beside what the run takes; and one turn adds to it before that is seen.
            holes = HEAP_OF_PASSES * forward + request.decode_bytes
            if max(peak, before.predicted_peak_bytes) + 2 * holes <= request.cap_bytes:
                return batch, peak + forward, holes
            return batch, peak, 0
    return 0, peak, 0
