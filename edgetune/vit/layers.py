"""The layers of a plain Vision Transformer, under the names that timm gives them and with timm's arithmetic, bit for bit.

Importing timm costs a small board more than torch's own anonymous memory leaves it (docs/decisions/0012-own-vit.md). What
timm's layers can do beside this (dropout, drop path, gates, other norms) stays timm's: a model that asks for it is built
by timm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """torch's, but that on the meta device, where there is nothing to fill, it is not filled: that imports 58 MiB."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv2d(nn.Conv2d):
    """The same."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class LayerNorm(nn.LayerNorm):
    """The same."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class GELUTanh(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return functional.gelu(inputs, approximate="tanh")


class QuickGELU(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * torch.sigmoid(1.702 * inputs)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) -> patch tokens (B, N, D)."""

    def __init__(self, image_px: tuple[int, int], patch_px: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.img_size = image_px
        self.patch_size = (patch_px, patch_px)
        self.grid_size = (image_px[0] // patch_px, image_px[1] // patch_px)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = Conv2d(3, width, kernel_size=patch_px, stride=patch_px, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} px, for a model of {self.img_size} px")
        images = self.proj(images)
        return images.flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    def __init__(self, width: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))
        if not self.gamma.is_meta:
            nn.init.constant_(self.gamma, init_values)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Attention(nn.Module):
    """Self-attention with one `qkv` projection: (B, T, D) -> (B, T, D)."""

    fused_attn = True

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, proj_bias: bool, qk_norm_eps: float | None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = nn.Identity() if qk_norm_eps is None else LayerNorm(self.head_dim, eps=qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else LayerNorm(self.head_dim, eps=qk_norm_eps)
        self.proj = Linear(width, width, bias=proj_bias)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        tokens = functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens.transpose(1, 2).reshape(batch, count, width)
        mixed: Tensor = self.proj(tokens)
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: type[nn.Module], *, bias: bool) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, bias=bias)
        self.act = activation()
        self.fc2 = Linear(hidden, width, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.fc1(tokens)  # under one name: what is read no more is held no longer
        tokens = self.act(tokens)
        mixed: Tensor = self.fc2(tokens)
        return mixed


class Block(nn.Module):
    """Norm, attention, norm, MLP, each half added to what it was given: (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: type[nn.Module],
        *,
        norm_eps: float,
        qkv_bias: bool,
        proj_bias: bool,
        qk_norm: bool,
        init_values: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=norm_eps)
        qk_norm_eps = norm_eps if qk_norm else None
        self.attn = Attention(width, heads, qkv_bias=qkv_bias, proj_bias=proj_bias, qk_norm_eps=qk_norm_eps)
        self.ls1 = LayerScale(width, init_values) if init_values else nn.Identity()
        self.norm2 = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, hidden, activation, bias=proj_bias)
        self.ls2 = LayerScale(width, init_values) if init_values else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        mixed: Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return mixed


class AttentionPool(nn.Module):
    """SigLIP's pooling: one learned query attends to every token, (B, T, D) -> (B, D)."""

    def __init__(self, width: int, heads: int, hidden: int, activation: type[nn.Module], *, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, hidden, activation, bias=True)
        self.init_weights()

    def init_weights(self) -> None:
        if self.latent.is_meta:
            return
        with torch.no_grad():
            # Cut off at two of the unit normal's deviations, then scaled.
            trunc_normal_(self.latent, std=1.0).mul_(self.latent.shape[-1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        q = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, 1, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(tokens).reshape(batch, count, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        tokens = functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens.transpose(1, 2).reshape(batch, 1, width)
        tokens = self.proj(tokens)
        tokens = tokens + self.mlp(self.norm(tokens))
        return tokens[:, 0]


@torch.no_grad()
def trunc_normal_(tensor: Tensor, *, std: float) -> Tensor:
    """Normal values within ±2, drawn as timm (and torch) draw them: by the inverse of the normal's distribution."""
    reach = math.erf(2.0 / std / math.sqrt(2.0))
    lower, upper = (1.0 - reach) / 2.0, (1.0 + reach) / 2.0
    tensor.uniform_(2 * lower - 1, 2 * upper - 1).erfinv_()
    return tensor.mul_(std * math.sqrt(2.0)).add_(0.0).clamp_(min=-2.0, max=2.0)
