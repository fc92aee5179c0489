"""Preprocessing values are checked where they are made, and no image shape is too odd."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgetune.data import Preprocess, normalise, resize_and_crop
from edgetune.data.preprocess import computed_size
from edgetune.errors import DataError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height_px", 0),
        ("width_px", 10**9),
        ("interpolation", "random"),
        ("crop_mode", "middle"),
        ("crop_pct", 0.0),
        ("crop_pct", 1e-9),
        ("crop_pct", float("nan")),
        ("mean", (0.5, float("inf"), 0.5)),
        ("std", (0.5, 0.0, 0.5)),
        ("channels", 1),
    ],
)
def test_a_value_no_image_can_be_prepared_with_is_refused_by_name(field, value):
    with pytest.raises(DataError, match=field):
        Preprocess(**{"height_px": 32, "width_px": 32, field: value})


def test_preprocessing_survives_being_stored():
    stored = Preprocess(224, 196, "lanczos", 0.95, "border", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert msgspec.json.decode(msgspec.json.encode(stored), type=Preprocess) == stored


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    crop_pct=st.floats(0.5, 1.2),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
)
def test_any_image_becomes_exactly_the_models_input(size, height, width, crop_pct, crop_mode):
    if min(height, width) / crop_pct < 1:
        return
    preprocess = Preprocess(height, width, "bilinear", crop_pct, crop_mode)
    values = normalise(resize_and_crop(Image.new("RGB", size, "red"), preprocess), preprocess)
    assert values.shape == (3, height, width)
    assert values.flags.c_contiguous
    assert np.isfinite(values).all()


def test_a_long_strip_is_not_blown_up_before_the_crop():
    width, height = computed_size((1, 60000), Preprocess(224, 224))
    assert width * height <= 32 * 256 * 256


def test_flipping_mirrors_left_and_right():
    image = Image.new("RGB", (4, 4), "black")
    image.paste("white", (0, 0, 2, 4))
    preprocess = Preprocess(4, 4, "nearest", 1.0, "squash", (0, 0, 0), (1, 1, 1))
    assert normalise(image, preprocess)[0, 0].tolist() == [1, 1, 0, 0]
    assert normalise(image, preprocess, flip=True)[0, 0].tolist() == [0, 0, 1, 1]
