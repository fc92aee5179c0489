"""What the whole process holds at most in each phase of a run: live tensors, and what data and the allocator add."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

from edgetune import cost
from edgetune.cost import FLOAT_BYTES
from edgetune.planner.values import (
    ALLOCATOR_SHARE,
    MAX_EVALUATION_BATCH,
    PREFETCHED_BATCHES,
    PROCESS_BYTES,
    Lossless,
    Lossy,
    Plan,
    PlanRequest,
    setup_of,
)


def process_bytes(runtime_bytes: int, live_bytes: int) -> int:
    """Peak of the process for a peak of live bytes above the runtime."""
    return runtime_bytes + PROCESS_BYTES + round(live_bytes * (1 + ALLOCATOR_SHARE))


def most_live_bytes(request: PlanRequest) -> int:
    """The largest peak of live bytes that `process_bytes` keeps under the cap; -1 if there is none."""
    return _most_live_bytes(request.cap_bytes - request.runtime_bytes)


@lru_cache(maxsize=64)
def _most_live_bytes(room: int) -> int:
    return bisect_right(range(max(0, room)), room, key=lambda live: process_bytes(0, live)) - 1


def prefetched_bytes(request: PlanRequest, batch: int) -> int:
    return PREFETCHED_BATCHES * cost.input_bytes(request.shape, batch) + request.decode_bytes


def resting_bytes(request: PlanRequest, lossy: Lossy) -> tuple[int, int]:
    """(weights as they are stored, optimizer state of all that may train), bytes."""
    shape = request.shape
    setup = setup_of(request, lossy, _ANY)
    weights = shape.parameters * FLOAT_BYTES - setup.half_blocks * shape.block_parameters * (FLOAT_BYTES // 2)
    state = cost.optimizer_bytes(shape, request.optimizer, setup.ever_trained_blocks, lossy.embeddings_train)
    return weights, state


_ANY = Lossless(1, (), cost.Recompute.NOTHING, False)


def evaluation_live_bytes(request: PlanRequest, lossy: Lossy, batch: int) -> int:
    weights, state = resting_bytes(request, lossy)
    shape = request.shape
    half = lossy.split_block if request.half_frozen else 0
    forward = cost.evaluation_peak_bytes(shape, batch, threads=request.threads, half_blocks=half)
    return weights + state + forward + prefetched_bytes(request, batch)


def evaluation_batch(request: PlanRequest, lossy: Lossy, training_live_bytes: int) -> int:
    """The largest power of two whose evaluation stays under what training needs anyway."""
    batch = MAX_EVALUATION_BATCH
    while batch > 1 and evaluation_live_bytes(request, lossy, batch) > training_live_bytes:
        batch //= 2
    return batch


def other_live_bytes(request: PlanRequest, lossy: Lossy) -> dict[str, int]:
    """Live bytes of the phases that are not training or evaluation."""
    shape = request.shape
    weights, state = resting_bytes(request, lossy)
    whole = shape.parameters * FLOAT_BYTES
    return {
        # Weights are read tensor by tensor into their place, so the largest exists twice.
        "load": round(request.load_copies * whole) + shape.largest_parameter * FLOAT_BYTES,
        "save": weights + state + shape.largest_parameter * FLOAT_BYTES,
    }


def least_other_live_bytes(request: PlanRequest, lossy: Lossy) -> int:
    """What a run needs whatever its training step is made of."""
    return max(*other_live_bytes(request, lossy).values(), evaluation_live_bytes(request, lossy, 1))


def phases(request: PlanRequest, lossy: Lossy, training_live_bytes: int) -> dict[str, int]:
    """Predicted peak of the process in each phase. `training_live_bytes`: what waits to be trained on included."""
    batch = evaluation_batch(request, lossy, training_live_bytes)
    live = other_live_bytes(request, lossy)
    live = {
        "load": live["load"],
        "train": training_live_bytes,
        "evaluate": evaluation_live_bytes(request, lossy, batch),
        "save": live["save"],
    }
    return {phase: process_bytes(request.runtime_bytes, size) for phase, size in live.items()}


def parts_of(plan: Plan) -> dict[str, int]:
    """What each kind holds at its own largest while it trains, bytes. They are not all at their largest at once: the
    peak is less.
    """
    step = plan.predicted
    grown = plan.predicted_phase_bytes["train"] - plan.runtime_bytes
    live = _most_live_bytes(grown)
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
