"""Decoded images are kept on disk while a run needs them: what was decoded once is read, to the last bit, or decoded again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from doubles import make_images
from PIL import Image

from edgetune.data import Pictures, Preprocess, batches, load_batch, open_folder, scan

PREPROCESS = Preprocess(8, 12)
EACH = 8 * 12 * 3


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.full((8, 12, 3), number, np.uint8))


def test_what_was_put_is_there_and_nothing_else(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, PREPROCESS, 100 * EACH)
    for number in (3, 0):
        pictures.put(number, picture(number))
    pictures.put(3, picture(9))  # it is there already
    for number in (3, 0):
        found = pictures.get(number)
        assert found is not None
        assert np.array_equal(found, np.asarray(picture(number)))
    assert pictures.get(1) is None
    assert pictures.get(4) is None
    assert pictures.written_bytes == 2 * EACH


def test_no_file_has_a_name(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, PREPROCESS, 100 * EACH)
    pictures.put(0, picture(0))
    assert list(tmp_path.iterdir()) == []


def test_over_the_limit_nothing_is_written(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, PREPROCESS, 2 * EACH + EACH // 2)
    for number in range(4):
        pictures.put(number, picture(number))
    assert [pictures.get(number) is not None for number in range(4)] == [True, True, False, False]
    assert pictures.written_bytes == 2 * EACH
    none = Pictures(tmp_path, PREPROCESS, EACH - 1)
    none.put(0, picture(0))
    assert none.get(0) is None


def test_a_folder_that_can_not_be_written_to_holds_none(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path / "none", PREPROCESS, 100 * EACH)
    pictures.put(0, picture(0))
    assert pictures.get(0) is None
    pictures.close()


def test_once_closed_all_is_decoded_again(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, PREPROCESS, 100 * EACH)
    pictures.put(0, picture(0))
    pictures.close()
    pictures.close()
    pictures.put(1, picture(1))
    assert pictures.get(0) is None
    assert pictures.get(1) is None


def test_the_scan_and_the_loading_decode_each_image_once_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", {"cat": 6, "dog": 5})
    plain = open_folder(images, seed=0, preprocess=PREPROCESS)
    opened: list[str] = []
    monkeypatch.setattr(scan, "decode", counted(opened, scan.decode))
    monkeypatch.setattr(batches, "open_rgb", counted(opened, batches.open_rgb))
    for pictures, times in ((Pictures(tmp_path, PREPROCESS, 100 * EACH), 1), (Pictures(tmp_path, PREPROCESS, 0), 3)):
        opened.clear()
        folder = open_folder(images, seed=0, preprocess=PREPROCESS, pictures=pictures)
        assert folder == plain
        for part in (folder.train, folder.val):
            indices = range(len(part.paths))
            for epoch in (0, 1):
                kept, labels = load_batch(part, indices, PREPROCESS, seed=0, epoch=epoch, hflip=0.5, pictures=pictures)
                anew, same = load_batch(part, indices, PREPROCESS, seed=0, epoch=epoch, hflip=0.5)
                assert np.array_equal(kept, anew)
                assert np.array_equal(labels, same)
        without = 2 * 11  # what `anew` opened
        assert len(opened) == 11 * times + without


def test_an_image_that_an_earlier_run_checked_is_decoded_at_its_first_use_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", {"cat": 6, "dog": 5})
    open_folder(images, seed=0, cache_dir=tmp_path / "c")
    pictures = Pictures(tmp_path, PREPROCESS, 100 * EACH)
    train = open_folder(images, seed=0, preprocess=PREPROCESS, cache_dir=tmp_path / "c", pictures=pictures).train
    opened: list[str] = []
    monkeypatch.setattr(batches, "open_rgb", counted(opened, batches.open_rgb))
    first, _ = load_batch(train, [0, 1], PREPROCESS, seed=0, epoch=0, pictures=pictures)
    again, _ = load_batch(train, [0, 1], PREPROCESS, seed=0, epoch=0, pictures=pictures)
    assert np.array_equal(first, again)
    assert len(opened) == 2


def test_whole_images_are_decoded_each_time_for_an_augmentation(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", {"cat": 6, "dog": 5})
    pictures = Pictures(tmp_path, PREPROCESS, 100 * EACH)
    train = open_folder(images, seed=0, preprocess=PREPROCESS, pictures=pictures).train
    seen = []

    def transform(image: Image.Image, epoch: int, index: int) -> np.ndarray:
        seen.append(image.size)
        return np.zeros((3, 8, 12), np.float32)

    load_batch(train, [0], PREPROCESS, seed=0, epoch=0, transform=transform, pictures=pictures)
    with Image.open(images / train.paths[0]) as image:
        assert seen == [image.size]


def counted(opened: list[str], function):  # type: ignore[no-untyped-def]
    def call(path, **options):  # type: ignore[no-untyped-def]
        opened.append(str(path))
        return function(path, **options)

    return call
