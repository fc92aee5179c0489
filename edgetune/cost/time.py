"""How long a step takes on a device, as an estimate: its FLOPs at the device's peak, its traffic at its bandwidth.

It ranks ways to compute the same step (more micro-batches read the weights more often; recompute computes more), and is
shown to the user as what it is. Real steps reach a share of either peak, much the same share for each way.
"""

from __future__ import annotations

from edgetune.cost.blocks import FLOAT_BYTES, plain_saved_floats
from edgetune.cost.step import StepSetup, optimizer_bytes, trained_parameters
from edgetune.cost.values import BlockState, Recompute, Selection, ViTShape, block_states

# Where a profile has one of the two figures, the other is taken from this; where it has none, both are only for ranking.
FLOPS_PER_BYTE = 8.0
_RANKING_FLOPS_PER_S = 1e10
# What starting a block's kernels costs in a micro-batch, in FLOPs of one core: 0.4 ms a block at 30 GFLOP/s (the bundled
# model in micro-batches of 1 and 2 on one x86 core, torch 2.14), an eighth of it again where the block is recomputed.
_START_FLOPS = 12_000_000


def speed_of(peak_flops_per_s: float | None, memory_bandwidth_bytes_per_s: float | None) -> tuple[float, float]:
    """(FLOP/s, bytes/s), with what is missing filled in."""
    if peak_flops_per_s is None:
        bandwidth = memory_bandwidth_bytes_per_s
        peak_flops_per_s = _RANKING_FLOPS_PER_S if bandwidth is None else FLOPS_PER_BYTE * bandwidth
    return peak_flops_per_s, memory_bandwidth_bytes_per_s or peak_flops_per_s / FLOPS_PER_BYTE


def step_traffic_bytes(shape: ViTShape, selection: Selection, setup: StepSetup) -> int:
    """Bytes that one optimizer step moves between memory and cores: weights, gradients, state, activations.

    Weights are read once a micro-batch in each pass over them; a gradient is written, or read and written where it is
    added to; activations are written and read once forward and once backward, and again where they are recomputed.
    """
    block = shape.block_parameters * FLOAT_BYTES
    weights = shape.parameters * FLOAT_BYTES
    activations = 0
    again = 0
    for number, state in enumerate(block_states(selection)):
        tokens = selection.tokens[number] + shape.prefix_tokens
        moved = tokens * plain_saved_floats(shape, True) * FLOAT_BYTES
        level = selection.level(number)
        activations += moved if state is BlockState.BELOW else 2 * moved
        if state is BlockState.BELOW:
            continue
        again += block
        if level is not Recompute.NOTHING:
            share = 1.0 if level is Recompute.BLOCK else 0.5
            activations += round(share * moved)
            again += round(share * block)
    trained = trained_parameters(shape, sum(selection.trains), selection.embeddings_train) * FLOAT_BYTES
    gradients = trained * (3 if setup.accumulation > 1 else 1)
    update = 3 * trained + 2 * optimizer_bytes(
        shape, setup.optimizer, sum(selection.trains), selection.embeddings_train
    )
    a_micro_batch = weights + again + gradients + 2 * setup.micro_batch * activations
    return setup.accumulation * a_micro_batch + update


def start_flops(selection: Selection, setup: StepSetup) -> int:
    """What starting all kernels of a step costs, in FLOPs of one core, times the cores that wait meanwhile."""
    levels = sum(1 for level in selection.recompute if level is not Recompute.NOTHING)
    return setup.threads * setup.accumulation * (selection.depth * _START_FLOPS + levels * _START_FLOPS // 8)


def step_seconds(flops: int, traffic_bytes: int, speed: tuple[float, float]) -> float:
    """Estimated seconds of a step: computing and moving one after the other, which no device does worse than."""
    return flops / speed[0] + traffic_bytes / speed[1]
