"""Every random number of the data side, each a function of (seed, purpose, counters): resuming needs no generator's
state.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from edgetune.errors import DataError, UsageError

# What a number is drawn for; the values are part of every seed and never change.
_ORDER, _FLIP, _SPLIT, _AUGMENT, _SAMPLE = 1, 2, 3, 4, 5


def _generator(purpose: int, seed: int, *counters: int) -> np.random.Generator:
    if seed < 0:
        raise UsageError(f"the seed is {seed}. Use 0 or a positive whole number.")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, seed, *counters])))


def epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which epoch `epoch` (from 0) visits `count` images: a permutation of 0..count-1."""
    return _generator(_ORDER, seed, epoch).permutation(count)


def flip_draw(seed: int, epoch: int, index: int) -> float:
    """A number in [0, 1) for image `index` in epoch `epoch`: below the flip probability, the image is mirrored."""
    return float(_generator(_FLIP, seed, epoch, index).random())


def augment_seeds(seed: int, epoch: int, index: int) -> tuple[int, int, int]:
    """Three 32-bit seeds for whatever draws while image `index` is augmented."""
    first, second, third = _generator(_AUGMENT, seed, epoch, index).integers(2**32, size=3, dtype=np.uint32).tolist()
    return first, second, third


def stratified_split(
    keys: Sequence[Hashable], labels: Sequence[int], classes: Sequence[str], *, seed: int, val_share: float = 0.2
) -> tuple[list[int], list[int]]:
    """The positions that train and the positions that validate, each ascending.

    Every class gives about `val_share` of its images to validation, at least one to each side. Images with equal `keys`
    (the same file, or a copy) stay on one side.
    Raises: DataError naming a class that has fewer than two different images; UsageError for a share outside (0, 1).
    """
    if not 0 < val_share < 1:
        raise UsageError(f"the share for validation is {val_share}. Use a number between 0 and 1, such as 0.2.")
    groups: list[dict[Hashable, list[int]]] = [{} for _ in classes]
    for position, (key, label) in enumerate(zip(keys, labels, strict=True)):
        groups[label].setdefault(key, []).append(position)
    val: set[int] = set()
    for label, own in enumerate(groups):
        if len(own) < 2:
            raise DataError(_too_few(classes[label], sum(map(len, own.values()))))
        val.update(_val_part(list(own.values()), _generator(_SPLIT, seed, label), val_share))
    return [p for p in range(len(labels)) if p not in val], sorted(val)


def _val_part(groups: list[list[int]], generator: np.random.Generator, val_share: float) -> list[int]:
    """Whole groups, drawn at random, up to the share; always one group at least and never all of them."""
    wanted = max(1, int(sum(map(len, groups)) * val_share + 0.5))
    order = [groups[place] for place in generator.permutation(len(groups))]
    taken: list[int] = []
    for group in order[:-1]:
        if len(taken) + len(group) <= wanted:
            taken += group
    return taken or min(order, key=len)


def _too_few(name: str, images: int) -> str:
    found = (
        "has one image" if images == 1 else f"has {images} images, all of them the same" if images else "has no images"
    )
    return (
        f"class {name!r} {found}, so it can't be both trained on and validated. "
        "Add images, take its folder away, or give train/ and val/ folders yourself."
    )


def balanced_sample(labels: Sequence[int], seed: int, most: int) -> npt.NDArray[np.int64]:
    """Positions of at most `most` images, of each class as large a share as of all, at least two where there are."""
    rng = _generator(_SAMPLE, seed)
    own = np.asarray(labels)
    if len(own) <= most:
        return np.arange(len(own))
    chosen = []
    for label in np.unique(own):
        places = rng.permutation(np.flatnonzero(own == label))
        chosen.append(places[: max(2, round(most * len(places) / len(own)))])
    return np.sort(np.concatenate(chosen))
