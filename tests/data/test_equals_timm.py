"""The preprocessing equals timm's evaluation transform, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetune.data import ImageSet, Preprocess, load_batch, load_image, normalise, resize_and_crop, timm_augment
from edgetune.errors import UsageError

pytest.importorskip("torch")
timm_data = pytest.importorskip("timm.data")

SIZES = [(32, 32), (7, 5), (31, 33), (224, 224), (225, 223), (640, 480), (333, 1001), (1000, 63), (1, 1), (90, 1400)]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def timms(preprocess: Preprocess):
    return timm_data.create_transform(
        (3, preprocess.height_px, preprocess.width_px),
        is_training=False,
        interpolation=preprocess.interpolation,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        mean=preprocess.mean,
        std=preprocess.std,
    )


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0, 1.1])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 37), (24, 40), (40, 24)])
def test_every_size_equals_timms_evaluation_transform(height, width, crop_pct, crop_mode):
    preprocess = Preprocess(height, width, "bicubic", crop_pct, crop_mode, *IMAGENET)
    transform = timms(preprocess)
    for size in SIZES:
        image = noise(*size)
        ours = normalise(resize_and_crop(image, preprocess), preprocess)
        assert ours.dtype == np.float32
        assert np.array_equal(ours, transform(image).numpy()), size


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_every_interpolation_equals_timms(interpolation):
    preprocess = Preprocess(224, 224, interpolation, 0.9, "center", *IMAGENET)
    for size in [(640, 480), (101, 300), (20, 30)]:
        image = noise(*size)
        ours = normalise(resize_and_crop(image, preprocess), preprocess)
        assert np.array_equal(ours, timms(preprocess)(image).numpy())


@pytest.mark.parametrize("size", [(3000, 20), (20, 3000), (5, 1999), (70, 9000)])
def test_a_strip_beyond_32_to_1_is_cropped_first_and_stays_within_a_few_steps_of_timm(size):
    preprocess = Preprocess(32, 32, "bicubic", 0.875, "center", (0, 0, 0), (1, 1, 1))
    image = noise(*size)
    ours = normalise(resize_and_crop(image, preprocess), preprocess)
    steps = 255 * np.abs(ours - timms(preprocess)(image).numpy())
    assert steps.max() <= 4
    assert steps.mean() <= 0.5


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[(mode, suffix) for mode in ("RGB", "L") for suffix in ("png", "jpg", "webp", "bmp", "tif", "gif")],
        *[("P", suffix) for suffix in ("png", "bmp", "tif", "gif")],
        *[("1", suffix) for suffix in ("png", "bmp", "tif", "gif")],
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
    ],
)
def test_a_file_without_transparency_equals_timms_loading(tmp_path: Path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    image = noise(50, 40).quantize(20) if mode == "P" else noise(50, 40).convert(mode)
    image.save(path)
    preprocess = Preprocess(32, 32, "bicubic", 0.9, "center", *IMAGENET)
    with Image.open(path) as opened:
        theirs = timms(preprocess)(opened.convert("RGB")).numpy()
    assert np.array_equal(load_image(path, preprocess), theirs)


def test_flipping_equals_flipping_timms_result(tmp_path: Path):
    noise(50, 40).save(tmp_path / "image.png")
    preprocess = Preprocess(33, 32, "bicubic", 0.9, "center", *IMAGENET)
    theirs = timms(preprocess)(noise(50, 40)).numpy()[:, :, ::-1]
    assert np.array_equal(load_image(tmp_path / "image.png", preprocess, flip=True), theirs)


@pytest.fixture
def one_image(tmp_path: Path) -> ImageSet:
    noise(60, 50).save(tmp_path / "image.png")
    return ImageSet(str(tmp_path), ("image.png",) * 3, (0, 1, 0))


def test_augmentation_depends_on_seed_epoch_and_index_only(one_image: ImageSet):
    import random

    import torch

    preprocess = Preprocess(32, 32)
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5}
    batches = {}
    for attempt in range(2):
        random.seed(attempt), np.random.seed(attempt), torch.manual_seed(attempt)
        transform = timm_augment(preprocess, seed=3, **options)
        for epoch in (0, 1):
            order = [0, 1, 2] if attempt == 0 else [2, 0, 1]
            inputs, _ = load_batch(one_image, order, preprocess, seed=3, epoch=epoch, transform=transform)
            for index, values in zip(order, inputs, strict=True):
                assert np.array_equal(batches.setdefault((epoch, index), values), values)
    assert not np.array_equal(batches[0, 0], batches[1, 0])
    assert not np.array_equal(batches[0, 0], batches[0, 1])
    other_seed, _ = load_batch(
        one_image, [0], preprocess, seed=4, epoch=0, transform=timm_augment(preprocess, seed=4, **options)
    )
    assert not np.array_equal(batches[0, 0], other_seed[0])


def test_augmentation_leaves_the_global_generators_as_they_were(one_image: ImageSet):
    import random

    import torch

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    preprocess = Preprocess(32, 32)
    load_batch(one_image, [0], preprocess, seed=0, epoch=0, transform=timm_augment(preprocess, 0))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_augmentation_timm_does_not_know_is_a_usage_error():
    with pytest.raises(UsageError, match="nonsense"):
        timm_augment(Preprocess(32, 32), 0, nonsense=1)
