"""The training loop, readable top to bottom. It knows no torch: a backend steps, a plan bounds, ALaST proposes.

Everything random is a function of (seed, step or epoch), and the position in the data is the step count alone, so a run
resumed from a checkpoint goes on exactly as the run that was never stopped.
"""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from traceback import clear_frames
from types import FrameType
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from edgetune import alast, cost
from edgetune.backends.base import Backend, Images, Labels, StepResult
from edgetune.cost import ViTShape
from edgetune.data import ImageSet, Preprocess, Transform, epoch_order, load_batch, prefetch
from edgetune.errors import DoesNotFit
from edgetune.methods import Method, Proposer, proposer
from edgetune.planner import Plan, fit
from edgetune.report import Scores, Tally, is_better
from edgetune.settings import RunSettings

# A loss that is no number this many steps in a row won't become one again: the weights do not change meanwhile.
MAX_LOST_STEPS = 3
# Tighter plans that one step is tried under when memory runs out, before the run ends.
MAX_TIGHTENINGS = 3
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
MicroBatch = tuple[Images, Labels]


class Interruption(Exception):
    """A signal asked the run to stop; the state is consistent. `run` turns it into `errors.Interrupted`."""


class Diverged(Exception):
    """The loss was no finite number, several steps in a row."""


class OverCap(Exception):
    """The measured peak passed the cap."""


class NoMemory(Exception):
    """Memory ran out, and went on doing so under tighter plans."""


class TrainingState(msgspec.Struct):
    """Where a run stands: what a checkpoint keeps besides tensors. Counts and sums since the first step."""

    step: int = 0
    evaluated_step: int = -1
    lost_steps: int = 0
    images: int = 0
    flops: int = 0
    token_share_sum: float = 0.0
    device_peak_bytes: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    total_seconds: float = 0.0
    epoch_loss_sum: float = 0.0
    epoch_correct: int = 0
    epoch_images: int = 0
    best_epoch: float | None = None
    best: Scores | None = None
    before: Scores | None = None
    alast: alast.AlastState | None = None
    tightenings: tuple[str, ...] = ()


class StepEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One step, as the listener and `metrics.csv` see it."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    train_accuracy: float
    learning_rate: float
    images_per_second: float
    token_share: float
    trained_blocks: int
    memory_bytes: int
    cap_bytes: int
    seconds: float
    eta_seconds: float


class Listener(Protocol):
    """Who watches a run: the terminal, a test, nobody."""

    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def step(self, event: StepEvent) -> None: ...
    def evaluated(self, step: int, epoch: float, scores: Scores, best: bool) -> None: ...


@dataclass
class Job:
    """All that the loop works on. `run.py` puts it together."""

    settings: RunSettings
    method: Method
    plan: Plan
    shape: ViTShape
    backend: Backend
    train_images: ImageSet
    val_images: ImageSet
    preprocess: Preprocess
    class_weights: npt.NDArray[np.float32] | None
    transform: Transform | None
    learning_rate: float
    listener: Listener
    checkpoint: Callable[[TrainingState], None]
    keep_best: Callable[[], None]
    memory_bytes: Callable[[], int]  # the judged peak: of the device where one is simulated, else of this process
    enter_phase: Callable[[str], None]
    # What to do about memory: a sentence if too little is left for a step under this plan, whether an error says that it
    # ran out, a tighter plan (DoesNotFit if there is none), and who is told of it.
    shortage: Callable[[Plan], str | None] = lambda _plan: None
    is_out_of_memory: Callable[[BaseException], bool] = lambda error: isinstance(error, MemoryError)
    tighten: Callable[[Plan], Plan] | None = None
    tightened: Callable[[Plan, str], None] = lambda _plan, _reason: None
    decode_budget_bytes: int | None = None
    state: TrainingState = field(default_factory=TrainingState)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def classes(self) -> int:
        return self.shape.classes

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_images.paths) // self.plan.batch_size)

    @property
    def total_steps(self) -> int:
        return self.settings.steps or self.settings.epochs * self.steps_per_epoch


def train(job: Job) -> None:
    """Run the loop to its last step.

    Raises: Interruption (a checkpoint is written), Diverged, OverCap (likewise); the state stays consistent in each.
    """
    state, plan = job.state, job.plan
    if state.before is None:
        state.before = evaluate(job, job.val_images)
    if job.method.prunes_tokens and state.alast is None:
        state.alast = alast.initial_state(job.shape.depth, plan.token_floor, job.settings.alast)
    propose = proposer(job.method, plan, state.alast, job.settings.alast)
    with closing(_Source(job)) as source:
        while True:
            if _evaluation_due(job) and state.evaluated_step != state.step:
                _evaluate_and_keep(job)
            if state.step == job.total_steps:
                return
            _one_step(job, propose, source)
            every = job.settings.checkpoint_every
            if job.stop.is_set():
                job.checkpoint(state)
                raise Interruption
            if every and state.step % every == 0 and not _evaluation_due(job):
                job.checkpoint(state)


T = TypeVar("T")


def _within_memory(job: Job, work: Callable[[], T], give_back: Callable[[], None], *, check: bool) -> T:
    """`work`, tried again under a tighter plan when memory runs out, or when too little is left to begin.

    `give_back` lets go of what the failed attempt left. A failed attempt leaves nothing: the same images are seen with
    the same randomness, so that no sample is lost and the order stays.

    Raises: NoMemory if there is no tighter plan, or MAX_TIGHTENINGS of them did not help.
    """
    for attempt in range(MAX_TIGHTENINGS + 1):
        reason = job.shortage(job.plan) if check else None
        if reason is None:
            try:
                return work()
            except Exception as error:
                if not job.is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                # The frames of what failed hold its tensors.
                clear_frames(error.__traceback__)
                error.__traceback__ = None
        give_back()
        gc.collect()
        if attempt == MAX_TIGHTENINGS or job.tighten is None:
            break
        try:
            job.plan = job.tighten(job.plan)
        except DoesNotFit:
            break
        job.tightened(job.plan, reason)
    raise NoMemory(reason)


def _one_step(job: Job, propose: Proposer, source: _Source) -> None:
    state = job.state
    indices = _step_indices(job, state.step)
    images = len(indices)
    learning_rate = rate_at(state.step, job)
    weight_sum = _weight_sum(job, indices)

    def attempt() -> tuple[cost.Selection, StepResult]:
        selection = fit(propose(alast.step_rng(job.settings.seed, state.step)), job.plan)
        result = job.backend.step(
            islice(source.batches(), -(-images // job.plan.micro_batch)),
            selection,
            images=images,
            weight_sum=weight_sum,
            learning_rate=learning_rate,
            seed=_step_seed(job.settings.seed, state.step),
            with_deltas=state.alast is not None,
            # The last step of an epoch may be cut into fewer parts than the plan's, never into more.
            updates_in_backward=job.plan.updates_in_backward,
            keeps_state=job.plan.keeps_state,
        )
        return selection, result

    began = time.monotonic()
    selection, result = _within_memory(job, attempt, source.close, check=True)
    seconds = time.monotonic() - began
    plan = job.plan
    if state.alast is not None and result.class_token_deltas is not None and result.updated:
        # The mean over the batch instead of the sum: alpha carries the batch size, so a short last batch moves nothing.
        alpha = job.settings.alast.alpha
        alpha = job.learning_rate * plan.batch_size if alpha is None else alpha
        alast.update(state.alast, list(result.class_token_deltas), alpha=alpha, floor=plan.token_floor)
    state.step += 1
    state.lost_steps = 0 if result.updated else state.lost_steps + 1
    state.images += images
    state.flops += cost.step_flops(job.shape, selection, images)
    share = cost.token_share(job.shape, selection)
    state.token_share_sum += share
    state.train_seconds += seconds
    if result.updated:
        state.epoch_loss_sum += result.loss * images
        state.epoch_correct += result.correct
        state.epoch_images += images
    _tell(job, selection, result, learning_rate, share, seconds)
    if state.lost_steps >= MAX_LOST_STEPS:
        raise Diverged


def _tell(
    job: Job, selection: cost.Selection, result: StepResult, learning_rate: float, share: float, seconds: float
) -> None:
    """Tell the listener of a step, and end the run if its memory passed the cap."""
    state, plan = job.state, job.plan
    memory_bytes = job.memory_bytes()
    state.device_peak_bytes = max(state.device_peak_bytes, memory_bytes)
    job.listener.step(
        StepEvent(
            step=state.step,
            total_steps=job.total_steps,
            epoch=state.step / job.steps_per_epoch,
            loss=result.loss,
            train_accuracy=state.epoch_correct / max(1, state.epoch_images),
            learning_rate=learning_rate,
            images_per_second=state.images / max(state.train_seconds, 1e-9),
            token_share=share,
            trained_blocks=sum(selection.trains),
            memory_bytes=memory_bytes,
            cap_bytes=plan.cap_bytes,
            seconds=seconds,
            eta_seconds=(job.total_steps - state.step) * state.train_seconds / state.step,
        )
    )
    if memory_bytes > plan.cap_bytes:
        job.checkpoint(state)
        raise OverCap


def _evaluation_due(job: Job) -> bool:
    """At the end of every epoch, and of the run."""
    step = job.state.step
    return step == job.total_steps or (step > 0 and step % job.steps_per_epoch == 0)


def _evaluate_and_keep(job: Job) -> None:
    state = job.state
    epoch = state.step / job.steps_per_epoch
    try:
        scores = evaluate(job, job.val_images)
    except Interruption:
        job.checkpoint(state)
        raise
    better = state.best is None or _better(scores, state.best, balanced=job.settings.balanced_class_weights)
    if better:
        # The model first: a checkpoint that calls an epoch the best must find its weights.
        job.keep_best()
        state.best, state.best_epoch = scores, epoch
    state.evaluated_step = state.step
    job.listener.evaluated(state.step, epoch, scores, better)
    state.epoch_loss_sum, state.epoch_correct, state.epoch_images = 0.0, 0, 0
    job.checkpoint(state)


def _better(scores: Scores, best: Scores, *, balanced: bool) -> bool:
    """By accuracy (balanced, where the loss is), at a tie by loss: small validation sets tie often."""
    new, old = (scores.balanced_accuracy, best.balanced_accuracy) if balanced else (scores.accuracy, best.accuracy)
    if new is not None and new == old and scores.loss is not None and best.loss is not None:
        return scores.loss < best.loss
    return is_better(new, old)


def evaluate(job: Job, images: ImageSet) -> Scores:
    """Accuracy and loss on all tokens. Raises: Interruption between batches, if a stop was asked for; NoMemory."""
    began = time.monotonic()
    job.enter_phase("evaluate")
    scores = _within_memory(job, lambda: _evaluate(job, images), lambda: None, check=False)
    job.enter_phase("train")
    job.state.eval_seconds += time.monotonic() - began
    return scores


def _evaluate(job: Job, images: ImageSet) -> Scores:
    tally = Tally(job.classes)
    size = job.plan.evaluation_batch
    total = len(images.paths)

    def batches() -> Iterator[MicroBatch]:
        for start in range(0, total, size):
            yield load_batch(
                images,
                range(start, min(start + size, total)),
                job.preprocess,
                seed=job.settings.seed,
                epoch=0,
                decode_budget_bytes=job.decode_budget_bytes,
            )

    with closing(prefetch(batches())) as source:
        for number, (inputs, labels) in enumerate(source):
            if job.stop.is_set():
                raise Interruption
            tally.add(job.backend.evaluate(inputs), labels)
            job.listener.progress("evaluate", min((number + 1) * size, total), total)
    return tally.scores()


def rate_at(step: int, job: Job) -> float:
    """Linear warm-up over the first epochs, then a cosine to zero: a function of the step alone."""
    total = job.total_steps
    warmup = min(round(job.settings.warmup_epochs * job.steps_per_epoch), total // 4)
    if step < warmup:
        return job.learning_rate * (step + 1) / warmup
    return job.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _step_indices(job: Job, step: int) -> npt.NDArray[np.int64]:
    """Which training images step `step` sees: a slice of its epoch's order (the last one of an epoch may be shorter)."""
    epoch, place = divmod(step, job.steps_per_epoch)
    order = epoch_order(len(job.train_images.paths), job.settings.seed, epoch)
    return order[place * job.plan.batch_size : (place + 1) * job.plan.batch_size]


class _Source:
    """The micro-batches of the run from its current step on; closed, it begins there anew, cut as the plan then says."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._batches: Generator[MicroBatch, None, None] | None = None

    def batches(self) -> Generator[MicroBatch, None, None]:
        if self._batches is None:
            self._batches = _micro_batches(self._job)
        return self._batches

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _micro_batches(job: Job) -> Generator[MicroBatch, None, None]:
    """Every micro-batch from the current step to the end of the run, loaded one ahead."""

    def produce() -> Iterator[MicroBatch]:
        for step in range(job.state.step, job.total_steps):
            indices = _step_indices(job, step)
            for start in range(0, len(indices), job.plan.micro_batch):
                yield load_batch(
                    job.train_images,
                    indices[start : start + job.plan.micro_batch],
                    job.preprocess,
                    seed=job.settings.seed,
                    epoch=step // job.steps_per_epoch,
                    hflip=job.settings.hflip,
                    transform=job.transform,
                    decode_budget_bytes=job.decode_budget_bytes,
                )

    # timm's augmentation draws from global generators, so it must run between steps, in this thread.
    return prefetch(produce(), depth=0 if job.transform is not None else 1)


def _weight_sum(job: Job, indices: npt.NDArray[np.int64]) -> float:
    if job.class_weights is None:
        return float(len(indices))
    labels = np.asarray(job.train_images.labels)[indices]
    return float(job.class_weights[labels].sum())


def _step_seed(seed: int, step: int) -> int:
    """The seed of torch's generator in one step (dropout, drop path)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1


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
