"""What a run's folder knows of its images: the first that differs is named, with how."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edgetune.data import DataFolder, open_folder
from edgetune.own_images import changes, write_images


def opened(images: Path) -> DataFolder:
    return open_folder(images, seed=0, max_bad=1.0)


@pytest.fixture
def run(image_folder: Path, tmp_path: Path) -> Path:
    """The folder of a run on the images of `image_folder`, one of which has a name that is no text."""
    shutil.copy(image_folder / "cat" / "000.png", image_folder / "cat" / os.fsdecode(b"\xff b%20.png"))
    folder = tmp_path / "run"
    folder.mkdir()
    write_images(folder, opened(image_folder))
    return folder


def test_the_same_images_have_not_changed_wherever_they_lie(run: Path, image_folder: Path, tmp_path: Path) -> None:
    assert changes(run, opened(image_folder)) is None
    assert changes(run, opened(Path(shutil.copytree(image_folder, tmp_path / "moved")))) is None


def test_what_became_of_images_is_told_by_the_first_of_each_kind(run: Path, image_folder: Path) -> None:
    cats = image_folder / "cat"
    before = (cats / "001.png").read_bytes()
    (cats / "001.png").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # as long as it was
    (cats / "002.png").write_bytes(b"broken")
    (cats / "003.png").unlink()
    (cats / "004.png").unlink()
    (cats / os.fsdecode(b"\xff b%20.png")).rename(cats / "named.png")
    told = changes(run, opened(image_folder))
    assert told == (
        "cat/001.png (changed), cat/002.png (unreadable), cat/003.png and 2 more (not there any more), cat/named.png (new)"
    )


@pytest.mark.parametrize("content", [b"", b"no digest\nat all\n\xff", b"one\n"])
def test_a_file_that_tells_nothing_is_passed_over(run: Path, image_folder: Path, content: bytes) -> None:
    (image_folder / "cat" / "003.png").unlink()
    (run / "images.txt").write_bytes(content)
    assert changes(run, opened(image_folder)) is None
    (run / "images.txt").unlink()
    assert changes(run, opened(image_folder)) is None
