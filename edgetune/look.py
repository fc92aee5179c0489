"""Where to split and how many tokens to keep there, found from the pretrained model and a sample of the training images.

Nothing is trained. A kernel classifier on what each candidate block puts out (closed form, each image judged by a
classifier that has not seen it) says how much of what the task needs is there. The same on the bare pixels says what a
model that learns everything anew starts from: where the pixels tell more than the pretrained blocks, these have lost what
the task needs, and nothing is frozen. Else the deepest split that loses nothing is the cheapest to train above: all that
the blocks above could learn from is still in what they are given. The same at the end of the frozen model, with fewer
tokens from the split on, says how few will do; not where that end tells less than the split does: blocks that have to
learn anew what to make of the tokens may need those that they make nothing of today.

`docs/decisions/0009-prefix-cache.md` says what this rests on, `benchmarks/split_study.py` how well it does. `splits.py`
makes a plan of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune.backends.base import Array, Backend, Images
from edgetune.cost import TokenScore, ViTShape
from edgetune.data import prefetch
from edgetune.features import LookedFeatures
from edgetune.planner import rounded_up
from edgetune.probes import Correct, told_right

Floats = npt.NDArray[np.float32]

# Of the depth: where a split is looked for. Above the last of them a third of the blocks is left to train; with a quarter
# (block 9 of 12), solar cells were told a point worse, though a classifier saw no difference (benchmarks/split_study.md).
CANDIDATES = (1 / 3, 1 / 2, 2 / 3)
# A loss of so little is none: a few images of the sample.
TOLERATED_LOSS = 0.01
# Sides of the images whose pixels are told apart, at most.
LOOKED_PX = 32


class Way(NamedTuple):
    """How tokens may be dropped at the split."""

    score: TokenScore
    share: float  # of the patch tokens, that go on


# In this order they are tried. Distance first: on solar cells it lost nothing where attention lost two points.
WAYS = (Way("distance", 0.4), Way("attention", 0.4), Way("distance", 0.67), Way("attention", 0.67))


class Sample(NamedTuple):
    """The images that are looked at, a few at a time."""

    places: npt.NDArray[np.int64]  # in the data set
    labels: npt.NDArray[np.int64]
    to_end: int  # so many of them, from the first on, are put through the whole model
    batch: int
    load: Callable[[int, int], Images]  # those from one number up to another
    turned: Callable[[], None] = lambda: None  # called when a few are done


class Found(NamedTuple):
    """The choice, and what it was made on, in words."""

    split_block: int
    split_tokens: float
    lines: tuple[str, ...]
    token_score: TokenScore = "attention"
    looked: LookedFeatures | None = None  # what was put through the blocks below on the way
    fits: bool = True  # whether the pretrained blocks have what the task needs


def candidate_splits(depth: int) -> tuple[int, ...]:
    return tuple(sorted({round(share * depth) for share in CANDIDATES} - {0, depth}))


def loses_nothing(correct: Correct, best: Correct) -> bool:
    """Whether what tells `correct` right does as well as the best, as far as these images can show."""
    lost = best.astype(np.float64) - correct
    error = lost.std() / len(lost) ** 0.5
    return bool(lost.mean() <= max(TOLERATED_LOSS, error))


def choose_split(told: Mapping[int, Correct]) -> int:
    """The deepest block below which everything can be frozen without losing anything."""
    best = max(told.values(), key=np.sum)
    return max(block for block, correct in told.items() if loses_nothing(correct, best))


def find(
    backend: Backend,
    shape: ViTShape,
    sample: Sample,
    kept: Callable[[int], LookedFeatures | None],
    progress: Callable[[int, int], None],
    *,
    lowest_split: int,
    scores: Sequence[TokenScore],
) -> Found:
    """`kept` makes what keeps the images' features at a split; `progress` is told of the first pass: done, of how many.
    `scores`: by which tokens may be dropped; none where they may not.
    """
    splits = [block for block in candidate_splits(shape.depth) if block >= lowest_split] or [lowest_split]
    labels, count = sample.labels, sample.to_end
    # The features at the deepest candidate are kept: it is the likeliest.
    keeps = kept(splits[-1])
    pixels, at_blocks, at_end = _first_pass(backend, sample, splits, keeps, progress, scored=bool(scores))
    by_split = {block: told_right(part, labels) for block, part in zip(splits, at_blocks, strict=True)}
    whole = told_right(at_end, labels[:count])
    by_pixels = told_right(pixels, labels, standardised=False)

    def of_first(told: Correct, features: Floats, *, standardised: bool = True) -> Correct:
        """Of those that are put through the whole model alone, what was `told` of all by the same features."""
        if count == len(labels):
            return told
        return told_right(features[:count], labels[:count], standardised=standardised)

    line = "a classifier on what a block is given tells " + ", ".join(
        f"{correct.mean():.1%} (block {block})" for block, correct in by_split.items()
    )
    line += f", one on the bare pixels {by_pixels.mean():.1%} of {len(labels)} training images"
    end = f"at the end of the frozen model {whole.mean():.1%}"
    if not loses_nothing(max(by_split.values(), key=np.sum), by_pixels) and not loses_nothing(
        whole, of_first(by_pixels, pixels, standardised=False)
    ):
        _let_go(keeps)
        line += f", {end} of {count}: the pretrained blocks fit this task badly, and as much trains as can"
        return Found(lowest_split, 1.0, (line,), fits=False)
    split = choose_split(by_split)
    line += f": nothing below block {split} trains"
    if split != splits[-1]:
        _let_go(keeps)
        keeps = None
    if not scores or not split:
        return Found(split, 1.0, (line,), looked=keeps)
    at_split = of_first(by_split[split], at_blocks[splits.index(split)])
    if not loses_nothing(whole, at_split):
        end += f" of {count}, at the split {at_split.mean():.1%}: what is above learns anew, from all patch tokens"
        return Found(split, 1.0, (line, end), looked=keeps)
    tokens = _Tokens(backend, sample, split, keeps or kept(split))
    way, told = _choose_way(tokens, whole, labels[:count], shape.patch_tokens, scores)
    return Found(split, way.share, (line, f"{end}{told}"), way.score, tokens.kept)


def _choose_way(
    tokens: _Tokens, whole: Correct, labels: npt.NDArray[np.int64], patch_tokens: int, scores: Sequence[TokenScore]
) -> tuple[Way, str]:
    """The first way that loses nothing against the `whole` of the tokens, else all of them; and what was found, in words."""
    told: dict[Way, Correct] = {}
    words = ""
    for way in (way for way in WAYS if way.score in scores):
        leaving = min(patch_tokens, rounded_up(way.share * patch_tokens))
        drops = leaving < patch_tokens
        told[way] = told_right(tokens.at_end(way.score, leaving), labels) if drops else whole
        words += f", {told[way].mean():.1%} ({leaving} of {patch_tokens} patch tokens, by {way.score})"
        if loses_nothing(told[way], whole):
            chosen, going = way, str(leaving)
            break
    else:
        # Above the split tokens are dropped all the same.
        chosen, going = max(told, key=lambda way: (way.share, told[way].sum()))._replace(share=1.0), "all"
    return chosen, f"{words} of {len(labels)}: {going} go on at the split, by {chosen.score}"


def _let_go(looked: LookedFeatures | None) -> None:
    if looked is not None:
        looked.close()


def _first_pass(
    backend: Backend,
    sample: Sample,
    blocks: Sequence[int],
    keeps: LookedFeatures | None,
    progress: Callable[[int, int], None],
    *,
    scored: bool,
) -> tuple[Floats, list[Floats], Floats]:
    """Of all images their pixels (N, 3 h w), made small, and what `Backend.look` makes of them at the blocks, each
    (N, 2 D); of the first ones what `Backend.at_end` makes of all their tokens.
    """
    total = len(sample.labels)
    pixels, at_end = _Rows(total), _Rows(sample.to_end)
    at_blocks = [_Rows(total) for _ in blocks]

    def batches() -> Iterator[tuple[int, Images]]:
        # A batch goes to the end or it doesn't.
        for first, last in ((0, sample.to_end), (sample.to_end, total)):
            for start in range(first, last, sample.batch):
                stop = min(start + sample.batch, last)
                yield stop, sample.load(start, stop)

    with closing(prefetch(batches())) as source:
        for stop, inputs in source:
            pixels.add(small(inputs))
            found = backend.look(inputs, blocks, scored=scored)
            for rows, summary in zip(at_blocks, found.at_blocks, strict=True):
                rows.add(summary)
            if keeps is not None:
                keeps.add(found.tokens, found.scores)
            if stop <= sample.to_end:
                at_end.add(backend.at_end(found.tokens, blocks[-1]))
            del found, inputs
            sample.turned()
            progress(stop, total)
    return pixels.values, [rows.values for rows in at_blocks], at_end.values


class _Rows:
    """An array (count, D) that is filled from its start: results that came to lie one by one between what is freed would
    keep it from being of use.
    """

    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0
        self.values: Floats = np.empty((0, 0), np.float32)

    def add(self, values: Floats) -> None:
        if not self._done:
            self.values = np.empty((self._count, values.shape[1]), np.float32)
        self.values[self._done : self._done + len(values)] = values
        self._done += len(values)


class _Tokens:
    """All tokens that leave block `split`, of the images that are put through to the end: `kept` where there is room,
    else made each time.
    """

    def __init__(self, backend: Backend, sample: Sample, split: int, kept: LookedFeatures | None) -> None:
        self.kept = kept
        self._backend, self._sample, self._split = backend, sample, split

    def at_end(self, score: TokenScore, leaving: int) -> Floats:
        """(N, 2 D): what `Backend.at_end` makes of them where so many patch tokens go on."""
        sample, found = self._sample, _Rows(self._sample.to_end)
        for start in range(0, sample.to_end, sample.batch):
            tokens, scores = self._of(start, min(start + sample.batch, sample.to_end))
            found.add(self._backend.at_end(self._backend.pruned(tokens, scores[score], leaving), self._split))
            del tokens, scores
            sample.turned()
        return found.values

    def _of(self, start: int, stop: int) -> tuple[Array, Mapping[Any, Array]]:
        places = self._sample.places[start:stop]
        if self.kept is not None and self.kept.has(places).all():
            there = self.kept.read(places)
            if there is not None:
                return there
        made = self._backend.look(self._sample.load(start, stop), [self._split], scored=True)
        if self.kept is not None and self.kept.count == start:
            self.kept.add(made.tokens, made.scores)
        return made.tokens, made.scores


def small(images: Images) -> npt.NDArray[np.float32]:
    """(B, 3, H, W) -> (B, 3 h w): means over squares of pixels, so that no side is longer than LOOKED_PX."""
    batch, channels, height, width = images.shape
    size = max(1, -(-max(height, width) // LOOKED_PX))
    cut = images[:, :, : height // size * size, : width // size * size]
    squares = cut.reshape(batch, channels, height // size, size, width // size, size).mean(axis=(3, 5))
    flat: npt.NDArray[np.float32] = squares.reshape(batch, -1).astype(np.float32)
    return flat
