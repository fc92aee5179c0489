"""The page in headless Chromium: from picture files to downloaded parameters that are torch's, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

pytest.importorskip("torch", reason="torch is what the page is compared with")

import msgspec
from parity import furthest, rate_at, step, torch_side

from edgetune.artifacts.importing import import_parameters
from edgetune.artifacts.manifest import Manifest
from edgetune.artifacts.reading import read_manifest
from edgetune.data.images import load_image, open_rgb
from edgetune.data.preprocess import resize_and_crop
from edgetune.web.folder import PageSettings

CLASSES = ("circle", "square")
KINDS = 4  # of sizes


def picture(kind: str, number: int) -> Image.Image:
    """A bright shape on a noisy ground: photographs' sizes and edges, without a photograph."""
    rng = np.random.default_rng(100 * CLASSES.index(kind) + number)
    width, height = ((120, 90), (90, 120), (101, 101), (80, 210))[number % KINDS]
    image = Image.fromarray(rng.integers(40, 140, (height, width, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
    middle, size = np.array([width, height]) / 2, 0.35 * min(width, height)
    place = (*(middle - size), *(middle + size))
    pen = ImageDraw.Draw(image)
    (pen.ellipse if kind == "circle" else pen.rectangle)(place, fill=tuple(rng.integers(150, 256, 3).tolist()))
    return image


def make_pictures(folder: Path, count: int) -> list[dict[str, Any]]:
    classes = []
    for kind in CLASSES:
        files = [folder / f"{kind}-{number}.png" for number in range(count)]
        for number, file in enumerate(files):
            picture(kind, number).save(file)
        classes.append({"name": kind, "files": files})
    return classes


def images_at(files: list[Path], places: list[int], manifest: Manifest) -> Any:
    return np.stack([load_image(files[place], manifest.preprocess) for place in places])


def trained(browser: Any, folder: Path, tmp_path: Path, settings: dict[str, Any], count: int = 4) -> dict[str, Any]:
    """The whole way; what the page says, what it hands out, and the files it was given."""
    classes = make_pictures(tmp_path, count)
    unseen = tmp_path / "unseen.png"
    picture("square", 40).save(unseen)
    found = browser(
        folder,
        {"act": "open"},
        {"act": "pictures", "classes": classes},
        {"act": "settings", **settings},
        {"act": "train"},
        {"act": "guess", "file": unseen},
        {"act": "download", "button": "#download", "to": tmp_path / "parameters.bin"},
        {"act": "download", "button": "#download-labels", "to": tmp_path / "labels.txt"},
        {"act": "download", "button": "#download-record", "to": tmp_path / "training.json"},
    )
    return {
        "opened": found[0],
        "figures": found[3],
        "guess": found[4],
        "download": found[5],
        "record": json.loads((tmp_path / "training.json").read_text()),
        "files": [file for each in classes for file in each["files"]],
        "unseen": unseen,
    }


@pytest.mark.parametrize("variant", ["all", "upper-2"])
def test_from_png_files_to_downloaded_parameters_sgd_is_torchs(
    browser: Any, page_folder: Path, tmp_path: Path, variant: str
) -> None:
    manifest = read_manifest(page_folder)
    settings = {"variant": variant, "optimizer": "sgd", "rate": 0.01, "epochs": 5, "batch": 8, "prunes": True}
    found = trained(browser, page_folder, tmp_path, settings)
    assert found["opened"]["isolated"]
    assert found["figures"]["phase"] == "Trained"
    steps = found["record"]["state"]["steps"]
    assert len(steps) == 5
    assert min(each["tokens"][-1] for each in steps) < 16
    side, chosen = torch_side(page_folder, manifest, "sgd"), manifest.variant(variant)
    labels = [0] * 4 + [1] * 4
    for number, each in enumerate(steps):
        images = images_at(found["files"], each["places"], manifest)
        rate = rate_at(number, 0.01, round(0.1 * 5), 5)
        other = step(side, chosen, images, [labels[place] for place in each["places"]], each["tokens"], rate)
        assert each["loss"] == pytest.approx(other.loss, abs=1e-5)
    flat = np.fromfile(tmp_path / "parameters.bin", "<f4")
    assert furthest(side, flat, chosen) < 1e-5
    shares = softmax(side.evaluate(images_at([found["unseen"]], [0], manifest))[0, :2])
    assert sorted(found["guess"]["shares"]) == pytest.approx(sorted(shares), abs=1e-4)

    # What it hands out becomes a model folder by the line that it shows.
    assert found["download"]["name"] == f"parameters-{variant}.bin"
    assert f"--variant {variant}" in found["download"]["import_line"]
    import_parameters(tmp_path / "parameters.bin", page_folder, tmp_path / "model", variant, tmp_path / "labels.txt")
    assert (tmp_path / "model" / "labels.txt").read_text() == "circle\nsquare\nclass 2\nclass 3\n"


def softmax(logits: Any) -> list[float]:
    powers = np.exp(logits - logits.max())
    return [float(each) for each in powers / powers.sum()]


def test_adamw_losses_are_torchs_and_a_class_of_five_keeps_one_aside(
    browser: Any, page_folder: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(page_folder)
    settings = {"variant": "upper-2", "optimizer": "adamw", "rate": 0.0001, "epochs": 3, "batch": 4}
    found = trained(browser, page_folder, tmp_path, settings, count=5)
    record = found["record"]
    steps = record["state"]["steps"]
    assert len(steps) == 6
    assert record["aside"] == 2
    assert found["figures"]["right"].endswith("of 2")
    assert len({place for each in steps for place in each["places"]}) == 8
    side, chosen = torch_side(page_folder, manifest, "adamw"), manifest.variant("upper-2")
    labels = [0] * 5 + [1] * 5
    for number, each in enumerate(steps):
        images = images_at(found["files"], each["places"], manifest)
        rate = rate_at(number, 1e-4, round(0.1 * 6), 6)
        other = step(side, chosen, images, [labels[place] for place in each["places"]], each["tokens"], rate)
        assert each["loss"] == pytest.approx(other.loss, abs=1e-5)


def test_pixels_are_pillows_within_1_of_255_and_jpegs_are_near(
    browser: Any, page_folder: Path, tmp_path: Path, record_property: Any
) -> None:
    manifest = read_manifest(page_folder)
    plain = picture("circle", 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = plain.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(plain.size))
    deep = Image.fromarray((np.asarray(plain.convert("L"), np.uint16) * 257).astype(np.uint16))
    pictures: dict[str, Any] = {
        "rgb.png": (plain, {}), "grey.png": (plain.convert("L"), {}), "palette.png": (plain.quantize(32), {}),
        "alpha.png": (alpha, {}), "deep.png": (deep, {}), "bits.png": (plain.convert("1"), {}),
        "turned.png": (plain, {"exif": turned}),
        "plain.jpg": (plain, {"quality": 90}), "turned.jpg": (plain, {"quality": 90, "exif": turned}),
        "large.jpg": (plain.resize((1600, 4200), Image.Resampling.BICUBIC), {"quality": 85}),
    }  # fmt: skip
    files = [tmp_path / name for name in pictures]
    for file, (image, options) in zip(files, pictures.values(), strict=True):
        image.save(file, **options)
    crops = browser(
        page_folder, {"act": "open"}, {"act": "pictures", "classes": [{"name": "a", "files": files}]}, {"act": "crops"}
    )[2]
    apart = {}
    for file, crop in zip(files, crops, strict=True):
        own = np.asarray(resize_and_crop(open_rgb(file), manifest.preprocess), int)
        apart[file.name] = int(np.abs(np.array(crop).reshape(own.shape) - own).max())
    record_property("largest difference of 255, by file", apart)
    print("largest difference of 255, by file:", apart)
    png = {name: value for name, value in apart.items() if name.endswith(".png")}
    assert max(png.values()) <= 1, png
    # Decoders of JPEG differ in rounding and in how they smooth colour: a few steps, never another picture.
    assert max(apart.values()) <= 12, apart


# Of 120 steps 12 warm up: stopped among them and after them.
@pytest.mark.parametrize("stop_at", [5, 41])
def test_a_tab_that_comes_back_goes_on_and_ends_with_the_same_bits(
    browser: Any, page_folder: Path, tmp_path: Path, stop_at: int
) -> None:
    classes = make_pictures(tmp_path, 3)
    settings = {"act": "settings", "variant": "upper-2", "optimizer": "sgd", "rate": 0.02, "epochs": 60, "batch": 4}
    begin = ({"act": "open"}, {"act": "pictures", "classes": classes}, settings)

    def download(name: str) -> dict[str, Any]:
        return {"act": "download", "button": "#download", "to": tmp_path / name}

    browser(page_folder, *begin, {"act": "train"}, download("whole"))
    found = browser(
        page_folder,
        *begin,
        {"act": "train", "stop_at": stop_at},
        {"act": "open"},
        {"act": "bring_back"},
        {"act": "guess", "file": classes[0]["files"][0]},
        {"act": "go_on"},
        download("parts"),
        {"act": "open"},
        {"act": "forget"},
        {"act": "open"},
    )
    assert found[3]["phase"].startswith("Stopped after step")
    assert "A training of circle, square (upper-2): step" in found[4]["kept"]
    assert found[5] == {"pictures": 6, "can_go_on": True}
    assert len(found[6]["shares"]) == 2
    assert found[7]["phase"] == "Trained"
    # By a digest: pytest would compare megabytes of bytes for hours.
    one, other = (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("whole", "parts"))
    assert one == other
    assert "step 120 of 120" in found[9]["kept"]
    assert found[11]["kept"] is None


@pytest.mark.slow
def test_a_model_of_millions_of_parameters_is_stopped_brought_back_gone_on_with_and_predicts(
    browser: Any, ort_web: Path, tmp_path: Path
) -> None:
    """What small models survive: the runtime frees what it has on its stack, when parameters are read or loaded."""
    command = [sys.executable, "-m", "edgetune", "export", "--model", "deit_tiny_patch16_224", "--no-pretrained"]
    command += ["--classes", "3", "--device", "android-4gb", "--split", "8", "--no-verify", "--ort-web", str(ort_web)]
    subprocess.run([*command, "--web", str(tmp_path / "page")], check=True, capture_output=True)
    classes = make_pictures(tmp_path, 4)
    found = browser(
        tmp_path / "page",
        {"act": "open"},
        {"act": "pictures", "classes": classes},
        {"act": "settings", "variant": "upper-4", "optimizer": "sgd", "rate": 0.01, "epochs": 5, "batch": 4},
        {"act": "train", "stop_at": 3},
        {"act": "go_on"},
        {"act": "guess", "file": classes[0]["files"][0]},
        {"act": "open"},
        {"act": "bring_back"},
        {"act": "guess", "file": classes[1]["files"][0]},
        {"act": "download", "button": "#download", "to": tmp_path / "parameters.bin"},
    )
    assert found[3]["phase"].startswith("Stopped after step")
    assert found[4]["phase"] == "Trained"
    assert [found[place]["notice"] for place in (3, 4, 5, 8)] == [None] * 4
    assert len(found[8]["shares"]) == 2
    import_parameters(tmp_path / "parameters.bin", tmp_path / "page", tmp_path / "model", "upper-4")


def test_what_goes_wrong_is_said_and_the_page_goes_on(browser: Any, page_folder: Path, tmp_path: Path) -> None:
    broken, empty, good = tmp_path / "broken.png", tmp_path / "empty.jpg", tmp_path / "good.png"
    broken.write_bytes(b"no picture at all")
    empty.write_bytes(b"")
    picture("circle", 0).save(good)
    one, other, third = (
        {"act": "pictures", "classes": [{"name": "a", "files": [file]}]} for file in (broken, empty, good)
    )
    found = browser(
        page_folder, {"act": "open"}, one, {"act": "notice"}, {"act": "open"}, other, {"act": "notice"}, third, {"act": "crops"}
    )  # fmt: skip
    assert "broken.png is no picture that this browser can read" in found[2]["notice"]
    assert "empty.jpg is an empty file" in found[5]["notice"]
    assert found[6]["lacking"] == "Add pictures to at least two classes."
    assert not found[6]["can"]
    assert len(found[7]) == 1


def with_cap(folder: Path, target: Path, mebibytes: int, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    (target / "page.json").write_bytes(msgspec.json.encode(PageSettings(cap_bytes=mebibytes * 2**20)))
    if changes:
        value = json.loads((target / "manifest.json").read_text())
        (target / "manifest.json").write_text(json.dumps({**value, **changes}))
    return target


def test_memory_over_the_cap_is_refused_in_words_and_less_of_the_model_then_trains(
    browser: Any, page_folder: Path, tmp_path: Path
) -> None:
    folder = with_cap(page_folder, tmp_path / "small", 18)
    classes = make_pictures(tmp_path, 4)
    found = browser(
        folder,
        {"act": "open"},
        {"act": "pictures", "classes": classes},
        {"act": "settings", "variant": "all", "optimizer": "adamw", "epochs": 2, "batch": 8},
        {"act": "train"},
        {"act": "settings", "variant": "head", "optimizer": "adamw", "epochs": 2, "batch": 2},
        {"act": "train"},
    )
    assert "Memory was refused while" in found[3]["notice"]
    assert "the cap is 18 MiB" in found[3]["notice"]
    assert found[5]["phase"] == "Trained"
    assert int(found[5]["heap"].split()[0]) <= 18


def test_artifacts_of_another_version_are_refused_in_words(browser: Any, page_folder: Path, tmp_path: Path) -> None:
    folder = with_cap(page_folder, tmp_path / "other", 64, runtime="1.20.0")
    found = browser(folder, {"act": "open"}, {"act": "notice"})
    assert "artifacts are of another version: format 1 (onnxruntime-training), runtime 1.20.0" in found[1]["notice"]


def test_it_fits_a_phone_and_every_control_has_a_name(browser: Any, page_folder: Path, tmp_path: Path) -> None:
    found = browser(
        page_folder,
        {"act": "open"},
        {"act": "pictures", "classes": make_pictures(tmp_path, 3)},
        {"act": "camera", "shots": 2},
        {"act": "settings", "epochs": 3},
        {"act": "train"},
        {"act": "guess", "file": tmp_path / "square-1.png"},
        {"act": "layout", "width": 390},
        {"act": "layout", "width": 320},
        {"act": "layout", "width": 1200},
    )
    assert found[2]["taken"] == 2
    assert found[4]["said"] == "Trained"
    for layout in found[6:]:
        assert layout["overflow"] <= 0
        assert layout["nameless"] == []
        assert layout["small"] == []
    dark = browser(page_folder, {"act": "open"}, {"act": "layout", "width": 390}, scheme="dark")[1]
    grounds = [[int(part) for part in layout["ground"].strip("rgb()").split(",")] for layout in (found[6], dark)]
    assert min(grounds[0]) > 200
    assert max(grounds[1]) < 60
