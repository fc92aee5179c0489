"""Every format, colour mode and rotation becomes the RGB image a person sees; what can't is refused by name."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import ExifTags, Image, ImageCms

from edgetune.data import ImageHeader, Preprocess, UnreadableImage, decode_bytes, load_image, open_rgb
from edgetune.data.images import draft_scale
from edgetune.errors import DataError


def pixels(path: Path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- colour modes


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix):
    picture().save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(pixels(tmp_path / f"x.{suffix}"), np.asarray(picture()))


def test_transparent_pixels_are_laid_on_white_and_opaque_ones_kept(tmp_path: Path):
    image = picture(4, 4).convert("RGBA")
    alpha = Image.new("L", (4, 4), 255)
    alpha.paste(0, (0, 0, 2, 4))
    image.putalpha(alpha)
    image.save(tmp_path / "x.png")
    found = pixels(tmp_path / "x.png")
    assert (found[:, :2] == 255).all()
    assert np.array_equal(found[:, 2:], np.asarray(picture(4, 4))[:, 2:])


def test_half_transparent_black_is_grey(tmp_path: Path):
    Image.new("RGBA", (3, 3), (0, 0, 0, 128)).save(tmp_path / "x.png")
    assert np.ptp(pixels(tmp_path / "x.png")) == 0
    assert pixels(tmp_path / "x.png")[0, 0, 0] == pytest.approx(127, abs=1)


@pytest.mark.parametrize("mode", ["LA", "P", "L", "RGB"])
def test_every_kind_of_png_transparency_is_laid_on_white(tmp_path: Path, mode):
    path = tmp_path / "x.png"
    if mode == "LA":
        Image.new("LA", (3, 3), (7, 0)).save(path)
    elif mode == "P":
        image = Image.new("P", (3, 3), 1)
        image.putpalette([0, 0, 0, 200, 10, 10])
        image.save(path, transparency=1)
    else:
        Image.new(mode, (3, 3), 9 if mode == "L" else (9, 9, 9)).save(
            path, transparency=9 if mode == "L" else (9, 9, 9)
        )
    assert (pixels(path) == 255).all()


def test_a_large_transparent_image_is_converted_in_bands_without_seams(tmp_path: Path):
    image = picture(1200, 700).convert("RGBA")
    image.putalpha(picture(1200, 700, seed=1).convert("L"))
    image.save(tmp_path / "x.png", compress_level=1)
    white = Image.new("RGBA", image.size, "white")
    expected = Image.alpha_composite(white, image).convert("RGB")
    assert np.array_equal(pixels(tmp_path / "x.png"), np.asarray(expected))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, suffix):
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"x.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 100.4, 255]], np.float32), [0, 100, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
    ],
)
def test_deep_grey_tiffs_are_scaled_by_the_span_of_their_values(tmp_path: Path, values, expected):
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert pixels(tmp_path / "x.tif")[0, :, 1].tolist() == expected


@pytest.mark.parametrize("worst", [-1.0, 70000.0, float("nan"), float("inf")])
def test_deep_grey_of_no_known_span_is_refused(tmp_path: Path, worst):
    Image.fromarray(np.array([[0.0, 3.0, worst]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match="grey values"):
        open_rgb(tmp_path / "x.tif")


def test_cmyk_bilevel_and_palette_become_rgb(tmp_path: Path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert pixels(tmp_path / "cmyk.tif")[0, 0].tolist() == [255, 0, 0]
    Image.new("1", (8, 8), 1).save(tmp_path / "one.png")
    assert (pixels(tmp_path / "one.png") == 255).all()
    picture().quantize(7).save(tmp_path / "p.gif")
    assert np.array_equal(pixels(tmp_path / "p.gif"), np.asarray(picture().quantize(7).convert("RGB")))


def test_a_lab_tiff_shows_its_colours(tmp_path: Path):
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(Image.new("RGB", (4, 4), (200, 100, 50)), lab).save(tmp_path / "x.tif")
    assert np.abs(pixels(tmp_path / "x.tif").astype(int) - [200, 100, 50]).max() < 10


def test_the_first_frame_of_several_is_used(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for suffix in ("gif", "tif", "webp", "png"):
        path = tmp_path / f"x.{suffix}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
        )
        assert pixels(path)[4, 4].tolist() == [255, 0, 0], suffix


def test_a_phones_jpeg_with_a_second_picture_behind_it_is_read_and_drafted(tmp_path: Path):
    picture(800, 600).save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[picture(80, 60)])
    assert open_rgb(tmp_path / "x.jpg").size == (800, 600)
    assert open_rgb(tmp_path / "x.jpg", decode_budget_bytes=2_000_000).size == (400, 300)


# ---- rotation


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_shows_the_picture_upright(tmp_path: Path, suffix, orientation):
    upright = Image.new("RGB", (32, 16), "blue")
    upright.paste("red", (0, 0, 16, 8))  # top left
    back = {2: 0, 3: 1 + 2, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose: what undoes each orientation
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"x.{suffix}"
    stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    found = pixels(path).astype(int)
    assert found.shape == (16, 32, 3)
    assert np.abs(found - np.asarray(upright)).mean() < 20  # JPEG blurs the edges
    assert np.abs(found[2, 2] - [255, 0, 0]).max() < 10


def test_broken_exif_does_not_lose_the_picture(tmp_path: Path):
    picture().save(tmp_path / "x.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\xff")
    assert open_rgb(tmp_path / "x.jpg").size == picture().size


# ---- files that can't be read


def broken_png(width: int, height: int) -> bytes:
    """A PNG whose header promises `width` x `height` pixels that are not there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    empty = b"IDAT" + zlib.compress(b"")
    return (
        b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", len(empty) - 4) + empty + struct.pack(">I", zlib.crc32(empty))
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_half_an_image_is_refused_by_name(tmp_path: Path, suffix):
    picture(64, 64).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"half.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half\."):
        load_image(tmp_path / f"half.{suffix}", Preprocess(8, 8))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP", b"BM", b"P5 9", b"II*\x00"],
)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, content):
    (tmp_path / "odd.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"odd\.jpg") as caught:
        open_rgb(tmp_path / "odd.jpg")
    assert caught.value.lasting


def test_missing_files_folders_pipes_and_impossible_names_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("missing.jpg", ".", "pipe.jpg", "with\0null.jpg", "x" * 5000):
        with pytest.raises(UnreadableImage):
            open_rgb(tmp_path / name)


def test_no_reader_that_starts_a_program_is_tried(tmp_path: Path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match="not an image in a format"):
        open_rgb(tmp_path / "x.png")


def test_random_damage_never_escapes_as_another_error(tmp_path: Path):
    generator = np.random.default_rng(0)
    path = tmp_path / "x"
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        picture(24, 24).save(tmp_path / f"whole.{suffix}")
        whole = np.frombuffer((tmp_path / f"whole.{suffix}").read_bytes(), dtype=np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = generator.integers(0, len(whole), 6)
            damaged[places] = generator.integers(0, 256, 6)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(UnreadableImage):
                assert open_rgb(path, decode_budget_bytes=2**26).mode == "RGB"


# ---- sizes and budgets


def test_over_pillows_bomb_limit_is_refused_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for width in (40, 90):  # Pillow warns up to twice its limit, and raises beyond
        (tmp_path / "bomb.png").write_bytes(broken_png(width, 30))
        with pytest.raises(UnreadableImage, match=r"bomb\.png.*limit"):
            open_rgb(tmp_path / "bomb.png")


def test_an_image_over_the_budget_is_refused_before_it_is_decoded(tmp_path: Path):
    (tmp_path / "huge.png").write_bytes(broken_png(9000, 9000))  # decoding it would fail with another reason
    with pytest.raises(UnreadableImage, match=r"9000 x 9000 pixels need \d+ MiB") as caught:
        open_rgb(tmp_path / "huge.png", decode_budget_bytes=2**27)
    assert not caught.value.lasting


@pytest.mark.parametrize("orientation", [1, 6])
def test_over_the_budget_a_jpeg_is_drafted_but_never_below_the_models_size(tmp_path: Path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture(1600, 800).save(tmp_path / "x.jpg", exif=exif)
    preprocess = Preprocess(175, 175, crop_pct=0.875)  # resizes the shorter side to 200
    header = ImageHeader(1600, 800, orientation=orientation)
    whole, half, quarter = (decode_bytes(header, scale=scale, preprocess=preprocess) for scale in (1, 2, 4))

    def long_side(budget: int) -> int:
        return max(open_rgb(tmp_path / "x.jpg", preprocess=preprocess, decode_budget_bytes=budget).size)

    assert long_side(whole) == 1600
    assert long_side(whole - 1) == long_side(half) == 800
    assert long_side(half - 1) == long_side(quarter) == 400
    with pytest.raises(UnreadableImage, match="need"):  # an eighth would be smaller than 200
        long_side(quarter - 1)


def test_a_draft_looks_like_the_whole_image(tmp_path: Path):
    picture(40, 30).resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "x.jpg", quality=95)
    preprocess = Preprocess(64, 64, mean=(0, 0, 0), std=(1, 1, 1))
    whole = load_image(tmp_path / "x.jpg", preprocess)
    drafted = load_image(tmp_path / "x.jpg", preprocess, decode_budget_bytes=2_000_000)
    assert not np.array_equal(whole, drafted)
    assert np.abs(whole - drafted).mean() < 0.02


def test_only_jpegs_are_drafted_and_progressive_ones_pay_for_their_coefficients():
    header = ImageHeader(4000, 3000, format="PNG")
    assert draft_scale(header, None, 2**24) is None
    assert draft_scale(ImageHeader(4000, 3000), None, 2**24) == 2
    assert draft_scale(ImageHeader(4000, 3000, codec_bytes=36_000_000), None, 2**24) is None
