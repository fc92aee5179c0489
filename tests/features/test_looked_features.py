"""What a look made of images is kept as a cache would keep it, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edgetune.features import LookedFeatures

TOKENS, WIDTH = 3, 2
EACH = {"float16": TOKENS * WIDTH * 2 + 2 * TOKENS * 4, "float32": TOKENS * WIDTH * 4 + 2 * TOKENS * 4}
IMAGES = np.array([7, 2, 5, 11])
VALUES = np.random.default_rng(0).standard_normal((4, TOKENS, WIDTH)).astype(np.float32)
SCORES = {
    name: np.random.default_rng(number).random((4, TOKENS)).astype(np.float32) for number, name in enumerate("ab")
}


def make(folder: Path, precision: Literal["float16", "float32"] = "float32", room: int = 100) -> LookedFeatures:
    return LookedFeatures(
        folder,
        IMAGES,
        blocks=8,
        tokens=TOKENS,
        width=WIDTH,
        scores=("a", "b"),
        precision=precision,
        limit_bytes=room * EACH[precision],
    )


def part(places: slice) -> dict[str, Any]:
    return {name: values[places] for name, values in SCORES.items()}


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_values_come_back_as_the_precision_has_them_and_scores_as_they_were(
    tmp_path: Path, precision: Literal["float16", "float32"]
) -> None:
    looked = make(tmp_path, precision)
    looked.add(VALUES[:3], part(slice(3)))
    looked.add(VALUES[3:], part(slice(3, None)))
    found = looked.read(np.array([5, 7]))
    assert found is not None
    assert np.array_equal(found[0], VALUES[[2, 0]].astype(precision).astype(np.float32))
    assert list(found[1]) == ["a", "b"]
    assert all(np.array_equal(values, SCORES[name][[2, 0]]) for name, values in found[1].items())
    assert looked.written_bytes == 4 * EACH[precision]


def test_what_was_not_added_is_not_here(tmp_path: Path) -> None:
    looked = make(tmp_path, room=3)
    looked.add(VALUES, SCORES)  # of which the last finds no room
    assert looked.has(np.array([11, 2, 0, 7])).tolist() == [False, True, False, True]
    looked.close()
    assert not looked.has(IMAGES).any()


def test_from_a_value_on_that_float16_can_t_hold_nothing_is_kept(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[1, 0, 0] = 70_000.0
    looked = make(tmp_path, "float16")
    looked.add(values, SCORES)
    assert looked.has(IMAGES).tolist() == [True, False, False, False]
    infinite = VALUES.copy()
    infinite[1] = np.inf  # as it came out of the model
    looked = make(tmp_path, "float16")
    looked.add(infinite, SCORES)
    assert looked.has(IMAGES).all()
