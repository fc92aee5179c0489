"""Where to split, from a look at some images: the arithmetic against trying, and what is chosen in clear cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from doubles import FakeBackend, make_images
from jobs import make_shape
from running import Witness, finetune

from edgetune.backends.base import Array, Images
from edgetune.report import read_report
from edgetune.splits import (
    RIDGES,
    TOKEN_SHARES,
    candidate_splits,
    choose_split,
    choose_tokens,
    find,
    inverted,
    loses_nothing,
    sample,
    told_right,
)

RNG = np.random.default_rng(0)


def right(share: float, count: int = 200, seed: int = 0) -> np.ndarray:
    """So large a share of the images told right, which ones by seed."""
    found = np.zeros(count, np.bool_)
    found[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    return found


def test_the_inverse_is_the_inverse() -> None:
    values = RNG.standard_normal((40, 60))
    matrix = values @ values.T / 60 + 0.1 * np.eye(40)
    assert np.allclose(inverted(matrix.copy()) @ matrix, np.eye(40), atol=1e-9)


def test_each_image_is_told_by_a_classifier_made_of_the_others() -> None:
    features = RNG.standard_normal((30, 6)).astype(np.float32)
    labels = RNG.integers(0, 3, 30)
    features[np.arange(30), labels] += 1.0
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    best = 0
    for ridge in RIDGES:
        correct = 0
        for left_out in range(30):
            kept = np.arange(30) != left_out
            gram = scaled[kept] @ scaled[kept].T / 6 + 1.0
            weights = np.linalg.solve(gram + ridge * np.eye(29), np.eye(3)[labels[kept]])
            correct += int(((scaled[left_out] @ scaled[kept].T / 6 + 1.0) @ weights).argmax() == labels[left_out])
        best = max(best, correct)
    assert told_right(features, labels).sum() == best


def test_what_separates_is_told_and_what_does_not_is_not() -> None:
    labels = np.arange(120) % 4
    noise = RNG.standard_normal((120, 10)).astype(np.float32)
    clear = noise.copy()
    clear[np.arange(120), labels] += 8.0
    assert told_right(clear, labels).mean() > 0.98
    assert told_right(noise, labels).mean() < 0.5


def test_a_feature_that_never_changes_is_no_trouble() -> None:
    labels = np.arange(20) % 2
    features = np.ones((20, 3), np.float32)
    features[:, 1] = labels
    assert told_right(features, labels).all()


@pytest.mark.parametrize(("depth", "expected"), [(12, (4, 6, 8)), (24, (8, 12, 16)), (2, (1,)), (1, ())])
def test_splits_are_looked_for_in_the_middle_of_the_model(depth: int, expected: tuple[int, ...]) -> None:
    assert candidate_splits(depth) == expected


def test_the_deepest_split_that_loses_nothing_is_taken() -> None:
    best = right(0.9)
    assert choose_split({4: right(0.895), 6: best, 8: right(0.9)}) == 8
    assert choose_split({4: right(0.9), 6: right(0.9), 8: right(0.7)}) == 6
    assert choose_split({4: right(0.95), 6: right(0.6), 8: right(0.5)}) == 4


def test_the_fewest_tokens_that_do_as_well_as_all_are_kept() -> None:
    assert choose_tokens({0.4: right(0.9), 0.67: right(0.9), 1.0: right(0.9)}) == 0.4
    assert choose_tokens({0.4: right(0.6), 0.67: right(0.9), 1.0: right(0.9)}) == 0.67
    assert choose_tokens({0.4: right(0.5), 0.67: right(0.6), 1.0: right(0.9)}) == 1.0


def test_a_loss_within_what_the_sample_can_show_is_none() -> None:
    """10 images lost and 7 won of 50 is a draw; 10 lost and none won is not."""
    best = np.ones(50, np.bool_)
    best[40:47] = False
    drawn = best.copy()
    drawn[:10], drawn[40:47] = False, True
    lost = best.copy()
    lost[:10] = False
    assert loses_nothing(drawn, best)
    assert not loses_nothing(lost, best)


def test_a_sample_has_every_class_in_its_share() -> None:
    labels = [0] * 900 + [1] * 90 + [2] * 3
    chosen = sample(labels, seed=1, most=100)
    counts = np.bincount(np.asarray(labels)[chosen])
    assert len(chosen) == len(set(chosen.tolist()))
    assert counts.tolist() == [91, 9, 2]
    assert sample(labels, seed=1, most=100).tolist() == chosen.tolist()
    assert sample([0, 1], seed=1).tolist() == [0, 1]


class _Telling(FakeBackend):
    """What is put out after so many blocks, with so many tokens, tells the class as well as `signal` says."""

    def __init__(self, labels: np.ndarray, signal: dict[tuple[int, int], float]) -> None:
        super().__init__(2, 4)
        self._labels, self._signal, self._seen = labels, signal, 0
        self.ways: list[Sequence[tuple[Sequence[int], int]]] = []

    def summaries(self, inputs: Images, ways: Sequence[tuple[Sequence[int], int]]) -> list[Array]:
        self.ways.append(ways)
        start = self._seen % len(self._labels)
        labels = self._labels[start : start + len(inputs)]
        self._seen += len(inputs)
        found = []
        for counts, blocks in ways:
            values = np.random.default_rng([start, blocks, counts[-1]]).standard_normal((len(labels), 4))
            values[np.arange(len(labels)), labels] += self._signal[blocks, counts[-1]]
            found.append(values.astype(np.float32))
        return found


def _found(signal: dict[tuple[int, int], float], *, lowest: int = 0, prunes: bool = True) -> tuple[int, float]:
    labels = np.arange(96) % 2
    backend = _Telling(labels, signal)

    def batches() -> Iterator[Images]:
        for _ in range(12):
            yield np.zeros((8, 3, 8, 8), np.float32)

    found = find(backend, make_shape(depth=12), batches, labels, lowest_split=lowest, prunes=prunes)
    assert len(found.lines) == 1 + prunes
    return found.split_block, found.split_tokens


def test_the_look_finds_the_split_and_the_tokens() -> None:
    splits = {(4, 16): 9.0, (6, 16): 9.0, (8, 16): 9.0}
    tokens = {(12, 8): 9.0, (12, 16): 9.0}  # 0.4 and 0.67 of 16 go up to 8 and 16
    assert _found(splits | tokens) == (8, 0.4)
    assert _found(splits | {(8, 16): 0.0} | tokens) == (6, 0.4)
    assert _found(splits | tokens | {(12, 8): 0.0}) == (8, 0.67)
    assert _found(splits | tokens, prunes=False) == (8, 1.0)
    assert _found(splits | tokens, lowest=8) == (8, 0.4)
    assert _found({(10, 16): 9.0} | tokens, lowest=10) == (10, 0.4)
    assert TOKEN_SHARES == (0.4, 0.67)


@pytest.mark.parametrize(
    ("changes", "looked"),
    [
        ({"split": "auto"}, True),
        ({}, False),
        ({"split": "auto", "split_block": 4}, False),
        ({"split": "auto", "trained_blocks": 3}, False),
        ({"split": "auto", "epochs": 2}, False),
        ({"split": "auto", "method": "full"}, False),
    ],
)
def test_a_run_looks_where_it_was_asked_to_and_it_pays(
    tmp_path: Path, changes: dict[str, object], looked: bool
) -> None:
    pytest.importorskip("torch")
    images = make_images(tmp_path / "images", {"ant": 20, "bee": 20})
    witness = Witness()
    finetune(images, tmp_path / "run", witness, **({"steps": None, "epochs": 3, "method": "alast"} | changes))
    report = read_report(tmp_path / "run")
    assert any(note.startswith("split: ") for note in witness.notes) == looked
    assert ("look" in report.phases) == looked
    if looked:
        assert report.split_block in (4, 6, 8)
        assert report.predicted_phases["look"] > 0
