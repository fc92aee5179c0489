"""Small folders of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import picture


@pytest.fixture
def make_class() -> Callable[..., None]:
    """`make_class(folder, count, first=0)` writes `count` different PNGs into `folder`."""

    def make(folder: Path, count: int, first: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(first, first + count):
            picture(seed=seed).save(folder / f"{seed:03d}.png")

    return make


@pytest.fixture
def two_classes(tmp_path: Path, make_class: Callable[..., None]) -> Path:
    """`data/cat` and `data/dog` with ten images each."""
    make_class(tmp_path / "data" / "cat", 10)
    make_class(tmp_path / "data" / "dog", 10, first=10)
    return tmp_path / "data"
