"""Shapes of models for tests of what needs no model: `deit_tiny`, and one with any numbers."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec

from edgetune.cost import BlockState, Recompute, ViTShape
from edgetune.cost.probed import Bytes, ProbedPart, ProbedWalk, block_way


def make_shape(
    *,
    depth: int = 12,
    width: int = 192,
    heads: int = 3,
    mlp_ratio: int = 4,
    grid: int = 14,
    patch_px: int = 16,
    prefix_tokens: int = 1,
    classes: int = 10,
    name: str = "vit",
    layer_scale: bool = False,
    qk_norm: bool = False,
    pre_norm: bool = False,
    gated_mlp: bool = False,
    **others: Any,
) -> ViTShape:
    """A ViT's shape, its parameters counted as timm has them."""
    hidden = mlp_ratio * width
    fc1 = (width + 1) * hidden * (2 if gated_mlp else 1)
    block = 2 * 2 * width + 4 * width * (width + 1) + fc1 + (hidden + 1) * width
    block += (2 * width if layer_scale else 0) + (4 * (width // heads) if qk_norm else 0)
    patch = 3 * patch_px**2 * width
    embed = patch + width + (grid**2 + prefix_tokens) * width + prefix_tokens * width + (2 * width if pre_norm else 0)
    return ViTShape(
        name=name,
        depth=depth,
        width=width,
        heads=heads,
        head_width=width // heads,
        mlp_width=hidden,
        patch_tokens=grid**2,
        prefix_tokens=prefix_tokens,
        classes=classes,
        image_px=(grid * patch_px, grid * patch_px),
        patch_px=(patch_px, patch_px),
        embed_parameters=embed,
        block_parameters=block,
        head_parameters=2 * width + (width + 1) * classes,
        largest_parameter=max(
            patch, hidden * width * (2 if gated_mlp else 1), 3 * width * width, (grid**2 + prefix_tokens) * width
        ),
        layer_scale=layer_scale,
        qk_norm=qk_norm,
        pre_norm=pre_norm,
        gated_mlp=gated_mlp,
        **others,
    )


def probed_block(width: int, hidden_floats: int, parameters: int) -> ProbedPart:
    """A block as a probe might find it: it keeps so many floats a token beyond its input, and twice that stands out."""
    stream, hidden = 4 * width, 4 * hidden_floats
    ways = {}
    for state, level, pruned, lowest, gradients, half in product(
        BlockState, Recompute, (False, True), (False, True), range(3), (False, True)
    ):
        trained = state is BlockState.TRAINED
        held = {Recompute.NOTHING: hidden, Recompute.MLP: hidden // 2, Recompute.BLOCK: 0}[level]
        kept = 0 if state is BlockState.BELOW else stream + held * (2 if trained else 1)
        index = 8 if pruned else 0
        gradient = 4 * parameters if trained else 0
        ways[block_way(state, level, pruned=pruned, lowest=lowest, gradients=gradients, half=half)] = ProbedWalk(
            (Bytes(token=2 * hidden + stream, leaving=2 * index), Bytes(token=kept, leaving=stream)),
            Bytes(token=kept, leaving=index if kept else 0),
            (Bytes(once=gradient, token=hidden), Bytes(once=gradient // 2, token=2 * hidden, scores=4)) if kept else (),
            Bytes(once=0 if gradients else gradient),
        )
    return ProbedPart(tuple(sorted(ways.items())), ((parameters // width, width),))


def settled(shape: ViTShape) -> ViTShape:
    """A shape without what differs from probe to probe: in which order autograd makes the gradients of a head's layers."""
    if shape.probed_head is None:
        return shape
    replace = msgspec.structs.replace
    ways = tuple((way, replace(walk, backward=(), left=Bytes())) for way, walk in shape.probed_head.ways)
    return replace(shape, probed_head=replace(shape.probed_head, ways=ways))


DEIT_TINY = make_shape(name="deit_tiny_patch16_224", classes=1000)
