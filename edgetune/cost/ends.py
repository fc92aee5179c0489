"""What stands at a step's two ends: from images to tokens, and from the last block to the loss. Pure arithmetic."""

from __future__ import annotations

from edgetune.cost.tape import FLOAT_BYTES, Mode, Tape
from edgetune.cost.values import ViTShape


def input_bytes(shape: ViTShape, batch: int) -> int:
    """One batch of images as float32."""
    return batch * shape.channels * shape.image_px[0] * shape.image_px[1] * FLOAT_BYTES


def _columns(shape: ViTShape, batch: int) -> int:
    """The images laid out as a matrix of patches, which torch's own convolution (without oneDNN) works on."""
    patch = shape.channels * shape.patch_px[0] * shape.patch_px[1]
    return batch * shape.patch_tokens * patch * FLOAT_BYTES


def _norm_backward(tape: Tape, shape: ViTShape, statistic: int, mode: Mode, *, inner: bool) -> None:
    """A norm outside of the blocks, of tokens with `statistic` bytes for one float each: what it kept goes."""
    stream = statistic * shape.width
    norm = 2 * shape.width * FLOAT_BYTES
    tape.take((stream if inner else 0) + norm)
    tape.touch(mode.threads * norm)
    tape.free(2 * stream + 2 * statistic + (0 if mode.gradients_stay else norm))


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
    if shape.pre_norm:
        _norm_backward(tape, shape, statistic, mode, inner=True)
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


def head_forward(tape: Tape, shape: ViTShape, patch_tokens: int, batch: int) -> None:
    """Final norm, classifier and loss. At the end what their backward needs is live."""
    statistic = batch * (patch_tokens + shape.prefix_tokens) * FLOAT_BYTES
    tape.take(statistic * shape.width + 2 * statistic)  # the final norm
    tape.take(2 * batch * shape.classes * FLOAT_BYTES)  # logits, their log-softmax


def head_backward(tape: Tape, shape: ViTShape, patch_tokens: int, batch: int, mode: Mode, *, inner: bool) -> None:
    """From the loss to the last block's output; `inner`: its gradient is needed."""
    statistic = batch * (patch_tokens + shape.prefix_tokens) * FLOAT_BYTES
    stream = statistic * shape.width
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
    _norm_backward(tape, shape, statistic, mode, inner=inner)
