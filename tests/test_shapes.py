"""The shapes that come as data equal those read off timm's models."""

from __future__ import annotations

import pytest
from shapes import settled

from edgetune.errors import UsageError
from edgetune.shapes import _load, known_shape, known_shapes

NAMES = sorted(_load())


def test_common_models_are_known_and_others_are_not() -> None:
    assert {"edgetune_micro", "deit_tiny_patch16_224", "vit_base_patch16_224"} <= set(NAMES)
    assert known_shape("resnet50", 10) is None
    assert 30 < len(list(known_shapes(10))) < len(NAMES)


def test_an_image_size_that_no_patch_divides_is_refused() -> None:
    with pytest.raises(UsageError, match="Try 98 or 112"):
        known_shape("vit_small_patch14_dinov2", 10, 100)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_a_known_shape_equals_the_models_own(name: str) -> None:
    pytest.importorskip("torch")
    from edgetune.vit.models import ModelSource, build_meta

    own = known_shape(name, 7)
    assert own is not None
    assert settled(own) == settled(build_meta(ModelSource(name=name), 7)[1])
    size = own.patch_px[0] * 6
    at_another = known_shape(name, 5, size)
    assert at_another is not None
    assert settled(at_another) == settled(build_meta(ModelSource(name=name, image_px=size), 5)[1])
