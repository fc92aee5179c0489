"""The loop on a fake backend: order, schedule, stopping, divergence, resuming. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import FakeBackend, make_images
from jobs import copy_of, make_job

from edgetune import trainer
from edgetune.alast import AlastState
from edgetune.job import Diverged, Interruption, Job, OverCap, StepEvent, TrainingState
from edgetune.report import Scores
from edgetune.trainer import _better, rate_at, train


def test_every_epoch_sees_every_training_image_once_and_ends_with_an_evaluation(image_folder: Path) -> None:
    job, watcher, saved = make_job(image_folder)
    train(job)
    count = len(job.train_images.paths)
    assert job.state.images == 3 * count
    assert [step for step, *_ in watcher.evaluations] == [job.steps_per_epoch * epoch for epoch in (1, 2, 3)]
    assert len(saved) == 3
    assert job.state.best is not None
    assert job.state.before is not None
    assert job.state.best.accuracy is not None
    assert job.state.best.accuracy > 0.6


def test_micro_batches_change_no_result(image_folder: Path) -> None:
    whole, watched, _ = make_job(image_folder)
    cut, watched_cut, _ = make_job(image_folder, accumulation=3)
    train(whole)
    train(cut)
    assert isinstance(cut.backend, FakeBackend)
    assert cut.backend.batches[0] == [3, 3, 2]
    for one, other in zip(watched.steps, watched_cut.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_the_last_batch_of_an_epoch_may_be_of_one_image(tmp_path: Path) -> None:
    job, _, _ = make_job(make_images(tmp_path / "d", {"a": 10, "b": 11}), batch_size=16, epochs=1)
    assert len(job.train_images.paths) % 16 == 1
    train(job)
    assert isinstance(job.backend, FakeBackend)
    assert job.backend.batches == [[16], [1]]


def test_a_run_resumed_at_any_step_goes_on_with_the_same_losses(image_folder: Path) -> None:
    job, watcher, _ = make_job(image_folder, method="alast", checkpoint_every=1)
    train(job)
    losses = [event.loss for event in watcher.steps]
    assert isinstance(job.backend, FakeBackend)
    for stop_after in (1, 2, 3, 5):
        first, first_watcher, saved = make_job(image_folder, method="alast", checkpoint_every=1)
        weights: list[Any] = []
        assert isinstance(first.backend, FakeBackend)
        backend = first.backend

        def keep(
            state: TrainingState,
            backend: FakeBackend = backend,
            weights: list[Any] = weights,
            saved: list[TrainingState] = saved,
        ) -> None:
            saved.append(copy_of(state))
            weights.append(backend.weight.copy())

        first.checkpoint = keep
        original = first_watcher.step

        def stop(event: StepEvent, job: Job = first, original: Any = original, after: int = stop_after) -> None:
            original(event)
            if event.step == after:
                job.stop.set()

        first_watcher.step = stop  # type: ignore[method-assign]
        with pytest.raises(Interruption):
            train(first)
        second, second_watcher, _ = make_job(image_folder, method="alast", checkpoint_every=1)
        second.state = saved[-1]
        assert second.state.step == stop_after
        second.backend.restore({"head.weight": weights[-1]}, {}, {"head.weight": stop_after})
        train(second)
        resumed = [event.loss for event in first_watcher.steps] + [event.loss for event in second_watcher.steps]
        assert resumed == losses
        assert second.backend.selections == job.backend.selections[stop_after:]  # type: ignore[attr-defined]
        assert second.state.flops == job.state.flops


def test_alast_draws_k_blocks_and_evaluation_moves_no_budget(image_folder: Path) -> None:
    job, _, _ = make_job(image_folder, method="alast", epochs=1)
    train(job)
    assert isinstance(job.backend, FakeBackend)
    assert all(sum(selection.trains) == job.plan.trained_blocks for selection in job.backend.selections)
    assert job.state.alast is not None
    budgets = AlastState(list(job.state.alast.budgets), job.state.alast.last_deltas)
    from edgetune.trainer import evaluate

    evaluate(job, job.val_images)
    assert job.state.alast == budgets


def test_a_lost_step_is_skipped_and_three_in_a_row_end_the_run(image_folder: Path) -> None:
    job, _, _ = make_job(image_folder)
    assert isinstance(job.backend, FakeBackend)
    job.backend.fail_at = {2}
    train(job)
    assert job.state.lost_steps == 0
    lost, _, _ = make_job(image_folder)
    assert isinstance(lost.backend, FakeBackend)
    lost.backend.fail_at = {2, 3, 4}
    with pytest.raises(Diverged):
        train(lost)
    assert lost.state.step == 4


def test_a_step_that_ends_early_leaves_none_of_its_images_to_the_next(image_folder: Path) -> None:
    whole, _, _ = make_job(image_folder)
    train(whole)
    lost, _, _ = make_job(image_folder, accumulation=4)
    assert isinstance(whole.backend, FakeBackend)
    assert isinstance(lost.backend, FakeBackend)
    lost.backend.fail_at = {1, 4, 5}  # it ends after the first of four micro-batches
    train(lost)
    assert [len(seen) for seen in lost.backend.seen] != [len(seen) for seen in whole.backend.seen]
    for number, (seen, all_of_it) in enumerate(zip(lost.backend.seen, whole.backend.seen, strict=True), 1):
        assert seen == all_of_it[: 2 if number in lost.backend.fail_at else None]


def test_a_run_over_its_cap_stops_with_a_checkpoint(image_folder: Path) -> None:
    job, _, saved = make_job(image_folder)
    job.memory_bytes = lambda: job.plan.cap_bytes + 1
    with pytest.raises(OverCap):
        train(job)
    assert job.state.step == 1
    assert saved[-1].step == 1


def test_a_broken_model_never_becomes_the_best(image_folder: Path) -> None:
    job, watcher, _ = make_job(image_folder, epochs=2)
    assert isinstance(job.backend, FakeBackend)
    backend, kept = job.backend, []
    job.keep_best = lambda _tokens: kept.append(job.state.step)
    original = watcher.evaluated

    def poison(step: int, epoch: float, scores: Scores, best: bool) -> None:
        original(step, epoch, scores, best)
        backend.weight[:] = np.nan

    watcher.evaluated = poison  # type: ignore[method-assign]
    with np.errstate(all="ignore"):
        train(job)
    assert kept == [job.steps_per_epoch]
    assert job.state.best_epoch == 1


def _told_at_each_epoch(job: Job, accuracies: list[float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train with these validation accuracies, the start's first; at which steps a model was kept."""
    kept: list[int] = []
    job.keep_best = lambda _tokens: kept.append(job.state.step)
    told = iter(accuracies)
    monkeypatch.setattr(
        trainer,
        "evaluate",
        lambda *_: Scores(
            accuracy=(share := next(told)), balanced_accuracy=share, loss=1.0, topk_accuracy=None, topk=1, recall=(), images=9
        ),
    )  # fmt: skip
    train(job)
    return kept


@pytest.mark.parametrize(("after", "best_epoch"), [([0.5, 0.6], 0), ([0.8, 0.5], 0), ([0.5, 0.9], 2), ([0.9, 0.85], 1)])
def test_a_run_that_starts_with_a_fitted_classifier_never_ends_with_a_worse_model(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, after: list[float], best_epoch: int
) -> None:
    job, watcher, _ = make_job(image_folder, epochs=2)
    job.starts_fitted = True
    kept = _told_at_each_epoch(job, [0.8, *after], monkeypatch)
    assert job.state.best_epoch == best_epoch
    assert job.state.best is not None
    assert job.state.best.accuracy == max(0.8, *after)
    assert kept == [0, best_epoch * job.steps_per_epoch][: 1 + (best_epoch > 0)]
    said = [note for note in job.state.notes if "as well as the start" in note]
    assert len(said) == (best_epoch == 0)
    assert all("Try a lower --lr than 0.1." in note for note in said)
    assert watcher.notes[0].startswith("start  validation")


def test_a_start_without_a_fitted_classifier_is_no_candidate(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, _ = make_job(image_folder, epochs=2)
    assert _told_at_each_epoch(job, [0.8, 0.5, 0.6], monkeypatch) == [job.steps_per_epoch, 2 * job.steps_per_epoch]
    assert job.state.best_epoch == 2


def test_the_rate_warms_up_and_falls_to_nearly_nothing(image_folder: Path) -> None:
    job, _, _ = make_job(image_folder, epochs=8, warmup_epochs=2.0)
    rates = [rate_at(step, job) for step in range(job.total_steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] > 0
    assert rates[-1] < 0.01


def test_class_weights_of_a_step_do_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", {"a": 20, "b": 6})
    seen = []
    for accumulation in (1, 4):
        job, _, _ = make_job(folder, accumulation=accumulation, balanced_class_weights=True, epochs=1)
        step = job.backend.step

        def spy(*args: Any, step: Any = step, **kwargs: Any) -> Any:
            seen.append((accumulation, kwargs["weight_sum"]))  # noqa: B023
            return step(*args, **kwargs)

        job.backend.step = spy  # type: ignore[method-assign]
        train(job)
    assert [total for cut, total in seen if cut == 1] == pytest.approx([total for cut, total in seen if cut == 4])


def test_at_a_tie_the_lower_loss_wins_and_balanced_weights_are_judged_by_balanced_accuracy() -> None:
    def scores(accuracy: float, balanced: float, loss: float) -> Scores:
        return Scores(
            accuracy=accuracy, balanced_accuracy=balanced, loss=loss, topk_accuracy=1.0, topk=2, recall=(), images=10
        )

    assert _better(scores(0.8, 0.5, 0.3), scores(0.8, 0.5, 0.4), balanced=False)
    assert not _better(scores(0.8, 0.5, 0.4), scores(0.8, 0.5, 0.3), balanced=False)
    assert not _better(scores(0.7, 0.9, 0.1), scores(0.8, 0.5, 0.4), balanced=False)
    assert _better(scores(0.7, 0.9, 0.1), scores(0.8, 0.5, 0.4), balanced=True)
