"""Classifiers in closed form on what a model that does not train puts out: each image judged by one that has not seen it.

No product goes through numpy's BLAS, which keeps 5 MiB for good once it is used. numpy only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune.planner import JUDGED_IMAGES

Correct = npt.NDArray[np.bool_]  # of each image, whether it was told right
Array = npt.NDArray[np.float64]

RIDGES = (1e-3, 1e-2, 1e-1)
# Of the median squared distance between two images: the kernel's width.
WIDTHS = (0.5, 1.0)
# Of a classifier that blocks are trained under. A weaker ridge tells a little more of images as the blocks are, but with weights
# so large that a step of the blocks throws it: docs/decisions/0009-prefix-cache.md.
HEAD_RIDGE = 0.1


def told_right(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], *, standardised: bool = True
) -> Correct:
    """Of each image, whether a classifier made of all the others tells it right. features (N, D), labels (N,).

    Kernel ridge regression onto the classes with a Gaussian kernel, whose leave-one-out residuals are known in closed
    form; of a few widths and strengths the one that tells most. `standardised`: each feature counts as much as any other
    (not so pixels, of which those at the edge hardly change).
    """
    centred = (features - features.mean(axis=0)).astype(np.float32)
    if standardised:
        centred /= _scale(centred.std(axis=0))
    norms = np.einsum("id,id->i", centred, centred)
    distances = np.maximum(norms[:, None] + norms[None, :] - 2 * np.einsum("id,jd->ij", centred, centred), 0.0)
    distances = distances.astype(np.float64) / max(float(np.median(distances)), 1e-30)
    targets = one_hot(labels)
    own = targets.argmax(axis=1)
    best: Correct | None = None
    for width in WIDTHS:
        gram = np.exp(-distances / width) + 1.0  # 1: the intercept
        for ridge in RIDGES:
            inverse = inverted(gram + ridge * np.eye(len(gram)))
            left_out = targets - np.einsum("ij,jc->ic", inverse, targets) / np.diag(inverse)[:, None]
            correct = left_out.argmax(axis=1) == own
            if best is None or correct.sum() > best.sum():
                best = correct
    assert best is not None
    return best


def _scale(spread: Any) -> Any:
    """What features of these standard deviations (D,) are divided by: one that never changes stays as it is."""
    return np.where(spread > 1e-6 * max(1e-30, float(spread.max())), spread, 1.0)


def one_hot(labels: npt.NDArray[np.int64], classes: int | None = None) -> Array:
    """(N,) -> (N, classes); by default those that there are."""
    names = np.unique(labels) if classes is None else np.arange(classes)
    found: Array = (labels[:, None] == names[None, :]).astype(np.float64)
    return found


def inverted(matrix: Array) -> Array:
    """The inverse of a positive definite matrix (N, N), which is overwritten: Gauss-Jordan, without pivots."""
    # Once: each new array of this size costs page faults.
    column, product = np.empty(len(matrix)), np.empty_like(matrix)
    for place in range(len(matrix)):
        pivot = matrix[place, place]
        column[:] = matrix[:, place]
        column[place] = 0.0
        matrix[:, place] = 0.0
        matrix[place, place] = 1.0
        matrix[place] /= pivot
        np.multiply(column[:, None], matrix[place], out=product)
        matrix -= product
    return matrix


class Classifier(NamedTuple):
    """weight (C, D) and bias (C,), float32: logits from 0 to 1. `told_right`: the share of images that it tells, each left
    out in turn.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    told_right: float


class RidgeClassifier:
    """A linear classifier on features (D) of images that come in batches: sums are kept, and a few images to judge on."""

    def __init__(self, width: int, classes: int) -> None:
        self._classes, self._count = classes, 0
        self._sum, self._products = np.zeros(width), np.zeros((width, width))
        self._targets, self._cross = np.zeros(classes), np.zeros((width, classes))
        self._kept: list[npt.NDArray[np.float32]] = []
        self._labels: list[npt.NDArray[np.int64]] = []

    def add(self, features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """features (B, D), labels (B,)."""
        wide, targets = features.astype(np.float64), one_hot(labels, self._classes)
        if sum(map(len, self._labels)) < JUDGED_IMAGES:
            self._kept.append(features.astype(np.float32))
            self._labels.append(labels)
        self._count += len(features)
        self._sum += wide.sum(axis=0)
        self._targets += targets.sum(axis=0)
        self._products += np.einsum("bi,bj->ij", wide, wide)
        self._cross += np.einsum("bi,bc->ic", wide, targets)

    def fitted(self) -> Classifier:
        """Of all images that were added; judged by the kept ones, each left out of what tells it (exact, in closed form)."""
        count, mean, share = self._count, self._sum / self._count, self._targets / self._count
        products = self._products / count - mean[:, None] * mean[None, :]
        spread = _scale(np.sqrt(np.maximum(np.diag(products), 0.0)))
        products /= spread[:, None] * spread[None, :]
        cross = (self._cross / count - mean[:, None] * share[None, :]) / spread[:, None]
        kept = (np.concatenate(self._kept) - mean) / spread  # (N, D)
        targets = one_hot(np.concatenate(self._labels), self._classes)
        inverse = inverted(products + HEAD_RIDGE * np.eye(len(products)))
        weight = np.einsum("de,ec->dc", inverse, cross)
        leverage = np.einsum("nd,nd->n", np.einsum("nd,de->ne", kept, inverse), kept) / count + 1 / count
        told = np.einsum("nd,dc->nc", kept, weight) + share
        left_out = targets - (targets - told) / np.maximum(1 - leverage, 1e-9)[:, None]
        right = float((left_out.argmax(axis=1) == targets.argmax(axis=1)).mean())
        weight /= spread[:, None]
        bias = share - np.einsum("d,dc->c", mean, weight)
        return Classifier(weight.T.astype(np.float32), bias.astype(np.float32), right)
