"""What a look made of images is kept as a cache would keep it, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from edgetune.features import LookedFeatures

TOKENS, WIDTH = 3, 2
EACH = {"float16": TOKENS * WIDTH * 2 + TOKENS * 4, "float32": TOKENS * WIDTH * 4 + TOKENS * 4}
IMAGES = np.array([7, 2, 5, 11])
VALUES = np.random.default_rng(0).standard_normal((4, TOKENS, WIDTH)).astype(np.float32)
ROWS = np.random.default_rng(1).random((4, TOKENS)).astype(np.float32)


def make(folder: Path, precision: Literal["float16", "float32"] = "float32", room: int = 100) -> LookedFeatures:
    return LookedFeatures(
        folder, IMAGES, blocks=8, tokens=TOKENS, width=WIDTH, precision=precision, limit_bytes=room * EACH[precision]
    )


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_values_come_back_as_the_precision_has_them_and_rows_as_they_were(
    tmp_path: Path, precision: Literal["float16", "float32"]
) -> None:
    looked = make(tmp_path, precision)
    looked.add(VALUES[:3], ROWS[:3])
    looked.add(VALUES[3:], ROWS[3:])
    found = looked.read(np.array([5, 7]))
    assert found is not None
    assert np.array_equal(found[0], VALUES[[2, 0]].astype(precision).astype(np.float32))
    assert np.array_equal(found[1], ROWS[[2, 0]])
    assert looked.written_bytes == 4 * EACH[precision]


def test_what_was_not_added_is_not_here(tmp_path: Path) -> None:
    looked = make(tmp_path, room=3)
    looked.add(VALUES, ROWS)  # of which the last finds no room
    assert looked.has(np.array([11, 2, 0, 7])).tolist() == [False, True, False, True]
    looked.close()
    assert not looked.has(IMAGES).any()


def test_from_a_value_on_that_float16_can_t_hold_nothing_is_kept(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[1, 0, 0] = 70_000.0
    looked = make(tmp_path, "float16")
    looked.add(values, ROWS)
    assert looked.has(IMAGES).tolist() == [True, False, False, False]
    infinite = VALUES.copy()
    infinite[1] = np.inf  # as it came out of the model
    looked = make(tmp_path, "float16")
    looked.add(infinite, ROWS)
    assert looked.has(IMAGES).all()


def test_without_rows_it_says_so(tmp_path: Path) -> None:
    looked = make(tmp_path)
    looked.add(VALUES, np.empty(0, np.float32))
    assert not looked.has_class_rows
    assert looked.has(IMAGES).all()
