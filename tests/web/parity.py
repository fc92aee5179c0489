"""Torch's side of a page's training: the same steps, from the same weights, by the optimizer graphs' rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.artifacts.manifest import Manifest, Variant
from edgetune.backends.pytorch import TorchBackend
from edgetune.checkpoint import load_tensors
from edgetune.cost import Selection
from edgetune.optim import Optimizer, OptimizerSettings
from edgetune.vit.models import ModelSource, load_model


class Uniform(Optimizer):
    """Decays every parameter, as AdamW's graph does; SGD's graph decays none."""

    def _decay(self, name: str, parameter: Any) -> float:
        return self.settings.weight_decay if self.settings.name == "adamw" else 0.0


def torch_side(artifacts: Path, manifest: Manifest, optimizer: str) -> TorchBackend:
    model = load_model(ModelSource(name=manifest.model, pretrained=False), manifest.shape.classes).model
    values = load_tensors(artifacts / manifest.weights)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    torch.set_num_threads(1)
    side = TorchBackend(model, OptimizerSettings(name=optimizer))  # type: ignore[arg-type]
    side.optimizer = Uniform(OptimizerSettings(name=optimizer, weight_decay=manifest.weight_decay))  # type: ignore[arg-type]
    return side


def step(side: TorchBackend, variant: Variant, images: Any, labels: Any, tokens: list[int], rate: float) -> Any:
    """Everything above the split trains, which is what the variant's graphs do."""
    trains = tuple(block >= variant.split_block for block in range(len(tokens)))
    return side.step(
        [(images, np.asarray(labels, np.int64))],
        Selection(trains, tuple(tokens)),
        images=len(labels),
        weight_sum=float(len(labels)),
        learning_rate=rate,
        seed=0,
        with_deltas=True,
    )


def rate_at(done: int, peak: float, warmup: int, total: int) -> float:
    """The schedule in words of the manifest, written down a second time."""
    if done < warmup:
        return peak * (done + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / max(1, total - warmup))))


def named(flat: Any, variant: Variant) -> dict[str, Any]:
    """A page's flat buffer by the parameters' names."""
    found, start = {}, 0
    for each in variant.parameters:
        size = math.prod(each.shape)
        found[each.name] = flat[start : start + size].reshape(each.shape)
        start += size
    assert start == len(flat)
    return found


def furthest(side: TorchBackend, flat: Any, variant: Variant) -> float:
    """The largest difference of a parameter."""
    own = side.model_tensors()
    return max(float(np.abs(own[name] - value).max()) for name, value in named(flat, variant).items())
