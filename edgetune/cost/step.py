"""Bytes of one training step, from arithmetic alone: no torch, no numpy, no model.

What comes in: a `ViTShape` (what the model is), a `Selection` (what this step does), a micro-batch.
What goes out: a `StepCost`, found by walking the step the way autograd does: forward, block by block, adding what each
keeps; backward, from the head down, with what is still held, the gradients made so far and the block's own workspace;
then the optimizer's update. `tests/test_cost_measured.py` and `benchmarks/memory_model.py` hold the result against the
CPU allocator's own events.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import msgspec

from edgetune.cost.blocks import FLOAT_BYTES, BlockWalk, Mode, Tape, block_walk
from edgetune.cost.flops import step_flops
from edgetune.cost.values import BlockState, Recompute, Selection, StepCost, ViTShape, block_states
from edgetune.optim import OptimizerName, scratch_floats, state_floats, transient_floats

# Class-token deltas: the class token before a block, its change, the change squared.
_DELTA_COPIES = 3


def trained_parameters(shape: ViTShape, trained_blocks: int, embeddings_train: bool) -> int:
    """Parameters that get a gradient when `trained_blocks` blocks and the head train."""
    embed = shape.embed_parameters if embeddings_train else 0
    return shape.head_parameters + trained_blocks * shape.block_parameters + embed


def input_bytes(shape: ViTShape, batch: int) -> int:
    """One batch of images as float32."""
    return batch * shape.channels * shape.image_px[0] * shape.image_px[1] * FLOAT_BYTES


def _block_matrices(shape: ViTShape) -> tuple[tuple[int, int], ...]:
    width, attention, hidden = shape.width, shape.attention_width, shape.mlp_width
    return (
        (3 * attention, width),
        (width, attention),
        (hidden * (2 if shape.gated_mlp else 1), width),
        (width, hidden),
    )


def _kernel(shape: ViTShape) -> tuple[int, int, int, int]:
    return (shape.width, shape.channels, *shape.patch_px)


def optimizer_bytes(shape: ViTShape, optimizer: OptimizerName, trained_blocks: int, embeddings_train: bool) -> int:
    """What the optimizer keeps of so many blocks, the head, and the embeddings where they train."""
    return FLOAT_BYTES * _state_floats(shape, optimizer, trained_blocks, embeddings_train)


@lru_cache(maxsize=1024)
def _state_floats(shape: ViTShape, optimizer: OptimizerName, trained_blocks: int, embeddings_train: bool) -> int:
    if optimizer != "adafactor":
        return state_floats(optimizer, (trained_parameters(shape, trained_blocks, embeddings_train),))
    matrices = _block_matrices(shape)
    vectors = max(0, shape.block_parameters - sum(rows * columns for rows, columns in matrices))
    block = vectors + sum(state_floats(optimizer, matrix) for matrix in matrices)
    head = max(0, shape.head_parameters - shape.classes * shape.width)
    total = trained_blocks * block + head + state_floats(optimizer, (shape.classes, shape.width))
    if embeddings_train:
        kernel = _kernel(shape)
        # Position embedding and tokens are factored too; counted whole where they are few, they make no difference.
        positions = (1, shape.all_tokens, shape.width)
        total += state_floats(optimizer, kernel) + state_floats(optimizer, positions) + 8 * shape.width
    return total


def update_scratch_bytes(shape: ViTShape, optimizer: OptimizerName, any_block: bool, embeddings_train: bool) -> int:
    """What one update needs beside parameters, gradients and state: the largest trained parameter's."""
    candidates: list[tuple[int, ...]] = [(shape.classes, shape.width), (shape.width,)]
    if any_block:
        candidates += _block_matrices(shape)
        # A vector takes a second copy of itself under Adafactor, which a matrix of the model always exceeds.
    if embeddings_train:
        candidates += [_kernel(shape), (1, shape.all_tokens, shape.width)]
    return FLOAT_BYTES * max(
        scratch_floats(optimizer, candidate, decayed=True) + transient_floats(optimizer, candidate)
        for candidate in candidates
    )


class StepSetup(msgspec.Struct, frozen=True, kw_only=True):
    """How a step is run, whatever it trains.

    `ever_trained_blocks`: blocks whose optimizer state there is. `half_blocks`: lowest blocks whose weights are stored
    as bfloat16. `may_prune`: count what pruning needs after every block, whether or not tokens are dropped there, so
    that fewer tokens never cost more.
    """

    micro_batch: int
    accumulation: int
    optimizer: OptimizerName
    ever_trained_blocks: int
    updates_in_backward: bool = False
    half_blocks: int = 0
    threads: int = 1
    may_prune: bool = False


class _Walked(NamedTuple):
    peak: int
    weights: int
    state: int
    gradients: int
    activations: int
    workspace: int


def step_cost(shape: ViTShape, selection: Selection, setup: StepSetup) -> StepCost:
    """Cost of one optimizer step of `setup.accumulation` micro-batches.

    Raises: ValueError if the selection's depth is not the shape's, or gradients of several micro-batches can't wait.
    """
    walked = _walk(shape, selection, setup)
    return StepCost(
        weights_bytes=walked.weights,
        gradients_bytes=walked.gradients,
        optimizer_bytes=walked.state,
        activations_bytes=walked.activations,
        workspace_bytes=walked.workspace,
        inputs_bytes=input_bytes(shape, setup.micro_batch),
        peak_bytes=walked.peak,
        flops=setup.accumulation * step_flops(shape, selection, setup.micro_batch),
    )


def step_peak_bytes(shape: ViTShape, selection: Selection, setup: StepSetup) -> int:
    """`step_cost(...).peak_bytes`, for a search that asks it thousands of times."""
    return _walk(shape, selection, setup).peak


def _walk(shape: ViTShape, selection: Selection, setup: StepSetup) -> _Walked:
    if selection.depth != shape.depth or len(selection.tokens) != shape.depth:
        raise ValueError(f"selection of depth {selection.depth} for a model of depth {shape.depth}")
    if setup.updates_in_backward and setup.accumulation > 1:
        raise ValueError("a weight updated inside the backward has no gradient left to add to")
    trained_count = sum(selection.trains)
    embeddings = selection.embeddings_train
    mode = Mode(setup.accumulation > 1, setup.updates_in_backward, setup.threads)
    weights = shape.parameters * FLOAT_BYTES - setup.half_blocks * shape.block_parameters * (FLOAT_BYTES // 2)
    state = optimizer_bytes(shape, setup.optimizer, setup.ever_trained_blocks, embeddings)
    gradients = FLOAT_BYTES * trained_parameters(shape, trained_count, embeddings)
    scratch = update_scratch_bytes(shape, setup.optimizer, trained_count > 0, embeddings)
    resting = weights + state + input_bytes(shape, setup.micro_batch)
    tape = Tape()
    tape.take(resting)
    if mode.accumulates:
        tape.take(gradients)  # of the micro-batches before
    if mode.updates_in_backward:
        tape.take(scratch)
    before = tape.live
    walks = _walk_forward(tape, shape, selection, setup, mode)
    activations = tape.live - before
    _walk_backward(tape, shape, selection, walks, setup.micro_batch, mode)
    peak = tape.peak
    if not mode.updates_in_backward:
        peak = max(peak, resting + gradients + scratch)
    return _Walked(
        peak=peak,
        weights=weights,
        state=state,
        gradients=0 if mode.updates_in_backward else gradients,
        activations=activations,
        workspace=max([scratch, *(walk.backward_peak for walk in walks)]),
    )


def _walk_forward(tape: Tape, shape: ViTShape, selection: Selection, setup: StepSetup, mode: Mode) -> list[BlockWalk]:
    """Embedding, blocks, head and loss. At the end all that the backward needs is live."""
    batch = setup.micro_batch
    embed_forward(tape, shape, batch, keeps=selection.embeddings_train)
    lowest = selection.lowest_trained_block
    states = block_states(selection)
    # A weight stored at half precision is a float32 copy while it is used, one at a time.
    upcast = max(rows * columns for rows, columns in _block_matrices(shape)) * FLOAT_BYTES
    deltas = _DELTA_COPIES * batch * shape.width * FLOAT_BYTES
    walks = []
    for block, state in enumerate(states):
        tokens = selection.tokens[block]
        after = selection.tokens[block + 1] if block + 1 < shape.depth else tokens
        prunes = after < tokens or (setup.may_prune and block + 1 < shape.depth)
        walk = block_walk(
            shape,
            state,
            selection.level(block),
            tokens,
            after if prunes else None,
            batch,
            block == lowest and not selection.embeddings_train,
            mode,
        )
        tape.touch(walk.forward_peak + deltas + (upcast if block < setup.half_blocks else 0))
        tape.take(walk.kept + batch * (after - tokens) * shape.width * FLOAT_BYTES)
        walks.append(walk)
    stream, statistic = _last_stream(shape, selection, batch)
    tape.take(stream + 2 * statistic)  # the final norm
    tape.take(2 * batch * shape.classes * FLOAT_BYTES)  # logits, their log-softmax
    return walks


def _last_stream(shape: ViTShape, selection: Selection, batch: int) -> tuple[int, int]:
    """Bytes of the tokens (B, T, D) that leave the last block, and of one float a token."""
    statistic = batch * (selection.tokens[-1] + shape.prefix_tokens) * FLOAT_BYTES
    return statistic * shape.width, statistic


def _walk_backward(
    tape: Tape, shape: ViTShape, selection: Selection, walks: list[BlockWalk], batch: int, mode: Mode
) -> None:
    """From the loss down to the lowest trained block, or the embeddings."""
    stream, statistic = _last_stream(shape, selection, batch)
    lowest = selection.lowest_trained_block
    logits = batch * shape.classes * FLOAT_BYTES
    tape.touch(2 * logits)
    tape.take(logits)
    head = shape.classes * (shape.width + 1) * FLOAT_BYTES
    pooled = batch * shape.width * FLOAT_BYTES
    tape.take(pooled + head)
    tape.free(logits)
    if not mode.gradients_stay:
        tape.free(head)
    tape.free(stream)  # the final norm's output
    tape.take(stream)  # its gradient
    tape.free(pooled)
    norm = 2 * shape.width * FLOAT_BYTES
    inner = lowest < shape.depth or selection.embeddings_train
    tape.take((stream if inner else 0) + norm)
    tape.touch(mode.threads * norm)
    tape.free(2 * stream + 2 * statistic + (0 if mode.gradients_stay else norm))
    for block in range(shape.depth - 1, lowest - 1, -1):
        walk = walks[block]
        tape.touch(walk.backward_peak)
        tokens = selection.tokens[block]
        after = selection.tokens[block + 1] if block + 1 < shape.depth else tokens
        tape.free(walk.kept + batch * (after - tokens) * shape.width * FLOAT_BYTES - walk.gradients)
    if selection.embeddings_train:
        embed_backward(tape, shape, batch, mode)


def _columns(shape: ViTShape, batch: int) -> int:
    """The images laid out as a matrix of patches, which torch's own convolution (without oneDNN) works on."""
    patch = shape.channels * shape.patch_px[0] * shape.patch_px[1]
    return batch * shape.patch_tokens * patch * FLOAT_BYTES


def embed_forward(tape: Tape, shape: ViTShape, batch: int, *, keeps: bool) -> None:
    """Images to tokens. At the end the tokens are live, and what the backward needs where the embeddings train."""
    patches = batch * shape.patch_tokens * shape.width * FLOAT_BYTES
    statistic = batch * shape.all_tokens * FLOAT_BYTES
    stream = statistic * shape.width
    if shape.stem_largest_floats:
        tape.touch(3 * max(shape.stem_largest_floats * batch * FLOAT_BYTES, stream))
        if keeps:
            tape.take(shape.stem_saved_floats * batch * FLOAT_BYTES)
    else:
        tape.touch(_columns(shape, batch))
        tape.touch(_columns(shape, batch) + patches)
    tape.take(patches)
    tape.take(stream)
    tape.free(patches)
    tape.touch(stream)  # with positions
    if shape.pre_norm:
        tape.take(stream + 2 * statistic)
        if not keeps:
            tape.free(stream + 2 * statistic)


def embed_backward(tape: Tape, shape: ViTShape, batch: int, mode: Mode) -> None:
    """From the tokens' gradient to the embedding's own."""
    kernel = shape.width * shape.channels * shape.patch_px[0] * shape.patch_px[1] * FLOAT_BYTES
    patches = batch * shape.patch_tokens * shape.width * FLOAT_BYTES
    statistic = batch * shape.all_tokens * FLOAT_BYTES
    stream = statistic * shape.width
    norm = 2 * shape.width * FLOAT_BYTES
    if shape.pre_norm:
        tape.take(stream + norm)
        tape.touch(mode.threads * norm)
        tape.free(2 * stream + 2 * statistic + (0 if mode.gradients_stay else norm))
    positions = (shape.embed_parameters * FLOAT_BYTES) - kernel
    tape.take(positions)
    if not mode.gradients_stay:
        tape.free(positions)
    tape.take(patches)  # laid out anew
    if shape.stem_largest_floats:
        tape.touch(3 * shape.stem_largest_floats * batch * FLOAT_BYTES)
    tape.take(kernel)
    tape.touch(_columns(shape, batch))
    tape.free(patches + stream)


def evaluation_peak_bytes(shape: ViTShape, batch: int, *, threads: int = 1, half_blocks: int = 0) -> int:
    """Live bytes of a forward pass on all tokens without gradient, above weights and optimizer state."""
    tape = Tape()
    tape.take(input_bytes(shape, batch))
    embed_forward(tape, shape, batch, keeps=False)
    walk = block_walk(
        shape, BlockState.BELOW, Recompute.NOTHING, shape.patch_tokens, None, batch, False, Mode(threads=threads)
    )
    upcast = max(rows * columns for rows, columns in _block_matrices(shape)) * FLOAT_BYTES
    tape.touch(walk.forward_peak + (upcast if half_blocks else 0))
    tape.touch(batch * (shape.all_tokens * (shape.width + 2) + 2 * shape.classes) * FLOAT_BYTES)
    return tape.peak
