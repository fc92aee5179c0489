"""From a file to an RGB image: every format, colour mode and rotation in one place, within a number of bytes.

What is unusual here:
- The file's header says how many bytes decoding will need before a pixel is decoded. Over the budget a JPEG is
  decoded at 1/2, 1/4 or 1/8 (Pillow's `draft`, libjpeg's scaled DCT), never below the size the model's preprocessing
  resizes to; anything else is refused. Within the budget an image is always decoded in full, so that ordinary images
  equal plain timm's.
- Transparent pixels are laid on white, as every viewer shows them. `convert("RGB")`, which timm uses, would show the
  colour hidden beneath instead; opaque images are the same in both.
- 16-bit grey is scaled to 8 bits. `convert` clips it, so that nearly everything turns white.
- The picture is turned as its EXIF orientation says, in training and prediction alike.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast

import numpy as np
from msgspec import Meta, Struct, structs
from PIL import ExifTags, Image, UnidentifiedImageError

from edgetune.data.preprocess import Array, Preprocess, Size, computed_size, normalise, resize_and_crop, resized_size
from edgetune.errors import DataError
from edgetune.units import format_bytes

# Image.open tries nothing else: some of Pillow's other readers start programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
_JPEG = ("JPEG", "MPO")  # Pillow names a JPEG with a second picture behind it MPO
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # a pixel in Pillow; others 4
_BAND_PIXELS = 2**18  # modes that need arithmetic are converted this many pixels at a time
_BAND_BYTES = 24  # five copies of such a band at most, and a little
_BASE_BYTES = 1024 * 1024  # file buffers, codec tables
_UNIDENTIFIED = "not an image in a format edgetune reads (PNG, JPEG, WebP, BMP, TIFF, GIF, PPM), or broken at its start"

_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(DataError):
    """One image can't be used. `lasting` is False where another try may go better (permissions, memory, a budget)."""

    def __init__(self, path: str, reason: str, *, lasting: bool = True) -> None:
        super().__init__(f"{shown(path)}: {reason}")
        self.path = path
        self.reason = reason
        self.lasting = lasting


class ImageHeader(Struct, frozen=True, array_like=True):
    """What a file's header tells before it is decoded. `orientation` is EXIF's, 1 when absent."""

    width: Annotated[int, Meta(ge=1)]
    height: Annotated[int, Meta(ge=1)]
    mode: str = "RGB"
    format: str = "JPEG"
    orientation: int = 1
    transparent: bool = False
    codec_bytes: int = 0  # what the decoder holds beside the picture, drafted or not


def shown(name: str) -> str:
    """`name` fit to be printed: bytes that are not UTF-8 and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def decode_bytes(header: ImageHeader, *, scale: int = 1, preprocess: Preprocess | None = None) -> int:
    """Bytes that decoding, converting, turning and resizing one image hold at once, at most.

    `scale` is the JPEG draft's denominator. Without `preprocess` the resized copy is left out.
    Source: peak RSS of Pillow 13 on 12-megapixel files of each format; a test measures it again.
    """
    width, height = -(-header.width // scale), -(-header.height // scale)
    pixels = width * height
    stored = pixels * _STORED_BYTES.get(header.mode, 4)
    rgb = 4 * pixels  # Pillow pads RGB to four bytes
    bands = _BAND_BYTES * min(pixels, _BAND_PIXELS) if header.transparent or _is_deep(header.mode) else 0
    converted = stored + rgb + bands if header.mode != "RGB" or header.transparent else rgb
    peaks = [stored + header.codec_bytes, converted]
    if header.orientation != 1:
        peaks.append(2 * rgb)
    if preprocess is not None:
        turned = _turned((width, height), header.orientation)
        new_width, new_height = computed_size(turned, preprocess)
        peaks.append(rgb + 4 * new_width * (turned[1] + new_height) + 12 * preprocess.width_px * preprocess.height_px)
    return max(peaks) + _BASE_BYTES


def peak_decode_bytes(largest_pixels: int) -> int:
    """Bytes that decoding any image of so many pixels needs at most; WebP is the format that needs most."""
    return 22 * largest_pixels + _BAND_BYTES * _BAND_PIXELS + _BASE_BYTES


def draft_scale(header: ImageHeader, preprocess: Preprocess | None, decode_budget_bytes: int | None) -> int | None:
    """The smallest of 1, 2, 4, 8 at which an image fits the budget; None if none does.

    Only JPEGs go beyond 1, and only while both sides stay at least as long as what they are resized to.
    """
    size = _turned((header.width, header.height), header.orientation)
    needed = resized_size(size, preprocess) if preprocess else (1, 1)
    for scale in (1, 2, 4, 8) if header.format in _JPEG else (1,):
        if scale > 1 and (size[0] < scale * needed[0] or size[1] < scale * needed[1]):
            return None
        needed_bytes = decode_bytes(header, scale=scale, preprocess=preprocess)
        if decode_budget_bytes is None or needed_bytes <= decode_budget_bytes:
            return scale
    return None


def check_size(path: str, header: ImageHeader, preprocess: Preprocess | None, decode_budget_bytes: int | None) -> int:
    """The draft scale to decode `path` at. Raises: UnreadableImage over Pillow's bomb limit or over the budget."""
    size = f"{header.width} x {header.height} pixels"
    if Image.MAX_IMAGE_PIXELS is not None and header.width * header.height > Image.MAX_IMAGE_PIXELS:
        limit = f"Pillow's limit of {Image.MAX_IMAGE_PIXELS // 10**6} megapixels"
        raise UnreadableImage(path, f"{size} are over {limit}. Make it smaller.", lasting=False)
    scale = draft_scale(header, preprocess, decode_budget_bytes)
    if scale is None:
        needs = format_bytes(decode_bytes(header, preprocess=preprocess))
        may = format_bytes(decode_budget_bytes or 0)
        raise UnreadableImage(
            path, f"{size} need {needs} to decode, and {may} may be used. Make it smaller.", lasting=False
        )
    return scale


def load_image(
    path: str | os.PathLike[str], preprocess: Preprocess, *, flip: bool = False, decode_budget_bytes: int | None = None
) -> Array:
    """One file -> float32 (3, height_px, width_px), as timm's evaluation transform makes it.

    Raises: UnreadableImage (a DataError) naming the file.
    """
    image = open_rgb(path, preprocess=preprocess, decode_budget_bytes=decode_budget_bytes)
    return normalise(resize_and_crop(image, preprocess), preprocess, flip=flip)


def open_rgb(
    path: str | os.PathLike[str], *, preprocess: Preprocess | None = None, decode_budget_bytes: int | None = None
) -> Image.Image:
    """One file, decoded in full (the first frame of several), turned upright, in mode RGB.

    `preprocess` bounds how small a draft may be when the budget asks for one.
    Raises: UnreadableImage (a DataError) naming the file: missing, empty, broken, too large, not an image.
    """
    return decode(path, preprocess=preprocess, decode_budget_bytes=decode_budget_bytes)[0]


def decode(
    path: str | os.PathLike[str], *, preprocess: Preprocess | None = None, decode_budget_bytes: int | None = None
) -> tuple[Image.Image, ImageHeader]:
    """`open_rgb`, and the header that was found."""
    try:
        return _open_and_decode(os.fspath(path), preprocess, decode_budget_bytes)
    except Warning:  # only where warnings were made errors; a complaint about metadata loses no picture
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _open_and_decode(os.fspath(path), preprocess, decode_budget_bytes)


def _open_and_decode(
    name: str, preprocess: Preprocess | None, decode_budget_bytes: int | None
) -> tuple[Image.Image, ImageHeader]:
    try:
        status = Path(name).stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise UnreadableImage(name, "not a file")
        if status.st_size == 0:
            raise UnreadableImage(name, "an empty file")
        # A handle and not a name: given a name, Pillow maps some files, and one cut short later would kill the process.
        with Path(name).open("rb") as file, Image.open(file, formats=FORMATS) as image:
            return _decode(name, image, status.st_size, preprocess, decode_budget_bytes)
    except (UnreadableImage, Warning):
        raise
    except Image.DecompressionBombError as error:
        limit = f"Pillow's limit of {(Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels"
        raise UnreadableImage(name, f"over {limit}. Make it smaller.", lasting=False) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, _UNIDENTIFIED) from error
    except MemoryError as error:
        raise UnreadableImage(name, "not enough memory to decode it", lasting=False) from error
    except OSError as error:
        reason = error.strerror if error.errno and error.strerror else str(error)
        raise UnreadableImage(name, shown(reason), lasting=not error.errno) from error
    except Exception as error:  # Pillow's readers raise nearly everything on broken files
        raise UnreadableImage(name, shown(f"broken: {error}")[:200]) from error


def _decode(
    name: str, image: Image.Image, file_bytes: int, preprocess: Preprocess | None, decode_budget_bytes: int | None
) -> tuple[Image.Image, ImageHeader]:
    header = ImageHeader(
        width=image.width,
        height=image.height,
        mode=image.mode,
        format=image.format or "",
        orientation=1 if image.format == "PNG" else _orientation(image),
        transparent=_transparent(image),
        codec_bytes=_codec_bytes(image, file_bytes),
    )
    scale = check_size(name, header, preprocess, decode_budget_bytes)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    orientation = _orientation(image)  # after loading: a PNG may carry it at its end, and TIFFs are upright by now
    if orientation != 1 and orientation != header.orientation:
        header = structs.replace(header, orientation=orientation)
        check_size(name, header, preprocess, decode_budget_bytes)
    rgb = _to_rgb(image)
    turn = _TURNS.get(orientation)
    return (rgb.transpose(turn) if turn is not None else rgb), header


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 where it is absent or broken, which is no reason to lose the picture."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in _TURNS else 1
    except Exception:
        return 1


def _turned(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation >= 5 else size


def _codec_bytes(image: Image.Image, file_bytes: int) -> int:
    pixels = image.width * image.height
    if image.format == "WEBP":  # two canvases, the frame as bytes, the decoder's own planes, the whole file
        return 14 * pixels + file_bytes
    if image.format == "TIFF" and image.info.get("compression") != "raw":  # one strip may hold it all, packed and not
        return 4 * pixels + file_bytes
    if image.format not in _JPEG or not image.info.get("progressive"):
        return 0
    # A progressive JPEG keeps two bytes a DCT coefficient until its last scan; components are rounded up to blocks.
    samples = [(h, v) for _, h, v, _ in cast("list[tuple[int, int, int, int]]", getattr(image, "layer", []))]
    across, down = max((h for h, _ in samples), default=1), max((v for _, v in samples), default=1)
    units = -(-image.width // (8 * across)) * -(-image.height // (8 * down))
    return sum(2 * 64 * h * v * units for h, v in samples)


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image.mode):
        factor = _grey_factor(image)
        return _in_bands(image, lambda band: _grey_to_8_bits(band, factor))
    if _transparent(image):
        return _in_bands(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_deep(mode: str) -> bool:
    """Grey of 16 or 32 bits, integer or float."""
    return mode == "F" or mode.startswith("I")


def _transparent(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _in_bands(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a few rows at a time, so that the intermediate copies stay small."""
    rows = max(1, _BAND_PIXELS // image.width)
    converted = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        converted.paste(to_rgb(band), (0, top))
    return converted


def _on_white(band: Image.Image) -> Image.Image:
    if band.mode in ("RGBa", "La"):  # premultiplied, as some TIFFs are
        band = band.convert("RGBA" if band.mode == "RGBa" else "LA")
    band = band.convert("RGBA")
    white = Image.new("RGBA", band.size, "white")
    return Image.alpha_composite(white, band).convert("RGB")


def _grey_factor(image: Image.Image) -> float:
    """What brings a pixel of a grey image deeper than 8 bits to 0..255.

    "I;16", and "I" as some Pillows read 16-bit PNG and PGM, span 0..65535. Floats and TIFFs of 32 bits do not tell
    their span: 0..1 (floats), 0..255 and 0..65535 are recognised by the values.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        return 255 / 65535
    low, high = cast("tuple[float, float]", image.getextrema())
    if low >= 0 and high <= 1 and image.mode == "F":
        return 255
    if low >= 0 and high <= 255:
        return 1
    if low >= 0 and high <= 65535:
        return 255 / 65535
    raise ValueError(f"grey values from {low:g} to {high:g}; 0..1, 0..255 and 0..65535 are understood")


def _grey_to_8_bits(band: Image.Image, factor: float) -> Image.Image:
    values = np.asarray(band, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("grey values that are not numbers")
    return Image.fromarray(np.rint(values * np.float32(factor)).clip(0, 255).astype(np.uint8)).convert("RGB")
