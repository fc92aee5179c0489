"""What a model is and what one step does, as values. No torch, no numpy."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

import msgspec

from edgetune.cost.probed import ProbedPart


class ViTShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost of a Vision Transformer depends on. Counts are of one model, widths are floats a token."""

    name: str
    depth: int
    width: int
    heads: int
    head_width: int
    mlp_width: int
    patch_tokens: int
    prefix_tokens: int
    classes: int
    image_px: tuple[int, int]
    patch_px: tuple[int, int]
    channels: int = 3
    class_token: bool = True
    token_pool: bool = True  # the head reads the class token
    fused_qkv: bool = True  # attention has one `qkv` projection, from which the class token's row can be had
    layer_scale: bool = False
    qk_norm: bool = False
    pre_norm: bool = False
    gated_mlp: bool = False
    mlp_half: bool = True  # a block's second half is norm2, then mlp: it can be recomputed by itself
    # Parts that are not timm's plain ones, as a run of them showed; None and empty: plain, and walked by arithmetic.
    probed_embed: ProbedPart | None = None
    probed_head: ProbedPart | None = None
    probed_blocks: tuple[ProbedPart, ...] = ()  # one of each kind
    block_kinds: tuple[int, ...] = ()  # of each block, which of them it is
    embed_parameters: int
    block_parameters: int
    head_parameters: int  # final norm, pooling and classifier
    largest_parameter: int  # elements of the largest single tensor

    @property
    def parameters(self) -> int:
        return self.embed_parameters + self.depth * self.block_parameters + self.head_parameters

    @property
    def weight_bytes(self) -> int:
        """Of all parameters and buffers, in float32."""
        buffers = sum(part.buffer_bytes for part in (self.probed_embed, self.probed_head) if part is not None)
        return 4 * self.parameters + buffers

    @property
    def all_tokens(self) -> int:
        return self.patch_tokens + self.prefix_tokens

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_width

    def probed_block(self, block: int) -> ProbedPart | None:
        return self.probed_blocks[self.block_kinds[block]] if self.probed_blocks else None


class Recompute(IntEnum):
    """What the backward of a block makes again instead of keeping it."""

    NOTHING = 0
    MLP = 1  # from the second norm on
    BLOCK = 2  # everything: of the block its input alone is kept


# By what patch tokens are ranked where some are dropped: how much the class token attends to each (ALaST's, arXiv
# 2408.08670), or how far each is from the mean of all.
TokenScore = Literal["attention", "distance"]


class Selection(msgspec.Struct, frozen=True):
    """What one step does: which blocks train, how many patch tokens each sees, what each recomputes.

    The first block sees all tokens, and none sees more than the one before. The head always trains. `recompute` empty:
    nothing is.
    """

    trains: tuple[bool, ...]
    tokens: tuple[int, ...]
    embeddings_train: bool = False
    recompute: tuple[Recompute, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.trains)

    @property
    def lowest_trained_block(self) -> int:
        """The first block that carries gradient; `depth` when only the head trains, 0 when the embeddings do."""
        if self.embeddings_train:
            return 0
        return next((block for block, trained in enumerate(self.trains) if trained), self.depth)

    def level(self, block: int) -> Recompute:
        return self.recompute[block] if self.recompute else Recompute.NOTHING


def all_tokens_kept(shape: ViTShape, trains: tuple[bool, ...], embeddings_train: bool = False) -> Selection:
    """The selection that prunes nothing."""
    return Selection(trains, (shape.patch_tokens,) * shape.depth, embeddings_train)


class BlockState(IntEnum):
    """What autograd keeps of a block in one step."""

    BELOW = 0  # nothing below it trains: it keeps nothing
    ON_PATH = 1  # frozen, but gradient passes through it
    TRAINED = 2


def block_states(selection: Selection) -> tuple[BlockState, ...]:
    lowest = selection.lowest_trained_block
    return tuple(
        BlockState.TRAINED if trained else BlockState.ON_PATH if block >= lowest else BlockState.BELOW
        for block, trained in enumerate(selection.trains)
    )


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one optimizer step, by what holds them, and its FLOPs.

    `peak_bytes` is the peak of live tensor bytes; the parts are what each kind holds at its own largest, so they may
    add up to more than the peak.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int
    inputs_bytes: int
    peak_bytes: int
    flops: int
