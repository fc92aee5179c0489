"""One lossy choice, and the ways to run it: which is the fastest that fits, which needs least."""

from __future__ import annotations

import math
from collections.abc import Iterable

from edgetune.cost import StepSetup
from edgetune.cost.time import speed_of, step_seconds, work_of
from edgetune.planner.choices import (
    extreme_micro_batches,
    levels_allowed,
    lossless_of,
    micro_batches,
    recompute_choices,
)
from edgetune.planner.phases import least_other_live_bytes, most_live_bytes, prefetched_bytes, training_live_bytes
from edgetune.planner.setups import setup_of
from edgetune.planner.values import Lossless, Lossy, PlanRequest
from edgetune.planner.worst import Draw, Peaks, first_draw, selected

# Times this close are the same as far as the estimate goes. Then fewer, larger micro-batches are taken: small ones lose
# more than it knows of (a micro-batch of 1 instead of 2: 9 to 20 % measured where it says 3 to 15).
AS_FAST = 1.05


def seconds_of(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> float:
    """Estimated time of a typical step: drawn blocks spread evenly."""
    setup = setup_of(request, lossy, lossless)
    work = work_of(request.shape, selected(_typical_draw(request, lossy), lossy, lossless), setup)
    return step_seconds(work, request.batch_size, setup, _speed(request))


def _typical_draw(request: PlanRequest, lossy: Lossy) -> Draw:
    depth, split, count = request.shape.depth, lossy.split_block, lossy.trained_blocks
    if not request.space.draws or not count:
        return first_draw(depth, lossy, request.space.draws)
    spread = {split + place * (depth - split) // count for place in range(count)}
    return tuple(block in spread for block in range(depth))


def _speed(request: PlanRequest) -> tuple[float, float]:
    return speed_of(request.peak_flops_per_s, request.memory_bandwidth_bytes_per_s)


class Ways:
    """The ways to run one lossy choice. What does not depend on the recompute is worked out once for each setup."""

    def __init__(self, request: PlanRequest, lossy: Lossy) -> None:
        self._request, self._lossy = request, lossy
        self._setups: dict[tuple[int, bool], StepSetup] = {}
        self._peaks: dict[tuple[int, bool], Peaks] = {}
        self._floors: dict[tuple[int, bool], int] = {}

    def least_live_bytes(self) -> int:
        """A bound from below, quickly, on what any way needs, what waits beside a step included."""
        nothing = recompute_choices(self._request, self._lossy)[0]
        ends = lossless_of(self._request, nothing, extreme_micro_batches(self._request))
        return max(least_other_live_bytes(self._request, self._lossy), min(map(self._floor, ends)))

    def may_fit(self) -> bool:
        return self.least_live_bytes() <= most_live_bytes(self._request, self._lossy)

    def fastest(self) -> tuple[Lossless | None, list[Lossless]]:
        """The best way that fits, and those that are faster than any that does.

        Best: of those within AS_FAST of the fastest that fits the one with the largest micro-batch, then the fastest.
        """
        refused: list[Lossless] = []
        found: Lossless | None = None
        slowest = math.inf
        if not self.may_fit():
            return None, refused
        for seconds, choice in self._by_time():
            if seconds > slowest:
                break
            if found is not None and choice.micro_batch <= found.micro_batch:
                continue
            if self._fits(choice):
                slowest = min(slowest, seconds * AS_FAST)
                found = choice
            elif found is None:
                refused.append(choice)
        return found, refused

    def _fits(self, choice: Lossless) -> bool:
        most = most_live_bytes(self._request, self._lossy)
        room = most - prefetched_bytes(self._request, self._lossy, choice.micro_batch)
        # What loading takes between steps is in the floor, whatever is recomputed.
        return self._floor(choice) <= most and self._of(choice).all_within(
            room, choice.recompute, choice.recompute_frozen
        )

    def resting_bytes(self, choice: Lossless) -> int:
        """Of a step, what is live before its first micro-batch, the micro-batch itself included."""
        return self._of(choice).before

    def _live(self, choice: Lossless, step_bytes: int) -> int:
        resting = self.resting_bytes(choice)
        return training_live_bytes(self._request, self._lossy, choice.micro_batch, step_bytes, resting)

    def cheapest(self, choices: Iterable[Lossless] | None = None) -> tuple[int, Lossless]:
        """Of some ways, or of all: the one that needs least, and the live bytes it needs."""
        if choices is None:
            sizes = extreme_micro_batches(self._request)
            patterns = recompute_choices(self._request, self._lossy)
            choices = (choice for pattern in patterns for choice in lossless_of(self._request, pattern, sizes))
        best: tuple[int, Lossless] | None = None
        for choice in sorted(choices, key=self._floor):
            if best is not None and self._floor(choice) >= best[0]:
                break
            if best is None or self._first(choice) < best[0]:
                peak, _ = self._of(choice).worst(choice.recompute, choice.recompute_frozen)
                live = self._live(choice, peak)
                if best is None or live < best[0]:
                    best = (live, choice)
        assert best is not None
        return max(best[0], least_other_live_bytes(self._request, self._lossy)), best[1]

    def _by_time(self) -> list[tuple[float, Lossless]]:
        request, lossy = self._request, self._lossy
        sizes, typical, speed = micro_batches(request), _typical_draw(request, lossy), _speed(request)
        timed: list[tuple[float, int, Lossless]] = []
        for pattern in recompute_choices(request, lossy):
            work = None
            for choice in lossless_of(request, pattern, sizes):
                setup = self._setup(choice)
                work = work or work_of(request.shape, selected(typical, lossy, choice), setup)
                timed.append((step_seconds(work, request.batch_size, setup, speed), len(timed), choice))
        return [(seconds, choice) for seconds, _, choice in sorted(timed, key=lambda entry: entry[:2])]

    def _setup(self, choice: Lossless) -> StepSetup:
        key = (choice.micro_batch, choice.updates_in_backward)
        if key not in self._setups:
            self._setups[key] = setup_of(self._request, self._lossy, choice)
        return self._setups[key]

    def _of(self, choice: Lossless) -> Peaks:
        key = (choice.micro_batch, choice.updates_in_backward)
        if key not in self._peaks:
            self._peaks[key] = Peaks(self._request.shape, self._request.space.draws, self._lossy, self._setup(choice))
        return self._peaks[key]

    def _floor(self, choice: Lossless) -> int:
        """What no recompute goes below in the choice's setup."""
        key = (choice.micro_batch, choice.updates_in_backward)
        if key not in self._floors:
            self._floors[key] = self._live(choice, self._of(choice).floor(levels_allowed(self._request)))
        return self._floors[key]

    def _first(self, choice: Lossless) -> int:
        return self._live(choice, self._of(choice).first(choice.recompute, choice.recompute_frozen))
