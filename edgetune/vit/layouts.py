"""Weights files' layouts: what timm's checkpoint filter does to a file that is under the model's names already, without timm.

That is a position embedding for another image size, and layer scales under their older names. Everything else (other
projects' names, patch kernels of another size) goes through timm's filter itself, where timm is installed.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.vit import stock
from edgetune.vit.plain import VisionTransformer

# What a file may hold beside the model: classifiers, and timm's layer before the classifier that is in use no more.
_BESIDE = re.compile(r"^(head|head_dist|fc_norm_.*|pre_logits)\b|pre_logits")
_GAMMA = re.compile(r"gamma_([0-9])")


def as_the_models(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """A file's tensors under the model's names and, if they fit, in its shapes; the model itself is not changed."""
    if _is_foreign(state, model) and (not isinstance(model, VisionTransformer) or find_spec("timm") is not None):
        return stock.converted(state, model)
    found = {}
    for name, value in state.items():
        if "pre_logits" in name:
            continue
        if name == "pos_embed" and isinstance(value, Tensor) and value.ndim == 3:
            value = _resized(value, state.get("patch_embed.proj.weight"), model)
        found[_GAMMA.sub(r"ls\1.gamma", name)] = value
    return found


def _is_foreign(state: dict[str, Any], model: Any) -> bool:
    """Whether a file needs more than `as_the_models` does by itself."""
    own = model.state_dict().keys()
    kernel = state.get("patch_embed.proj.weight")
    fits = isinstance(kernel, Tensor) and kernel.shape == model.patch_embed.proj.weight.shape
    theirs = not isinstance(model, VisionTransformer)
    resized_otherwise = any(word in str(model.pretrained_cfg.get("architecture")) for word in ("flexi", "radio"))
    strange = (name for name in state if _GAMMA.sub(r"ls\1.gamma", name) not in own and not _BESIDE.search(name))
    return theirs or resized_otherwise or not fits or next(strange, None) is not None


def _resized(positions: Tensor, kernel: Any, model: VisionTransformer) -> Tensor:
    """A position embedding (1, P + N, D) for the model's image size, as timm's `resample_abs_pos_embed` makes it."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    count = positions.shape[1] - prefix
    new = model.patch_embed.grid_size
    old = _grid_of(kernel, count, model)
    if count == new[0] * new[1] and (old is None or old == new):
        return positions
    if old is None:
        side = int(max(count, 0) ** 0.5)
        old = side, side
    kept, grid = positions[:, :prefix], positions[:, prefix:]
    width, dtype = grid.shape[-1], grid.dtype
    image = grid.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = functional.interpolate(image, size=new, mode="bicubic", antialias=True)
    grid = image.permute(0, 2, 3, 1).reshape(1, -1, width).to(dtype)
    return torch.cat([kept, grid], dim=1) if prefix else grid


def _grid_of(kernel: Any, count: int, model: VisionTransformer) -> tuple[int, int] | None:
    """Rows and columns of the grid that a file's positions are for: what its config says, where that accounts for all."""
    if not isinstance(kernel, Tensor) or kernel.ndim != 4:
        return None
    size = model.pretrained_model_args.get("img_size") or model.pretrained_cfg.get("input_size", (3, 224, 224))[-2:]
    height, width = (size, size) if isinstance(size, int) else size
    grid = height // kernel.shape[-2], width // kernel.shape[-1]
    return grid if grid[0] * grid[1] == count else None
