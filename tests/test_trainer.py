"""The loop on a fake backend: order, schedule, stopping, divergence, resuming. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import FakeBackend, make_images

from edgetune.alast import AlastState
from edgetune.cost import ViTShape
from edgetune.data import Preprocess, class_weights, open_folder
from edgetune.methods import METHODS, space_of
from edgetune.planner import PlanRequest, plan
from edgetune.report import Scores
from edgetune.settings import RunSettings
from edgetune.trainer import Diverged, Interruption, Job, OverCap, StepEvent, TrainingState, _better, rate_at, train
from edgetune.units import GIB, MIB

PREPROCESS = Preprocess(height_px=8, width_px=8, crop_pct=1.0)


class Watcher:
    def __init__(self) -> None:
        self.steps: list[StepEvent] = []
        self.evaluations: list[tuple[int, float, Scores, bool]] = []

    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...

    def step(self, event: StepEvent) -> None:
        self.steps.append(event)

    def evaluated(self, step: int, epoch: float, scores: Scores, best: bool) -> None:
        self.evaluations.append((step, epoch, scores, best))


def make_shape(depth: int = 4, classes: int = 2) -> ViTShape:
    return ViTShape(
        name="tiny",
        depth=depth,
        width=16,
        heads=2,
        head_width=8,
        mlp_width=64,
        patch_tokens=16,
        prefix_tokens=1,
        classes=classes,
        image_px=(8, 8),
        patch_px=(2, 2),
        embed_parameters=500,
        block_parameters=3000,
        head_parameters=100,
        largest_parameter=1024,
    )


def make_job(folder: Path, **changes: Any) -> tuple[Job, Watcher, list[TrainingState]]:
    """A job over the images of `folder`; keyword arguments change its settings."""
    settings = RunSettings(
        **{"model": "tiny", "epochs": 3, "batch_size": 8, "learning_rate": 0.1, "warmup_epochs": 0.0, **changes}
    )
    data = open_folder(folder, seed=settings.seed, preprocess=PREPROCESS)
    shape, method = make_shape(), METHODS[settings.method]
    made = plan(
        PlanRequest(
            shape=shape,
            space=space_of(method, shape, trained_blocks=settings.trained_blocks, split_block=settings.split_block),
            batch_size=settings.batch_size,
            optimizer="adamw",
            cap_bytes=GIB,
            runtime_bytes=100 * MIB,
            accumulation=settings.accumulation,
        )
    )
    watcher, saved = Watcher(), []
    job = Job(
        settings=settings,
        method=method,
        plan=made,
        shape=shape,
        backend=FakeBackend(2, 3 * 8 * 8),
        train_images=data.train,
        val_images=data.val,
        preprocess=PREPROCESS,
        class_weights=class_weights(data.train.labels, 2) if settings.balanced_class_weights else None,
        transform=None,
        learning_rate=0.1,
        listener=watcher,
        checkpoint=lambda state: saved.append(_copy(state)),
        keep_best=lambda: None,
        memory_bytes=lambda: 200 * MIB,
        enter_phase=lambda _phase: None,
    )
    return job, watcher, saved


def _copy(state: TrainingState) -> TrainingState:
    import msgspec

    return msgspec.convert(msgspec.to_builtins(state), TrainingState)


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
            saved.append(_copy(state))
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
    job.keep_best = lambda: kept.append(job.state.step)
    original = watcher.evaluated

    def poison(step: int, epoch: float, scores: Scores, best: bool) -> None:
        original(step, epoch, scores, best)
        backend.weight[:] = np.nan

    watcher.evaluated = poison  # type: ignore[method-assign]
    with np.errstate(all="ignore"):
        train(job)
    assert kept == [job.steps_per_epoch]
    assert job.state.best_epoch == 1


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
