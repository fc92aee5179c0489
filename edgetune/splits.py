"""Where to split and how many tokens to keep there, found from the pretrained model and a sample of the training images.

Nothing is trained. A kernel classifier on what each candidate block puts out (closed form, each image judged by a
classifier that has not seen it) says how much of what the task needs is there. The same on the bare pixels says what a
model that learns everything anew starts from: where the pixels tell more than the pretrained blocks, these have lost what
the task needs, and nothing is frozen. Else the deepest split that loses nothing is the cheapest to train above: all that
the blocks above could learn from is still in what they are given. The same at the end of the frozen model, with fewer
tokens from the split on, says how few will do.

`docs/decisions/0009-prefix-cache.md` says what this rests on, `benchmarks/split_study.py` how well it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgetune.backends.base import Backend, Images
from edgetune.cost import FLOAT_BYTES, TokenScore, ViTShape, evaluation_peak_bytes, input_bytes
from edgetune.data import balanced_sample, load_batch, prefetch
from edgetune.errors import DoesNotFit
from edgetune.features import LookedFeatures
from edgetune.job import Listener
from edgetune.methods import adaptive_obstacle, everything
from edgetune.planner import PREFETCHED_BATCHES, Plan, PlanRequest, process_bytes, rounded_up
from edgetune.planner import plan as make_plan
from edgetune.prepare import Setup, scratch_bytes, tell_plan
from edgetune.probes import Correct, told_right
from edgetune.settings import names_budgets
from edgetune.units import format_bytes

MOST_IMAGES = 384
# Of the depth: where a split is looked for. Above the last of them a third of the blocks is left to train; with a quarter
# (block 9 of 12), solar cells were told a point worse, though a classifier saw no difference (benchmarks/split_study.md).
CANDIDATES = (1 / 3, 1 / 2, 2 / 3)
# Of the patch tokens: what may be kept at the split.
TOKEN_SHARES = (0.4, 0.67)
SCORES: tuple[TokenScore, ...] = ("attention", "distance")
# A loss of so little is none: a few images of the sample.
TOLERATED_LOSS = 0.01
# Sides of the images whose pixels are told apart, at most.
LOOKED_PX = 32


class Way(NamedTuple):
    """How tokens may be dropped at the split."""

    score: TokenScore
    share: float  # of the patch tokens, that go on


class Found(NamedTuple):
    """The choice, and what it was made on, in words."""

    split_block: int
    split_tokens: float
    lines: tuple[str, ...]
    token_score: TokenScore = "attention"
    looked: LookedFeatures | None = None  # what was put through the blocks below on the way
    fits: bool = True  # whether the pretrained blocks have what the task needs


ALL = Way("attention", 1.0)


def candidate_splits(depth: int) -> tuple[int, ...]:
    return tuple(sorted({round(share * depth) for share in CANDIDATES} - {0, depth}))


def look_bytes(shape: ViTShape, batch: int) -> int:
    """What looking holds beside the model and a forward pass of `batch` images."""
    streams = 4 * batch * shape.all_tokens * shape.width * FLOAT_BYTES
    ways = len(CANDIDATES) + len(SCORES) * len(TOKEN_SHARES) + 1
    summaries = (ways + 2) * MOST_IMAGES * 2 * shape.width * FLOAT_BYTES
    pixels = 2 * MOST_IMAGES * shape.channels * LOOKED_PX**2 * FLOAT_BYTES
    return streams + max(summaries, pixels) + pixels // 2 + 5 * MOST_IMAGES**2 * 8


def loses_nothing(correct: Correct, best: Correct) -> bool:
    """Whether what tells `correct` right does as well as the best, as far as these images can show."""
    lost = best.astype(np.float64) - correct
    error = lost.std() / len(lost) ** 0.5
    return bool(lost.mean() <= max(TOLERATED_LOSS, error))


def choose_split(told: Mapping[int, Correct]) -> int:
    """The deepest block below which everything can be frozen without losing anything."""
    best = max(told.values(), key=np.sum)
    return max(block for block, correct in told.items() if loses_nothing(correct, best))


def choose_tokens(told: Mapping[Way, Correct], whole: Correct) -> Way | None:
    """The smallest share of the tokens that does as well as all, by the score with which it does best; None: none does."""
    fit = [way for way, correct in told.items() if loses_nothing(correct, whole)]
    fewest = min((way.share for way in fit), default=None)
    return max((way for way in fit if way.share == fewest), key=lambda way: told[way].sum(), default=None)


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
    chosen = balanced_sample(data.train.labels, settings.seed, MOST_IMAGES)

    def batches() -> Iterator[Images]:
        for start in range(0, len(chosen), size):
            yield load_batch(
                data.train,
                chosen[start : start + size],
                setup.preprocess,
                seed=settings.seed,
                epoch=0,
                decode_budget_bytes=setup.decode_budget_bytes,
                pictures=setup.pictures,
            )[0]
            listener.progress("look for the split", min(start + size, len(chosen)), len(chosen))

    prunes = settings.split_tokens is None and adaptive_obstacle(shape) is None
    scores = SCORES if settings.token_score is None else (settings.token_score,)

    def kept(split: int) -> LookedFeatures | None:
        if setup.scratch_folder is None or split == 0:
            return None
        return LookedFeatures(
            setup.scratch_folder,
            chosen,
            blocks=split,
            tokens=shape.all_tokens,
            width=shape.width,
            scores=scores if prunes else (),
            precision=settings.cache_precision,
            limit_bytes=scratch_bytes(setup.scratch_folder) // 2,
        )

    labels = np.asarray(data.train.labels, np.int64)[chosen]
    found = find(
        backend, shape, batches, labels, kept, lowest_split=setup.plan.split_block, scores=scores if prunes else ()
    )
    for line in found.lines:
        listener.note(f"split: {line}")
    request, plan = _planned(
        setup.request,
        found,
        prunes=prunes,
        budgets_asked=names_budgets(settings),
    )
    phases = plan.predicted_phase_bytes | {"look": peak_bytes}
    plan = msgspec.structs.replace(
        plan, predicted_phase_bytes=phases, predicted_peak_bytes=max(plan.predicted_peak_bytes, peak_bytes)
    )
    tell_plan(plan, listener)
    looked = found.looked
    if looked is not None and (plan.prefix is None or plan.prefix.blocks != looked.blocks):
        looked.close()  # no cache takes it
    notes = (*setup.notes, *(f"split: {line}" for line in found.lines))
    return msgspec.structs.replace(setup, request=request, plan=plan, notes=notes, looked=looked)


def _planned(
    request: PlanRequest, found: Found, *, prunes: bool, budgets_asked: bool = False
) -> tuple[PlanRequest, Plan]:
    """What was found as a request, and its plan. `budgets_asked`: how tokens are pruned was named."""
    space = request.space
    if not found.fits and space.draws and 0 in space.splits:
        # All tokens, too: blocks that fit badly do not know which ones they can do without.
        floor = request.token_floor if budgets_asked else 1.0
        whole = msgspec.structs.replace(request, space=everything(space, request.shape.depth), token_floor=floor)
        with suppress(DoesNotFit):
            return whole, make_plan(whole)
    splits = tuple(split for split in space.splits if split >= found.split_block)
    request = msgspec.structs.replace(
        request,
        space=msgspec.structs.replace(space, splits=splits or space.splits[-1:]),
        split_tokens=found.split_tokens if prunes else request.split_tokens,
        token_score=found.token_score if prunes else request.token_score,
    )
    return request, make_plan(request)


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
    kept: Callable[[int], LookedFeatures | None],
    *,
    lowest_split: int,
    scores: Sequence[TokenScore],
) -> Found:
    """`batches` gives the sampled images, in the order of `labels`, each time it is called; `kept` makes what keeps their
    features at a split. `scores`: by which tokens may be dropped; none where they may not.
    """
    splits = [block for block in candidate_splits(shape.depth) if block >= lowest_split] or [lowest_split]
    all_tokens = shape.patch_tokens

    def tokens_of(way: Way) -> int:
        return min(all_tokens, rounded_up(way.share * all_tokens))

    def looked_at(
        blocks: Sequence[int], ways: Sequence[Way], keeps: LookedFeatures | None
    ) -> tuple[npt.NDArray[np.float32], list[Correct], list[Correct]]:
        """The pixels, and what is told right at the blocks and, in each way, at the end."""
        counts = [(way.score, tokens_of(way)) for way in ways]
        pixels, at_blocks, at_end = _looked_at(backend, batches, blocks, counts, keeps)
        return pixels, [told_right(part, labels) for part in at_blocks], [told_right(part, labels) for part in at_end]

    few, more = ([Way(score, share) for score in scores] if splits[-1] else [] for share in TOKEN_SHARES)
    # At the deepest candidate, which is the likeliest, the tokens are looked at in the same pass.
    looked = kept(splits[-1])
    pixels, at_splits, (*at_end, whole) = looked_at(splits, [*few, ALL], looked)
    by_split, told = dict(zip(splits, at_splits, strict=True)), dict(zip(few, at_end, strict=True))
    split = choose_split(by_split)
    by_pixels = told_right(pixels, labels, standardised=False)
    best = max((*by_split.values(), whole), key=np.sum)
    line = "a classifier on what a block is given tells " + ", ".join(
        f"{correct.mean():.1%} (block {block})" for block, correct in by_split.items()
    )
    line += f", at the end {whole.mean():.1%}, one on the bare pixels {by_pixels.mean():.1%} of {len(labels)} training images: "
    if not loses_nothing(best, by_pixels):
        line += "the pretrained blocks fit this task badly, and as much trains as can"
        _let_go(looked)
        return Found(lowest_split, 1.0, (line,), fits=False)
    lines = [line + f"nothing below block {split} trains"]
    if split != splits[-1]:
        _let_go(looked)
        looked = None
    if not few:
        return Found(split, 1.0, tuple(lines), looked=looked)
    if split != splits[-1]:
        looked = kept(split)
        _, _, at_end = looked_at([split], few, looked)
        told = dict(zip(few, at_end, strict=True))
    chosen = choose_tokens(told, whole)
    if chosen is None:
        _, _, at_end = looked_at([split], more, None)
        told |= dict(zip(more, at_end, strict=True))
        # Above the split tokens are dropped all the same.
        chosen = choose_tokens(told, whole) or max(more, key=lambda way: told[way].sum())._replace(share=1.0)
    lines.append(
        f"at the end of the frozen model {whole.mean():.1%} (all {all_tokens} patch tokens), "
        + ", ".join(f"{correct.mean():.1%} ({tokens_of(way)} by {way.score})" for way, correct in told.items())
        + f": {tokens_of(chosen)} go on at the split, by {chosen.score}"
    )
    return Found(split, chosen.share, tuple(lines), chosen.score, looked)


def _let_go(looked: LookedFeatures | None) -> None:
    if looked is not None:
        looked.close()


def _looked_at(
    backend: Backend,
    batches: Callable[[], Iterator[Images]],
    blocks: Sequence[int],
    leaving: Sequence[tuple[TokenScore, int]],
    kept: LookedFeatures | None,
) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
    """The images' pixels (N, 3 h w), made small, and what `Backend.look` makes of them at the blocks and at the end, each
    (N, 2 D).
    """
    pixels: list[npt.NDArray[np.float32]] = []
    parts: list[list[npt.NDArray[np.float32]]] = [[] for _ in (*blocks, *leaving)]
    with closing(prefetch(batches())) as source:
        for inputs in source:
            pixels.append(small(inputs))
            found = backend.look(inputs, blocks, leaving)
            for part, summary in zip(parts, (*found.at_blocks, *found.at_end), strict=True):
                part.append(summary)
            if kept is not None:
                kept.add(found.tokens, found.scores)
    whole = [np.concatenate(part) for part in parts]
    return np.concatenate(pixels), whole[: len(blocks)], whole[len(blocks) :]


def small(images: Images) -> npt.NDArray[np.float32]:
    """(B, 3, H, W) -> (B, 3 h w): means over squares of pixels, so that no side is longer than LOOKED_PX."""
    batch, channels, height, width = images.shape
    size = max(1, -(-max(height, width) // LOOKED_PX))
    cut = images[:, :, : height // size * size, : width // size * size]
    squares = cut.reshape(batch, channels, height // size, size, width // size, size).mean(axis=(3, 5))
    flat: npt.NDArray[np.float32] = squares.reshape(batch, -1).astype(np.float32)
    return flat
