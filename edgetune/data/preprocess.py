"""From an RGB image to a model's input: one preprocessing for every backend, in Pillow and numpy.

The size arithmetic is that of timm's evaluation transform (`timm.data.transforms_factory.transforms_imagenet_eval`)
and of the torchvision functions it calls; tests hold the two bit-equal. Only the numbers of a model's own config
come in here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from PIL import Image

from edgetune.errors import DataError

Array = npt.NDArray[np.float32]
Size = tuple[int, int]  # (width, height), as Pillow has it

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_MODES = ("center", "squash", "border")

# Shorter-side resizing turns a 1 x 9999 strip into 256 x 2.5 million pixels. Past this many times the resized square
# only what the crop keeps is computed.
_LARGEST_RESIZE = 32


class Preprocess(Struct, frozen=True):
    """What a model wants to see; stored with the run.

    `crop_pct` is the share of the resized image the crop keeps. `crop_mode`: "center" resizes the shorter side and
    crops, "squash" gives up the aspect ratio, "border" fits the longer side and pads with the mean colour.

    Raises: DataError for a value no image could be prepared with.
    """

    height_px: int
    width_px: int
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    channels: int = 3

    def __post_init__(self) -> None:
        _require(1 <= self.height_px <= 8192, "height_px", self.height_px, "1 to 8192 pixels")
        _require(1 <= self.width_px <= 8192, "width_px", self.width_px, "1 to 8192 pixels")
        _require(self.interpolation in _RESAMPLING, "interpolation", self.interpolation, ", ".join(_RESAMPLING))
        _require(self.crop_mode in _CROP_MODES, "crop_mode", self.crop_mode, ", ".join(_CROP_MODES))
        _require(0.1 <= self.crop_pct <= 2, "crop_pct", self.crop_pct, "0.1 to 2")
        _require(min(self._scaled()) >= 1, "crop_pct", self.crop_pct, "one that leaves a pixel")
        _require(self.channels == 3, "channels", self.channels, "3: only RGB models are supported")
        _require(all(map(math.isfinite, self.mean)), "mean", self.mean, "three finite numbers")
        _require(all(math.isfinite(s) and s > 0 for s in self.std), "std", self.std, "three positive numbers")

    def _scaled(self) -> Size:
        return math.floor(self.width_px / self.crop_pct), math.floor(self.height_px / self.crop_pct)


def _require(holds: bool, field: str, found: object, allowed: str) -> None:
    if not holds:
        raise DataError(f"preprocessing: {field} is {found!r}, which can't be used. Allowed: {allowed}.")


def resized_size(size: Size, preprocess: Preprocess) -> Size:
    """The (width, height) an image of `size` is resized to before the crop."""
    width, height = size
    scaled_width, scaled_height = preprocess._scaled()
    if preprocess.crop_mode == "squash":
        return scaled_width, scaled_height
    if preprocess.crop_mode == "center" and scaled_width == scaled_height:
        short, long = sorted(size)
        new_long = int(scaled_width * long / short)  # floor, as torchvision's Resize of the shorter side
        return (scaled_width, new_long) if width <= height else (new_long, scaled_width)
    ratios = width / scaled_width, height / scaled_height
    ratio = max(ratios) if preprocess.crop_mode == "border" else min(ratios)
    return max(1, round(width / ratio)), max(1, round(height / ratio))  # timm's ResizeKeepRatio


def computed_size(size: Size, preprocess: Preprocess) -> Size:
    """The (width, height) of the largest image that `resize_and_crop` makes: as resized, or the crop of a long
    strip.
    """
    width, height = resized_size(size, preprocess)
    scaled_width, scaled_height = preprocess._scaled()
    if width * height <= _LARGEST_RESIZE * scaled_width * scaled_height:
        return width, height
    return min(width, preprocess.width_px), min(height, preprocess.height_px)


def resize_and_crop(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """An RGB image -> an RGB image of exactly `width_px` x `height_px`, as timm's evaluation transform makes it.

    Strips longer than 32:1 are cropped and resized at once, which costs no more memory than other images and may differ
    from timm by a few steps in 255.
    """
    resampling = _RESAMPLING[preprocess.interpolation]
    new_size = resized_size(image.size, preprocess)
    kept = computed_size(image.size, preprocess)
    if kept == new_size:
        image = image.resize(new_size, resampling)
    else:
        left, top, right, bottom = _source_box(image.size, new_size, kept)
        # One side after the other: in one call, Pillow may choose another order than it does for the whole strip.
        image = image.resize((kept[0], image.height), resampling, box=(left, 0, right, image.height))
        image = image.resize(kept, resampling, box=(0, top, image.width, bottom))
    image = _pad(image, preprocess)
    left = round((image.width - preprocess.width_px) / 2)
    top = round((image.height - preprocess.height_px) / 2)
    return image.crop((left, top, left + preprocess.width_px, top + preprocess.height_px))


def _source_box(size: Size, new_size: Size, kept: Size) -> tuple[float, float, float, float]:
    """Where in the source the middle `kept` pixels of the resized image come from: (left, top, right, bottom)."""
    left, top = round((new_size[0] - kept[0]) / 2), round((new_size[1] - kept[1]) / 2)
    per_x, per_y = size[0] / new_size[0], size[1] / new_size[1]
    right, bottom = min(size[0], (left + kept[0]) * per_x), min(size[1], (top + kept[1]) * per_y)
    return left * per_x, top * per_y, right, bottom


def _pad(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Pad what is smaller than the crop, half on each side (the odd pixel goes right and below)."""
    missing_x = max(0, preprocess.width_px - image.width)
    missing_y = max(0, preprocess.height_px - image.height)
    if not missing_x and not missing_y:
        return image
    red, green, blue = (round(255 * m) for m in preprocess.mean) if preprocess.crop_mode == "border" else (0, 0, 0)
    padded = Image.new("RGB", (image.width + missing_x, image.height + missing_y), (red, green, blue))
    padded.paste(image, (missing_x // 2, missing_y // 2))
    return padded


def normalise(image: Image.Image | npt.NDArray[np.uint8], preprocess: Preprocess, *, flip: bool = False) -> Array:
    """An RGB image, or its pixels (H, W, 3) -> float32 (3, H, W): scaled to 0..1, mean subtracted, divided by std, mirrored if asked."""
    pixels = np.asarray(image)[:, ::-1] if flip else np.asarray(image)  # (H, W, 3)
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    values /= np.float32(255)
    values -= np.asarray(preprocess.mean, dtype=np.float32)[:, None, None]
    values /= np.asarray(preprocess.std, dtype=np.float32)[:, None, None]
    return values
