"""The page prepares pictures as Pillow and timm do, to the bit; budgets and tokens are those of the trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from edgetune import alast
from edgetune.data.preprocess import Preprocess, normalise, resize_and_crop, resized_size
from edgetune.planner.tokens import rounded_up

SIZES = [
    (32, 32),
    (28, 28),
    (97, 61),
    (61, 97),
    (640, 481),
    (33, 1500),
    (1500, 20),
    (3, 5),
    (1, 1),
    (257, 256),
    (90, 200),
]
# Up to 12, Pillow always resized rows first; the page does as the newest does.
COLUMNS_FIRST_SINCE = 13
PILLOW = int(PIL.__version__.split(".")[0])
WAYS = [
    {"interpolation": name, "crop_pct": share, "crop_mode": mode}
    for name in ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")
    for share, mode in ((0.875, "center"), (1.0, "squash"), (0.9, "border"))
]


def asked(preprocess: Preprocess) -> dict[str, Any]:
    return {name: getattr(preprocess, name) for name in preprocess.__struct_fields__}


def test_resizing_and_cropping_are_pillows_to_the_bit_for_every_filter_mode_and_shape(
    core: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    pictures, wanted = [], []
    for number, (width, height) in enumerate(SIZES):
        # Noise and hard edges at both ends of the range: where overshoot is clipped.
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        pixels[: height // 2] = np.where(pixels[: height // 2] > 127, 255, 0)
        file = tmp_path / f"{number}.rgb"
        file.write_bytes(pixels.tobytes())
        for way in WAYS:
            for height_px, width_px in ((32, 32), (24, 40)):
                preprocess = Preprocess(
                    height_px, width_px, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **way
                )
                new_width, new_height = resized_size((width, height), preprocess)
                columns_first = height - new_height > 2 * max(0, width - new_width)
                if columns_first and PILLOW < COLUMNS_FIRST_SINCE:
                    continue
                image = resize_and_crop(Image.fromarray(pixels), preprocess)
                pictures.append({"file": file, "width": width, "height": height, "preprocess": asked(preprocess)})
                wanted.append((preprocess, np.asarray(image), normalise(image, preprocess)))
    core("prepare", pictures=pictures, out=tmp_path / "out")
    found = (tmp_path / "out").read_bytes()
    place = 0
    for picture, (preprocess, pixels, values) in zip(pictures, wanted, strict=True):
        own = np.frombuffer(found, np.uint8, pixels.size, place).reshape(pixels.shape)
        difference = np.abs(own.astype(int) - pixels).max()
        assert difference == 0, f"{picture['width']} x {picture['height']}, {preprocess}: {difference} of 255"
        floats = np.frombuffer(found, "<f4", values.size, place + pixels.size).reshape(values.shape)
        np.testing.assert_array_equal(floats, values)
        place += pixels.size + values.nbytes
    assert place == len(found)


@pytest.mark.parametrize("share", ["compound", "absolute"])
@pytest.mark.parametrize(("split", "name"), [(0, "all"), (4, "upper-8"), (12, "head")])
def test_budgets_move_and_tokens_fall_as_the_trainer_has_it(core: Any, share: str, split: int, name: str) -> None:
    depth, patches, floor, alpha = 12, 196, 0.88, 0.02
    rng = random.Random(3)
    deltas = [[rng.uniform(0, 20) for _ in range(depth)] for _ in range(40)]
    deltas[7][3] = float("nan")
    manifest = {
        "shape": {"depth": depth, "patch_tokens": patches},
        "variants": [{"name": name, "split_block": split}],
        "adaptive": {
            "settings": {"initial_budget": 0.9, "alpha": None, "token_share": share},
            "token_floor": {name: floor},
            "token_multiple": 8,
        },
    }
    plain = [[None if value != value else value for value in each] for each in deltas]
    found = core("tokens", manifest=manifest, variant=name, alpha=alpha, deltas=plain)

    settings = alast.AlastSettings(token_share=share)  # type: ignore[arg-type]
    state = alast.initial_state(depth, floor, settings)
    wanted = []
    for each in [None, *deltas]:
        if each is not None:
            alast.update(state, each, alpha=alpha, floor=floor)
        counts = [patches]
        for count in alast.keep_tokens(state.budgets, patches, split, settings.token_share)[1:]:
            counts.append(min(rounded_up(count), counts[-1]))
        wanted.append(counts)
    assert found["tokens"] == wanted
    assert found["budgets"] == pytest.approx(state.budgets, abs=1e-12)
    assert len({tuple(each) for each in wanted}) > (5 if split < depth else 0)
