"""Pictures for tests, made on the spot."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(width: int = 12, height: int = 10, seed: int = 0) -> Image.Image:
    """An RGB image of noise; other seeds give other pictures."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
