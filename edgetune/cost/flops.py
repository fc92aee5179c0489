"""FLOPs of one training step. A multiply-add is two; softmax, norms and activations are left out (under a hundredth).

Source: `torch.utils.flop_counter`, which counts the same products; the tests hold the two together within 1 %.
"""

from __future__ import annotations

from edgetune.cost.values import BlockState, Recompute, Selection, ViTShape, all_tokens_kept, block_states


class _Products:
    """FLOPs of one block's products for one image."""

    def __init__(self, shape: ViTShape, patch_tokens: int) -> None:
        tokens = patch_tokens + shape.prefix_tokens
        width, attention, hidden = shape.width, shape.attention_width, shape.mlp_width
        self.qkv = 2 * tokens * width * 3 * attention
        self.fc1 = 2 * tokens * width * hidden * (2 if shape.gated_mlp else 1)
        self.fc2 = 2 * tokens * hidden * width
        self.linears = self.qkv + 2 * tokens * attention * width + self.fc1 + self.fc2
        self.attention = 4 * tokens * tokens * attention


def block_forward_flops(shape: ViTShape, patch_tokens: int) -> int:
    """FLOPs of one block's forward for one image."""
    products = _Products(shape, patch_tokens)
    return products.linears + products.attention


def embed_flops(shape: ViTShape) -> int:
    """FLOPs of the patch embedding of one image."""
    return 2 * shape.patch_tokens * shape.patch_px[0] * shape.patch_px[1] * shape.channels * shape.width


def prefix_flops(shape: ViTShape, blocks: int) -> int:
    """FLOPs of the embeddings and the lowest `blocks` blocks on all tokens, forward, for one image."""
    return embed_flops(shape) + blocks * block_forward_flops(shape, shape.patch_tokens)


def step_flops(shape: ViTShape, selection: Selection, batch: int, cached_blocks: int = 0) -> int:
    """FLOPs of forward and backward over one batch, what is recomputed included, the optimizer's (a thousandth) not.

    What the lowest `cached_blocks` blocks put out is read and not computed.

    Backward costs a linear one product for its input's gradient and one for its weight's; attention five products for
    the two of its forward on the fused path, of which one makes the scores again: that one is not counted.
    """
    total = 0 if cached_blocks else embed_flops(shape) * (2 if selection.embeddings_train else 1)
    for block, state in enumerate(block_states(selection)):
        if block < cached_blocks:
            continue
        products = _Products(shape, selection.tokens[block])
        total += products.linears + products.attention
        if state is BlockState.BELOW:
            continue
        total += products.linears + 2 * products.attention
        if state is BlockState.TRAINED:
            total += products.linears
        level = selection.level(block)
        if level is Recompute.BLOCK:
            # The last product is not needed again, but where its output is what a layer scale keeps.
            total += products.linears + products.attention - (0 if shape.layer_scale else products.fc2)
        elif level is Recompute.MLP:
            total += products.fc1
    return batch * (total + 3 * 2 * shape.width * shape.classes)


def full_fine_tuning_flops(shape: ViTShape, images: int) -> int:
    """What full fine-tuning on all tokens would need for as many images: the yardstick of the report."""
    everything = all_tokens_kept(shape, (True,) * shape.depth, embeddings_train=True)
    return step_flops(shape, everything, images)


def token_share(shape: ViTShape, selection: Selection) -> float:
    """Patch tokens that the blocks see, as a share of all."""
    return sum(selection.tokens) / (shape.depth * shape.patch_tokens)
