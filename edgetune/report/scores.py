"""What an evaluation says about a model: accuracy, class by class too, and which of two models is the better one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

MAX_TOPK = 5


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of one evaluation, shares from 0 to 1. None: not known, since there was no image or a logit was no number.

    `recall`: the share of each class's images that were recognised; None for a class without images.
    `balanced_accuracy`: the mean of `recall` over the classes that have images, so a dead class shows.
    `topk_accuracy`: the right class was among the best `topk` = min(5, classes).
    """

    accuracy: float | None
    balanced_accuracy: float | None
    loss: float | None
    topk_accuracy: float | None
    topk: int
    recall: tuple[float | None, ...]
    images: int

    def __str__(self) -> str:
        return (
            f"accuracy {_number(self.accuracy)}, balanced {_number(self.balanced_accuracy)}, loss {_number(self.loss)}"
        )


def classification_scores(
    confusion: Sequence[Sequence[int]] | npt.NDArray[Any], *, topk_hits: int, loss_sum: float, images: int
) -> Scores:
    """Scores from the confusion matrix (true class, predicted class) and sums over `images` images.

    A loss that is no finite number means that a logit was none, and the class with the largest of such logits is no
    prediction: then all scores are None, so that a broken model never becomes the best one.

    Raises: ValueError for a matrix that is not square or does not count `images` images.
    """
    counts = np.asarray(confusion, np.int64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.min(initial=0) < 0 or counts.sum() != images:
        raise ValueError(f"a confusion matrix of shape {counts.shape} with {counts.sum()} images, not {images}")
    topk = min(MAX_TOPK, len(counts))
    if images == 0 or not math.isfinite(loss_sum):
        unknown = (None,) * len(counts)
        return Scores(
            accuracy=None,
            balanced_accuracy=None,
            loss=None,
            topk_accuracy=None,
            topk=topk,
            recall=unknown,
            images=images,
        )
    hits, totals = counts.diagonal().tolist(), counts.sum(axis=1).tolist()
    recall = tuple(hit / total if total else None for hit, total in zip(hits, totals, strict=True))
    present = [share for share in recall if share is not None]
    return Scores(
        accuracy=sum(hits) / images,
        balanced_accuracy=math.fsum(present) / len(present),
        loss=loss_sum / images,
        topk_accuracy=topk_hits / images,
        topk=topk,
        recall=recall,
        images=images,
    )


class Tally:
    """Adds up the batches of one evaluation."""

    def __init__(self, classes: int) -> None:
        self._confusion = np.zeros((classes, classes), np.int64)
        self._loss_sum = 0.0
        self._topk_hits = 0
        self._images = 0

    def add(self, logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> None:
        """One batch: logits (B, classes), labels (B,)."""
        logits = logits.astype(np.float64)
        rows = np.arange(len(labels))
        with np.errstate(invalid="ignore", over="ignore"):
            shifted = logits - logits.max(axis=1, keepdims=True)
            log_sums = np.log(np.exp(shifted).sum(axis=1))
        self._loss_sum += float((log_sums - shifted[rows, labels]).sum())
        np.add.at(self._confusion, (labels, logits.argmax(axis=1)), 1)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :MAX_TOPK]
        self._topk_hits += int((best == labels[:, None]).any(axis=1).sum())
        self._images += len(labels)

    def scores(self) -> Scores:
        return classification_scores(
            self._confusion, topk_hits=self._topk_hits, loss_sum=self._loss_sum, images=self._images
        )


def is_better(candidate: float | None, best: float | None) -> bool:
    """Whether `candidate` is the higher of two accuracies. What is no finite number is never better than anything."""
    if candidate is None or not math.isfinite(candidate):
        return False
    return best is None or not math.isfinite(best) or candidate > best


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"
