"""`decode_bytes` is never below what decoding takes from the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

WIDTH, HEIGHT = 2000, 1400

MEASURE = """
import json, sys
from edgetune.data.images import decode, decode_bytes, draft_scale, load_image
from edgetune.data import Preprocess, peak_decode_bytes

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

preprocess = Preprocess(224, 224)
load_image(sys.argv[1], preprocess)  # whatever Pillow loads once
found = {}
for path in sys.argv[2:]:
    for budget in (None, 2**23):
        try:
            header = decode(path, preprocess=preprocess, decode_budget_bytes=budget)[1]
        except Exception:
            continue  # over the budget
        scale = draft_scale(header, preprocess, budget)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = resident("VmRSS")
        load_image(path, preprocess, decode_budget_bytes=budget)
        taken = resident("VmHWM") - before
        predicted = decode_bytes(header, scale=scale, preprocess=preprocess)
        found[f"{path} at {scale}"] = taken, predicted, peak_decode_bytes(header.width * header.height)
print(json.dumps(found))
"""


@pytest.fixture
def photographs(tmp_path: Path) -> list[str]:
    base = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    image = Image.fromarray(base).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    with_alpha = image.convert("RGBA")
    with_alpha.putalpha(image.convert("L"))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
    quick = {"compress_level": 1}
    for name, picture, options in [
        ("plain.jpg", image, {}),
        ("turned.jpg", image, {"exif": turned}),
        ("progressive.jpg", image, {"progressive": True, "subsampling": 0}),
        ("cmyk.jpg", image.convert("CMYK"), {}),
        ("plain.png", image, quick),
        ("alpha.png", with_alpha, quick),
        ("palette.png", image.quantize(32), quick),
        ("deep.png", deep, quick),
        ("plain.webp", image, {"method": 0}),
        ("alpha.webp", with_alpha, {"method": 0}),
        ("raw.tif", image, {}),
        ("packed.tif", image, {"compression": "tiff_adobe_deflate", "strip_size": 10**9}),
        ("turned.tif", image, {"exif": turned}),
        ("plain.bmp", image, {}),
        ("plain.gif", image.quantize(32), {}),
        ("deep.tif", Image.fromarray(np.asarray(image.convert("L")).astype(np.float32)), {}),
    ]:
        picture.save(tmp_path / name, **options)
    return [str(path) for path in sorted(tmp_path.iterdir())]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak")
@pytest.mark.slow
def test_predicted_decode_bytes_are_never_below_measured(photographs: list[str], tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "warm.tif", compression="tiff_adobe_deflate")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "warm.tif"), *photographs]
    # Every large block goes back to the kernel when it is freed, or one image would be decoded in what another left.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found = json.loads(output)
    assert len(found) >= len(photographs) + 3  # three JPEGs also as drafts
    for name, (taken, predicted, worst) in found.items():
        print(f"{Path(name).name:24} took {taken / 2**20:6.1f} MiB of {predicted / 2**20:6.1f} predicted")
        assert taken <= predicted <= worst, name
        if taken > 2**23:
            assert predicted < 2 * taken, name
