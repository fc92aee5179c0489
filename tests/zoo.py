"""One model of each kind that the loop must run: whole families at reduced depth and size, with no value left at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import timm
import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import (
    DiffAttention,
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)

from edgetune.cost import Selection

CLASSES = 5


def tiny(**changes: object) -> VisionTransformer:
    sizes: dict[str, object] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": CLASSES,
    }  # fmt: skip
    return VisionTransformer(**(sizes | changes))


def _named(name: str, **reduced: int) -> Callable[[], VisionTransformer]:
    return partial(timm.create_model, name, num_classes=CLASSES, **reduced)


# With a class token, a joint qkv and a head that reads the class token: what ALaST can train.
ADAPTIVE: dict[str, Callable[[], VisionTransformer]] = {
    "deit_tiny": _named("deit_tiny_patch16_224", img_size=96),
    "deit3_small": _named("deit3_small_patch16_224", depth=3, img_size=64),
    "vit_base": _named("vit_base_patch16_224", depth=2, img_size=64),
    "dinov2": _named("vit_small_patch14_dinov2", depth=3, img_size=56),
    "dinov2 with registers": _named("vit_small_patch14_reg4_dinov2", depth=3, img_size=56),
    "clip": _named("vit_base_patch32_clip_224", depth=2, img_size=96),
    "distilled": _named("deit_tiny_distilled_patch16_224", depth=3, img_size=64),
    "q and k norm": partial(tiny, qk_norm=True, norm_layer=partial(RmsNorm, eps=1e-5)),
    "layer scale, drop path": partial(tiny, init_values=0.3, drop_path_rate=0.5),
    "dropout": partial(tiny, proj_drop_rate=0.2, attn_drop_rate=0.2, pos_drop_rate=0.2, drop_rate=0.2),
    "gated": partial(tiny, mlp_layer=GluMlp),
    "SwiGLU": partial(tiny, mlp_layer=SwiGLU, reg_tokens=2),
    "inner norms": partial(tiny, scale_attn_norm=True, scale_mlp_norm=True, fc_norm=True),
    "norm after": partial(tiny, block_fn=ResPostBlock),
    "any image size": partial(tiny, dynamic_img_size=True),
    "hybrid, group norm": _named("vit_tiny_r_s16_p8_224", depth=2, img_size=64),
    "hybrid, batch norm": _named("vit_base_resnet26d_224", depth=2, img_size=64),
}
# What the other methods train.
OTHERS: dict[str, Callable[[], VisionTransformer]] = {
    "siglip": _named("vit_base_patch16_siglip_224", depth=2, img_size=64),
    "average, register": _named("vit_wee_patch16_reg1_gap_256", depth=3, img_size=64),
    "attention pooling, prefix included": _named("test_vit3"),
    "parallel": partial(tiny, block_fn=ParallelScalingBlock),
    "parallel things": _named("vit_small_patch16_18x2_224", depth=2, img_size=64),
    "differential attention": partial(tiny, attn_layer=DiffAttention),
}
ALL = ADAPTIVE | OTHERS


def build(name: str) -> VisionTransformer:
    """The same weights each time; biases, tokens and scales are no zeros or ones."""
    return copy.deepcopy(_build(name))


@cache
def _build(name: str) -> VisionTransformer:
    torch.manual_seed(0)
    model = ALL[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def images(model: VisionTransformer, batch: int = 2, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def depth(model: VisionTransformer) -> int:
    return len(model.blocks)


def keep_all(model: VisionTransformer, trains: tuple[bool, ...], embeddings_train: bool = False) -> Selection:
    return Selection(trains, (model.patch_embed.num_patches,) * depth(model), embeddings_train)


def everything(model: VisionTransformer) -> Selection:
    return keep_all(model, (True,) * depth(model), embeddings_train=True)


def hooks(model: torch.nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )
