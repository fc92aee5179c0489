"""Runs for tests: in this process with a listener that remembers, or as a user would, in a process of their own."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.job import StepEvent
from edgetune.report import RunReport, Scores
from edgetune.settings import RunSettings

SECONDS = 120  # a run of a few steps takes five; the machine may be busy


class Witness:
    """A listener that remembers. `on_step` is called after each step."""

    def __init__(self, on_step: Callable[[StepEvent], object] | None = None) -> None:
        self.notes: list[str] = []
        self.steps: list[StepEvent] = []
        self.evaluations: list[Scores] = []
        self._on_step = on_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int) -> None: ...

    def step(self, event: StepEvent) -> None:
        self.steps.append(event)
        if self._on_step is not None:
            self._on_step(event)

    def evaluated(self, step: int, epoch: float, scores: Scores, best: bool) -> None:
        self.evaluations.append(scores)


def settings(data: Path | None, **changes: Any) -> RunSettings:
    """Three steps of eight images on the bundled model; keyword arguments change that."""
    defaults = {"model": "edgetune_micro", "device": "jetson-nano", "steps": 3, "batch_size": 8, "threads": 1}
    return RunSettings(data=None if data is None else str(data), **{**defaults, **changes})


def finetune(data: Path | None, output: Path, listener: Witness | None = None, **changes: Any) -> RunReport:
    from edgetune import run

    plan_file = changes.pop("plan_file", None)
    return run.finetune(settings(data, **changes), output=output, plan_file=plan_file, listener=listener or Witness())


def resume(folder: Path, listener: Witness | None = None, **changes: Any) -> RunReport:
    from edgetune import run

    return run.resume(folder, listener=listener or Witness(), **changes)


def interrupt_after(step: int) -> Witness:
    """A listener that sends this process a Ctrl-C after a step."""
    return Witness(lambda event: signal.raise_signal(signal.SIGINT) if event.step == step else None)


def losses(folder: Path) -> list[tuple[str, str, str]]:
    """(step, loss, learning rate) of each step in metrics.csv, to the last digit."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader(file) if row["loss"]]


def command(*arguments: str | Path | bytes) -> list[str | bytes]:
    return [sys.executable, "-m", "edgetune", *(os.fspath(argument) for argument in arguments)]


def cli(*arguments: str | Path | bytes, **more: Any) -> subprocess.CompletedProcess[str]:
    """`edgetune ...` in a process of its own, with this test's config and cache folders."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        **{"env": environment(), **more},
    )


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "error", "NO_COLOR": "1", **more}
