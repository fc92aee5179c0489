"""One run, from settings to report: device, data, model, plan, loop, saved model.

Phases follow one another so that each one's peak is known: what a run imports is warmed up and read first (the
runtime); everything after it is training. `outcome.py` turns what happened into the report.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgetune import devices, system
from edgetune import settings as settings_module
from edgetune.backends.base import Backend
from edgetune.checkpoint import create_run_folder, open_run_folder, write_atomically
from edgetune.cost import ViTShape
from edgetune.data import (
    DataFolder,
    Preprocess,
    bundled_sample,
    class_weights,
    default_cache_dir,
    open_folder,
    timm_augment,
)
from edgetune.errors import BackendUnavailable, CapExceeded, EdgetuneError, Interrupted, RunFolderError, UsageError
from edgetune.judge import Judge, judge_for
from edgetune.memory import MemoryMeter, limit_allocator
from edgetune.methods import METHODS, adaptive_obstacle, check_model, space_of
from edgetune.optim import OptimizerSettings
from edgetune.outcome import Outcome, make_report
from edgetune.planner import Plan, PlanRequest
from edgetune.planner import plan as make_plan
from edgetune.profiles import DeviceProfile
from edgetune.report import MetricsLog, RunReport, Scores, read_report, report_to_json
from edgetune.settings import RunSettings, StoredRun
from edgetune.shapes import known_shapes
from edgetune.store import (
    METRICS_FILE,
    PLAN_FILE,
    REPORT_FILE,
    Standing,
    images_sha256,
    read_plan,
    read_stored,
    restore,
    trainable_space,
    write_model,
    write_start,
)
from edgetune.trainer import (
    Diverged,
    Interruption,
    Job,
    Listener,
    OverCap,
    StepEvent,
    TrainingState,
    stop_on_signals,
    train,
)
from edgetune.units import MIB

if TYPE_CHECKING:
    from edgetune.vit.models import LoadedModel

# Of what is left for training, the share that decoding one image may take at the most.
DECODE_SHARE = 1 / 3
LEAST_DECODE_BYTES = 8 * MIB


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is settled before any weight is loaded."""

    settings: RunSettings
    judge: Judge
    data: DataFolder
    shape: ViTShape
    preprocess: Preprocess
    plan: Plan
    decode_budget_bytes: int
    notes: tuple[str, ...]


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
        settings = _settings_of_plan(settings, stored_plan)
    existed = output is not None and output.exists()
    path = create_run_folder(None, settings.model, profile.id, output)
    with MemoryMeter() as meter, open_run_folder(path):
        try:
            judge = _warm_up(settings, profile, meter)
            setup = prepare(settings, judge, profile, meter, listener, stored_plan)
            with meter.phase("load"):
                backend, write_checkpoint = _load_new(setup, path, meter)
        except BaseException:
            _discard(path, keep=existed)
            raise
        standing = Standing(TrainingState(), write_checkpoint, ())
        return _train_and_report(path, setup, backend, standing, meter, listener, began)


def resume(path: Path, *, listener: Listener, data: str | None = None) -> RunReport:
    """Go on with an interrupted run from its last checkpoint, bit for bit as if it had not stopped.

    Raises: RunFolderError if there is nothing to resume; else as `finetune`.
    """
    began = time.monotonic()
    stored = read_stored(path)  # before the lock, which would leave its file in a folder that is no run's
    _refuse_finished(path)
    with MemoryMeter() as meter, open_run_folder(path):
        settings = stored.settings if data is None else msgspec.structs.replace(stored.settings, data=data)
        profile = devices.find_device(settings.device)
        judge = _warm_up(settings, profile, meter)
        setup = prepare(settings, judge, profile, meter, listener, read_plan(path / PLAN_FILE))
        if setup.data.classes != stored.classes:
            raise RunFolderError(
                f"the images have other classes than the run: {_some(setup.data.classes)} instead of "
                f"{_some(stored.classes)}. Give the run's own images with --data."
            )
        if images_sha256(setup.data) != stored.images_sha256:
            raise RunFolderError(
                f"the images are not those that the run started with: {len(setup.data.train.paths)} for training and "
                f"{len(setup.data.val.paths)} for validation instead of {stored.train_images} and "
                f"{stored.val_images}, or others of the same number. Put them back, or start a new run: "
                f"--model local-dir:{path} goes on from its weights."
            )
        with meter.phase("load"):
            backend = _build(setup, meter, pretrained=False)[1]
            standing = restore(path, setup.plan, backend)
        for note in standing.notes:
            listener.note(note)
        step = standing.state.step
        listener.note(f"going on from step {step}")
        notes = (*standing.notes, f"resumed at step {step}: memory figures are of the part after it")
        standing = standing._replace(notes=notes)
        return _train_and_report(path, setup, backend, standing, meter, listener, began)


def prepare(
    settings: RunSettings,
    judge: Judge,
    profile: DeviceProfile,
    meter: MemoryMeter,
    listener: Listener,
    stored_plan: Plan | None,
) -> Setup:
    """Data, the model's shape and the plan: all that can fail before a weight is loaded."""
    from edgetune.vit.models import ModelSource, describe

    source = ModelSource(name=settings.model, image_px=settings.image_px)
    _, preprocess = describe(source, classes=2)
    left = judge.cap_bytes - judge.device_runtime_bytes
    if stored_plan is not None:
        # What this machine has left today must not change at which scale a photograph is decoded.
        left = stored_plan.cap_bytes - stored_plan.runtime_bytes
    decode_budget = max(LEAST_DECODE_BYTES, int(left * DECODE_SHARE))
    with meter.phase("data"):
        data = open_folder(
            settings.data or bundled_sample(),
            seed=settings.seed,
            val_share=settings.val_share,
            max_bad=settings.max_bad,
            decode_budget_bytes=decode_budget,
            cache_dir=default_cache_dir(),
            progress=lambda done, total: listener.progress("check images", done, total),
            preprocess=preprocess,
        )
    shape, _ = describe(source, classes=len(data.classes))
    notes = [*judge.notes, *data.notes]
    listener.note(
        f"{len(data.train.paths)} training and {len(data.val.paths)} validation images, "
        f"{len(data.classes)} classes: {_some(data.classes, 20)}"
    )
    method = METHODS[settings.method]
    check_model(method, shape, adaptive_obstacle(shape))
    plan = stored_plan
    if plan is None:
        plan = make_plan(
            PlanRequest(
                shape=shape,
                space=space_of(method, shape, trained_blocks=settings.trained_blocks, split_block=settings.split_block),
                batch_size=min(settings.batch_size, len(data.train.paths)),
                optimizer=settings.optimizer,
                cap_bytes=judge.cap_bytes,
                runtime_bytes=judge.device_runtime_bytes,
                token_floor=settings.token_floor,
                accumulation=settings.accumulation,
                decode_bytes=data.decode_peak_bytes,
                threads=settings.threads or min(profile.cores or 2**10, system.usable_cores()),
                peak_flops_per_s=profile.peak_flops_per_s,
            ),
            smaller_models=known_shapes(len(data.classes)),
        )
    elif len(plan.token_ceiling) != shape.depth or plan.token_ceiling[0] != shape.patch_tokens:
        raise UsageError(
            f"the plan is for {plan.model} ({len(plan.token_ceiling)} blocks, {plan.token_ceiling[0]} patch tokens), "
            f"not for {shape.name} ({shape.depth}, {shape.patch_tokens}) at this image size."
        )
    frozen = shape.depth if method.name == "head" else plan.split_block
    if not settings.pretrained and (frozen or not plan.embeddings_train):
        what = f"the embeddings and the {frozen} blocks below the split" if frozen else "the embeddings"
        notes.append(f"warning: {what} stay frozen at random weights; --method full trains everything")
    for note in notes:
        listener.note(note)
    for line in plan.explanation:
        listener.note(f"plan: {line}")
    return Setup(
        settings=settings,
        judge=judge,
        data=data,
        shape=shape,
        preprocess=preprocess,
        plan=plan,
        decode_budget_bytes=decode_budget,
        notes=tuple(notes),
    )


def _warm_up(settings: RunSettings, profile: DeviceProfile, meter: MemoryMeter) -> Judge:
    """Import all that the run needs and take one step on nothing; what the process holds then is the runtime."""
    limit_allocator()
    # Threads that spin while they wait starve whatever else runs, on few cores themselves. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    meter.enter("runtime")
    try:
        import torch

        from edgetune.backends.pytorch import warm_up
    except ImportError as error:
        raise BackendUnavailable(
            f"fine-tuning needs torch, torchvision and timm ({error}). Install them with: pip install 'edgetune[torch]'"
        ) from error
    torch.set_num_threads(settings.threads or min(profile.cores or 2**10, system.usable_cores()))
    warm_up(OptimizerSettings(name=settings.optimizer))
    judge = judge_for(profile, settings.ram_cap_bytes, meter)
    meter.enter("")
    return judge


def _load_new(setup: Setup, path: Path, meter: MemoryMeter) -> tuple[Backend, Callable[[TrainingState], None]]:
    """The model as the run starts with it, all of the run folder that does not change, and what writes checkpoints."""
    from edgetune.vit.models import timm_config

    loaded, backend = _build(setup, meter, pretrained=setup.settings.pretrained)
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


def _build(setup: Setup, meter: MemoryMeter, *, pretrained: bool) -> tuple[LoadedModel, Backend]:
    import torch

    from edgetune.backends.pytorch import TorchBackend
    from edgetune.vit.models import ModelSource, load_model

    settings, plan = setup.settings, setup.plan
    torch.set_num_threads(plan.threads)
    torch.manual_seed(settings.seed)  # the new head's weights
    source = ModelSource(
        name=settings.model,
        weights=settings.weights if pretrained else None,
        pretrained=pretrained,
        image_px=settings.image_px,
    )
    loaded = load_model(source, len(setup.data.classes))
    backend = TorchBackend(
        loaded.model,
        OptimizerSettings(name=plan.optimizer, weight_decay=settings.weight_decay),
        class_weights=_class_weights(setup),
        label_smoothing=settings.label_smoothing,
        at_peak=meter.current,
    )
    return loaded, backend


def _class_weights(setup: Setup) -> Any:
    if not setup.settings.balanced_class_weights:
        return None
    return class_weights(setup.data.train.labels, len(setup.data.classes))


def _train_and_report(
    path: Path,
    setup: Setup,
    backend: Backend,
    standing: Standing,
    meter: MemoryMeter,
    listener: Listener,
    began: float,
) -> RunReport:
    """Run the loop and leave a complete folder whatever ends it; then say what ended it."""
    settings, plan, state = setup.settings, setup.plan, standing.state
    method = METHODS[settings.method]
    rate = settings.learning_rate or method.learning_rate[plan.optimizer]
    metrics = MetricsLog(path / METRICS_FILE)
    metrics.truncate_after(state.step, keep_evaluation=state.evaluated_step == state.step)

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
        class_weights=_class_weights(setup),
        transform=timm_augment(setup.preprocess, settings.seed) if settings.augment else None,
        learning_rate=rate,
        listener=_Logged(listener, metrics),
        checkpoint=save_checkpoint,
        keep_best=save_best,
        enter_phase=meter.enter,
        memory_bytes=lambda: setup.judge.device_peak_bytes(meter.peaks()),
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
                f"stopped after step {state.step}. Go on with: edgetune finetune --resume {path}",
                signals[0] if signals else signal.SIGINT,
            )
        except OverCap:
            stopped = "over the cap"
        except (MemoryError, RuntimeError) as failure:
            if not _is_out_of_memory(failure):
                raise
            stopped = "out of memory"
            error = CapExceeded(
                f"memory ran out at step {state.step} ({str(failure).splitlines()[0] if str(failure) else 'MemoryError'}). "
                f"{path} is complete up to its last checkpoint; try a lower --ram-cap, under which less is planned."
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
            stopped, error = "failed", failure
            save_checkpoint(state)
            listener.note(f"stopped after step {state.step}. Go on with: edgetune finetune --resume {path}")
    if state.best is None:
        save_best()  # stopped before the first evaluation: the weights as they are
    count_time()
    outcome = Outcome(
        settings=settings,
        judge=setup.judge,
        data=setup.data,
        shape=setup.shape,
        plan=plan,
        state=state,
        peaks=meter.stop(),
        backend=backend.name,
        stopped=stopped,
        learning_rate=rate,
        steps_per_epoch=job.steps_per_epoch,
        notes=(*setup.notes, *standing.notes),
    )
    report = make_report(outcome)
    write_atomically(path / REPORT_FILE, report_to_json(report) + b"\n")
    if error is None and not report.within_cap:
        error = CapExceeded(f"{report.verdict}. The folder {path} is complete up to step {state.step}.")
    listener.note(f"run folder: {path}")
    if error is not None:
        error.report = report
        raise error
    return report


class _Logged:
    """The listener, with `metrics.csv` beside it."""

    def __init__(self, listener: Listener, metrics: MetricsLog) -> None:
        self._listener, self._metrics = listener, metrics
        self.note, self.progress = listener.note, listener.progress

    def step(self, event: StepEvent) -> None:
        self._metrics.append(
            {
                "step": event.step,
                "epoch": event.epoch,
                "loss": event.loss,
                "train_accuracy": event.train_accuracy,
                "learning_rate": event.learning_rate,
                "images_per_second": event.images_per_second,
                "token_share": event.token_share,
                "trained_blocks": event.trained_blocks,
                "memory_bytes": event.memory_bytes,
                "seconds": event.seconds,
            }
        )
        self._listener.step(event)

    def evaluated(self, step: int, epoch: float, scores: Scores, best: bool) -> None:
        self._metrics.append(
            {
                "step": step,
                "epoch": epoch,
                "val_loss": scores.loss,
                "val_accuracy": scores.accuracy,
                "val_balanced_accuracy": scores.balanced_accuracy,
            }
        )
        self._listener.evaluated(step, epoch, scores, best)


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


def _is_out_of_memory(error: BaseException) -> bool:
    """Allocators say it in many words; these are those of numpy, torch's CPU allocator, the C++ library and oneDNN."""
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _discard(path: Path, *, keep: bool) -> None:
    """Take back a folder in which no step was taken; one that the user had made stays, empty."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if not keep:
        path.rmdir()


def _settings_of_plan(settings: RunSettings, plan: Plan) -> RunSettings:
    """A replayed plan decides the method, the batch and the optimizer."""
    if settings.model != plan.model:
        raise UsageError(f"the plan is for --model {plan.model}, not {settings.model}.")
    return msgspec.structs.replace(
        settings,
        method=plan.method,
        batch_size=plan.batch_size,
        optimizer=plan.optimizer,
        trained_blocks=None,
        split_block=None,
        threads=plan.threads,
    )


def _some(names: tuple[str, ...], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
