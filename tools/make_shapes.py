"""Write `edgetune/assets/shapes.json`: the shapes of known models, read off the models on the meta device."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from edgetune.shapes import SHAPES_FILE, KnownShape
from edgetune.vit.known import known_models
from edgetune.vit.models import MICRO_MODEL, ModelSource, build_meta, classifier_names

COMMON = (
    MICRO_MODEL,
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *(f"vit_{size}_patch16_384" for size in ("tiny", "small", "base")),
    *(f"vit_{size}_patch32_224" for size in ("small", "base", "large")),
    "vit_small_patch8_224",
    "vit_base_patch8_224",
    *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
    *(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large")),
    *(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large")),
    "vit_base_patch32_clip_224",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_gap_240",
    "vit_little_patch16_reg1_gap_256",
)


# Beside these, all that is built without timm: to see what the parts hold that are not plain takes as much memory as timm.
NAMES = (*COMMON, *(name for name in known_models() if name not in COMMON))


def known(name: str) -> KnownShape:
    model, shape = build_meta(ModelSource(name=name), classes=1)
    heads = classifier_names(model)
    excluded = ("pos_embed", *(f"{head}.weight" for head in heads))
    others = [value.numel() for key, value in model.named_parameters() if key not in excluded]
    prefix = 0 if model.pos_embed is None else model.pos_embed.shape[1] - shape.patch_tokens
    return KnownShape(
        shape=shape,
        classifiers=len(heads),
        position_prefix=prefix,
        largest_other=max(others),
        common=name in COMMON,
    )


def main(path: Path = SHAPES_FILE) -> None:
    torch.set_num_threads(1)
    shapes = {name: known(name) for name in NAMES}
    lines = [msgspec.json.encode(name) + b": " + msgspec.json.encode(shape) for name, shape in shapes.items()]
    path.write_bytes(b"{\n" + b",\n".join(lines) + b"\n}\n")


if __name__ == "__main__":
    main()
