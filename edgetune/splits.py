"""Where to split and how many tokens to keep there, found from the pretrained model and a sample of the training images.

Nothing is trained. A linear classifier on what each candidate block puts out (closed form, each image judged by a
classifier that has not seen it) says how much of what the task needs is there. The deepest split that loses nothing is
the cheapest to train above: all that the blocks above could learn from is still in what they are given. The same at the
end of the frozen model, with fewer tokens from the split on, says how few will do.

`docs/decisions/0009-prefix-cache.md` says what this rests on, `benchmarks/split_study.py` how well it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgetune.backends.base import Backend, Images
from edgetune.cost import FLOAT_BYTES, ViTShape, evaluation_peak_bytes, input_bytes
from edgetune.data import load_batch, prefetch
from edgetune.job import Listener
from edgetune.methods import adaptive_obstacle
from edgetune.planner import PREFETCHED_BATCHES, PlanRequest, process_bytes, rounded_up
from edgetune.planner import plan as make_plan
from edgetune.prepare import Setup, tell_plan
from edgetune.units import format_bytes

MOST_IMAGES = 384
# Of the depth: where a split is looked for. Above the last of them a third of the blocks is left to train.
CANDIDATES = (1 / 3, 1 / 2, 2 / 3)
# Of the patch tokens: what may be kept at the split.
TOKEN_SHARES = (0.4, 0.67)
# A loss of so little is none: a few images of the sample.
TOLERATED_LOSS = 0.01
RIDGES = (1e-2, 1e-1)

Correct = npt.NDArray[np.bool_]  # of each image, whether it was told right


class Found(NamedTuple):
    """The choice, and what it was made on, in words."""

    split_block: int
    split_tokens: float
    lines: tuple[str, ...]


def candidate_splits(depth: int) -> tuple[int, ...]:
    return tuple(sorted({round(share * depth) for share in CANDIDATES} - {0, depth}))


def sample(labels: Sequence[int], seed: int, most: int = MOST_IMAGES) -> npt.NDArray[np.int64]:
    """Positions of at most `most` images, of each class as large a share as of all, at least two where there are."""
    rng = np.random.default_rng([seed, 12])
    own = np.asarray(labels)
    if len(own) <= most:
        return np.arange(len(own))
    chosen = []
    for label in np.unique(own):
        places = rng.permutation(np.flatnonzero(own == label))
        chosen.append(places[: max(2, round(most * len(places) / len(own)))])
    return np.sort(np.concatenate(chosen))


def told_right(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Correct:
    """Of each image, whether a linear classifier made of all the others tells it right. features (N, D), labels (N,).

    Ridge regression onto the classes, whose leave-one-out residuals are known in closed form; of a few strengths the
    one that tells most. No product goes through numpy's BLAS, which keeps 5 MiB for good once it is used.
    """
    centred = features - features.mean(axis=0)
    spread = centred.std(axis=0)
    centred /= np.where(spread > 0, spread, 1.0)
    gram = np.einsum("id,jd->ij", centred, centred).astype(np.float64) / centred.shape[1] + 1.0  # 1: the intercept
    targets = (labels[:, None] == np.unique(labels)[None, :]).astype(np.float64)
    own = targets.argmax(axis=1)
    best: Correct | None = None
    for ridge in RIDGES:
        inverse = inverted(gram + ridge * np.eye(len(gram)))
        left_out = targets - np.einsum("ij,jc->ic", inverse, targets) / np.diag(inverse)[:, None]
        correct = left_out.argmax(axis=1) == own
        if best is None or correct.sum() > best.sum():
            best = correct
    assert best is not None
    return best


def inverted(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The inverse of a positive definite matrix (N, N), which is overwritten: Gauss-Jordan, without pivots."""
    for place in range(len(matrix)):
        pivot = matrix[place, place]
        column = matrix[:, place].copy()
        column[place] = 0.0
        matrix[place, place] = 1.0
        matrix[place] /= pivot
        matrix[:, place] *= np.arange(len(matrix)) == place
        matrix -= column[:, None] * matrix[place]
    return matrix


def look_bytes(shape: ViTShape, batch: int) -> int:
    """What looking holds beside the model and a forward pass of `batch` images."""
    streams = 4 * batch * shape.all_tokens * shape.width * FLOAT_BYTES
    ways = max(len(CANDIDATES), len(TOKEN_SHARES) + 1)
    summaries = (ways + 3) * MOST_IMAGES * 2 * shape.width * FLOAT_BYTES
    return streams + summaries + 4 * MOST_IMAGES**2 * 8


def loses_nothing(correct: Correct, best: Correct) -> bool:
    """Whether what tells `correct` right does as well as the best, as far as these images can show."""
    lost = best.astype(np.float64) - correct
    error = lost.std() / len(lost) ** 0.5
    return bool(lost.mean() <= max(TOLERATED_LOSS, error))


def choose_split(told: Mapping[int, Correct]) -> int:
    """The deepest block below which everything can be frozen without losing anything."""
    best = max(told.values(), key=np.sum)
    return max(block for block, correct in told.items() if loses_nothing(correct, best))


def choose_tokens(told: Mapping[float, Correct]) -> float:
    """The smallest share of the tokens that does as well as all (1.0 is among them)."""
    return min(share for share, correct in told.items() if loses_nothing(correct, told[1.0]))


def decide(setup: Setup, backend: Backend, listener: Listener) -> Setup:
    """The setup with the split, and the tokens that are kept there, that a sample of the training images asks for.

    What the user named stays; so does what the cap leaves no choice in.
    """
    settings, data, shape = setup.settings, setup.data, setup.shape
    size, peak_bytes = _batch_that_fits(setup.request)
    if not size:
        listener.note(f"split: not looked for, which takes {format_bytes(peak_bytes)}: the lowest that fits")
        tell_plan(setup.plan, listener)
        return setup
    chosen = sample(data.train.labels, settings.seed)

    def batches() -> Iterator[Images]:
        for start in range(0, len(chosen), size):
            yield load_batch(
                data.train,
                chosen[start : start + size],
                setup.preprocess,
                seed=settings.seed,
                epoch=0,
                decode_budget_bytes=setup.decode_budget_bytes,
            )[0]
            listener.progress("look for the split", min(start + size, len(chosen)), len(chosen))

    prunes = settings.split_tokens is None and adaptive_obstacle(shape) is None
    labels = np.asarray(data.train.labels, np.int64)[chosen]
    found = find(backend, shape, batches, labels, lowest_split=setup.plan.split_block, prunes=prunes)
    for line in found.lines:
        listener.note(f"split: {line}")
    space = setup.request.space
    splits = tuple(split for split in space.splits if split >= found.split_block)
    request = msgspec.structs.replace(
        setup.request,
        space=msgspec.structs.replace(space, splits=splits or space.splits[-1:]),
        split_tokens=found.split_tokens if prunes else settings.split_tokens,
    )
    plan = make_plan(request)
    phases = plan.predicted_phase_bytes | {"look": peak_bytes}
    plan = msgspec.structs.replace(
        plan, predicted_phase_bytes=phases, predicted_peak_bytes=max(plan.predicted_peak_bytes, peak_bytes)
    )
    tell_plan(plan, listener)
    notes = (*setup.notes, *(f"split: {line}" for line in found.lines))
    return msgspec.structs.replace(setup, request=request, plan=plan, notes=notes)


def _batch_that_fits(request: PlanRequest) -> tuple[int, int]:
    """(images at once, the process's predicted peak in bytes) of a look within the cap; 0 images where none is."""
    shape = request.shape
    for batch in (16, 4, 1):
        forward = evaluation_peak_bytes(shape, batch, threads=request.threads)
        waiting = (PREFETCHED_BATCHES * input_bytes(shape, batch) if request.overlaps else 0) + request.decode_bytes
        live = shape.parameters * FLOAT_BYTES + forward + waiting + look_bytes(shape, batch)
        peak = process_bytes(request.runtime_bytes, live)
        if peak <= request.cap_bytes:
            return batch, peak
    return 0, peak


def find(
    backend: Backend,
    shape: ViTShape,
    batches: Callable[[], Iterator[Images]],
    labels: npt.NDArray[np.int64],
    *,
    lowest_split: int,
    prunes: bool,
) -> Found:
    """`batches` gives the sampled images, in the order of `labels`, each time it is called."""
    splits = [block for block in candidate_splits(shape.depth) if block >= lowest_split] or [lowest_split]
    told = _told(backend, batches, labels, [((shape.patch_tokens,) * (block + 1), block) for block in splits])
    by_split = dict(zip(splits, told, strict=True))
    split = choose_split(by_split)
    lines = [
        "a linear classifier on what a block is given tells "
        + ", ".join(f"{correct.mean():.1%} (block {block})" for block, correct in by_split.items())
        + f" of {len(labels)} training images: nothing below block {split} trains"
    ]
    if not prunes:
        return Found(split, 1.0, tuple(lines))
    shares = (*TOKEN_SHARES, 1.0)
    ways = []
    for share in shares:
        kept = min(shape.patch_tokens, rounded_up(share * shape.patch_tokens))
        ways.append(((shape.patch_tokens,) * split + (kept,) * (shape.depth - split + 1), shape.depth))
    by_share = dict(zip(shares, _told(backend, batches, labels, ways), strict=True))
    tokens = choose_tokens(by_share)
    lines.append(
        "at the end of the frozen model "
        + ", ".join(f"{correct.mean():.1%} ({share:.0%} of the tokens)" for share, correct in by_share.items())
        + f": {tokens:.0%} of the patch tokens go on at the split"
    )
    return Found(split, tokens, tuple(lines))


def _told(
    backend: Backend,
    batches: Callable[[], Iterator[Images]],
    labels: npt.NDArray[np.int64],
    ways: Sequence[tuple[tuple[int, ...], int]],
) -> list[Correct]:
    parts: list[list[npt.NDArray[np.float32]]] = [[] for _ in ways]
    with closing(prefetch(batches())) as source:
        for inputs in source:
            for place, summary in enumerate(backend.summaries(inputs, ways)):
                parts[place].append(summary)
    return [told_right(np.concatenate(part), labels) for part in parts]
