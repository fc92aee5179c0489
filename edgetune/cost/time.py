"""How long a step takes on a device, as an estimate: its FLOPs at the device's peak, its traffic at its bandwidth.

It ranks ways to compute the same step (more micro-batches read the weights more often; recompute computes more), and is
shown to the user as what it is. Real steps reach a share of either peak, much the same share for each way.
"""

from __future__ import annotations

from typing import NamedTuple

from edgetune.cost.flops import step_flops
from edgetune.cost.step import StepSetup, resident_weights_bytes
from edgetune.cost.tape import FLOAT_BYTES, plain_saved_floats
from edgetune.cost.values import BlockState, Recompute, Selection, ViTShape, block_states
from edgetune.cost.weights import optimizer_bytes, trained_parameters

# Where a profile has one of the two figures, the other is taken from this; where it has none, both are only for ranking.
FLOPS_PER_BYTE = 8.0
_RANKING_FLOPS_PER_S = 1e10
# Products of few rows are slow for what they compute: 1 + this / rows times as long. Measured on one x86 core with torch
# 2.14, micro-batches of 1, 2, 4, 8: the bundled model (65 tokens) 1.60, 1.34, 1.10, 1.00; DeiT-Tiny (197) 1.09 at 1.
_ROWS_OVERHEAD = 40.0


def speed_of(peak_flops_per_s: float | None, memory_bandwidth_bytes_per_s: float | None) -> tuple[float, float]:
    """(FLOP/s, bytes/s), with what is missing filled in."""
    if peak_flops_per_s is None:
        bandwidth = memory_bandwidth_bytes_per_s
        peak_flops_per_s = _RANKING_FLOPS_PER_S if bandwidth is None else FLOPS_PER_BYTE * bandwidth
    return peak_flops_per_s, memory_bandwidth_bytes_per_s or peak_flops_per_s / FLOPS_PER_BYTE


class Work(NamedTuple):
    """What a selection gives a device to do, however the batch is cut into micro-batches."""

    flops: int  # of one image
    rows: float  # tokens that a block sees of one image, mean over blocks
    activation_bytes: int  # moved for one image, each written and read
    weight_bytes: int  # read in each micro-batch
    trained_bytes: int  # weights that get a gradient
    state_bytes: int  # the optimizer's, of those


def work_of(shape: ViTShape, selection: Selection, setup: StepSetup) -> Work:
    """Work of one step; of the setup, the optimizer and the cached prefix alone count."""
    block_bytes = shape.block_parameters * FLOAT_BYTES
    cached = setup.cached_blocks
    weights = resident_weights_bytes(shape, 0, cached)
    activations = 0
    for number, state in enumerate(block_states(selection)):
        if number < cached:
            continue
        tokens = selection.tokens[number] + shape.prefix_tokens
        moved = tokens * plain_saved_floats(shape, True) * FLOAT_BYTES
        activations += moved if state is BlockState.BELOW else 2 * moved
        if state is BlockState.BELOW:
            continue
        weights += block_bytes
        level = selection.level(number)
        if level is not Recompute.NOTHING:
            share = 1.0 if level is Recompute.BLOCK else 0.5
            activations += round(share * moved)
            weights += round(share * block_bytes)
    trained = sum(selection.trains)
    return Work(
        flops=step_flops(shape, selection, 1, cached),
        rows=sum(selection.tokens[cached:] or (1,)) / max(1, selection.depth - cached) + shape.prefix_tokens,
        activation_bytes=2 * activations,
        weight_bytes=weights,
        trained_bytes=trained_parameters(shape, trained, selection.embeddings_train) * FLOAT_BYTES,
        state_bytes=optimizer_bytes(shape, setup.optimizer, trained, selection.embeddings_train),
    )


def step_seconds(work: Work, batch: int, setup: StepSetup, speed: tuple[float, float]) -> float:
    """Estimated seconds of a step of `batch` images: computing and moving one after the other, which no device does
    worse than.

    Weights are read once a micro-batch in each pass over them; a gradient is written, or read and written where it is
    added to; activations are written and read once forward and once backward, and again where they are recomputed.
    """
    flops = batch * work.flops * (1 + _ROWS_OVERHEAD / (setup.micro_batch * work.rows))
    gradients = work.trained_bytes * (3 if setup.accumulation > 1 else 1)
    update = 3 * work.trained_bytes + 2 * work.state_bytes
    traffic = setup.accumulation * (work.weight_bytes + gradients + setup.micro_batch * work.activation_bytes) + update
    return flops / speed[0] + traffic / speed[1]
