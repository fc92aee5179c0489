"""What stands at a step's two ends: from images to tokens, and from the last block to the loss. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from edgetune.cost.probed import Bytes, ProbedPart, amounts, most, part_way, total
from edgetune.cost.tape import FLOAT_BYTES, Mode, Tape
from edgetune.cost.values import ViTShape


class EndWalk(NamedTuple):
    """One end of a step, in bytes: peaks above what is live where forward and backward begin; `kept` and `left` are what
    more is live after the forward, and after both, than before."""

    forward_peak: int
    kept: int
    backward_peak: int
    left: int


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


def embed_walk(shape: ViTShape, batch: int, mode: Mode, *, keeps: bool) -> EndWalk:
    """From images to tokens and back; `keeps`: the embeddings train."""
    if shape.probed_embed is not None:
        way = part_way(keeps=keeps, gradients=mode.gradients_way)
        return _probed(shape.probed_embed, way, amounts(batch, shape.all_tokens, 0, shape.classes, mode.threads))
    forward, backward = Tape(), Tape()
    embed_forward(forward, shape, batch, keeps=keeps)
    if keeps:
        embed_backward(backward, shape, batch, mode)
    return EndWalk(forward.peak, forward.live, backward.peak, forward.live + backward.live)


def head_walk(
    shape: ViTShape, patch_tokens: int, batch: int, mode: Mode, *, inner: bool, held: bool = False
) -> EndWalk:
    """From the last block's output to the loss and back; `inner`: the gradient of that output is needed.

    `held`: that output was read from the cache, and stands to the end of the step.
    """
    if shape.probed_head is not None:
        way = part_way(keeps=True, inner=inner, gradients=mode.gradients_way)
        of = amounts(batch, patch_tokens + shape.prefix_tokens, 0, shape.classes, mode.threads)
        return _probed(shape.probed_head, way, of, held)
    tape = Tape()
    head_forward(tape, shape, patch_tokens, batch)
    forward_peak = kept = tape.live
    head_backward(tape, shape, patch_tokens, batch, mode, inner=inner)
    return EndWalk(forward_peak, kept, tape.peak - kept, tape.live)


def evaluated_head_bytes(shape: ViTShape, batch: int, mode: Mode) -> int:
    """The most that final norm and classifier hold where nothing is kept."""
    if shape.probed_head is not None:
        of = amounts(batch, shape.all_tokens, 0, shape.classes, mode.threads)
        return most(shape.probed_head.walk(part_way(keeps=False), batch).forward, of)
    return batch * (shape.all_tokens * (shape.width + 2) + 2 * shape.classes) * FLOAT_BYTES


def _probed(part: ProbedPart, way: int, of: Bytes, held: bool = False) -> EndWalk:
    walk = part.walk(way, of.image, held=held)
    return EndWalk(most(walk.forward, of), total(walk.kept, of), most(walk.backward, of), total(walk.left, of))
