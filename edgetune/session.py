"""From a loaded model to a complete run folder, whatever ends the training."""

from __future__ import annotations

import gc
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec

from edgetune.backends.base import Backend
from edgetune.caching import Features, Place, make, open_features
from edgetune.checkpoint import open_base, write_atomically
from edgetune.cost import FLOAT_BYTES
from edgetune.data import timm_augment
from edgetune.engines import engine_of
from edgetune.errors import CapExceeded, DoesNotFit, EdgetuneError, Interrupted
from edgetune.features import FeaturesDamaged, FeaturesOverflow
from edgetune.guard import Guard, memory_ends
from edgetune.heads import fit_head
from edgetune.job import Diverged, Interruption, Job, Listener, NoMemory, OverCap, TrainingState
from edgetune.methods import METHODS, default_rate
from edgetune.outcome import Outcome, make_report
from edgetune.planner import CachedPrefix, Plan, PlanRequest, pinned
from edgetune.prepare import Setup, cache_folder, existing, step_weights
from edgetune.replay import forget, reason_of
from edgetune.report import RunReport, report_to_json
from edgetune.selections import SelectionLog, read_selections
from edgetune.settings import StoredRun
from edgetune.store import (
    METRICS_FILE,
    PLAN_FILE,
    REPORT_FILE,
    LoggedListener,
    Standing,
    trainable_space,
    write_json,
    write_model,
)
from edgetune.trainer import train
from edgetune.units import format_bytes

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


@dataclass
class Session:
    """One stretch of a run, from its start or from where it was resumed. `began` is monotonic, in seconds."""

    path: Path
    setup: Setup
    stored: StoredRun
    backend: Backend
    standing: Standing
    guard: Guard
    began: float

    def __post_init__(self) -> None:
        self.cache: Features | None = None
        self.state = self.standing.state
        self.saved_step = self.state.step
        self._scratch_counted_bytes = 0
        method = METHODS[self.setup.settings.method]
        self.learning_rate = self.setup.settings.learning_rate or default_rate(
            method, self.setup.plan.optimizer, self.setup.shape.width
        )

    def count(self) -> None:
        """Bring the state's seconds and written bytes up to now."""
        written = sum(kept.written_bytes for kept in (self.setup.pictures, self.setup.looked) if kept is not None)
        self.state.scratch_written_bytes += written - self._scratch_counted_bytes
        self._scratch_counted_bytes = written
        now = time.monotonic()
        self.state.total_seconds += now - self.began
        self.began = now

    def save_checkpoint(self, state: TrainingState) -> None:
        self.count()
        with self.guard.meter.phase("save"):
            self.standing.write_checkpoint(state)
        self.saved_step = state.step

    def save_model(self, evaluation_tokens: tuple[int, ...] | None = None) -> None:
        with self.guard.meter.phase("save"):
            write_model(self.path, self.backend, evaluation_tokens, self.setup.plan.token_score)

    def follow(self, plan: Plan, job: Job) -> None:
        """From now on this plan holds, also for the run that is resumed if the next thing to happen is a kill."""
        self.backend.use_split(plan.split_block, embeddings_train=plan.embeddings_train)
        if plan.half_frozen:
            self.backend.store_half(plan.split_block)
        if plan.keeps_state:
            self.backend.reserve(trainable_space(plan))
        if job.is_whole:
            self.save_checkpoint(job.state)
        write_json(self.path / PLAN_FILE, plan)


def train_and_report(session: Session, listener: Listener) -> RunReport:
    """Run the loop and leave a complete folder whatever ends it; then say what ended it.

    Raises: CapExceeded, Interrupted and other EdgetuneErrors, each with the report.
    """
    path, setup, state, guard = session.path, session.setup, session.state, session.guard
    session.backend.use_token_score(setup.plan.token_score)
    job = _job(session, LoggedListener(listener, path / METRICS_FILE, state))
    stopped, error = _train(session, job)
    if state.best is None:
        with _whatever_ended_it(error), memory_ends("saving the model", guard):
            session.save_model()  # stopped before the first evaluation: the weights as they are
    session.count()
    outcome = Outcome(
        settings=setup.settings,
        judge=setup.judge,
        data=setup.data,
        shape=setup.shape,
        plan=job.plan,
        state=state,
        peaks=guard.meter.stop(),
        backend=session.backend.name,
        enforced_by=guard.limit.description,
        stopped=stopped,
        learning_rate=session.learning_rate,
        steps_per_epoch=job.steps_per_epoch,
        cached_bytes=None if session.cache is None else session.cache.stored_bytes,
        cache_precision=None if session.cache is None else session.cache.precision,
        notes=(*setup.notes, *state.notes, *session.standing.notes),
    )
    report = make_report(outcome)
    with _whatever_ended_it(error), memory_ends("writing the report", guard):
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


def begin(session: Session, job: Job) -> None:
    """Where the plan caches the frozen prefix: make what is missing of the cache, let the prefix go, and only then take
    the optimizer's state. Then fit the classifier, where that comes first.

    Raises: as `caching.make` and `heads.fit_head`; CapExceeded if the cache can't be whole and the run does not fit without
    it.
    """
    if job.plan.prefix is not None:
        _cache(session, job, job.plan.prefix)
    fit_head(job)


def _cache(session: Session, job: Job, prefix: CachedPrefix) -> None:
    backend = session.backend
    settings, state = session.setup.settings, job.state
    folder = cache_folder(settings, session.path)
    place = Place(
        folder=folder,
        architecture=f"{session.stored.architecture} {session.stored.model_args}",
        preprocess=msgspec.to_builtins(session.setup.preprocess),
        limit_bytes=settings.cache_limit_bytes,
        keep_free_bytes=_kept_free_bytes(session, folder),
    )
    features = open_features(job, place, prefix, settings.cache_precision)
    looked = session.setup.looked
    try:
        make(job, features, looked)
    except FeaturesOverflow as error:
        features.remove()
        job.tell(f"{error}; the cache is kept as float32")
        features = open_features(job, place, prefix, "float32")
        make(job, features)
    finally:
        if looked is not None:
            looked.close()
    state.cache_written_bytes += features.written_bytes
    job.features = features
    session.cache = features
    for note in features.notes:
        job.tell(note)
    if prefix.whole and features.is_whole:
        before = session.guard.meter.current().total_bytes
        stored = open_base(session.path, session.standing.base_sha256)
        state.dropped_bytes = backend.drop_prefix(prefix.blocks, stored)
        after = session.guard.meter.current().total_bytes
        job.listener.note(
            f"the cache is whole ({format_bytes(features.stored_bytes)}): {format_bytes(state.dropped_bytes)} of weights "
            f"leave memory, {format_bytes(before)} resident become {format_bytes(after)}"
        )
        if job.pictures is not None:
            job.pictures.close()  # no image is asked for any more
    elif prefix.whole:
        _go_on_without_all(session, job, features)
    elif features.full is not None:
        job.tell(f"{_cached_part(features, folder)}: the rest is computed when it is needed")
    session.standing.restore_optimizer()
    if job.plan.keeps_state:
        backend.reserve(trainable_space(job.plan))
    job.ready = True


def _cached_part(features: Features, folder: Path) -> str:
    why = features.full or "some of it can't be read back"
    return f"only a part is cached ({why})" if features.stored_bytes else f"nothing can be cached in {folder} ({why})"


def _kept_free_bytes(session: Session, cache: Path) -> int:
    """What the run itself still writes to the cache's disk: the model, two checkpoints and a third being written."""
    if existing(cache).stat().st_dev != session.path.stat().st_dev:
        return 0
    return 4 * FLOAT_BYTES * session.setup.shape.parameters


def _go_on_without_all(session: Session, job: Job, features: Features) -> None:
    """Turn to a plan under which the prefix stays in memory: the cache could not be made whole."""
    assert job.plan.prefix is not None
    partly = msgspec.structs.replace(job.plan.prefix, whole=False)
    request = pinned(session.setup.request, partly)
    splits = tuple(split for split in request.space.splits if split >= partly.blocks)
    request = msgspec.structs.replace(request, space=msgspec.structs.replace(request.space, splits=splits))
    part = _cached_part(features, cache_folder(session.setup.settings, session.path))
    try:
        job.plan = _make_plan(session, request)
    except DoesNotFit as error:
        raise DoesNotFit(
            f"{part}, and with the frozen blocks in memory {error}",
            error.smallest_cap_bytes,
        ) from error
    job.tell(f"{part}: the rest is computed when it is needed, under a new plan")
    for line in job.plan.explanation:
        job.listener.note(f"plan: {line}")
    write_json(session.path / PLAN_FILE, job.plan)


def _make_plan(session: Session, request: PlanRequest) -> Plan:
    settings = session.setup.settings
    return engine_of(settings).plan(settings, request)


def _job(session: Session, listener: Listener) -> Job:
    setup, guard = session.setup, session.guard
    settings = setup.settings
    job = Job(
        settings=settings,
        method=METHODS[settings.method],
        plan=setup.plan,
        shape=setup.shape,
        backend=session.backend,
        train_images=setup.data.train,
        val_images=setup.data.val,
        preprocess=setup.preprocess,
        class_weights=step_weights(setup),
        transform=timm_augment(setup.preprocess, settings.seed) if settings.augment else None,
        learning_rate=session.learning_rate,
        listener=listener,
        checkpoint=session.save_checkpoint,
        keep_best=session.save_model,
        enter_phase=guard.meter.enter,
        memory_bytes=lambda: setup.judge.device_peak_bytes(guard.meter.peaks()),
        shortage=guard.shortage,
        is_out_of_memory=lambda error: guard.is_out_of_memory(error, job.plan),
        tighten=lambda current: guard.tighter(
            pinned(setup.request, current.prefix), current, partial(_make_plan, session)
        ),
        follow=lambda plan: session.follow(plan, job),
        decode_budget_bytes=setup.decode_budget_bytes,
        pictures=setup.pictures,
        keep_selection=SelectionLog(session.path, session.state.step).append,
        replayed=None if settings.replay is None else read_selections(Path(settings.replay)),
        ready=setup.plan.prefix is None,
        state=session.state,
    )
    return job


def _train(session: Session, job: Job) -> tuple[str, EdgetuneError | None]:
    """Run the loop; why it stopped, and what to raise for it. Whatever can be gone on with is saved by then."""
    path, state = session.path, session.state
    go_on = f"edgetune finetune --resume {shlex.quote(str(path))}"
    with stop_on_signals(job.stop) as signals:
        try:
            begin(session, job)
            train(job)
            return "finished", None
        except Interruption:
            number = signals[0] if signals else signal.SIGINT
            return "interrupted", Interrupted(f"stopped after step {state.step}. Go on with: {go_on}", number)
        except OverCap:
            return "over the cap", None
        except Diverged:
            return "diverged", EdgetuneError(_diverged(session))
        except Exception as failure:
            if not isinstance(failure, NoMemory) and not session.guard.is_out_of_memory(failure, job.plan):
                if not isinstance(failure, EdgetuneError):
                    raise
                # An image that has gone, a full disk: the state is that of the last whole step.
                _save(session, job)
                advice = "When that is mended, go on with:"
                if isinstance(failure, FeaturesDamaged):  # this run may have let go what computes them
                    advice = "What is missing or damaged is computed again by:"
                failure.args = (f"{_what_stopped(session, job, failure)} {advice} {go_on}",)
                return "failed", failure
            reason = reason_of(failure) + (", under tighter plans too" if isinstance(failure, NoMemory) else "")
            forget(failure)
        session.guard.lift()
        gc.collect()
        _save(session, job)
        return "out of memory", CapExceeded(
            f"memory ran out after step {state.step} ({reason}). {path} is complete up to step {session.saved_step}. With "
            f"more memory free, go on with: {go_on}"
        )


def _save(session: Session, job: Job) -> None:
    """A checkpoint, if the weights are worth one and it can be written; there is an earlier one."""
    if job.is_whole:
        with suppress(EdgetuneError, MemoryError, OSError, RuntimeError):
            session.save_checkpoint(session.state)


def _what_stopped(session: Session, job: Job, failure: EdgetuneError) -> str:
    """What was being done, how far it was, and what came between: one sentence or more."""
    doing = {"evaluate": "evaluation", "head": "fitting the classifier"}.get(session.guard.meter.at_hand, "training")
    if not job.ready:
        doing = "caching the frozen blocks"  # its phase has ended by now
    step = f"after step {session.state.step}" if session.state.step else "before the first step"
    reason = str(failure)
    return f"{doing} stopped {step}: {reason}{'' if reason.endswith(('.', '!', '?')) else '.'}"


def _diverged(session: Session) -> str:
    state = session.state
    reached = "The weights left there are of no use."
    if state.best is not None and state.best.accuracy is not None:
        reached = f"The best epoch before, at {state.best.accuracy:.1%}, is kept."
    return (
        f"the loss was no finite number at step {state.step}. Try a lower --lr than {session.learning_rate:g}. "
        f"The run folder is {session.path}. {reached}"
    )


@contextmanager
def _whatever_ended_it(error: EdgetuneError | None) -> Iterator[None]:
    """What can't be written any more must not hide what ended the run."""
    try:
        yield
    except EdgetuneError:
        if error is None:
            raise


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP (a terminal that went) ask for a stop after the step at hand; a second one interrupts at once.

    Yields the list of signals that came. Outside the main thread signals stay as they are.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    # What was ignored when we started (nohup, a job in the background of a script) stays ignored.
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
