"""One run, from settings to report: device, data, model, plan, loop, saved model.

Phases follow one another so that each one's peak is known: what a run imports is warmed up and read first (the
runtime); everything after it is training. `session.py` trains, `outcome.py` turns what happened into the report.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from edgetune import devices, system
from edgetune import settings as settings_module
from edgetune.artifacts.manifest import Manifest
from edgetune.artifacts.reading import check_files, read_manifest
from edgetune.backends.base import Backend
from edgetune.checkpoint import create_run_folder, open_run_folder
from edgetune.checkpoint.tensors import open_tensors
from edgetune.data import some
from edgetune.engines import Built
from edgetune.errors import ArtifactsError, CapExceeded, RunFolderError, UsageError
from edgetune.guard import Guard, guarded, memory_ends
from edgetune.job import Listener, TrainingState
from edgetune.memory import MemoryMeter
from edgetune.own_images import changes, images_sha256, write_images
from edgetune.prepare import Setup, build, prepare, reserved_bytes, settings_of_plan, settle_views, warm_up
from edgetune.replay import forget
from edgetune.report import RunReport, read_report
from edgetune.selections import read_selections
from edgetune.session import Session, train_and_report
from edgetune.settings import RunSettings, StoredRun
from edgetune.splits import decide
from edgetune.store import (
    PLAN_FILE,
    REPORT_FILE,
    Standing,
    is_imported,
    read_plan,
    read_stored,
    restore,
    trainable_space,
    write_start,
)


def finetune(
    settings: RunSettings, *, listener: Listener, output: Path | None = None, plan_file: Path | None = None
) -> RunReport:
    """Fine-tune as asked and leave a run folder.

    Raises: EdgetuneError of every kind; CapExceeded and Interrupted after the folder was completed up to there. One
    that comes before the first step leaves no folder.
    """
    settings_module.check(settings)
    settings_module.check_text("--output", str(output or ""))
    began = time.monotonic()
    profile = devices.find_device(settings.device)
    stored_plan = None if plan_file is None else read_plan(plan_file)
    if stored_plan is not None:
        settings = settings_of_plan(settings, stored_plan)
    existed = output is not None and os.path.lexists(output)  # never raises: what is wrong with it is said next
    path = create_run_folder(None, settings.model, profile.id, output)
    with memory_ends("in the run"), MemoryMeter() as meter, open_run_folder(path), ExitStack() as stack:
        stack.enter_context(system.pinned_cores(profile.cores))
        try:
            with memory_ends("before the model was loaded"):
                judge = warm_up(settings, profile, meter)
                setup = prepare(
                    settings,
                    judge,
                    profile,
                    meter,
                    listener,
                    stored_plan,
                    replay=stored_plan is not None,
                    run_folder=path,
                )
            if settings.replay is not None:
                _check_replayed(Path(settings.replay), setup)
            guard = stack.enter_context(guarded(settings.enforce, judge, meter, reserved_bytes(setup)))
            with meter.phase("load"), memory_ends("loading the model", guard):
                built = build(setup, meter, pretrained=settings.pretrained)
                backend = built.backend
                if settings.replay is not None:
                    _begin_as(Path(settings.replay), backend)
            state = TrainingState()
            if setup.looks:
                looked = time.monotonic()
                with meter.phase("look"), memory_ends("looking for the split", guard):
                    setup, state.notes = decide(setup, backend, listener)
                state.look_seconds = time.monotonic() - looked
            setup, views = settle_views(settings, setup)
            for note in views:
                listener.note(note)
            state.notes += views
            with meter.phase("load"), memory_ends("writing the run folder", guard):
                stored, standing = _write_start(setup, path, built, state)
            if setup.plan.prefix is None:
                _reserve(backend, setup, guard)
        except BaseException as error:
            if isinstance(error, CapExceeded | MemoryError):
                forget(error)  # what its frames hold is wanted for what follows
            try:
                stack.close()
            finally:
                _discard(path, keep=existed)
            raise
        return train_and_report(Session(path, setup, stored, backend, standing, guard, began), listener)


def resume(path: Path, *, listener: Listener, data: str | None = None, artifacts: str | None = None) -> RunReport:
    """Go on with an interrupted run from its last checkpoint, bit for bit as if it had not stopped. `data`, `artifacts`:
    where its images, and what it trains from, are now.

    Raises: RunFolderError if there is nothing to resume; else as `finetune`. Before the first step, the folder stays as
    it was.
    """
    began = time.monotonic()
    stored = read_stored(path)  # before the lock, which would leave its file in a folder that is no run's
    if is_imported(stored):
        raise RunFolderError(
            f"{path} holds a model that another device trained: there is nothing to resume. "
            f"To train it further: edgetune finetune --model local-dir:{path}"
        )
    stored = _with_artifacts(path, stored, artifacts)
    told = _told_before(path)
    with memory_ends("in the run"), MemoryMeter() as meter, open_run_folder(path), ExitStack() as stack:
        settings = stored.settings if data is None else msgspec.structs.replace(stored.settings, data=data)
        profile = devices.find_device(settings.device)
        stack.enter_context(system.pinned_cores(profile.cores))
        with memory_ends("before the model was loaded"):
            judge = warm_up(settings, profile, meter)
            setup = prepare(
                settings, judge, profile, meter, listener, read_plan(path / PLAN_FILE), replay=False, run_folder=path
            )
        _check_data(path, stored, setup)
        guard = stack.enter_context(guarded(settings.enforce, judge, meter, reserved_bytes(setup)))
        with meter.phase("load"), memory_ends("loading the run", guard):
            backend = build(setup, meter, pretrained=False).backend
            standing = restore(path, setup.plan, backend, settings.artifacts)
            if setup.plan.prefix is None:
                standing.restore_optimizer()
        if setup.plan.prefix is None:
            _reserve(backend, setup, guard)
        # The checkpoint is older than the report where a step that half happened ended the run.
        standing.state.tightenings = max(standing.state.tightenings, told, key=len)
        for note in standing.notes:
            listener.note(note)
        step = standing.state.step
        listener.note(f"going on from step {step}")
        notes = (*standing.notes, f"resumed at step {step}: this host's memory figures are of the part after it")
        standing = standing._replace(notes=notes)
        return train_and_report(Session(path, setup, stored, backend, standing, guard, began), listener)


def _with_artifacts(path: Path, stored: StoredRun, moved: str | None) -> StoredRun:
    """The run with where its artifacts are now.

    Raises: UsageError for a run that is not from any; ArtifactsError if they are not there, or can't be used.
    """
    if moved is not None and stored.settings.artifacts is None:
        raise UsageError(f"--artifacts: the run in {path} trains with torch, from none. Leave it out.")
    folder = moved or stored.settings.artifacts
    if folder is None:
        return stored
    _manifest_of(path, folder, f", or say where they are: --resume {path} --artifacts DIR")
    return msgspec.structs.replace(stored, settings=msgspec.structs.replace(stored.settings, artifacts=folder))


def _manifest_of(run: Path, artifacts: str, otherwise: str = "") -> Manifest:
    """Of what a run began from. Raises: ArtifactsError saying what to do where they are gone or can't be used."""
    try:
        return read_manifest(Path(artifacts))
    except ArtifactsError as error:
        raise ArtifactsError(
            f"{error} The run in {run} began from artifacts there: put them back{otherwise}."
        ) from error


def _check_data(path: Path, stored: StoredRun, setup: Setup) -> None:
    """Raises: RunFolderError if the images are not the run's own: the steps to come would see others."""
    if setup.data.classes != stored.classes:
        raise RunFolderError(
            f"the images have other classes than the run: {some(setup.data.classes)} instead of "
            f"{some(stored.classes)}. Give the run's own images with --data."
        )
    what = changes(path, setup.data)
    if what is None and images_sha256(setup.data) == stored.images_sha256:
        return
    raise RunFolderError(
        f"the images are not those that the run started with: {what or _counted(stored, setup)}. Put them back, or start a "
        f"new run: --model local-dir:{path} goes on from its weights."
    )


def _counted(stored: StoredRun, setup: Setup) -> str:
    """How other images than a run's own differ from them, where it does not know them by name."""
    now = len(setup.data.train.paths), len(setup.data.val.paths)
    if now == (stored.train_images, stored.val_images):
        return "as many, but with other names or sizes"
    return f"{now[0]} for training and {now[1]} for validation instead of {stored.train_images} and {stored.val_images}"


def settings_of_replay(run: Path, own: RunSettings) -> RunSettings:
    """A run's settings for doing its steps again: all that decides what is computed is the run's, where and from what it
    is computed is `own`.

    Raises: RunFolderError if the folder is no run's; ArtifactsError if the artifacts that it began from are gone.
    """
    stored, plan = read_stored(run), read_plan(run / PLAN_FILE)
    draws = plan.method not in ("full", "head")
    there = stored.settings
    model, weights, image_px = there.model, there.weights, there.image_px
    if own.backend == "ort":
        model, weights, image_px = own.model, None, None
    elif there.artifacts is not None:
        # The run's folder says what model it is of, the artifacts hold the weights that it began from.
        manifest = _manifest_of(run, there.artifacts)
        check_files(Path(there.artifacts), manifest, (manifest.weights,))
        weights = str(Path(there.artifacts) / manifest.weights)
        model = f"local-dir:{run}"
    return msgspec.structs.replace(
        there,
        model=model,
        backend=own.backend,
        artifacts=own.artifacts,
        weights=weights,
        image_px=image_px,
        pretrained=there.pretrained or own.backend == "ort",
        replay=str(run),
        data=there.data if own.data is None else own.data,
        device=own.device,
        ram_cap_bytes=own.ram_cap_bytes,
        enforce=own.enforce,
        threads=own.threads,
        prefix_cache=own.prefix_cache,
        cache_dir=None,
        method=plan.method,
        batch_size=plan.batch_size,
        optimizer=plan.optimizer,
        split="lowest",
        split_block=plan.split_block if draws else None,
        trained_blocks=plan.trained_blocks if plan.draws else None,
        accumulation=None,
        token_floor=plan.token_floor if plan.method == "alast" and plan.embeddings_train else None,
        token_ceiling=None,
        token_score=plan.token_score if draws else None,
        embeddings="train" if draws and plan.embeddings_train else there.embeddings,
        # What looking for the split found counts as asked for.
        split_tokens=plan.token_ceiling[plan.split_block] / plan.token_ceiling[0]
        if draws and plan.split_block
        else None,
        recompute="auto",
        updates_in_backward=None,
        half_frozen=False,
    )


def _begin_as(run: Path, backend: Backend) -> None:
    """A new classifier is drawn by the seed; a run from artifacts began with theirs."""
    artifacts = read_stored(run).settings.artifacts
    if artifacts is None or not backend.has_linear_head:
        return
    manifest = _manifest_of(run, artifacts)
    if manifest.classifier is not None:
        check_files(Path(artifacts), manifest, (manifest.weights,))
        there = open_tensors(Path(artifacts) / manifest.weights, manifest.files[manifest.weights].sha256)
        backend.set_head(there[f"{manifest.classifier}.weight"], there[f"{manifest.classifier}.bias"])


def _check_replayed(run: Path, setup: Setup) -> None:
    """Raises: RunFolderError if the steps of another run can't be done again: other images, other blocks, too few."""
    stored, selections = read_stored(run), read_selections(run)
    what = changes(run, setup.data)
    if what is not None or images_sha256(setup.data) != stored.images_sha256:
        told = "" if what is None else f": {what}"
        raise RunFolderError(f"the images are not those of {run}{told}. Give its own images with --data.")
    if setup.data.classes != stored.classes:
        raise RunFolderError(
            f"{run} tells {len(stored.classes)} classes apart, spare ones of its artifacts included; here they are "
            f"{len(setup.data.classes)}. Export with --classes {len(setup.data.classes)} to compare the two."
        )
    depth, tokens = setup.shape.depth, setup.shape.patch_tokens
    if any((len(each.trains), each.tokens[0]) != (depth, tokens) for each in selections):
        raise RunFolderError(
            f"{run} is of another model than {setup.shape.name}: {depth} blocks, {tokens} patch tokens."
        )
    settings = setup.settings
    wanted = settings.steps or settings.epochs * -(-len(setup.data.train.paths) // setup.plan.batch_size)
    if len(selections) < wanted:
        raise RunFolderError(
            f"{run} did {len(selections)} of its {wanted} steps: finish it with --resume, then replay it."
        )


def _write_start(setup: Setup, path: Path, built: Built, state: TrainingState) -> tuple[StoredRun, Standing]:
    """All of the run folder that does not change, from the model as the run starts with it."""
    stored = StoredRun(
        settings=setup.settings,
        classes=setup.data.classes,
        train_images=len(setup.data.train.paths),
        val_images=len(setup.data.val.paths),
        images_sha256=images_sha256(setup.data),
        preprocess=setup.preprocess,
        architecture=built.architecture,
        model_args=built.model_args,
    )
    write_images(path, setup.data)
    return stored, write_start(path, stored, setup.plan, built.config, built.backend, state)


def _reserve(backend: Backend, setup: Setup, guard: Guard) -> None:
    """Make the optimizer's state at once, where it is kept: memory must not grow with the steps. (With a cached prefix
    that waits until the prefix has left, see `session.begin`.)
    """
    if setup.plan.keeps_state:
        with memory_ends("making the optimizer's state", guard):
            backend.reserve(trainable_space(setup.plan))


def _told_before(path: Path) -> tuple[str, ...]:
    """The tightenings in the run's report. Raises: RunFolderError if it says that the run is finished."""
    try:
        report = read_report(path / REPORT_FILE)
    except RunFolderError:
        return ()  # none was written: the run was killed
    if report.stopped_because == "finished":
        raise RunFolderError(
            f"the run in {path} is finished ({report.steps} steps): there is nothing to resume. "
            f"To train its model further: edgetune finetune --model local-dir:{path}"
        )
    return report.tightenings


def _discard(path: Path, *, keep: bool) -> None:
    """Take back a folder in which no step was taken; one that the user had made stays, empty."""
    for attempt in (1, 2):
        try:
            for entry in path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
            if not keep:
                path.rmdir()
            return
        except MemoryError:
            if attempt == 2:
                return  # what ended the run is to be told, not this
            gc.collect()
