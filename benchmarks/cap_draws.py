"""What `cap.py` runs: models, sizes, batches, methods and caps, drawn from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

METHODS = ("full", "last-k", "head", "random-k", "alast")
LIKED_FACTOR = 1.15  # "somewhat above" what the method likes best
PHOTOGRAPH_SHARE = 0.25


class Model(msgspec.Struct, frozen=True):
    """A model to draw, at which sizes, up to which batch, how many steps, and how often among the runs."""

    name: str
    image_px: tuple[int, ...]
    largest_batch: int
    steps: int = 5
    weight: int = 2


# Bounded so that a step takes seconds on two cores.
MODELS = (
    Model("edgetune_micro", (32, 48, 64), 32, steps=6, weight=4),
    Model("deit_tiny_patch16_224", (96, 160, 224), 32, steps=4, weight=4),
    Model("vit_tiny_patch16_224", (128, 192), 32, steps=4),
    Model("vit_tiny_patch16_384", (384,), 6, steps=3),
    Model("vit_small_patch32_224", (224, 320), 32, steps=4),
    Model("deit_small_patch16_224", (96, 160, 224), 8, steps=4),
    Model("deit3_small_patch16_224", (96, 160), 12, steps=4),
    Model("vit_small_patch14_reg4_dinov2", (112, 154), 12, steps=4),
    Model("vit_base_patch16_224", (224,), 4, steps=3, weight=1),
)
QUICK_MODELS = (Model("edgetune_micro", (32, 48), 16, steps=3), Model("deit_tiny_patch16_224", (96, 160), 8, steps=3))


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """A run but for its cap. `photographs`: some of its images are large, and their decoding counts."""

    model: str
    image_px: int
    batch: int
    method: str
    steps: int
    photographs: bool = False


def configurations(count: int, seed: int, models: Sequence[Model] = MODELS) -> list[Configuration]:
    """`count` configurations, a function of the seed. Models come by their weights, methods equally often."""
    rng = random.Random(f"cap {seed}")
    which = _deck(rng, [model for model in models for _ in range(model.weight)])
    methods = _deck(rng, list(METHODS))
    drawn = []
    for _ in range(count):
        model = next(which)
        batch = min(model.largest_batch, math.floor(2 ** rng.uniform(0, math.log2(model.largest_batch + 1))))
        drawn.append(
            Configuration(
                model=model.name,
                image_px=rng.choice(model.image_px),
                batch=batch,
                method=next(methods),
                steps=model.steps,
                photographs=rng.random() < PHOTOGRAPH_SHARE,
            )
        )
    return drawn


def _deck(rng: random.Random, cards: list[Any]) -> Iterator[Any]:
    """Every card once in random order, then again."""
    while True:
        rng.shuffle(cards)
        yield from cards


def draw_cap(rng: random.Random, runtime_bytes: int, smallest_bytes: int, liked_bytes: int) -> int:
    """A cap between the runtime plus `smallest_bytes` and somewhat above the runtime plus `liked_bytes`.

    Uniform in the logarithm: between 40 and 1,000 MiB most caps should bind.
    """
    highest = max(smallest_bytes, liked_bytes) * LIKED_FACTOR
    room = math.exp(rng.uniform(math.log(smallest_bytes), math.log(highest)))
    return runtime_bytes + max(smallest_bytes, round(room))
