"""What a run's process takes beside its engine, done once on next to nothing: decoding, random numbers, a classifier.

Code and modules that come after the runtime was measured would count as training, and no model of a step knows them: 3 to 4
MiB of them without this (x86, numpy 2.4, Pillow 13).
"""

from __future__ import annotations

import io
import sys

import numpy as np
from PIL import Image

from edgetune.data import Preprocess, normalise, resize_and_crop
from edgetune.probes import RidgeClassifier, told_right

_SIDE = 64
# More than the table of interned strings has free places for where a run begins.
_NAMES = 100_000


def warm_up_data() -> None:
    """Decode, resize and normalise a picture of each common format; draw; fit a classifier."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    how = Preprocess(width_px=_SIDE // 2, height_px=_SIDE // 2)
    for name in ("PNG", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, name)
        with Image.open(file) as image:
            image.draft("RGB", (_SIDE, _SIDE))
            values = normalise(resize_and_crop(image.convert("RGB"), how), how)
    features = values.reshape(-1, 8)[:32]
    labels = rng.permutation(np.arange(len(features)) % 2)
    fit = RidgeClassifier(features.shape[1], 2)
    fit.add(features, labels)
    fit.fitted()
    told_right(features, labels)


def settle_interned_strings() -> None:
    """Let Python's table of interned strings grow now, if it is about to.

    Every part of a path is interned while it lives, and leaves a used-up place behind: after some hundred steps the table is
    built anew, at twice its size (2 MiB more, all at once), in the middle of training. After this it has room again.
    """
    for number in range(_NAMES):
        sys.intern(f"edgetune {number}")
