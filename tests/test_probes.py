"""Classifiers in closed form, against trying each image left out."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from edgetune.planner.phases import fit_bytes
from edgetune.probes import HEAD_RIDGE, RIDGES, WIDTHS, RidgeClassifier, inverted, one_hot, told_right

RNG = np.random.default_rng(0)


def test_the_inverse_is_the_inverse() -> None:
    values = RNG.standard_normal((40, 60))
    matrix = values @ values.T / 60 + 0.1 * np.eye(40)
    assert np.allclose(inverted(matrix.copy()) @ matrix, np.eye(40), atol=1e-9)


def test_each_image_is_told_by_a_classifier_made_of_the_others() -> None:
    features = RNG.standard_normal((30, 6)).astype(np.float32)
    labels = RNG.integers(0, 3, 30)
    features[np.arange(30), labels] += 1.0
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    distances = ((scaled[:, None] - scaled[None, :]) ** 2).sum(axis=2)
    distances /= np.median(distances)
    best = 0
    for width in WIDTHS:
        kernel = np.exp(-distances / width) + 1.0
        for ridge in RIDGES:
            correct = 0
            for left_out in range(30):
                kept = np.arange(30) != left_out
                weights = np.linalg.solve(kernel[np.ix_(kept, kept)] + ridge * np.eye(29), np.eye(3)[labels[kept]])
                correct += int((kernel[left_out, kept] @ weights).argmax() == labels[left_out])
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


def _fitted(features: np.ndarray, labels: np.ndarray, classes: int, batch: int = 16) -> RidgeClassifier:
    fit = RidgeClassifier(features.shape[1], classes)
    for start in range(0, len(labels), batch):
        fit.add(features[start : start + batch], labels[start : start + batch])
    return fit


def _separate(count: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, classes, count)
    features = RNG.standard_normal((count, width)).astype(np.float32) * 3 + 5
    features[np.arange(count), labels] += 12.0
    return features, labels


def test_a_classifier_from_batches_is_ridge_regression_on_all_of_them() -> None:
    features, labels = _separate(100, 8, 3)
    found = _fitted(features, labels, 3).fitted()
    logits = features @ found.weight.T + found.bias
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    targets = one_hot(labels, 3)
    solved = np.linalg.solve(
        scaled.T @ scaled / 100 + HEAD_RIDGE * np.eye(8), scaled.T @ (targets - targets.mean(0)) / 100
    )
    assert np.allclose(logits, scaled @ solved + targets.mean(axis=0), atol=1e-4)
    assert (logits.argmax(axis=1) == labels).mean() > 0.97


def test_what_a_classifier_says_of_itself_is_of_images_left_out() -> None:
    """On noise it tells chance, though the same images are what it was made of."""
    features = RNG.standard_normal((120, 60)).astype(np.float32)
    labels = RNG.integers(0, 4, 120)
    found = _fitted(features, labels, 4).fitted()
    own = ((features @ found.weight.T + found.bias).argmax(axis=1) == labels).mean()
    assert own > 0.6
    assert found.told_right < 0.45


@pytest.mark.parametrize(("count", "width"), [(36, 96), (24, 48), (42, 48)])
def test_with_fewer_images_than_features_it_is_not_taken_in_by_noise(count: int, width: int) -> None:
    rng = np.random.default_rng(count)
    features, labels = rng.standard_normal((count, width)).astype(np.float32), rng.integers(0, 3, count)
    found = _fitted(features, labels, 3).fitted()
    others = rng.standard_normal((400, width)).astype(np.float32)
    logits = others @ found.weight.T + found.bias
    assert found.told_right < 0.7
    assert np.abs(logits).max() < 3  # nothing is said loudly of what is not known


def test_a_classifier_is_not_thrown_where_the_blocks_under_it_move() -> None:
    """Directions in which features hardly differ may help to tell these images, and are the first that training shifts."""
    labels = RNG.integers(0, 3, 200)
    features = RNG.standard_normal((200, 20)).astype(np.float32)
    features[np.arange(200), labels] += 1.5
    features[:, 10:] = 0.03 * features[:, 10:] + features[:, :10]  # nearly the same again
    found = _fitted(features, labels, 3).fitted()
    moved = features + 0.3 * RNG.standard_normal(features.shape).astype(np.float32)
    assert np.abs((moved - features) @ found.weight.T).max() < 0.3


def test_features_that_never_change_and_classes_that_never_come_are_no_trouble() -> None:
    features, labels = _separate(40, 6, 2)
    features[:, 5] = 7.0
    found = _fitted(features, labels, 4).fitted()
    assert np.isfinite(found.weight).all()
    assert np.isfinite(found.bias).all()
    assert ((features @ found.weight.T + found.bias).argmax(axis=1) == labels).mean() > 0.95


@pytest.mark.parametrize(("width", "classes", "batch"), [(96, 10, 32), (384, 5, 8), (256, 300, 64)])
def test_a_fit_holds_no_more_than_is_planned_for_it(width: int, classes: int, batch: int) -> None:
    features, labels = _separate(640, width, min(classes, width))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    found = _fitted(features, labels, classes, batch).fitted()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert found.weight.shape == (classes, width)
    assert peak <= fit_bytes(width, classes, batch)
    assert peak > 0.4 * fit_bytes(width, classes, batch)
