"""A plain Vision Transformer of our own: parameter names, outputs, gradients and fresh weights are timm's, to the last bit.

`Architecture` holds timm's arguments for it, under timm's names: what it has no field for is not built here. Tests hold
every model in `assets/models.json` to timm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import msgspec
import torch
from torch import Tensor, nn

from edgetune.vit.layers import ACTIVATIONS, AttentionPool, Block, LayerNorm, Linear, PatchEmbed, trunc_normal_

# Ours, or one of timm's that has the same parts: it can't be named without importing timm.
AnyViT: TypeAlias = Any


class Architecture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model is built of; defaults and names are those of timm's VisionTransformer, `norm_eps` and `distilled` apart.

    Raises: ValueError for a head that reads a token which isn't there, or a width that the heads don't divide.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    class_token: bool = True
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    global_pool: Literal["token", "avg", "map"] = "token"
    pool_include_prefix: bool = False
    act_layer: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-6
    distilled: bool = False

    def __post_init__(self) -> None:
        counts = (self.patch_size, self.embed_dim, self.depth, self.num_heads, *self.image_px)
        if min(counts) < 1 or self.reg_tokens < 0 or self.hidden < 1 or not math.isfinite(self.mlp_ratio):
            raise ValueError("sizes below one")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{self.num_heads} heads don't divide a width of {self.embed_dim}")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("the head reads a class token which isn't there")
        if self.distilled and (self.global_pool != "token" or self.reg_tokens):
            raise ValueError("a distilled head reads the class and the distillation token")

    @property
    def image_px(self) -> tuple[int, int]:
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def hidden(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes), in the parts that `vit.loop` runs one after the other."""

    in_chans = 3
    dynamic_img_size = False
    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None
    pos_embed: nn.Parameter

    def __init__(self, architecture: Architecture, classes: int, *, initialise: bool = True) -> None:
        super().__init__()
        self.architecture = given = architecture
        self.pretrained_cfg: dict[str, Any] = {}
        self.pretrained_model_args: dict[str, Any] = {}
        width, activation = given.embed_dim, ACTIVATIONS[given.act_layer]
        self.num_classes, self.global_pool = classes, given.global_pool
        self.num_features = self.embed_dim = width
        self.has_class_token, self.no_embed_class = given.class_token, given.no_embed_class
        self.num_prefix_tokens = int(given.class_token) + given.reg_tokens
        self.pool_include_prefix = given.pool_include_prefix
        # A bias is of no use where a norm follows.
        self.patch_embed = PatchEmbed(given.image_px, given.patch_size, width, bias=not given.pre_norm)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if given.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, given.reg_tokens, width)) if given.reg_tokens else None
        positions = self.patch_embed.num_patches + (0 if given.no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        self.pos_drop, self.patch_drop = nn.Identity(), nn.Identity()
        self.norm_pre = self._norm() if given.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*self._blocks(activation))
        pools = given.global_pool == "avg" if given.fc_norm is None else given.fc_norm
        self.norm = self._norm() if given.final_norm and not pools else nn.Identity()
        self.attn_pool = (
            AttentionPool(width, given.num_heads, given.hidden, activation, norm_eps=given.norm_eps)
            if given.global_pool == "map"
            else None
        )
        self.fc_norm = self._norm() if given.final_norm and pools else nn.Identity()
        self.head_drop = nn.Identity()
        self.head = Linear(width, classes)
        if initialise:
            self.init_weights()

    def _norm(self) -> LayerNorm:
        return LayerNorm(self.architecture.embed_dim, eps=self.architecture.norm_eps)

    def _blocks(self, activation: type[nn.Module]) -> Iterator[Block]:
        given = self.architecture
        for _ in range(given.depth):
            yield Block(
                given.embed_dim,
                given.num_heads,
                given.hidden,
                activation,
                norm_eps=given.norm_eps,
                qkv_bias=given.qkv_bias,
                proj_bias=given.proj_bias,
                qk_norm=given.qk_norm,
                init_values=given.init_values,
            )

    def init_weights(self) -> None:
        """Fresh weights, drawn in timm's order; on the meta device there is nothing to draw."""
        if self.pos_embed.is_meta:
            return
        trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in _children_first(self):
            if isinstance(module, nn.Linear):
                fresh_linear(module)
            elif isinstance(module, AttentionPool):
                module.init_weights()

    def get_classifier(self) -> nn.Module:
        return self.head

    def _prefix(self, batch: int) -> list[Tensor]:
        return [token.expand(batch, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]

    def _pos_embed(self, patches: Tensor) -> Tensor:
        prefix = self._prefix(patches.shape[0])
        if self.no_embed_class:
            patches = patches + self.pos_embed
            return torch.cat([*prefix, patches], dim=1) if prefix else patches
        tokens = torch.cat([*prefix, patches], dim=1) if prefix else patches
        return tokens + self.pos_embed

    def forward_features(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.blocks(self.norm_pre(self._pos_embed(self.patch_embed(images)))))
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        if self.global_pool == "token":
            return tokens[:, 0]
        if not self.pool_include_prefix:
            tokens = tokens[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            pooled: Tensor = self.attn_pool(tokens)
            return pooled
        return tokens.mean(dim=1)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        tokens = self.pool(tokens)  # under one name, so that what is read no more is held no longer
        tokens = self.fc_norm(tokens)
        return tokens if pre_logits else self.head(tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class DistilledVisionTransformer(VisionTransformer):
    """DeiT's: a distillation token beside the class token, a head for each, and their mean as the answer."""

    def __init__(self, architecture: Architecture, classes: int) -> None:
        super().__init__(architecture, classes, initialise=False)
        width = architecture.embed_dim
        self.num_prefix_tokens = 2
        self.dist_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 2, width))
        self.head_dist = Linear(width, classes)
        self.init_weights()

    def init_weights(self) -> None:
        if not self.dist_token.is_meta:
            trunc_normal_(self.dist_token, std=0.02)
        super().init_weights()

    def get_classifier(self) -> Any:
        return self.head, self.head_dist

    def _prefix(self, batch: int) -> list[Tensor]:
        return [*super()._prefix(batch), self.dist_token.expand(batch, -1, -1)]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        tokens, dist_token = tokens[:, 0], tokens[:, 1]
        if pre_logits:
            return (tokens + dist_token) / 2
        tokens = self.head(tokens)
        dist_token = self.head_dist(dist_token)
        answer: Tensor = (tokens + dist_token) / 2
        return answer


def build(architecture: Architecture, classes: int) -> VisionTransformer:
    """The model with fresh weights; on torch's meta device, without memory."""
    kind = DistilledVisionTransformer if architecture.distilled else VisionTransformer
    return kind(architecture, classes)


def fresh_linear(layer: nn.Linear) -> None:
    """The values with which timm builds a linear layer of a Vision Transformer."""
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
        yield child
