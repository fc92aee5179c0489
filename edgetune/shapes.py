"""Shapes of common timm models as data, so that a plan needs neither torch nor timm. Pure.

`assets/shapes.json` is made by `tools/make_shapes.py`; a test holds every entry to the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import msgspec

from edgetune.cost import ViTShape
from edgetune.errors import UsageError

SHAPES_FILE = Path(__file__).parent / "assets" / "shapes.json"


class KnownShape(msgspec.Struct, frozen=True, kw_only=True):
    """A shape at one class and the model's own image size, and what is needed to move it to others."""

    shape: ViTShape
    classifiers: int  # linear heads (two in a distilled model)
    position_prefix: int  # prefix tokens that have a position embedding
    largest_other: int  # elements of the largest tensor but position embedding and classifier
    common: bool = True  # named to someone whose model does not fit


def known_shape(name: str, classes: int, image_px: int | None = None) -> ViTShape | None:
    """The shape of a common model for so many classes at an image size (None: its own); None if it is not known.

    Raises: UsageError for an image size that is no multiple of the patch.
    """
    if name not in _load():
        return None
    known = _entry(name)
    shape = known.shape
    height, width = (image_px, image_px) if image_px is not None else shape.image_px
    check_image_size(name, image_px, shape.patch_px)
    tokens = (height // shape.patch_px[0]) * (width // shape.patch_px[1])
    positions = (tokens + known.position_prefix) * shape.width
    return msgspec.structs.replace(
        shape,
        classes=classes,
        image_px=(height, width),
        patch_tokens=tokens,
        embed_parameters=shape.embed_parameters + (tokens - shape.patch_tokens) * shape.width,
        head_parameters=shape.head_parameters + known.classifiers * (classes - 1) * (shape.width + 1),
        largest_parameter=max(known.largest_other, positions, classes * shape.width),
    )


def check_image_size(name: str, image_px: int | None, patch_px: tuple[int, int]) -> None:
    """Raises: UsageError for an image size that is no multiple of the patch, naming the nearest that are."""
    if image_px is None or not any(image_px % side for side in patch_px):
        return
    lower = image_px // patch_px[0] * patch_px[0]
    near = [str(size) for size in (lower, lower + patch_px[0]) if size]
    raise UsageError(
        f"--image-size {image_px} is no multiple of {name}'s patch size {patch_px[0]}. Try {' or '.join(near)}."
    )


def known_shapes(classes: int) -> Iterator[ViTShape]:
    """Every common model at its own image size, for the message that says what would fit; read only if it is made."""
    for name in _load():
        shape = known_shape(name, classes) if _entry(name).common else None
        if shape is not None:
            yield shape


def _entry(name: str) -> KnownShape:
    return msgspec.json.decode(_load()[name], type=KnownShape)


@lru_cache(maxsize=1)
def _load() -> dict[str, msgspec.Raw]:
    """Every entry as it is written: a run needs one of them."""
    return msgspec.json.decode(SHAPES_FILE.read_bytes(), type=dict[str, msgspec.Raw])
