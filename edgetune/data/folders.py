"""A folder of images -> what trains and what validates: finds both, checks every image, says what was left out and why.

Two layouts: `train/` and `val/` (also `valid/`, `validation/`) with one folder a class in each, or the class folders
alone (or in `train/` only), split by seed. The classes are train's, sorted by name; val never shifts them.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edgetune.data.draws import stratified_split
from edgetune.data.files import ClassFiles, class_folders, plural
from edgetune.data.images import ImageHeader, decode_bytes, draft_scale, shown
from edgetune.data.layout import find_layout, known_classes, list_files, refuse_lost, refuse_unusable
from edgetune.data.pictures import Pictures
from edgetune.data.preprocess import Preprocess
from edgetune.data.scan import scan
from edgetune.errors import DataError, UsageError

_NAMED_AT_MOST = 5


class ImageSet(Struct, frozen=True):
    """Images and their labels. `root` is absolute, `paths` are relative to it, with "/", as the file system spells
    them.

    `contents` tells the pictures apart: a digest of each file's bytes, and the scale at which it is decoded where that is
    not full. Empty where nobody looked. `places`: of each image, its number among `Pictures`.
    """

    root: str
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    contents: tuple[str, ...] = ()
    places: array[int] | None = None


class BadImage(Struct, frozen=True):
    """An image that was skipped; `path` is fit to be printed."""

    path: str
    reason: str


class DataFolder(Struct, frozen=True):
    """What `open_folder` found. `notes` are sentences for the user.

    `largest_pixels` counts the largest image's pixels; `decode_peak_bytes` is what the most expensive image needs to be
    decoded within the budget (JPEG drafts counted).
    """

    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    notes: tuple[str, ...]
    bad: tuple[BadImage, ...]
    largest_pixels: int
    decode_peak_bytes: int


class _Image(Struct, frozen=True):
    path: str
    label: int
    digest: str
    header: ImageHeader
    place: int


class _Options(Struct, frozen=True):
    """How images are checked: `open_folder`'s own options, handed down."""

    root: str
    max_bad: float
    preprocess: Preprocess | None
    decode_budget_bytes: int | None
    cache_dir: Path | None
    progress: Callable[[int, int], None] | None
    pictures: Pictures | None = None


def open_folder(
    root: str | os.PathLike[str],
    *,
    seed: int,
    val_share: float = 0.2,
    max_bad: float = 0.01,
    decode_budget_bytes: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    preprocess: Preprocess | None = None,
    pictures: Pictures | None = None,
) -> DataFolder:
    """Find, check and split the images under `root`.

    `max_bad` is the share of images that may be unreadable, and the share of a class that may be in formats that
    can't be read. `preprocess` makes the memory figures exact; without it the resized copy is not counted. `pictures`
    (with `preprocess`) keeps what was decoded for `load_batch`.
    Raises: DataError for anything that would make the run start on other data than was meant; UsageError for a bad
    share.
    """
    how = _checked_options(root, max_bad, preprocess, decode_budget_bytes, cache_dir, progress, pictures)
    train_root, val_root, notes = find_layout(how.root)
    train_files = list_files(how.root, train_root, notes)
    refuse_lost(train_files, max_bad)
    refuse_unusable(train_root, train_files)
    classes = tuple(train_files)
    val_files: dict[str, ClassFiles] = {}
    if val_root:
        val_files = known_classes(list_files(how.root, val_root, notes), classes, val_root)
        refuse_lost(val_files, max_bad)
    (train, val), bad = _examine([train_files, val_files], classes, how)
    _refuse_emptied(classes, train)
    if val_root:
        _refuse_nothing(val_root, val)
    else:
        train, val = _split(classes, train, seed, val_share, notes)
    return _folder(classes, train, val, notes, bad, how)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few class names, in words."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def class_names(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """The classes that `open_folder` would find, in its order; no image is opened. Raises: DataError as there."""
    path = os.fspath(root)
    notes: list[str] = []
    train, _, _ = find_layout(path)
    files = list_files(path, train, notes)
    refuse_unusable(train, files)
    return tuple(files)


def open_for_evaluation(
    root: str | os.PathLike[str],
    classes: Sequence[str],
    *,
    max_bad: float = 0.01,
    decode_budget_bytes: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    preprocess: Preprocess | None = None,
) -> DataFolder:
    """All images of `val/`, or of the class folders in `root` where there is no `val/`, labelled by a trained
    model's `classes`.

    Returns: a DataFolder whose `train` is empty. Raises: DataError as `open_folder`, and for a class the model
    doesn't know.
    """
    how = _checked_options(root, max_bad, preprocess, decode_budget_bytes, cache_dir, progress)
    _, val_root, notes = find_layout(how.root, evaluating=True)
    val_root = val_root or how.root
    # `classes` come from a report or labels.txt, where names are printable; folders are matched in that spelling.
    spelling = {shown(name): name for name in class_folders(val_root)}
    own = tuple(spelling.get(name, name) for name in classes)
    files = known_classes(list_files(how.root, val_root, notes), own, val_root)
    refuse_lost(files, max_bad)
    (val,), bad = _examine([files], own, how)
    _refuse_nothing(val_root, val)
    return _folder(own, [], val, notes, bad, how)


def class_weights(labels: Sequence[int], classes: int) -> npt.NDArray[np.float32]:
    """Balanced weights of the loss, float32 (classes,): n / (k x count), k being the classes that occur.

    Their mean over the samples is 1, so the learning rate keeps its meaning. A class without images gets 0.
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes).astype(np.float64)
    present = counts > 0
    weights = np.zeros(classes, dtype=np.float32)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


def _checked_options(
    root: str | os.PathLike[str],
    max_bad: float,
    preprocess: Preprocess | None,
    decode_budget_bytes: int | None,
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None,
    pictures: Pictures | None = None,
) -> _Options:
    if not 0 <= max_bad <= 1:
        raise UsageError(f"the share of bad images allowed is {max_bad}. Use a number from 0 to 1, such as 0.01.")
    path = os.path.abspath(root)  # noqa: PTH100 - takes ".." out and leaves links as the user named them
    if os.path.lexists(path) and not os.path.isdir(path):  # noqa: PTH112 - never raises
        raise DataError(f"{shown(path)} is not a folder. Name a folder of images; an archive has to be unpacked first.")
    return _Options(path, max_bad, preprocess, decode_budget_bytes, cache_dir, progress, pictures)


def _examine(
    parts: Sequence[dict[str, ClassFiles]], classes: tuple[str, ...], how: _Options
) -> tuple[list[list[_Image]], list[BadImage]]:
    """Decode every image of every part. Raises: DataError when more than the share allowed is bad."""
    labels = {name: label for label, name in enumerate(classes)}
    listed = [
        (part, labels[name], image)
        for part, files in enumerate(parts)
        for name, found in files.items()
        for image in found.images
    ]
    records = scan(
        how.root,
        [image for _, _, image in listed],
        preprocess=how.preprocess,
        decode_budget_bytes=how.decode_budget_bytes,
        cache_dir=how.cache_dir,
        progress=how.progress,
        pictures=how.pictures,
    )
    good: list[list[_Image]] = [[] for _ in parts]
    bad = []
    for place, ((part, label, image), record) in enumerate(zip(listed, records, strict=True)):
        if record.header is None:
            bad.append(BadImage(shown(image.path), record.reason))
        else:
            good[part].append(_Image(image.path, label, record.digest, record.header, place))
    if len(bad) > how.max_bad * len(listed):
        raise DataError(
            f"{len(bad)} of {len(listed)} images can't be used, more than the share allowed ({how.max_bad:g}): "
            f"{_named(bad)}. Mend them or take them away, or allow it with a larger --max-bad."
        )
    return good, bad


def _named(bad: Sequence[BadImage]) -> str:
    more = f"; and {len(bad) - _NAMED_AT_MOST} more" if len(bad) > _NAMED_AT_MOST else ""
    return "; ".join(f"{image.path} ({image.reason})" for image in bad[:_NAMED_AT_MOST]) + more


def _refuse_emptied(classes: tuple[str, ...], train: Sequence[_Image]) -> None:
    left = {image.label for image in train}
    empty = [shown(name) for label, name in enumerate(classes) if label not in left]
    if empty:
        raise DataError(f"every image of class {empty[0]!r} is unreadable. Mend them, or take the folder away.")


def _refuse_nothing(folder: str, val: Sequence[_Image]) -> None:
    if not val:
        raise DataError(f"every image in {shown(folder)} is unreadable. Mend them, or name another folder.")


def _split(
    classes: tuple[str, ...], images: list[_Image], seed: int, val_share: float, notes: list[str]
) -> tuple[list[_Image], list[_Image]]:
    train, val = stratified_split(
        [image.digest for image in images],
        [image.label for image in images],
        [shown(name) for name in classes],
        seed=seed,
        val_share=val_share,
    )
    notes.append(
        f"There is no val/: {len(train)} images train and {len(val)} validate, split class by class with seed {seed}."
    )
    return [images[i] for i in train], [images[i] for i in val]


def _folder(
    classes: tuple[str, ...],
    train: Sequence[_Image],
    val: Sequence[_Image],
    notes: list[str],
    bad: Sequence[BadImage],
    how: _Options,
) -> DataFolder:
    headers = [image.header for image in (*train, *val)]
    scales = [draft_scale(header, how.preprocess, how.decode_budget_bytes) or 1 for header in headers]
    skipped = [f"{plural(len(bad), 'unreadable image')} skipped: {_named(bad)}."] if bad else []
    return DataFolder(
        classes=tuple(shown(name) for name in classes),
        train=_image_set(how.root, train, scales),
        val=_image_set(how.root, val, scales[len(train) :]),
        notes=(*notes, *skipped, *_missing(classes, val), *_twice(train, val)),
        bad=tuple(bad),
        largest_pixels=max(header.width * header.height for header in headers),
        decode_peak_bytes=max(
            decode_bytes(header, scale=scale, preprocess=how.preprocess)
            for header, scale in zip(headers, scales, strict=True)
        ),
    )


def _image_set(root: str, images: Sequence[_Image], scales: Sequence[int]) -> ImageSet:
    return ImageSet(
        root,
        tuple(image.path for image in images),
        tuple(image.label for image in images),
        tuple(
            image.digest if scale == 1 else f"{image.digest}/{scale}"
            for image, scale in zip(images, scales[: len(images)], strict=True)
        ),
        array("i", [image.place for image in images]),
    )


def _missing(classes: tuple[str, ...], val: Sequence[_Image]) -> list[str]:
    present = {image.label for image in val}
    missing = [shown(name) for label, name in enumerate(classes) if label not in present]
    if not missing:
        return []
    return [f"Without images to validate on: {', '.join(missing)}. Their accuracy can't be measured."]


def _twice(train: Sequence[_Image], val: Sequence[_Image]) -> list[str]:
    """Pictures that are in train and in val, or in two classes: linked or copied, found by their bytes."""
    notes = []
    trained = {image.digest: image for image in train}
    shared = [image for image in val if image.digest in trained]
    if shared:
        first, other = shown(shared[0].path), shown(trained[shared[0].digest].path)
        notes.append(
            f"{len(shared)} of {len(val)} validation images also in train ({first} is the same picture as {other}): "
            "the accuracy will look better than it is."
        )
    labels: dict[str, _Image] = {}
    torn = [image for image in (*train, *val) if labels.setdefault(image.digest, image).label != image.label]
    if torn:
        first, other = shown(torn[0].path), shown(labels[torn[0].digest].path)
        notes.append(f"{plural(len(torn), 'image')} in two classes at once ({first} is the same picture as {other}).")
    return notes
