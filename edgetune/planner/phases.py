"""What the whole process holds at most in each phase of a run: live tensors, and what data and the allocator add."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

from edgetune import cost
from edgetune.cost import FLOAT_BYTES, ViTShape
from edgetune.planner.prefix import cached_prefix
from edgetune.planner.setups import setup_of
from edgetune.planner.values import (
    ALLOCATOR_SHARE,
    HOLES_BYTES,
    JUDGED_IMAGES,
    LIMIT_BYTES,
    PASS_TOKENS,
    PREFETCHED_BATCHES,
    PROCESS_BYTES,
    TOKEN_HOLES_BYTES,
    CachedPrefix,
    Lossless,
    Lossy,
    Plan,
    PlanRequest,
)
from edgetune.units import MIB

# What reading the cache takes beside the batch, and writing it: the buffers of `features`.
READ_BYTES = MIB
WRITE_BYTES = 10 * MIB
DOUBLE_BYTES = 8


def process_bytes(runtime_bytes: int, live_bytes: int, kept_free_bytes: int = HOLES_BYTES) -> int:
    """Peak of the process for a peak of live bytes above the runtime. `kept_free_bytes`: see the function of that name."""
    return runtime_bytes + PROCESS_BYTES + kept_free_bytes + round(live_bytes * (1 + ALLOCATOR_SHARE))


def needed_bytes(request: PlanRequest, lossy: Lossy, live_bytes: int) -> int:
    """`process_bytes` of a run of this choice."""
    return process_bytes(request.runtime_bytes, live_bytes, kept_free_bytes(request, lossy))


def kept_free_bytes(request: PlanRequest, lossy: Lossy) -> int:
    """What of the cap no live byte may take, beside PROCESS_BYTES and a share: for holes in the heap, and for code."""
    depth, space = request.shape.depth, request.space
    ever_train = depth - lossy.split_block if space.draws and lossy.trained_blocks else lossy.trained_blocks
    changing = TOKEN_HOLES_BYTES if space.prunes_tokens else 0
    return HOLES_BYTES * ever_train // depth + changing + (LIMIT_BYTES if request.by_limit else 0)


def most_live_bytes(request: PlanRequest, lossy: Lossy) -> int:
    """The largest peak of live bytes that `needed_bytes` keeps under the cap; -1 if there is none."""
    return _most_live_bytes(request.cap_bytes - request.runtime_bytes, kept_free_bytes(request, lossy))


@lru_cache(maxsize=1024)
def _most_live_bytes(room: int, kept_free: int) -> int:
    return bisect_right(range(max(0, room)), room, key=lambda live: process_bytes(0, live, kept_free)) - 1


def training_live_bytes(request: PlanRequest, lossy: Lossy, batch: int, step_bytes: int, resting_bytes: int) -> int:
    """Live bytes while the run trains: of a step and what waits beside it, or of loading where that is between steps.

    `resting_bytes`: of the step, what is there before its first micro-batch, the micro-batch itself included.
    """
    live = step_bytes + prefetched_bytes(request, lossy, batch)
    prefix = cached_prefix(request, lossy)
    whole = prefix is not None and prefix.whole
    if request.overlaps and not whole:
        return live
    # The micro-batch before is still there.
    loading = cost.input_bytes(request.shape, batch) + request.decode_bytes
    if whole:
        loading = _cached_bytes(prefix, batch) + READ_BYTES
    return max(live, resting_bytes + loading)


def prefetched_bytes(request: PlanRequest, lossy: Lossy, batch: int) -> int:
    """What waits beside a step: micro-batches of images with the decoding of one more; of a whole cache the buffer alone,
    since a micro-batch is read in no time.
    """
    prefix = cached_prefix(request, lossy)
    if prefix is not None and prefix.whole:
        return READ_BYTES
    features = _cached_bytes(prefix, batch)
    if not request.overlaps:
        return features
    return PREFETCHED_BATCHES * (cost.input_bytes(request.shape, batch) + features) + request.decode_bytes


def _cached_bytes(prefix: CachedPrefix | None, batch: int) -> int:
    """A micro-batch of what the cache holds, as it is trained on."""
    return 0 if prefix is None else batch * prefix.stored_tokens * prefix.width * FLOAT_BYTES


def resting_bytes(request: PlanRequest, lossy: Lossy) -> tuple[int, int]:
    """(weights as they are stored while the run trains, optimizer state of all that may train), bytes."""
    shape = request.shape
    setup = setup_of(request, lossy, _ANY)
    weights = cost.resident_weights_bytes(shape, setup.half_blocks, setup.cached_blocks)
    state = cost.optimizer_bytes(shape, request.optimizer, setup.ever_trained_blocks, lossy.embeddings_train)
    return weights, state


_ANY = Lossless(1, (), cost.Recompute.NOTHING, False)


def _loaded_bytes(request: PlanRequest, lossy: Lossy) -> int:
    """The weights of the whole model, as they are stored."""
    half = min(lossy.split_block, request.shape.depth) if request.half_frozen else 0
    return cost.resident_weights_bytes(request.shape, half, 0)


def evaluation_live_bytes(request: PlanRequest, lossy: Lossy, batch: int) -> int:
    shape, prefix = request.shape, cached_prefix(request, lossy)
    weights, state = resting_bytes(request, lossy)
    if prefix is not None and prefix.whole:
        read = PREFETCHED_BATCHES * batch * shape.all_tokens * shape.width * FLOAT_BYTES + READ_BYTES
        return weights + state + read + cost.evaluation_peak_bytes(shape, batch, threads=request.threads, cached=True)
    return weights + state + _forward_bytes(request, lossy, batch)


def head_live_bytes(request: PlanRequest, lossy: Lossy, batch: int) -> int:
    """While the classifier is fitted: an evaluation beside the fit's sums, or solving for it; 0 where it is not."""
    if not request.fits_head:
        return 0
    return evaluation_live_bytes(request, lossy, batch) + fit_bytes(request.shape.width, request.shape.classes, batch)


def fit_bytes(width: int, classes: int, batch: int) -> int:
    """What `probes.RidgeClassifier` holds at most: its sums and the images it judges by, and what one more batch, or
    solving, takes.
    """
    sums = (width + classes) * (width + 1) * DOUBLE_BYTES
    judged = (JUDGED_IMAGES + batch) * width * FLOAT_BYTES
    images = JUDGED_IMAGES + batch
    solving = 4 * width * width + images * (3 * width + 5 * classes) + 4 * width * classes
    adding = width * width + batch * (width + classes)
    return sums + judged + DOUBLE_BYTES * max(solving, adding)


def _evaluated_bytes(request: PlanRequest, lossy: Lossy, batch: int) -> int:
    return max(evaluation_live_bytes(request, lossy, batch), head_live_bytes(request, lossy, batch))


def _forward_bytes(request: PlanRequest, lossy: Lossy, batch: int) -> int:
    """A forward pass from images, without gradient, and the images that wait."""
    half = lossy.split_block if request.half_frozen else 0
    forward = cost.evaluation_peak_bytes(request.shape, batch, threads=request.threads, half_blocks=half)
    inputs = cost.input_bytes(request.shape, batch)
    if not request.overlaps:
        return max(forward, 2 * inputs + request.decode_bytes)
    return forward + PREFETCHED_BATCHES * inputs + request.decode_bytes


def caching_live_bytes(request: PlanRequest, lossy: Lossy, batch: int) -> int:
    """While the cache is made: the whole model, no optimizer state yet, and what waits to be written."""
    prefix = cached_prefix(request, lossy)
    if prefix is None or (request.cache is not None and request.cache.blocks is not None):
        return 0  # there is none, or it is there
    out = 2 * batch * request.shape.all_tokens * prefix.width * FLOAT_BYTES
    return _loaded_bytes(request, lossy) + _forward_bytes(request, lossy, batch) + out + WRITE_BYTES


def pass_batch(shape: ViTShape) -> int:
    """Images that go through the model at once without gradient, at most: a power of two."""
    return 1 << (max(1, PASS_TOKENS // shape.all_tokens).bit_length() - 1)


def largest_batch(most: int, most_live_bytes: int, live_bytes: Callable[[int], int]) -> int:
    """The largest power of two up to `most` that stays under what training needs anyway."""
    batch = most
    while batch > 1 and live_bytes(batch) > most_live_bytes:
        batch //= 2
    return batch


def evaluation_batch(request: PlanRequest, lossy: Lossy, training_live_bytes: int) -> int:
    """Images that are evaluated at once: no more than stay under what training needs anyway."""
    most = pass_batch(request.shape)
    return largest_batch(most, training_live_bytes, lambda batch: _evaluated_bytes(request, lossy, batch))


def cache_batch(request: PlanRequest, lossy: Lossy, training_live_bytes: int) -> int:
    """Images that go through the prefix at once while the cache is made."""
    # What loading takes anyway is no more than what is there.
    most = max(training_live_bytes, *other_live_bytes(request, lossy).values())
    return largest_batch(pass_batch(request.shape), most, lambda batch: caching_live_bytes(request, lossy, batch))


def other_live_bytes(request: PlanRequest, lossy: Lossy) -> dict[str, int]:
    """Live bytes of the phases that are not training, evaluation or caching."""
    shape = request.shape
    weights, state = resting_bytes(request, lossy)
    loaded = _loaded_bytes(request, lossy)
    whole, largest = shape.weight_bytes, shape.largest_parameter * FLOAT_BYTES
    read_to_be_written = loaded > weights or request.half_frozen
    return {
        "data": request.decode_bytes,
        # Weights are read tensor by tensor into their place, so the largest exists twice, and once more where a stored
        # one is converted; what is saved is written from where it lies.
        "load": round(request.load_copies * whole) + largest,
        "save": weights + state + (largest if read_to_be_written else 0),
        # The optimizer's state is read when the prefix has left.
        "resume": max(loaded, weights + state) + 2 * largest,
    }


def least_other_live_bytes(request: PlanRequest, lossy: Lossy) -> int:
    """What a run needs whatever its training step is made of."""
    caching = caching_live_bytes(request, lossy, 1)
    return max(*other_live_bytes(request, lossy).values(), _evaluated_bytes(request, lossy, 1), caching)


def phases(request: PlanRequest, lossy: Lossy, training_live_bytes: int) -> dict[str, int]:
    """Predicted peak of the process in each phase. `training_live_bytes`: what waits to be trained on included."""
    batch = evaluation_batch(request, lossy, training_live_bytes)
    live = other_live_bytes(request, lossy)
    live |= {"train": training_live_bytes, "evaluate": evaluation_live_bytes(request, lossy, batch)}
    if request.fits_head:
        live["head"] = head_live_bytes(request, lossy, batch)
    if caching_live_bytes(request, lossy, 1):
        live["cache"] = caching_live_bytes(request, lossy, cache_batch(request, lossy, training_live_bytes))
    return {phase: needed_bytes(request, lossy, size) for phase, size in live.items()}


def parts_of(plan: Plan) -> dict[str, int]:
    """What each kind holds at its own largest while it trains, bytes. They are not all at their largest at once: the
    peak is less.
    """
    step = plan.predicted
    grown = plan.predicted_phase_bytes["train"] - plan.runtime_bytes
    live = _most_live_bytes(grown, plan.kept_free_bytes)
    return {
        "runtime": plan.runtime_bytes,
        "weights": step.weights_bytes,
        "gradients": step.gradients_bytes,
        "optimizer": step.optimizer_bytes,
        "activations": step.activations_bytes,
        "workspace": step.workspace_bytes,
        "inputs": step.inputs_bytes + live - step.peak_bytes,  # what waits to be trained on, and its decoding
        "margin": grown - live,
    }
