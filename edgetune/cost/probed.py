"""What a part of a model that is not plain holds, as a run of it showed: bytes as sums over what they grow with. Pure.

`vit/probe.py` runs such a part on torch's meta device, where tensors take no memory, and notes every tensor that comes
and goes. What it found is kept as numbers, so that a plan needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import msgspec


class Bytes(NamedTuple):
    """Bytes that grow with these; tokens are all tokens, prefix tokens among them. May be less than nothing."""

    once: int = 0
    image: int = 0
    leaving: int = 0  # a token that goes on to the next block
    token: int = 0  # a token that came in
    pair: int = 0  # a pair of tokens of one image
    thread: int = 0
    scores: int = 0  # an element of the block of scores that the threads of fused attention hold
    rows: int = 0  # a row of it
    classes: int = 0
    logits: int = 0  # a class and image


@lru_cache(maxsize=65536)
def amounts(batch: int, tokens: int, leaving: int, classes: int, threads: int) -> Bytes:
    """How many there are of each thing that `Bytes` grow with."""
    rows = threads * min(256 if tokens >= 768 else 64 if tokens >= 192 else 32, tokens)
    return Bytes(
        once=1,
        image=batch,
        leaving=batch * leaving,
        token=batch * tokens,
        pair=batch * tokens**2,
        thread=threads,
        scores=rows * min(512, tokens),
        rows=rows,
        classes=classes,
        logits=batch * classes,
    )


def total(found: Bytes, of: Bytes) -> int:
    return sum(each * count for each, count in zip(found, of, strict=True))


def most(found: tuple[Bytes, ...], of: Bytes) -> int:
    """The largest of them; 0 where there are none."""
    return max((total(each, of) for each in found), default=0)


def added(one: Bytes, other: Bytes, sign: int = 1) -> Bytes:
    return Bytes(*(a + sign * b for a, b in zip(one, other, strict=True)))


def largest(found: Iterable[Bytes]) -> tuple[Bytes, ...]:
    """Those of them of which one is the largest, whatever there is of each thing."""
    kept: list[Bytes] = []
    for each in dict.fromkeys(found):
        if not any(_never_less(other, each) for other in kept):
            kept = [other for other in kept if not _never_less(each, other)] + [each]
    return tuple(kept)


def _never_less(one: Bytes, other: Bytes) -> bool:
    """Whether `one` is as large as `other` for any counts: what there is more of makes up for what there is less of."""
    more = added(one, other, -1)
    sums = accumulate((more.pair, more.token, more.leaving, more.image, more.once))
    return min(*sums, *accumulate((more.scores, more.rows)), more.thread, more.classes, more.logits) >= 0


class ProbedWalk(msgspec.Struct, frozen=True, cache_hash=True):
    """One way to run a part: `forward` and `backward` hold what the peak is the largest of, above what is live where
    they begin; `kept` is what more is live after the forward than before, `left` after both.
    """

    forward: tuple[Bytes, ...]
    kept: Bytes
    backward: tuple[Bytes, ...] = ()
    left: Bytes = Bytes()


class ProbedPart(msgspec.Struct, frozen=True, cache_hash=True):
    """A part in all the ways that it can run, each under its number, and its parameters' shapes.

    `alone`: the same of a single image, where that is laid out otherwise than several are. `buffer_bytes`: what it has
    beside its parameters, as the statistics of batch norms.
    """

    ways: tuple[tuple[int, ProbedWalk], ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    alone: tuple[tuple[int, ProbedWalk], ...] = ()
    buffer_bytes: int = 0

    def walk(self, way: int, batch: int, *, held: bool = False) -> ProbedWalk:
        """`held`: the part's input stands to the end of the step, so that the part can't give it back."""
        ways = _ways(self, batch == 1 and bool(self.alone))
        return ways.get(way + HELD, ways[way]) if held else ways[way]


@lru_cache(maxsize=64)
def _ways(part: ProbedPart, alone: bool) -> dict[int, ProbedWalk]:
    return dict(part.alone if alone else part.ways)


# Added to the number of a way in which the part can't give its input back, where that holds other bytes.
HELD = 1000


def part_way(*, keeps: bool, inner: bool = False, gradients: int = 0) -> int:
    """The number of a way to run what stands at a step's end. `keeps`: it trains; `inner`: its input's gradient is needed.

    `gradients`: 0 where they stay, 1 where they are added to others, 2 where they are used up at once.
    """
    return 1 + 2 * gradients + inner if keeps else 0


def block_way(state: int, level: int, *, pruned: bool, lowest: bool, gradients: int, half: bool) -> int:
    """The number of a way to run a block."""
    return ((((state * 3 + level) * 2 + pruned) * 2 + lowest) * 3 + gradients) * 2 + half
