"""Make the bundled sample `digits.zip`: scikit-learn's handwritten digits as PNGs in class folders, split 80/20 by
seed.

What comes in: `sklearn.datasets.load_digits()`, 1,797 grey images of 8x8 with 17 levels.
What goes out: `train/0..9/*.png`, `val/0..9/*.png` (8x8, grey, the levels spread over 0..255) and README.md with
attribution.

The same input gives the same bytes: files sorted, dates fixed, nothing compressed (zlib's output differs between its
makers).

    python tools/make_sample.py --output edgetune/assets/digits.zip
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgetune.data import stratified_split

LEVELS = 16  # load_digits counts 0..16 ink cells
README = """\
# Handwritten digits

{images} images of handwritten digits, 8x8 pixels, grey, in `train/` and `val/` (one folder a digit).

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licence CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/); the test part of
it, as scikit-learn (BSD-3-Clause) carries it in `sklearn.datasets.load_digits`.

Changes: the levels 0..16 were spread over 0..255 and written as PNG; the images were split into train and val, class by
class, with seed {seed}. Made by edgetune's `tools/make_sample.py`.
"""


def png(levels: npt.NDArray[np.float64]) -> bytes:
    """One image of levels 0..16, shape (H, W), as an 8-bit grey PNG."""
    data = io.BytesIO()
    Image.fromarray(np.rint(levels * (255 / LEVELS)).astype(np.uint8)).save(data, "PNG", compress_level=0)
    return data.getvalue()


def write_archive(
    output: Path, images: npt.NDArray[np.float64], labels: Sequence[int], *, seed: int = 0, val_share: float = 0.2
) -> None:
    """Write `images` (N, H, W) with their `labels` as a zip of class folders; equal images stay on one side of the
    split.
    """
    pngs = [png(image) for image in images]
    classes = [str(label) for label in range(max(labels) + 1)]
    train, val = stratified_split(pngs, labels, classes, seed=seed, val_share=val_share)
    files = {
        f"{part}/{labels[i]}/{i:04d}.png": pngs[i] for part, places in (("train", train), ("val", val)) for i in places
    }
    files["README.md"] = README.format(images=len(pngs), seed=seed).encode()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, wherever this runs
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("edgetune/assets/digits.zip"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from sklearn.datasets import load_digits

    digits = load_digits()
    write_archive(arguments.output, digits.images, digits.target.tolist(), seed=arguments.seed)
    print(f"{arguments.output}: {len(digits.target)} images, {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
