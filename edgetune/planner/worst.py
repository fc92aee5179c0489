"""Peaks of all steps that one lossy choice allows: of one draw of blocks, of the worst, and a bound from below."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from edgetune.cost import Recompute, Selection, StepSetup, ViTShape
from edgetune.cost.blocks import BlockWalk
from edgetune.cost.step import NOT_RUN, placed_walk, step_frame, walked_peak
from edgetune.cost.values import BlockState
from edgetune.planner.setups import setup_of
from edgetune.planner.values import Lossless, Lossy, PlanRequest, with_levels

Draw = tuple[bool, ...]  # of each block, whether it trains
_LEVELS = len(Recompute)


def first_draw(depth: int, lossy: Lossy, draws: bool) -> Draw:
    """The lowest blocks above the split where blocks are drawn, the top ones where they are not."""
    if draws:
        return tuple(lossy.split_block <= block < lossy.split_block + lossy.trained_blocks for block in range(depth))
    return tuple(block >= depth - lossy.trained_blocks for block in range(depth))


def selected(trains: Draw, lossy: Lossy, lossless: Lossless) -> Selection:
    return with_levels(
        trains, lossy.token_ceiling, lossy.embeddings_train, lossless.recompute, lossless.recompute_frozen
    )


def worst_draw(request: PlanRequest, lossy: Lossy, lossless: Lossless) -> tuple[int, Selection]:
    """(peak of live bytes, the draw that has it) over all draws at the token ceilings."""
    peaks = Peaks(request.shape, request.space.draws, lossy, setup_of(request, lossy, lossless))
    peak, trains = peaks.worst(lossless.recompute, lossless.recompute_frozen)
    return peak, selected(trains, lossy, lossless)


class Peaks:
    """Peaks of live bytes of the steps of one lossy choice, run in one setup, at the token ceilings."""

    def __init__(self, shape: ViTShape, draws: bool, lossy: Lossy, setup: StepSetup) -> None:
        self._lossy = lossy
        self._depth = shape.depth
        self._draws = draws and 0 < lossy.trained_blocks < shape.depth - lossy.split_block
        self._first = first_draw(shape.depth, lossy, draws)
        self._cached = setup.cached_blocks
        first_tokens = lossy.token_ceiling[min(self._cached, shape.depth - 1)]
        self._frame = step_frame(
            shape, first_tokens, lossy.token_ceiling[-1], lossy.embeddings_train, sum(self._first), setup
        )
        self.before = self._frame.before
        alike = msgspec.structs.replace(
            setup, ever_trained_blocks=0, optimizer="sgd", accumulation=min(2, setup.accumulation)
        )
        self._walk = _table(shape, lossy.token_ceiling, alike).walk

    def of(self, trains: Draw, levels: tuple[Recompute, ...], frozen: Recompute) -> int:
        """The peak of one draw."""
        lowest = self._lowest(trains)
        walks = []
        for block, trained in enumerate(trains):
            level = levels[block]
            if block < self._cached:
                walks.append(NOT_RUN)
            elif block < lowest:
                walks.append(self._walk(block, BlockState.BELOW, Recompute.NOTHING))
            elif trained:
                at_bottom = block == lowest and not self._lossy.embeddings_train
                walks.append(self._walk(block, BlockState.TRAINED, level, at_bottom))
            else:
                walks.append(self._walk(block, BlockState.ON_PATH, max(level, frozen)))
        return walked_peak(self._frame, walks, lowest)

    def first(self, levels: tuple[Recompute, ...], frozen: Recompute) -> int:
        """The peak of one draw, which that of the worst is not below."""
        return self.of(self._first, levels, frozen)

    def floor(self, levels: list[Recompute]) -> int:
        """What no choice among these levels goes below: as if each block had the best of them at every instant."""
        lowest = self._lowest(self._first)
        walks = []
        for block, trained in enumerate(self._first):
            if block < self._cached:
                walks.append(NOT_RUN)
                continue
            if block < lowest:
                walks.append(self._walk(block, BlockState.BELOW, Recompute.NOTHING))
                continue
            state = BlockState.TRAINED if trained else BlockState.ON_PATH
            at_bottom = block == lowest and not self._lossy.embeddings_train
            ways = [self._walk(block, state, level, at_bottom) for level in levels]
            kept = min(way.kept for way in ways)
            backward = min(way.kept + way.backward_peak for way in ways) - kept
            walks.append(BlockWalk(min(way.forward_peak for way in ways), kept, backward, ways[0].gradients))
        return walked_peak(self._frame, walks, lowest)

    def worst(self, levels: tuple[Recompute, ...], frozen: Recompute) -> tuple[int, Draw]:
        """(peak, the draw that has it) over all draws."""
        return max((self.of(trains, levels, frozen), trains) for trains in self._candidates(levels, frozen))

    def all_within(self, most_bytes: int, levels: tuple[Recompute, ...], frozen: Recompute) -> bool:
        """Whether no draw passes so many bytes. The first that does ends it."""
        if self.first(levels, frozen) > most_bytes:
            return False
        return not self._draws or all(
            self.of(trains, levels, frozen) <= most_bytes for trains in self._candidates(levels, frozen)
        )

    def _lowest(self, trains: Draw) -> int:
        """The first block that carries gradient."""
        if self._lossy.embeddings_train:
            return 0
        return trains.index(True) if True in trains else self._depth

    def _candidates(self, levels: tuple[Recompute, ...], frozen_level: Recompute) -> list[Draw]:
        """Draws of which one has the largest peak among all draws of K blocks above the split.

        A step peaks in some block's forward or backward, or between the two. Given the lowest trained block and the
        block of the peak, every other block adds a fixed amount to it when it trains instead of being frozen: below,
        what it keeps more; above, its gradients (or nothing, in the forward). So the worst draw for that pair takes the
        K - 1 blocks that add most, and the worst of all is the worst of some pair. Tests hold it against every draw.
        """
        depth, split, count = self._depth, self._lossy.split_block, self._lossy.trained_blocks
        if not self._draws:
            return [self._first]
        trained = [self._walk(block, BlockState.TRAINED, levels[block]) for block in range(split, depth)]
        frozen = [
            self._walk(block, BlockState.ON_PATH, max(levels[block], frozen_level)) for block in range(split, depth)
        ]
        kept = [one.kept - other.kept for one, other in zip(trained, frozen, strict=True)]
        gradients = [walk.gradients for walk in trained]
        backward = [
            more + one.backward_peak - other.backward_peak
            for more, one, other in zip(kept, trained, frozen, strict=True)
        ]
        forward = [one.forward_peak - other.forward_peak for one, other in zip(trained, frozen, strict=True)]
        nothing = [0] * len(kept)
        gains = {tuple(kept)}
        for peak in range(len(kept)):
            gains.add((*kept[:peak], backward[peak], *gradients[peak + 1 :]))
            gains.add((*kept[:peak], forward[peak], *nothing[peak + 1 :]))
        found: dict[Draw, None] = {}
        for gain in gains:
            ranked = sorted(range(len(kept)), key=lambda place: -gain[place])
            for lowest in range(len(kept) - count + 1):
                others = [place for place in ranked if place > lowest][: count - 1]
                chosen = {split + lowest, *(split + place for place in others)}
                found[tuple(block in chosen for block in range(depth))] = None
        return list(found)


class _Table:
    """Blocks' walks in their places, each made when it is first asked for."""

    def __init__(self, shape: ViTShape, tokens: tuple[int, ...], setup: StepSetup) -> None:
        self._shape, self._tokens, self._setup = shape, tokens, setup
        kinds = 2 * _LEVELS * len(BlockState)
        self._made: list[list[BlockWalk | None]] = [[None] * kinds for _ in range(shape.depth)]

    def walk(self, block: int, state: BlockState, level: Recompute, at_bottom: bool = False) -> BlockWalk:
        """`at_bottom`: the block's input needs no gradient."""
        kind = (2 * state + at_bottom) * _LEVELS + level
        found = self._made[block][kind]
        if found is None:
            found = placed_walk(self._shape, self._tokens, self._setup, block, state, level, at_bottom)
            self._made[block][kind] = found
        return found


_table = lru_cache(maxsize=512)(_Table)
