"""One run, from settings to report: device, data, model, plan, loop, saved model.

Phases follow one another so that each one's peak is known: what a run imports is warmed up and read first (the
runtime); everything after it is training. `outcome.py` turns what happened into the report.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import msgspec

from edgetune import devices
from edgetune import settings as settings_module
from edgetune.backends.base import Backend
from edgetune.checkpoint import create_run_folder, open_run_folder, write_atomically
from edgetune.data import timm_augment
from edgetune.errors import CapExceeded, EdgetuneError, Interrupted, RunFolderError
from edgetune.guard import Guard, guarded
from edgetune.memory import MemoryMeter
from edgetune.methods import METHODS
from edgetune.outcome import Outcome, make_report
from edgetune.planner import Plan, tightened
from edgetune.prepare import Setup, build, prepare, settings_of_plan, some, step_weights, warm_up
from edgetune.report import RunReport, read_report, report_to_json
from edgetune.settings import RunSettings, StoredRun
from edgetune.store import (
    METRICS_FILE,
    PLAN_FILE,
    REPORT_FILE,
    LoggedListener,
    Standing,
    images_sha256,
    read_plan,
    read_stored,
    restore,
    trainable_space,
    write_json,
    write_model,
    write_start,
)
from edgetune.trainer import (
    Diverged,
    Interruption,
    Job,
    Listener,
    NoMemory,
    OverCap,
    TrainingState,
    stop_on_signals,
    train,
)
from edgetune.units import format_bytes


def finetune(
    settings: RunSettings, *, listener: Listener, output: Path | None = None, plan_file: Path | None = None
) -> RunReport:
    """Fine-tune as asked and leave a run folder.

    Raises: EdgetuneError of every kind; CapExceeded and Interrupted after the folder was completed up to there.
    """
    settings_module.check(settings)
    settings_module.check_text("--output", str(output or ""))
    began = time.monotonic()
    profile = devices.find_device(settings.device)
    stored_plan = None if plan_file is None else read_plan(plan_file)
    if stored_plan is not None:
        settings = settings_of_plan(settings, stored_plan)
    existed = output is not None and output.exists()
    path = create_run_folder(None, settings.model, profile.id, output)
    with MemoryMeter() as meter, open_run_folder(path), ExitStack() as stack:
        try:
            judge = warm_up(settings, profile, meter)
            setup = prepare(settings, judge, profile, meter, listener, stored_plan, replay=stored_plan is not None)
            guard = stack.enter_context(guarded(settings.enforce, judge, meter))
            with meter.phase("load"):
                backend, write_checkpoint = _load_new(setup, path, meter)
        except BaseException:
            _discard(path, keep=existed)
            raise
        standing = Standing(TrainingState(), write_checkpoint, ())
        return _train_and_report(path, setup, backend, standing, guard, listener, began)


def resume(path: Path, *, listener: Listener, data: str | None = None) -> RunReport:
    """Go on with an interrupted run from its last checkpoint, bit for bit as if it had not stopped.

    Raises: RunFolderError if there is nothing to resume; else as `finetune`.
    """
    began = time.monotonic()
    stored = read_stored(path)  # before the lock, which would leave its file in a folder that is no run's
    _refuse_finished(path)
    with MemoryMeter() as meter, open_run_folder(path), ExitStack() as stack:
        settings = stored.settings if data is None else msgspec.structs.replace(stored.settings, data=data)
        profile = devices.find_device(settings.device)
        judge = warm_up(settings, profile, meter)
        setup = prepare(settings, judge, profile, meter, listener, read_plan(path / PLAN_FILE), replay=False)
        if setup.data.classes != stored.classes:
            raise RunFolderError(
                f"the images have other classes than the run: {some(setup.data.classes)} instead of "
                f"{some(stored.classes)}. Give the run's own images with --data."
            )
        if images_sha256(setup.data) != stored.images_sha256:
            raise RunFolderError(
                f"the images are not those that the run started with: {len(setup.data.train.paths)} for training and "
                f"{len(setup.data.val.paths)} for validation instead of {stored.train_images} and "
                f"{stored.val_images}, or others of the same number. Put them back, or start a new run: "
                f"--model local-dir:{path} goes on from its weights."
            )
        guard = stack.enter_context(guarded(settings.enforce, judge, meter))
        with meter.phase("load"):
            backend = build(setup, meter, pretrained=False)[1]
            standing = restore(path, setup.plan, backend)
        for note in standing.notes:
            listener.note(note)
        step = standing.state.step
        listener.note(f"going on from step {step}")
        notes = (*standing.notes, f"resumed at step {step}: this host's memory figures are of the part after it")
        standing = standing._replace(notes=notes)
        return _train_and_report(path, setup, backend, standing, guard, listener, began)


def _load_new(setup: Setup, path: Path, meter: MemoryMeter) -> tuple[Backend, Callable[[TrainingState], None]]:
    """The model as the run starts with it, all of the run folder that does not change, and what writes checkpoints."""
    from edgetune.vit.models import timm_config

    loaded, backend = build(setup, meter, pretrained=setup.settings.pretrained)
    stored = StoredRun(
        settings=setup.settings,
        classes=setup.data.classes,
        train_images=len(setup.data.train.paths),
        val_images=len(setup.data.val.paths),
        images_sha256=images_sha256(setup.data),
        preprocess=setup.preprocess,
        architecture=loaded.architecture,
        model_args=loaded.model_args,
    )
    write = write_start(path, stored, setup.plan, timm_config(loaded, setup.data.classes), backend)
    return backend, write


def _train_and_report(
    path: Path,
    setup: Setup,
    backend: Backend,
    standing: Standing,
    guard: Guard,
    listener: Listener,
    began: float,
) -> RunReport:
    """Run the loop and leave a complete folder whatever ends it; then say what ended it."""
    settings, plan, state, meter = setup.settings, setup.plan, standing.state, guard.meter
    method = METHODS[settings.method]
    rate = settings.learning_rate or method.learning_rate[plan.optimizer]
    logged = LoggedListener(listener, path / METRICS_FILE, state)

    def count_time() -> None:
        nonlocal began
        now = time.monotonic()
        state.total_seconds += now - began
        began = now

    def save_checkpoint(state: TrainingState) -> None:
        count_time()
        with meter.phase("save"):
            standing.write_checkpoint(state)

    def save_best() -> None:
        with meter.phase("save"):
            write_model(path, backend)

    def follow(tighter: Plan, reason: str) -> None:
        """From now on this plan holds, also for a run resumed later."""
        if tighter.half_frozen:
            backend.store_half(tighter.split_block)
        if tighter.keeps_state:
            backend.reserve(trainable_space(tighter))
        write_json(path / PLAN_FILE, tighter)
        said = (
            f"step {state.step + 1}: memory ran out ({reason}); done again, with the same images, under a tighter plan "
            f"of {format_bytes(tighter.predicted_peak_bytes)}: {tighter.explanation[2].removeprefix('chosen: ')}"
        )
        state.tightenings = (*state.tightenings, said)
        logged.note(said)

    if plan.keeps_state:
        backend.reserve(trainable_space(plan))
    job = Job(
        settings=settings,
        method=method,
        plan=plan,
        shape=setup.shape,
        backend=backend,
        train_images=setup.data.train,
        val_images=setup.data.val,
        preprocess=setup.preprocess,
        class_weights=step_weights(setup),
        transform=timm_augment(setup.preprocess, settings.seed) if settings.augment else None,
        learning_rate=rate,
        listener=logged,
        checkpoint=save_checkpoint,
        keep_best=save_best,
        enter_phase=meter.enter,
        memory_bytes=lambda: setup.judge.device_peak_bytes(meter.peaks()),
        shortage=guard.shortage,
        is_out_of_memory=lambda error: guard.is_out_of_memory(error, job.plan),
        tighten=lambda current: tightened(setup.request, current),
        tightened=follow,
        decode_budget_bytes=setup.decode_budget_bytes,
        state=state,
    )
    stopped = "finished"
    error: EdgetuneError | None = None
    with stop_on_signals(job.stop) as signals:
        try:
            train(job)
        except Interruption:
            stopped = "interrupted"
            error = Interrupted(
                f"stopped after step {state.step}. Go on with: {_resume_command(path)}",
                signals[0] if signals else signal.SIGINT,
            )
        except OverCap:
            stopped = "over the cap"
        except NoMemory as failure:
            stopped = "out of memory"
            guard.lift()
            with suppress(EdgetuneError):
                save_checkpoint(state)
            error = CapExceeded(
                f"memory ran out at step {state.step + 1}, under tighter plans too ({failure}). {path} is complete up to "
                f"step {state.step}. With more memory free, go on with: {_resume_command(path)}"
            )
        except Diverged:
            stopped = "diverged"
            reached = "The weights left there are of no use."
            if state.best is not None and state.best.accuracy is not None:
                reached = f"The best epoch before, at {state.best.accuracy:.1%}, is kept."
            error = EdgetuneError(
                f"the loss was no finite number at step {state.step}. Try a lower --lr than {rate:g}. "
                f"The run folder is {path}. {reached}"
            )
        except EdgetuneError as failure:
            # An image that has gone, a full disk: the state is that of the last whole step.
            stopped = "failed"
            with suppress(EdgetuneError):
                save_checkpoint(state)
            failure.args = (f"{failure} When that is mended, go on with: {_resume_command(path)}",)
            error = failure
    if state.best is None:
        with suppress(EdgetuneError) if error is not None else nullcontext():
            save_best()  # stopped before the first evaluation: the weights as they are
    count_time()
    outcome = Outcome(
        settings=settings,
        judge=setup.judge,
        data=setup.data,
        shape=setup.shape,
        plan=job.plan,
        state=state,
        peaks=meter.stop(),
        backend=backend.name,
        enforced_by=guard.limit.description,
        stopped=stopped,
        learning_rate=rate,
        steps_per_epoch=job.steps_per_epoch,
        notes=(*setup.notes, *standing.notes),
    )
    report = make_report(outcome)
    with suppress(EdgetuneError) if error is not None else nullcontext():
        write_atomically(path / REPORT_FILE, report_to_json(report) + b"\n")
    if error is None and not report.within_cap:
        error = CapExceeded(
            f"{report.verdict}. The folder {path} is complete up to step {state.step}. "
            "Start again with a larger --ram-cap, or with fewer trained blocks or a smaller batch."
        )
    listener.note(f"run folder: {path}")
    if error is not None:
        error.report = report
        raise error
    return report


def _resume_command(path: Path) -> str:
    return f"edgetune finetune --resume {shlex.quote(str(path))}"


def _refuse_finished(path: Path) -> None:
    """Raises: RunFolderError if the run's report says that it is finished."""
    try:
        report = read_report(path / REPORT_FILE)
    except RunFolderError:
        return  # none was written: the run was killed
    if report.stopped_because == "finished":
        raise RunFolderError(
            f"the run in {path} is finished ({report.steps} steps): there is nothing to resume. "
            f"To train its model further: edgetune finetune --model local-dir:{path}"
        )


def _discard(path: Path, *, keep: bool) -> None:
    """Take back a folder in which no step was taken; one that the user had made stays, empty."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if not keep:
        path.rmdir()
