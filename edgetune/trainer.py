"""The training loop, readable top to bottom. It knows no torch: a backend steps, a plan bounds, ALaST proposes.

Everything random is a function of (seed, step or epoch), and the position in the data is the step count alone, so a run
resumed from a checkpoint goes on exactly as the run that was never stopped. `job.py` says what the loop works on,
`replay.py` what happens when memory runs out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune import alast, cost
from edgetune.backends.base import Array, Labels, StepResult
from edgetune.caching import Loaded, Use, batches_ahead, cached_blocks, completed, load, one_pass
from edgetune.data import ImageSet, epoch_order, prefetch
from edgetune.errors import DoesNotFit
from edgetune.job import Diverged, Interruption, Job, OverCap, StepEvent
from edgetune.methods import proposer
from edgetune.planner import fit, lightened, pruned_tokens
from edgetune.planner.values import with_levels
from edgetune.replay import smaller_batches, within_memory
from edgetune.report import Scores, Tally, is_better

# A loss that is no number this many steps in a row won't become one again: the weights do not change meanwhile.
MAX_LOST_STEPS = 3
MicroBatch = tuple[Array, Labels]


def train(job: Job) -> None:
    """Run the loop to its last step.

    Raises: Interruption (a checkpoint is written), OverCap (likewise), Diverged; the state stays consistent in each.
    NoMemory: then it is that of the last whole step, and the weights are too if `job.is_whole`.
    """
    state = job.state
    job.whole_steps = job.backend.optimizer_steps()
    if state.before is None:
        _evaluate_start(job)
    if job.method.prunes_tokens and state.alast is None:
        state.alast = alast.initial_state(job.shape.depth, job.plan.token_floor, job.settings.alast)
    with closing(_Source(job)) as source:
        while True:
            if _evaluation_due(job) and state.evaluated_step != state.step:
                _evaluate_and_keep(job, source)
            if state.step == job.total_steps:
                if state.best_epoch == 0:
                    job.tell(
                        f"no epoch told the validation images as well as the start did, which is what is saved: the "
                        f"pretrained model with a classifier fitted to it. Try a lower --lr than {job.learning_rate:g}."
                    )
                return
            _one_step(job, source)
            every = job.settings.checkpoint_every
            if job.stop.is_set():
                job.checkpoint(state)
                raise Interruption
            if every and state.step % every == 0 and not _evaluation_due(job):
                job.checkpoint(state)


def _one_step(job: Job, source: _Source) -> None:
    state = job.state
    indices = _step_indices(job, state.step)
    images = len(indices)
    learning_rate = rate_at(state.step, job)
    weight_sum = _weight_sum(job, indices)

    def attempt() -> tuple[cost.Selection, StepResult]:
        plan = job.plan
        selection = lightened(job.shape, _selection(job), plan)
        result = job.backend.step(
            source.of_step(state.step),
            selection,
            images=images,
            weight_sum=weight_sum,
            learning_rate=learning_rate,
            seed=_step_seed(job.settings.seed, state.step),
            with_deltas=state.alast is not None,
            updates_in_backward=plan.updates_in_backward,
            keeps_state=plan.keeps_state,
            cached_blocks=cached_blocks(job),
        )
        return selection, result

    began = time.monotonic()
    selection, result = within_memory(job, f"step {state.step + 1}", attempt, source.close, needs_room=True)
    seconds = time.monotonic() - began
    plan = job.plan
    if state.alast is not None and result.class_token_deltas is not None and result.updated:
        # The mean over the batch instead of the sum: alpha carries the batch size, so a short last batch moves nothing.
        alpha = job.settings.alast.alpha
        alpha = job.learning_rate * plan.batch_size if alpha is None else alpha
        alast.update(state.alast, list(result.class_token_deltas), alpha=alpha, floor=plan.token_floor)
    state.step += 1
    job.keep_selection(state.step, selection)
    job.whole_steps = job.backend.optimizer_steps()
    state.lost_steps = 0 if result.updated else state.lost_steps + 1
    state.images += images
    state.flops += cost.step_flops(job.shape, selection, images, cached_blocks(job))
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


def _selection(job: Job) -> cost.Selection:
    """What the step at hand trains and keeps: the method's choice clipped to the plan, or what another run did.

    Raises: DoesNotFit if the plan has no room for what that run did.
    """
    plan, state = job.plan, job.state
    if job.replayed is None:
        propose = proposer(job.method, plan, state.alast, job.settings.alast)
        return fit(propose(alast.step_rng(job.settings.seed, state.step)), plan)
    wanted = job.replayed[state.step]
    room = (
        all(asked <= most for asked, most in zip(wanted.tokens, plan.token_ceiling, strict=True))
        and sum(wanted.trains) <= plan.trained_blocks
        and not any(wanted.trains[: plan.split_block])
    )
    if not room:
        raise DoesNotFit(
            f"step {state.step + 1} of the run that is replayed trains more, or keeps more tokens, than the plan here "
            "has room for. Try a larger --ram-cap.",
            plan.predicted_peak_bytes,
        )
    return with_levels(wanted.trains, wanted.tokens, wanted.embeddings_train, plan.recompute, plan.recompute_frozen)


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


def _evaluate_start(job: Job) -> None:
    """What the model tells before the first step. With a fitted classifier it is a model as good as any that training
    makes, and it may end up as the best.
    """
    state, before = job.state, evaluate(job, job.val_images)
    told = _accuracy(before, balanced=job.settings.balanced_class_weights)
    if job.starts_fitted and is_better(told, None):
        job.keep_best(None)
        state.best, state.best_epoch = before, 0.0
        job.listener.note(f"start  validation {before}  (best so far)")
    state.before = before  # last: a run that goes on after a failure above begins here


def _evaluate_and_keep(job: Job, source: _Source) -> None:
    state = job.state
    epoch = state.step / job.steps_per_epoch
    try:
        scores = evaluate(job, job.val_images, source.close)
        pruned = None
        if pruned_tokens(job.plan) is not None:
            # Which tokens serve a model best that was trained on some is for the validation images to say.
            as_trained = evaluate(job, job.val_images, source.close, "evaluate pruned")
            if _better(as_trained, scores, balanced=job.settings.balanced_class_weights):
                scores, pruned = as_trained, pruned_tokens(job.plan)
    except Interruption:
        job.checkpoint(state)
        raise
    better = state.best is None or _better(scores, state.best, balanced=job.settings.balanced_class_weights)
    if better:
        # The model first: a checkpoint that calls an epoch the best must find its weights.
        job.keep_best(pruned)
        state.evaluation_tokens = pruned
        state.best, state.best_epoch = scores, epoch
    state.evaluated_step = state.step
    job.listener.evaluated(state.step, epoch, scores, better)
    state.epoch_loss_sum, state.epoch_correct, state.epoch_images = 0.0, 0, 0
    job.checkpoint(state)


def _better(scores: Scores, best: Scores, *, balanced: bool) -> bool:
    """By accuracy, at a tie by loss: small validation sets tie often."""
    new, old = _accuracy(scores, balanced=balanced), _accuracy(best, balanced=balanced)
    if new is not None and new == old and scores.loss is not None and best.loss is not None:
        return scores.loss < best.loss
    return is_better(new, old)


def _accuracy(scores: Scores, *, balanced: bool) -> float | None:
    """What models are compared by: balanced, where the loss is."""
    return scores.balanced_accuracy if balanced else scores.accuracy


def evaluate(job: Job, images: ImageSet, give_back: Callable[[], None] = lambda: None, use: Use = "evaluate") -> Scores:
    """Accuracy and loss on all tokens, or as trained. Raises: Interruption between batches, if a stop was asked for;
    NoMemory.

    `give_back` lets go of what waits to be trained on, where memory runs out.
    """
    began = time.monotonic()
    job.enter_phase("evaluate")
    what = f"evaluation after step {job.state.step}"
    lighter = partial(smaller_batches, job, "evaluation_batch", len(images.paths))
    scores = within_memory(job, what, lambda: _evaluate(job, images, use), give_back, lighter)
    job.enter_phase("train")
    job.state.eval_seconds += time.monotonic() - began
    return scores


def _evaluate(job: Job, images: ImageSet, use: Use) -> Scores:
    tokens = pruned_tokens(job.plan) if use == "evaluate pruned" else None
    tally = Tally(job.classes)
    with closing(one_pass(job, images, np.arange(len(images.paths)), use, "evaluate")) as batches:
        for inputs, labels in batches:
            tally.add(job.backend.evaluate(inputs, cached_blocks(job), tokens), labels)
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


class _Part(NamedTuple):
    """One micro-batch, and where it belongs."""

    step: int
    is_last: bool
    loaded: Loaded


class _Source:
    """The images of the run from its current step on, loaded one micro-batch ahead.

    Closed, it begins anew at the step at hand, cut as the plan then says.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._parts: Generator[_Part, None, None] | None = None

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of one step. What an earlier step, which ended early, left is passed over."""
        if self._parts is None:
            self._parts = _parts(self._job)
        for part in self._parts:
            if part.step == step:
                yield completed(self._job, part.loaded, "train")
                if part.is_last:
                    return

    def close(self) -> None:
        if self._parts is not None:
            self._parts.close()
            self._parts = None


def _parts(job: Job) -> Generator[_Part, None, None]:
    """Every micro-batch from the current step to the end of the run."""
    size, first, end = job.plan.micro_batch, job.state.step, job.total_steps

    def produce() -> Iterator[_Part]:
        for step in range(first, end):
            indices = _step_indices(job, step)
            for start in range(0, len(indices), size):
                epoch, part = step // job.steps_per_epoch, indices[start : start + size]
                loaded = load(job, job.train_images, part, epoch, "train")
                yield _Part(step, start + size >= len(indices), loaded)

    return prefetch(produce(), depth=batches_ahead(job, training=True))


def _weight_sum(job: Job, indices: npt.NDArray[np.int64]) -> float:
    if job.class_weights is None:
        return float(len(indices))
    labels = np.asarray(job.train_images.labels)[indices]
    return float(job.class_weights[labels].sum())


def _step_seed(seed: int, step: int) -> int:
    """The seed of torch's generator in one step (dropout, drop path)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1
