"""Bytes of weights, gradients and optimizer state, and what an update needs beside them. Pure arithmetic."""

from __future__ import annotations

from functools import lru_cache
from math import prod

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
    block = sum(state_floats(optimizer, tensor) for tensor in _block_tensors(shape))
    head = sum(state_floats(optimizer, tensor) for tensor in _head_tensors(shape))
    total = trained_blocks * block + head
    if embeddings_train:
        total += sum(state_floats(optimizer, tensor) for tensor in _embed_tensors(shape))
    return total


def _block_tensors(shape: ViTShape) -> list[tuple[int, ...]]:
    if shape.probed_blocks:
        return list(max((part.parameters for part in shape.probed_blocks), key=lambda found: sum(map(prod, found))))
    matrices = block_matrices(shape)
    vectors = max(0, shape.block_parameters - sum(rows * columns for rows, columns in matrices))
    return [*matrices, (vectors,)]


def _head_tensors(shape: ViTShape) -> list[tuple[int, ...]]:
    classifier = (shape.classes, shape.width)
    others = [] if shape.probed_head is None else list(shape.probed_head.parameters)
    rest = max(0, shape.head_parameters - prod(classifier) - sum(map(prod, others)))
    return [classifier, *others, (rest,)]


def _embed_tensors(shape: ViTShape) -> list[tuple[int, ...]]:
    if shape.probed_embed is not None:
        return list(shape.probed_embed.parameters)
    # Position embedding and tokens are factored too; counted whole where they are few, they make no difference.
    return [_kernel(shape), (1, shape.all_tokens, shape.width), (8 * shape.width,)]


def update_scratch_bytes(shape: ViTShape, optimizer: OptimizerName, any_block: bool, embeddings_train: bool) -> int:
    """What one update needs beside parameters, gradients and state: the largest trained parameter's."""
    candidates: list[tuple[int, ...]] = [(shape.classes, shape.width), (shape.width,)]
    if shape.probed_head is not None:
        candidates += shape.probed_head.parameters
    # A vector takes a second copy of itself under Adafactor, which a matrix of the model always exceeds.
    if any_block:
        candidates += block_matrices(shape) if not shape.probed_blocks else _block_tensors(shape)
    if embeddings_train:
        candidates += _embed_tensors(shape)
    # A step reserves the largest scratch; any parameter's update may then take more beside it for an instant.
    scratch = max(scratch_floats(optimizer, candidate, decayed=True) for candidate in candidates)
    return FLOAT_BYTES * (scratch + max(transient_floats(optimizer, candidate) for candidate in candidates))
