"""Scores equal scikit-learn's, and what is no number is never the best."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from edgetune.report import Scores, classification_scores, is_better


def test_scores_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    true, guessed = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    confusion = np.zeros((7, 7), np.int64)
    np.add.at(confusion, (true, guessed), 1)
    scores = classification_scores(confusion, topk_hits=150, loss_sum=300.0, images=200)
    assert scores.accuracy == pytest.approx(accuracy_score(true, guessed))
    assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(true, guessed))
    assert scores.recall == pytest.approx(recall_score(true, guessed, average=None).tolist())
    assert (scores.loss, scores.topk_accuracy, scores.topk) == (1.5, 0.75, 5)


def test_a_dead_class_shows_in_balanced_accuracy() -> None:
    scores = classification_scores([[95, 0], [5, 0]], topk_hits=100, loss_sum=1.0, images=100)
    assert (scores.accuracy, scores.balanced_accuracy, scores.recall) == (0.95, 0.5, (1.0, 0.0))


def test_a_class_without_images_has_no_recall_and_counts_nowhere() -> None:
    scores = classification_scores([[3, 1, 0], [0, 0, 0], [0, 1, 1]], topk_hits=6, loss_sum=1.0, images=6)
    assert scores.recall == (0.75, None, 0.5)
    assert scores.balanced_accuracy == 0.625
    assert scores.topk == 3


@pytest.mark.parametrize("loss_sum", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_score_nothing(loss_sum: float) -> None:
    scores = classification_scores([[5, 0], [0, 5]], topk_hits=10, loss_sum=loss_sum, images=10)
    assert (scores.accuracy, scores.balanced_accuracy, scores.loss, scores.topk_accuracy) == (None,) * 4
    assert scores.recall == (None, None)
    assert "not known" in str(scores)


def test_no_images_score_nothing() -> None:
    scores = classification_scores(np.zeros((2, 2)), topk_hits=0, loss_sum=0.0, images=0)
    assert scores.accuracy is None
    assert scores.recall == (None, None)


@pytest.mark.parametrize("confusion", [[[1, 0]], [1], [[1, 0], [0, 0]], [[3, -1], [0, 0]], []])
def test_a_matrix_that_is_none_or_counts_other_images_is_refused(confusion: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="confusion matrix"):
        classification_scores(confusion, topk_hits=0, loss_sum=0.0, images=2)


def test_scores_survive_a_checkpoint() -> None:
    for loss_sum in (1.0, math.nan):
        scores = classification_scores([[1, 2], [0, 0]], topk_hits=3, loss_sum=loss_sum, images=3)
        assert msgspec.json.decode(msgspec.json.encode(scores), type=Scores) == scores


@pytest.mark.parametrize(
    ("candidate", "best", "better"),
    [
        (0.6, 0.5, True),
        (0.5, 0.5, False),
        (0.4, 0.5, False),
        (0.0, None, True),
        (0.0, math.nan, True),
        (0.0, math.inf, True),
        (math.nan, 0.0, False),
        (math.nan, None, False),
        (math.nan, math.nan, False),
        (math.inf, 0.5, False),
        (None, 0.0, False),
        (None, None, False),
    ],
)
def test_the_higher_one_is_better_and_no_number_never(candidate: float, best: float, better: bool) -> None:
    assert is_better(candidate, best) is better
