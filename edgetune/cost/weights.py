"""Bytes of weights, gradients and optimizer state, and what an update needs beside them. Pure arithmetic."""

from __future__ import annotations

from functools import lru_cache

from edgetune.cost.tape import FLOAT_BYTES
from edgetune.cost.values import ViTShape
from edgetune.optim import OptimizerName, scratch_floats, state_floats, transient_floats


def trained_parameters(shape: ViTShape, trained_blocks: int, embeddings_train: bool) -> int:
    """Parameters that get a gradient when `trained_blocks` blocks and the head train."""
    embed = shape.embed_parameters if embeddings_train else 0
    return shape.head_parameters + trained_blocks * shape.block_parameters + embed


def block_matrices(shape: ViTShape) -> tuple[tuple[int, int], ...]:
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
    matrices = block_matrices(shape)
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
        candidates += block_matrices(shape)
        # A vector takes a second copy of itself under Adafactor, which a matrix of the model always exceeds.
    if embeddings_train:
        candidates += [_kernel(shape), (1, shape.all_tokens, shape.width)]
    return FLOAT_BYTES * max(
        scratch_floats(optimizer, candidate, decayed=True) + transient_floats(optimizer, candidate)
        for candidate in candidates
    )
