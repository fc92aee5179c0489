"""Weights of frozen blocks stored as bfloat16: half the bytes, and float32 arithmetic all the same.

While a module runs its weights are float32 copies, one module at a time. Rounding to bfloat16 changes what the block
computes (three significant digits a weight), so this is a lossy lever, for blocks that never train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgetune.vit.plain import AnyViT

_MARK = "_edgetune_half"


def store_half(model: AnyViT, blocks: int) -> None:
    """Store the float32 weights of the lowest `blocks` blocks as bfloat16. Those that are so already stay."""
    for block in model.blocks[:blocks]:
        for module in block.modules():
            own = [value for value in module._parameters.values() if value is not None]
            if not own or getattr(module, _MARK, False) or any(value.dtype != torch.float32 for value in own):
                continue
            for value in own:
                value.requires_grad_(False)
                value.data = value.data.to(torch.bfloat16)
            setattr(module, _MARK, True)
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow, always_call=True)


def _widen(module: nn.Module, _inputs: Any) -> None:
    _narrow(module)  # what an interrupt (Ctrl-C runs no forward hook) left wide
    stored: dict[str, Any] = dict(module._parameters)
    object.__setattr__(module, "_edgetune_stored", stored)
    for name, value in stored.items():
        if value is not None:
            module._parameters[name] = value.detach().float()


def _narrow(module: nn.Module, _inputs: Any = None, _output: Any = None) -> None:
    stored = module.__dict__.pop("_edgetune_stored", None)
    if stored is not None:
        module._parameters.update(stored)
