"""What the frozen prefix of a run puts out for each image: made once before the first step, read from then on.

`features` keeps it on disk, the planner says whether it pays; here it is made and handed to the loop. An image that is not
there (a full disk, a limit) is put through the prefix when it is needed: the run is the same, only slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune.backends.base import Array, Images, Labels
from edgetune.cost import Selection
from edgetune.data import ImageSet, flip_draw, load_batch, prefetch
from edgetune.features import CHUNK_BYTES, FeatureKey, FeatureStore, LookedFeatures, entry_id, weights_sha256
from edgetune.job import Interruption, Job
from edgetune.planner import CachedPrefix, entry_bytes
from edgetune.replay import smaller_batches, within_memory
from edgetune.settings import Precision, RunSettings

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CachedImages:
    """One set of images: view `v` of image `i` is entry `v * count + i` of the store."""

    store: FeatureStore
    count: int
    views: int
    patch_tokens: tuple[int, ...]  # that enter each block of the prefix, and that leave it

    def places(self, indices: Places, epoch: int) -> Places:
        return (epoch % self.views) * self.count + indices


@dataclass(frozen=True)
class Features:
    """What a run reads instead of computing it."""

    prefix: CachedPrefix
    train: CachedImages
    val: CachedImages  # on all tokens
    pruned_val: CachedImages | None  # on those that training keeps, where it does not keep all
    precision: Precision

    @property
    def is_whole(self) -> bool:
        return all(store.is_whole for store in self._stores)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for store in self._stores for note in store.notes))

    @property
    def full(self) -> str | None:
        """Why not all is kept."""
        return next((store.full for store in self._stores if store.full), None)

    @property
    def stored_bytes(self) -> int:
        stored: dict[Path, int] = {}
        for store in self._stores:  # two of one key share a folder, and each knows what was there when it last looked
            stored[store.folder] = max(store.stored_bytes, stored.get(store.folder, 0))
        return sum(stored.values())

    @property
    def written_bytes(self) -> int:
        return sum(store.written_bytes for store in self._stores)

    @property
    def _stores(self) -> list[FeatureStore]:
        parts = (self.train, self.val, self.pruned_val)
        return [part.store for part in parts if part is not None]

    def remove(self) -> None:
        """Delete it: what is there is of no use."""
        for store in self._stores:
            store.remove()


class Loaded(NamedTuple):
    """A micro-batch as it was read: images, or features of which some are still to be computed."""

    inputs: Array
    labels: Labels
    absent: Places | None = None  # rows of `inputs`
    images: Images | None = None  # what they are of


def view_of(settings: RunSettings, epoch: int) -> int:
    """The epoch whose augmentation an image gets: with fixed views they come round again."""
    return epoch % settings.augment_views if settings.augment_views else epoch


Use = Literal["train", "evaluate", "evaluate pruned"]


def _part(features: Features, use: Use) -> CachedImages:
    if use == "train":
        return features.train
    if use == "evaluate":
        return features.val
    assert features.pruned_val is not None
    return features.pruned_val


def load(job: Job, images: ImageSet, indices: Places, epoch: int, use: Use) -> Loaded:
    """The images at `indices`, as the step or the evaluation takes them, as far as they can be had without computing."""
    read = _reader(job, images, training=use == "train")
    cached = None if job.features is None else _part(job.features, use)
    view = view_of(job.settings, epoch)
    if cached is None:
        return Loaded(*read(indices, view))
    assert job.features is not None
    prefix = job.features.prefix
    places = cached.places(indices, view)
    here = cached.store.present[places]
    tokens = cached.store.key.stored_tokens
    inputs = np.empty((len(indices), tokens, prefix.width), np.float32)
    if here.all():
        cached.store.read(places, inputs)
        labels = np.asarray(images.labels, np.int64)[indices]
        return Loaded(inputs, labels)
    if here.any():
        found = np.empty((int(here.sum()), tokens, prefix.width), np.float32)
        cached.store.read(places[here], found)
        inputs[here] = found
    absent = np.flatnonzero(~here)
    labels = np.asarray(images.labels, np.int64)[indices]
    return Loaded(inputs, labels, absent, read(indices[absent], view)[0])


def completed(job: Job, loaded: Loaded, use: Use) -> tuple[Array, Labels]:
    """The micro-batch with what was absent computed. In the thread that trains: it is the backend that computes."""
    if loaded.absent is not None:
        assert job.features is not None
        assert loaded.images is not None
        cached = _part(job.features, use)
        loaded.inputs[loaded.absent] = job.backend.features(
            loaded.images, cached.patch_tokens, pooled=job.features.prefix.pooled
        )
    return loaded.inputs, loaded.labels


def one_pass(
    job: Job, images: ImageSet, places: Places, use: Use, what: str
) -> Generator[tuple[Array, Labels], None, None]:
    """The images at `places` in batches of an evaluation, each view the first; to be closed by whoever takes them.

    `what` names the pass to the user. Raises: Interruption between batches, if a stop was asked for.
    """
    size, total = job.plan.evaluation_batch, len(places)

    def batches() -> Iterator[Loaded]:
        for start in range(0, total, size):
            yield load(job, images, places[start : start + size], 0, use)

    with closing(prefetch(batches(), depth=batches_ahead(job, training=use == "train"))) as source:
        for number, loaded in enumerate(source):
            if job.stop.is_set():
                raise Interruption
            yield completed(job, loaded, use)
            job.listener.progress(what, min((number + 1) * size, total), total)


def batches_ahead(job: Job, *, training: bool) -> int:
    """Batches that are loaded meanwhile: none where memory binds, and of what is trained on none where a whole cache has it,
    which is read in no time. timm's augmentation draws from global generators, so it must run between steps, in the thread
    that trains.
    """
    whole = job.features is not None and job.features.is_whole
    return int(job.plan.overlaps and not (training and (whole or job.transform is not None)))


def cached_blocks(job: Job) -> int:
    """How many of the lowest blocks are read instead of being computed."""
    return 0 if job.features is None else job.features.prefix.blocks


def _reader(job: Job, images: ImageSet, *, training: bool) -> Callable[[Places, int], tuple[Images, Labels]]:
    def read(indices: Places, epoch: int) -> tuple[Images, Labels]:
        return load_batch(
            images,
            indices,
            job.preprocess,
            seed=job.settings.seed,
            epoch=epoch,
            hflip=job.settings.hflip if training else 0.0,
            transform=job.transform if training else None,
            decode_budget_bytes=job.decode_budget_bytes,
            pictures=job.pictures,
        )

    return read


class Place(NamedTuple):
    """Where a run's features lie and what they are of."""

    folder: Path
    architecture: str  # name and arguments
    preprocess: Mapping[str, object]
    limit_bytes: int | None
    keep_free_bytes: int  # of the disk, for what else the run writes to it


def open_features(job: Job, place: Place, prefix: CachedPrefix, precision: Precision) -> Features:
    """What there is already of this run's features; damaged parts are said in `notes` and made anew."""
    settings, backend, all_tokens = job.settings, job.backend, job.shape.patch_tokens
    depth = job.shape.depth
    above = backend.trained_names(Selection(tuple(block >= prefix.blocks for block in range(depth)), ()))
    weights = weights_sha256((name, array) for name, array in backend.model_tensors().items() if name not in above)

    def key(patch_tokens: tuple[int, ...], stored_tokens: int) -> FeatureKey:
        return FeatureKey(
            weights_sha256=weights,
            architecture=place.architecture,
            split_block=prefix.blocks,
            tokens=patch_tokens,
            token_score=job.plan.token_score if patch_tokens[-1] < all_tokens else "attention",
            pooled=prefix.pooled,
            preprocess=dict(place.preprocess),
            precision=precision,
            stored_tokens=stored_tokens,
            width=prefix.width,
        )

    below = (all_tokens,) * prefix.blocks
    train_tokens, val_tokens = (*below, prefix.patch_tokens), (*below, all_tokens)
    pruned = not prefix.pooled and prefix.patch_tokens < all_tokens
    evaluated = prefix.stored_tokens + (0 if prefix.pooled else all_tokens - prefix.patch_tokens)
    train_ids = [
        entry_id(content, _variant(settings, view, index))
        for view in range(prefix.views)
        for index, content in enumerate(job.train_images.contents)
    ]
    # The two of the validation images are made in one pass: together they may hold as much as one.
    limit, val_chunk_bytes = place.limit_bytes, CHUNK_BYTES // 2 if pruned else None
    train = FeatureStore.open(
        place.folder,
        key(train_tokens, prefix.stored_tokens),
        train_ids,
        limit_bytes=limit,
        keep_free_bytes=place.keep_free_bytes,
    )
    val_ids = [entry_id(content) for content in job.val_images.contents]
    pruned_val = None
    if pruned:
        pruned_val = FeatureStore.open(
            place.folder,
            train.key,
            val_ids,
            limit_bytes=limit,
            keep_free_bytes=place.keep_free_bytes,
            chunk_bytes=val_chunk_bytes,
        )
        each = entry_bytes(prefix.stored_tokens, prefix.width, prefix.float_bytes)
        limit = None if limit is None else max(0, limit - prefix.train_bytes - len(val_ids) * each)
    val = FeatureStore.open(
        place.folder,
        key(val_tokens, evaluated),
        val_ids,
        limit_bytes=limit,
        keep_free_bytes=place.keep_free_bytes,
        chunk_bytes=val_chunk_bytes,
    )
    return Features(
        prefix=prefix,
        train=CachedImages(train, len(job.train_images.paths), prefix.views, train_tokens),
        val=CachedImages(val, len(val_ids), 1, val_tokens),
        pruned_val=None if pruned_val is None else CachedImages(pruned_val, len(val_ids), 1, train_tokens),
        precision=precision,
    )


def _variant(settings: RunSettings, view: int, index: int) -> str:
    """What tells the views of one picture apart. Mirroring is told by its outcome: a picture has two of them at most."""
    if settings.augment:
        return f"timm {metadata.version('timm')} {settings.seed} {view} {index}"
    if settings.hflip and flip_draw(settings.seed, view, index) < settings.hflip:
        return "mirrored"
    return ""


def make(job: Job, features: Features, looked: LookedFeatures | None = None) -> None:
    """Compute and keep what is missing, as far as there is room. What is there when it is stopped stays. What was `looked`
    at is taken from there.

    Raises: Interruption, NoMemory, FeaturesOverflow.
    """
    began = time.monotonic()
    job.enter_phase("cache")
    try:
        if looked is not None:
            _take(job, features, looked)
        val = [part for part in (features.pruned_val, features.val) if part is not None]
        for parts, images in (([features.train], job.train_images), (val, job.val_images)):
            work = partial(_make_parts, job, features, parts, images, training=images is job.train_images)
            within_memory(
                job, "caching the frozen blocks", work, lambda: None, partial(smaller_batches, job, "cache_batch", None)
            )
    finally:
        job.state.cache_seconds += time.monotonic() - began
        job.enter_phase("train")


def _take(job: Job, features: Features, looked: LookedFeatures) -> None:
    """Keep what looking for the split made of training images, as this run's cache has them."""
    prefix, train = features.prefix, features.train
    pruned = prefix.patch_tokens < job.shape.patch_tokens
    score = job.plan.token_score
    same = (looked.blocks, looked.precision) == (prefix.blocks, features.precision)
    if not same or prefix.pooled or (pruned and score not in looked.scores):
        return
    missing = train.store.missing()
    first_view = missing[missing < train.count]
    plain = [not _variant(job.settings, 0, int(image)) for image in first_view]  # the look mirrored none
    wanted = first_view[looked.has(first_view) & np.array(plain, np.bool_)]
    try:
        for start in range(0, len(wanted), job.plan.cache_batch):
            places = wanted[start : start + job.plan.cache_batch]
            found = looked.read(places)
            if job.stop.is_set():
                raise Interruption
            if found is None or train.store.full is not None:
                return
            values, scores = found
            train.store.add(
                places, job.backend.pruned(values, scores[score], prefix.patch_tokens) if pruned else values
            )
    finally:
        train.store.flush()


def _make_parts(
    job: Job, features: Features, parts: Sequence[CachedImages], images: ImageSet, *, training: bool
) -> None:
    """`parts`: the features of one set of images, or those on fewer tokens and those on all."""
    if len(parts) > 1:
        pruned, whole = parts
        both = np.intersect1d(pruned.store.missing(), whole.store.missing())
        _put_through(job, features, parts, both, images, training=training)
    for part in parts:
        _put_through(job, features, [part], part.store.missing(), images, training=training)


def _put_through(
    job: Job, features: Features, parts: Sequence[CachedImages], missing: Places, images: ImageSet, *, training: bool
) -> None:
    """Compute what is `missing` in all of `parts`, until one of them is full."""
    if any(part.store.full for part in parts):
        return
    read = _reader(job, images, training=training)
    what = "cache training images" if training else "cache validation images"
    prefix, count, done = features.prefix, parts[0].count, 0

    def batches() -> Iterator[tuple[int, Places, Images]]:
        for passed, places in _still_missing(parts, missing, job.plan.cache_batch):
            yield passed, places, read(places % count, int(places[0]) // count)[0]

    try:
        with closing(prefetch(batches(), depth=batches_ahead(job, training=training))) as source:
            for done, places, inputs in source:
                if job.stop.is_set():
                    raise Interruption
                if len(parts) > 1:
                    whole, pruned = job.backend.whole_and_pruned_features(inputs, prefix.blocks, prefix.patch_tokens)
                    found = [pruned, whole]
                else:
                    found = [job.backend.features(inputs, parts[0].patch_tokens, pooled=prefix.pooled)]
                for part, values in zip(parts, found, strict=True):
                    part.store.add(places, values)
                job.listener.progress(what, done, len(missing))
                if any(part.store.full for part in parts):
                    return
        if done < len(missing):
            job.listener.progress(what, len(missing), len(missing))  # the last were another run's
    finally:
        for part in parts:
            part.store.flush()


def _still_missing(parts: Sequence[CachedImages], missing: Places, size: int) -> Iterator[tuple[int, Places]]:
    """`missing`, which is sorted, in batches of one view each, without what another run has added meanwhile; and how many are done then.

    In order, until another run is met: it began at the same end, so from then on in an order of this run's own, which
    leaves the two little to do twice.
    """
    count = parts[0].count
    edges = np.searchsorted(missing, count * np.arange(parts[0].views + 1))
    starts = np.concatenate([np.arange(start, end, size) for start, end in pairwise(edges)])
    done, in_order = 0, True
    for number in range(len(starts)):
        if in_order and any(part.store.meets_another for part in parts):
            np.random.default_rng().shuffle(starts[number:])  # seeded alike, the runs would stay side by side
            in_order = False
        batch = missing[starts[number] : starts[number] + size]
        batch = batch[batch // count == batch[0] // count]
        done += len(batch)
        there = np.all([part.store.present[batch] for part in parts], axis=0)
        if not there.all():
            yield done, batch[~there]
