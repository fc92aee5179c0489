"""Jobs for the loop on a fake backend, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from doubles import FakeBackend

from edgetune.cost import ViTShape
from edgetune.data import Preprocess, class_weights, open_folder
from edgetune.job import Job, StepEvent, TrainingState
from edgetune.methods import METHODS, space_of
from edgetune.planner import PlanRequest, plan
from edgetune.report import Scores
from edgetune.settings import RunSettings
from edgetune.units import GIB, MIB

PREPROCESS = Preprocess(height_px=8, width_px=8, crop_pct=1.0)


class Watcher:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[StepEvent] = []
        self.evaluations: list[tuple[int, float, Scores, bool]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

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
    data = open_folder(folder, seed=settings.seed, val_share=settings.val_share, preprocess=PREPROCESS)
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
        checkpoint=lambda state: saved.append(copy_of(state)),
        keep_best=lambda _tokens: None,
        memory_bytes=lambda: 200 * MIB,
        enter_phase=lambda _phase: None,
    )
    return job, watcher, saved


def copy_of(state: TrainingState) -> TrainingState:
    return msgspec.convert(msgspec.to_builtins(state), TrainingState)
