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
import numpy as np
import zoo
from memory_model import Config, Outcome
from timm.layers import QuickGELU, SwiGLU
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch.backends import nnpack

from edgetune.backends.pytorch import TorchBackend, own_kernels
from edgetune.cost import Recompute, Selection, ViTShape, evaluation_peak_bytes
from edgetune.methods import adaptive_obstacle
from edgetune.optim import OptimizerName, OptimizerSettings
from edgetune.planner import ceilings
from edgetune.vit.shape import shape_of

Build = Callable[..., VisionTransformer]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_runs_compute() -> Iterator[None]:
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(2)  # the allocator's events depend on it
    with nnpack.flags(enabled=True):
        own_kernels()
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


# What is built otherwise. Plain parts put together in another way are walked, the others are probed.

WALKED: dict[str, Build] = {
    "layer scale": partial(_micro, init_values=1e-5),
    "q and k norm": partial(_micro, qk_norm=True),
    "registers": partial(_micro, reg_tokens=4),
    "qkv without bias": partial(_micro, qkv_bias=False),
    "a thousand classes": partial(_micro, num_classes=1000),
    "many tokens": partial(_micro, img_size=64),
    "few tokens": partial(_micro, img_size=64, patch_size=16),
}
PROBED: dict[str, Build] = {
    "QuickGELU": partial(_micro, act_layer=QuickGELU, pre_norm=True),
    "average": partial(_micro, class_token=False, global_pool="avg"),
    "norm after, no prefix token": partial(zoo.tiny, block_fn=ResPostBlock, class_token=False, global_pool="avg"),
    "gated, no prefix token": partial(zoo.tiny, mlp_layer=SwiGLU, class_token=False, global_pool="map"),
    "gated, 192 tokens and more": partial(_micro, img_size=56, depth=6, mlp_layer=SwiGLU),
    **{name: partial(zoo.build, name) for name in zoo.ALL if name not in ("deit_tiny", "vit_base", "clip")},
}
# It keeps whole attention matrices and is refused before it is planned (`check_supported`).
del PROBED["differential attention"]


def _steps_of(family: str, build: Build, seed: int, count: int) -> Iterator[Outcome]:
    rng = random.Random(f"{family} {seed}")
    for _ in range(count):
        model = build()
        shape = shape_of(model, family)
        levels = tuple(Recompute) if shape.mlp_half else (Recompute.NOTHING, Recompute.BLOCK)
        config = memory_model.random_step(
            rng,
            family,
            shape.image_px[0],
            shape.depth,
            shape.patch_tokens,
            prunes=adaptive_obstacle(shape) is None,
            levels=levels,
        )
        yield memory_model.measure(model, config, with_flops=False)


@pytest.mark.parametrize("family", WALKED)
def test_random_steps_of_plain_parts_are_predicted_within_half_a_percent(family: str) -> None:
    for outcome in _steps_of(family, WALKED[family], seed=0, count=2):
        _holds(outcome, highest=0.01 if family == "a thousand classes" else 0.005)


@pytest.mark.parametrize("family", PROBED)
def test_random_steps_of_every_other_family_are_predicted_within_two_percent_and_hardly_ever_too_low(
    family: str,
) -> None:
    for outcome in _steps_of(family, PROBED[family], seed=0, count=3):
        _holds(outcome)


@slow
@pytest.mark.parametrize("family", [*WALKED, *PROBED])
def test_more_random_steps_of_every_family(family: str) -> None:
    # Of models as small as these, what is never live at once in a probed block shows as a percent or two too many.
    for outcome in _steps_of(family, (WALKED | PROBED)[family], seed=1, count=12):
        _holds(outcome, highest=0.02 if family in WALKED else 0.04)


def _blocks_train(model: VisionTransformer, level: Recompute) -> Selection:
    depth, tokens = len(model.blocks), model.patch_embed.num_patches
    return Selection((False,) + (True,) * (depth - 1), (tokens,) * depth, False, (level,) * depth)


@pytest.mark.parametrize("level", [Recompute.NOTHING, Recompute.BLOCK])
@pytest.mark.parametrize("family", ["SwiGLU", "dropout", "parallel", "layer scale, drop path"])
def test_blocks_that_are_not_plain_hold_what_their_probe_says_where_they_are_most_of_the_step(
    family: str, level: Recompute
) -> None:
    # Sixteen images, no optimizer state: weights are a small part, so that an error of a block's would show.
    model = zoo.build(family)
    for micro_batch in (1, 16):
        outcome = _outcome(model, _blocks_train(model, level), micro_batch=micro_batch, optimizer="sgd")
        _holds(outcome)


@pytest.mark.parametrize("family", ["hybrid, batch norm", "hybrid, group norm", "siglip"])
def test_ends_that_are_not_plain_hold_what_their_probe_says_where_they_train(family: str) -> None:
    model = zoo.build(family)
    depth, tokens = len(model.blocks), model.patch_embed.num_patches
    for micro_batch in (1, 8):
        everything = Selection((True,) * depth, (tokens,) * depth, True)
        _holds(_outcome(model, everything, micro_batch=micro_batch, optimizer="sgd"))
        _holds(_outcome(model, Selection((False,) * depth, (tokens,) * depth), micro_batch=micro_batch))


def test_a_frozen_stem_holds_what_its_probe_says_of_as_many_images_as_nnpack_would_convolve() -> None:
    model = zoo.build("hybrid, group norm")
    tokens = model.patch_embed.num_patches
    outcome = _outcome(model, Selection((False, False), (tokens, tokens)), micro_batch=16, optimizer="sgd")
    _holds(outcome)


@pytest.mark.parametrize("family", ["SwiGLU", "hybrid, batch norm", "siglip", "layer scale, drop path"])
def test_an_evaluation_holds_no_more_than_is_said(family: str) -> None:
    model = zoo.build(family)
    shape = shape_of(model, family)
    backend = TorchBackend(model, OptimizerSettings(name="sgd"))
    images = np.zeros((8, 3, *shape.image_px), np.float32)
    backend.evaluate(images)
    measured = images.nbytes + memory_model.peak_growth_bytes(lambda: backend.evaluate(images))
    said = evaluation_peak_bytes(shape, 8, threads=2)
    assert measured <= 1.005 * said
    assert said <= 1.1 * measured
