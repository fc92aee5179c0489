"""What a run folder holds and how a run comes back from it. `checkpoint.py` does the writing; this says what is written.

run.json           settings, classes, preprocessing: all that evaluate, predict and resume need
plan.json          the plan
config.json        what plain timm builds the model from; with model.safetensors (the best epoch) a timm folder
labels.txt         one class a line, in the order of the logits
metrics.csv        one row a step, one an evaluation
report.json        the report
checkpoints/       the base weights once, and of the last two checkpoints only what training changed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from edgetune.backends.base import Array, Backend
from edgetune.checkpoint import (
    Checkpoint,
    OptimizerRecord,
    latest_checkpoint,
    read_base,
    save_base,
    save_checkpoint,
    save_tensors,
    write_atomically,
)
from edgetune.cost import Selection
from edgetune.errors import RunFolderError
from edgetune.planner import Plan
from edgetune.settings import StoredRun
from edgetune.trainer import TrainingState

RUN_FILE, PLAN_FILE, REPORT_FILE = "run.json", "plan.json", "report.json"
MODEL_FILE, CONFIG_FILE, LABELS_FILE, METRICS_FILE = "model.safetensors", "config.json", "labels.txt", "metrics.csv"
# A parameter's values and its optimizer state lie in one file; timm's names hold no such character.
MODEL_PREFIX, OPTIMIZER_PREFIX = "model|", "optimizer|"

T = TypeVar("T")


def write_start(
    folder: Path, stored: StoredRun, plan: Plan, timm_config: Mapping[str, Any], backend: Backend
) -> Callable[[TrainingState], None]:
    """Write everything that does not change during a run, the weights it starts from included, and a first checkpoint.

    Returns: what writes the later ones.
    """
    write_json(folder / RUN_FILE, stored)
    write_json(folder / PLAN_FILE, plan)
    write_json(folder / CONFIG_FILE, timm_config)
    labels = "".join(f"{name}\n" for name in stored.classes)
    write_atomically(folder / LABELS_FILE, labels.encode("utf-8", "surrogateescape"))
    base_sha256 = save_base(folder, dict(backend.model_tensors()))
    write = checkpoint_writer(folder, plan, backend, stored.settings.seed, base_sha256)
    write(TrainingState())
    return write


def write_model(folder: Path, backend: Backend) -> None:
    """model.safetensors as plain timm loads it."""
    save_tensors(folder / MODEL_FILE, dict(backend.model_tensors()), {"format": "pt"})


def checkpoint_writer(
    folder: Path, plan: Plan, backend: Backend, seed: int, base_sha256: str
) -> Callable[[TrainingState], None]:
    """A function that saves what training may have changed, its optimizer state, and where the run stands."""
    names = backend.trained_names(trainable_space(plan))

    def write(state: TrainingState) -> None:
        tensors = {MODEL_PREFIX + name: array for name, array in backend.model_tensors() if name in names}
        tensors |= {OPTIMIZER_PREFIX + name: array for name, array in backend.optimizer_tensors()}
        checkpoint = Checkpoint(
            step=state.step,
            seed=seed,
            optimizer=OptimizerRecord(name=plan.optimizer, steps=backend.optimizer_steps()),
            training=msgspec.to_builtins(state),
            base_sha256=base_sha256,
        )
        save_checkpoint(folder, checkpoint, tensors)

    return write


class Standing(NamedTuple):
    """Where a run stood, what writes its next checkpoints, and notes for the user."""

    state: TrainingState
    write_checkpoint: Callable[[TrainingState], None]
    notes: tuple[str, ...]


def restore(folder: Path, plan: Plan, backend: Backend) -> Standing:
    """Put the last good checkpoint back into the backend.

    Raises: RunFolderError if there is none, or it does not belong to the plan.
    """
    found = latest_checkpoint(folder)
    if found is None:
        raise RunFolderError(f"{folder} has no checkpoint: there is nothing to resume. Start the run again.")
    checkpoint, tensors, notes = found
    for name, array in read_base(folder, checkpoint.base_sha256):
        backend.restore({name: array}, {}, {})
    backend.restore(
        dict(_prefixed(tensors, MODEL_PREFIX)), dict(_prefixed(tensors, OPTIMIZER_PREFIX)), checkpoint.optimizer.steps
    )
    try:
        state = msgspec.convert(checkpoint.training, TrainingState)
    except msgspec.ValidationError as error:
        raise RunFolderError(f"the checkpoint in {folder} is of another version of edgetune: {error}.") from error
    write = checkpoint_writer(folder, plan, backend, checkpoint.seed, checkpoint.base_sha256)
    return Standing(state, write, notes)


def trainable_space(plan: Plan) -> Selection:
    """Every region that some step of the run may train."""
    depth = len(plan.token_ceiling)
    lowest = plan.split_block if plan.draws else depth - plan.trained_blocks
    return Selection(tuple(block >= lowest for block in range(depth)), plan.token_ceiling, plan.embeddings_train)


def read_stored(folder: Path) -> StoredRun:
    """Raises: RunFolderError if the folder is no run folder, or its run.json is damaged."""
    return read_json(folder / RUN_FILE, StoredRun)


def read_plan(path: Path) -> Plan:
    """Raises: RunFolderError if the file is no plan."""
    return read_json(path, Plan)


def read_json(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RunFolderError(f"{path} can't be read ({reason}). Wanted: a run folder of edgetune.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged or of another version of edgetune: {error}.") from error


def write_json(path: Path, value: object) -> None:
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _prefixed(tensors: Mapping[str, Array], prefix: str) -> Iterator[tuple[str, Array]]:
    for name, array in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), array
