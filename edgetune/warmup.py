"""What a run's process pages in beside its engine, done once on next to nothing: decoding, random numbers, a classifier.

Code and modules that come after the runtime was measured would count as training, and no model of a step knows them: 3 to 4
MiB of them without this (x86, numpy 2.4, Pillow 13).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from edgetune.data import Preprocess, normalise, resize_and_crop
from edgetune.probes import RidgeClassifier, told_right

_SIDE = 64


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
