"""The arithmetic against the truth: the CPU allocator's own events, and torch's own count of FLOPs.

Random steps of whole timm models, as `benchmarks/memory_model.py` draws them (its table is over 540 of them); the
bundled model; and models that are built otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import live_bytes  # noqa: F401  (makes benchmarks/ importable)
import memory_model
from memory_model import Config, Outcome
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer

from edgetune.backends.pytorch import without_onednn
from edgetune.cost import Recompute, Selection, ViTShape
from edgetune.optim import OptimizerName
from edgetune.planner import ceilings
from edgetune.vit.shape import shape_of

Build = Callable[..., VisionTransformer]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_runs_compute() -> Iterator[None]:
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(2)  # the allocator's events depend on it
    without_onednn()
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn


def _holds(outcome: Outcome, lowest: float = -0.005, highest: float = 0.02) -> None:
    where = memory_model.line(outcome)
    assert lowest <= outcome.error <= highest, where
    assert outcome.flops_error is None or abs(outcome.flops_error) <= 0.01, where


# Whole models of the families that the bar is on


def _random_steps(family: str, seed: int, count: int, largest_grid: int) -> Iterator[Outcome]:
    rng = random.Random(f"{family} {seed}")
    for number in range(count):
        config = memory_model.random_config(rng, family, largest_grid=largest_grid)
        model = memory_model.build(family, config.image_px)
        yield memory_model.measure(model, config, with_flops=number == 0)


@pytest.mark.parametrize("family", memory_model.MODELS)
def test_random_steps_of_whole_models_are_predicted_within_two_percent_and_hardly_ever_too_low(family: str) -> None:
    for outcome in _random_steps(family, seed=0, count=2, largest_grid=6):
        _holds(outcome)


@slow
@pytest.mark.parametrize("family", memory_model.MODELS)
def test_more_random_steps_of_whole_models(family: str) -> None:
    for outcome in _random_steps(family, seed=1, count=8, largest_grid=14):
        _holds(outcome)


# The bundled model


def _micro(**changes: object) -> VisionTransformer:
    sizes: dict[str, object] = {
        "img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 12, "num_heads": 3, "num_classes": 10,
    }  # fmt: skip
    return VisionTransformer(**(sizes | changes))


def _selection(shape: ViTShape, name: str, level: Recompute = Recompute.NOTHING) -> Selection:
    depth = shape.depth
    trains = {
        "full": (True,) * depth,
        "all-blocks": (True,) * depth,
        "head": (False,) * depth,
        "last-third": tuple(block >= depth - max(1, depth // 3) for block in range(depth)),
        "every-second": tuple(block % 2 == 1 for block in range(depth)),
        "first-only": tuple(block == 0 for block in range(depth)),
    }
    base = name.removesuffix(" pruned")
    tokens = ceilings(shape, 0, 0.9 if base != name else 1.0)
    return Selection(trains[base], tokens, base == "full", (level,) * depth)


def _outcome(
    model: VisionTransformer,
    selection: Selection,
    *,
    micro_batch: int = 8,
    parts: int = 1,
    optimizer: OptimizerName = "adamw",
    threads: int = 2,
    with_flops: bool = False,
) -> Outcome:
    config = Config("", model.patch_embed.img_size[0], micro_batch, parts, optimizer, False, threads, selection)
    return memory_model.measure(model, config, with_flops=with_flops)


MICRO: list[tuple[str, OptimizerName, int]] = [
    ("full", "adamw", 1),
    ("head", "adamw", 1),
    ("last-third", "sgd", 1),
    ("every-second", "momentum", 1),
    ("full pruned", "adafactor", 4),
    ("last-third pruned", "adamw", 1),
    ("first-only", "adamw", 16),
]


@pytest.mark.parametrize("level", list(Recompute))
@pytest.mark.parametrize("case", MICRO, ids=lambda case: f"{case[0]}, {case[1]}, {case[2]} micro-batches")
def test_steps_of_the_bundled_model_are_predicted_within_two_percent(
    case: tuple[str, OptimizerName, int], level: Recompute
) -> None:
    selected, optimizer, parts = case
    model = _micro()
    selection = _selection(shape_of(model, "micro"), selected, level)
    _holds(
        _outcome(model, selection, micro_batch=16 // parts, parts=parts, optimizer=optimizer, with_flops=parts == 1),
        highest=0.005,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_stored_as_bfloat16_are_counted_as_half_and_one_copy(threads: int) -> None:
    torch.set_num_threads(threads)
    model = _micro(embed_dim=384, num_heads=6, img_size=16)
    shape = shape_of(model, "micro")
    selection = Selection((False,) * 9 + (True,) * 3, (shape.patch_tokens,) * 12)
    config = Config("", 16, 2, 1, "adamw", False, threads, selection, half_blocks=9)
    outcome = memory_model.measure(model, config, with_flops=False)
    _holds(outcome)
    assert (
        outcome.measured_bytes
        < 0.8
        * _outcome(
            model=_micro(embed_dim=384, num_heads=6, img_size=16), selection=selection, micro_batch=2
        ).measured_bytes
    )


# What is built otherwise: (a block's or head's own parts; lowest and highest error)

FAMILIES: dict[str, tuple[Build, float, float]] = {
    "layer scale": (partial(_micro, init_values=1e-5), -0.005, 0.005),
    "q and k norm": (partial(_micro, qk_norm=True), -0.005, 0.005),
    "QuickGELU": (partial(_micro, act_layer=QuickGELU, pre_norm=True), -0.005, 0.005),
    "registers": (partial(_micro, reg_tokens=4), -0.005, 0.005),
    "average": (partial(_micro, class_token=False, global_pool="avg"), -0.005, 0.005),
    "qkv without bias": (partial(_micro, qkv_bias=False), -0.005, 0.005),
    "a thousand classes": (partial(_micro, num_classes=1000), -0.005, 0.01),
    "many tokens": (partial(_micro, img_size=64), -0.005, 0.005),
    "few tokens": (partial(_micro, img_size=64, patch_size=16), -0.005, 0.005),
}
