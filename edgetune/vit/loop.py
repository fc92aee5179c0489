"""One explicit loop over a ViT's own blocks, ours or timm's, in which freezing and token pruning are plain statements.

No forward is copied and nothing of the model is changed: with all tokens kept, outputs and gradients equal plain timm's
to the last bit (tests hold ten families to it). What overrides the parts this loop stands on is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgetune.cost import Recompute, Selection, TokenScore
from edgetune.errors import UnsupportedModel
from edgetune.regions import region_of, trains
from edgetune.vit.plain import AnyViT
from edgetune.vit.recompute import run_recomputed
from edgetune.vit.stock import is_vision_transformer, plain_forward


def check_supported(model: Any, name: str) -> AnyViT:
    """The model, as what the loop knows: ours, or one of timm's that has all that ours has.

    Raises: UnsupportedModel if it is another architecture, or one that runs its blocks in a way of its own.
    """
    if not is_vision_transformer(model):
        raise UnsupportedModel(
            f"{name} is a {type(model).__name__}; edgetune trains timm's VisionTransformer family "
            "(vit_*, deit_*, deit3_*, *_dinov2, *_clip_* and the like). Try --model deit_tiny_patch16_224."
        )
    if not plain_forward(model):
        raise UnsupportedModel(
            f"{name} ({type(model).__name__}) runs its blocks in a way of its own, for which edgetune has no adapter. "
            "Try a plain vit_* or deit_* model."
        )
    if not len(model.blocks):
        raise UnsupportedModel(f"{name} has no blocks to train.")
    if any(type(module).__name__ == "DiffAttention" for module in model.modules()):
        raise UnsupportedModel(
            f"{name} uses differential attention, which keeps whole attention matrices: edgetune can't foresee its memory. "
            "Try a plain vit_* model."
        )
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise UnsupportedModel(f"{name} takes images of {channels} channels; edgetune feeds RGB.")
    return model


def apply_selection(model: AnyViT, selection: Selection) -> None:
    """Make exactly the selected regions trainable and in training mode; every other keeps no gradient and is in eval mode.

    BatchNorm (hybrid stems) stays in eval mode even where it trains: its statistics are those of pretraining.
    """
    for name, parameter in model.named_parameters():
        trained = trains(region_of(name), selection)
        parameter.requires_grad_(trained)
        if not trained:
            parameter.grad = None
    model.training = True
    for name, module in model.named_children():
        if name == "blocks":
            module.training = True
            for block, trained in zip(module, selection.trains, strict=True):
                block.train(trained)
        else:
            module.train(trains(region_of(name), selection))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def embed(model: AnyViT, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> tokens (B, P + N, D): prefix tokens first."""
    tokens = model._pos_embed(model.patch_embed(images))
    embedded: Tensor = model.norm_pre(model.patch_drop(tokens))
    return embedded


def prefix(
    model: AnyViT, images: Tensor, patch_tokens: Sequence[int], *, pooled: bool, score: TokenScore = "attention"
) -> Tensor:
    """Images (B, 3, H, W) -> what the lowest blocks put out, (B, P + N, D), without gradient.

    `patch_tokens`: how many enter each of these blocks and, last, how many leave them. `pooled`: of these, only the
    prefix tokens, which are all that a head of `global_pool='token'` reads.
    """
    with torch.no_grad():
        tokens = embed(model, images)
        for index, leaving in enumerate(patch_tokens[1:]):
            tokens = run_block(model.blocks[index], tokens, leaving, model.num_prefix_tokens, Recompute.NOTHING, score)
        return tokens[:, : model.num_prefix_tokens] if pooled else tokens


def prefix_whole_and_pruned(
    model: AnyViT, images: Tensor, blocks: int, leaving: int, score: TokenScore = "attention"
) -> tuple[Tensor, Tensor]:
    """What `prefix` makes of images on all tokens, and with `leaving` patch tokens that leave the last block, in one pass."""
    with torch.no_grad():
        tokens = prefix(model, images, (model.patch_embed.num_patches,) * blocks, pooled=False)
        tokens, scores = _scored(model.blocks[blocks - 1], tokens, model.num_prefix_tokens, Recompute.NOTHING, score)
        return tokens, keep_tokens(tokens, scores, leaving, model.num_prefix_tokens)


class Looked(NamedTuple):
    """What a pretrained model's lower blocks make of images (B)."""

    at_blocks: list[Tensor]  # summaries (B, 2 D) of what leaves each block that was asked for
    tokens: Tensor  # (B, P + N, D) that leave the deepest of those blocks
    scores: dict[TokenScore, Tensor]  # of each of them, (B, P + N); nothing where none was asked for


def look(model: AnyViT, images: Tensor, blocks: Sequence[int], *, scored: bool) -> Looked:
    """`blocks`: after how many blocks to look, rising. `scored`: with the scores by which tokens may be dropped."""
    with torch.no_grad():
        tokens, at_blocks = embed(model, images), []
        scores: dict[TokenScore, Tensor] = {}
        if blocks[0] == 0:
            at_blocks.append(_summary(model, tokens))
        for done, block in enumerate(model.blocks[: blocks[-1]], start=1):
            if done == blocks[-1] and scored:
                tokens, attention = _scored(block, tokens, model.num_prefix_tokens, Recompute.NOTHING, "attention")
                scores = {"attention": attention, "distance": distances(tokens, model.num_prefix_tokens)}
            else:
                tokens = run_recomputed(block, tokens, Recompute.NOTHING)
            if done in blocks:
                at_blocks.append(_summary(model, tokens))
        return Looked(at_blocks, tokens, scores)


def at_end(model: AnyViT, tokens: Tensor, blocks: int) -> Tensor:
    """The summary (B, 2 D) of what leaves the last block, of tokens (B, T, D) that left block `blocks`."""
    with torch.no_grad():
        for block in model.blocks[blocks:]:
            tokens = run_recomputed(block, tokens, Recompute.NOTHING)
        return _summary(model, tokens)


def _summary(model: AnyViT, tokens: Tensor) -> Tensor:
    """(B, P + N, D) -> (B, 2 D): the class token (or nothing) and the mean of the patch tokens."""
    patches = tokens[:, model.num_prefix_tokens :].mean(dim=1)
    return torch.cat((tokens[:, 0], patches), dim=1) if model.num_prefix_tokens else patches


def forward(
    model: AnyViT,
    inputs: Tensor,
    selection: Selection,
    *,
    with_deltas: bool = False,
    cached_blocks: int = 0,
    classifies: bool = True,
    score: TokenScore = "attention",
) -> tuple[Tensor, list[Tensor]]:
    """Images (B, 3, H, W) -> logits (B, classes), and each block's class-token delta (a scalar, mean over the batch).

    Blocks below the lowest trained one run without gradient, so that nothing of theirs is kept. With `cached_blocks`
    the inputs are what `prefix` made of the images, and so many blocks are left out; their deltas are 0. Without
    `classifies`, what the classifier is given, (B, D), takes the logits' place.
    """
    gradient = torch.is_grad_enabled()
    lowest = selection.lowest_trained_block
    # How many patch tokens leave each block: what the next one sees; nothing is dropped after the last.
    leaving = (*selection.tokens[1:], selection.tokens[-1])
    deltas: list[Tensor] = [torch.zeros(())] * cached_blocks if with_deltas else []
    if cached_blocks:
        tokens = inputs
    else:
        with torch.set_grad_enabled(gradient and selection.embeddings_train):
            tokens = embed(model, inputs)
    for index in range(cached_blocks, len(model.blocks)):
        block = model.blocks[index]
        # A copy: a view would hold all of the block's input.
        class_token_before = tokens[:, 0].detach().clone() if with_deltas else None
        with torch.set_grad_enabled(gradient and index >= lowest):
            level = selection.level(index) if gradient and index >= lowest else Recompute.NOTHING
            tokens = run_block(block, tokens, leaving[index], model.num_prefix_tokens, level, score)
        if class_token_before is not None:
            # The paper's ||CLS_l - CLS_(l-1)||^2, as a mean over the batch so that a short last batch shifts nothing.
            change = tokens[:, 0].detach() - class_token_before
            deltas.append(change.square().sum(dim=1).mean())
    return model.forward_head(model.norm(tokens), pre_logits=not classifies), deltas


def run_block(
    block: Any,
    tokens: Tensor,
    leaving: int,
    prefix_tokens: int,
    level: Recompute,
    score: TokenScore = "attention",
) -> Tensor:
    """One unmodified block; of its patch tokens the `leaving` ones with the highest score go on."""
    if leaving >= tokens.shape[1] - prefix_tokens:
        return run_recomputed(block, tokens, level)
    tokens, scores = _scored(block, tokens, prefix_tokens, level, score)
    return keep_tokens(tokens, scores, leaving, prefix_tokens)


def _scored(
    block: Any, tokens: Tensor, prefix_tokens: int, level: Recompute, score: TokenScore
) -> tuple[Tensor, Tensor]:
    """What a block puts out, and the score of each token of it, (B, P + N).

    The hook on `attn.qkv` only reads the projection that the block computes anyway, and is gone when this returns.
    """
    if score == "distance":
        tokens = run_recomputed(block, tokens, level)
        return tokens, distances(tokens.detach(), prefix_tokens)
    rows: list[Tensor] = []
    handle = block.attn.qkv.register_forward_hook(
        lambda _module, _inputs, qkv: rows.append(class_attention(block.attn, qkv.detach()))
    )
    try:
        tokens = run_recomputed(block, tokens, level)
    finally:
        handle.remove()
    return tokens, rows[0]


@torch.no_grad()
def class_attention(attention: Any, qkv: Tensor) -> Tensor:
    """The class token's attention to every token, mean over heads: (B, T, 3 * A) -> (B, T).

    One row of q times k, after the model's own q and k norms; fused attention stays as it is.
    """
    batch, tokens, _ = qkv.shape
    heads = attention.num_heads
    q, k = qkv.view(batch, tokens, 3, heads, -1)[:, :, :2].unbind(2)  # (B, T, H, A / H) each
    q = attention.q_norm(q[:, :1].transpose(1, 2))  # (B, H, 1, A / H)
    k = attention.k_norm(k.transpose(1, 2))  # (B, H, T, A / H)
    scores = (q * attention.scale) @ k.transpose(-2, -1)  # (B, H, 1, T)
    row: Tensor = scores.softmax(dim=-1).mean(dim=1)[:, 0]
    return row


@torch.no_grad()
def distances(tokens: Tensor, prefix_tokens: int) -> Tensor:
    """How far each patch token is from their mean: (B, P + N, D) -> (B, P + N), 0 for prefix tokens."""
    patches = tokens[:, prefix_tokens:]
    far = torch.linalg.vector_norm(patches - patches.mean(dim=1, keepdim=True), dim=2)
    return torch.cat((far.new_zeros(len(far), prefix_tokens), far), dim=1)


def keep_tokens(tokens: Tensor, scores: Tensor, keep: int, prefix_tokens: int) -> Tensor:
    """Keep every prefix token and the `keep` patch tokens with the highest `scores`, in their order.

    tokens (B, P + N, D), scores (B, P + N) -> (B, P + keep, D)
    """
    batch, _, width = tokens.shape
    chosen = scores[:, prefix_tokens:].topk(keep, dim=1).indices.sort(dim=1).values + prefix_tokens
    always = torch.arange(prefix_tokens, device=tokens.device).expand(batch, -1)
    index = torch.cat((always, chosen), dim=1)[:, :, None].expand(-1, -1, width)
    kept: Tensor = _Keep.apply(tokens, index)
    return kept


class _Keep(torch.autograd.Function):
    """`tokens.gather(1, index)` that saves the index alone: torch's own saves its whole input, a width a token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = tokens.shape
        return tokens.gather(1, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        # Each token is kept once, so that placing is adding.
        return gradient.new_zeros(ctx.shape).scatter_(1, index, gradient), None


def named_regions(model: AnyViT) -> Iterator[tuple[str | int, str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield region_of(name), name, parameter
