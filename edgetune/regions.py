"""Which part of a model a parameter belongs to, by timm's names, and whether a step trains it. Pure, no torch."""

from __future__ import annotations

from edgetune.cost import Selection

EMBEDDING_NAMES = (
    "patch_embed",
    "pos_embed",
    "cls_token",
    "reg_token",
    "dist_token",
    "norm_pre",
    "pos_drop",
    "patch_drop",
)


def region_of(parameter: str) -> str | int:
    """`"embeddings"`, the block's number, or `"head"` (final norm, pooling and classifier)."""
    if parameter.startswith("blocks."):
        return int(parameter.split(".")[1])
    return "embeddings" if parameter.split(".")[0] in EMBEDDING_NAMES else "head"


def trains(region: str | int, selection: Selection) -> bool:
    if isinstance(region, int):
        return selection.trains[region]
    return region == "head" or selection.embeddings_train
