"""The loading: a batch of images by index, one batch ahead in a thread, timm's augmentation. No worker processes."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgetune.data.draws import augment_seeds, flip_draw
from edgetune.data.folders import ImageSet
from edgetune.data.images import open_rgb
from edgetune.data.pictures import Pictures
from edgetune.data.preprocess import Array, Preprocess, normalise, resize_and_crop
from edgetune.errors import BackendUnavailable, UsageError

T = TypeVar("T")
Transform = Callable[[Image.Image, int, int], Array]  # (RGB image, epoch, index) -> (3, H, W)

_STOP_SECONDS = 10  # how long a reader that hangs may delay the end; its thread is a daemon


def load_batch(
    images: ImageSet,
    indices: Sequence[int] | npt.NDArray[np.int64],
    preprocess: Preprocess,
    *,
    seed: int,
    epoch: int,
    hflip: float = 0.0,
    transform: Transform | None = None,
    decode_budget_bytes: int | None = None,
    pictures: Pictures | None = None,
) -> tuple[Array, npt.NDArray[np.int64]]:
    """The images at `indices`: inputs float32 (B, 3, H, W) and labels int64 (B,), a function of the arguments only.

    `hflip` is the probability of mirroring an image. A `transform` replaces resizing, cropping and mirroring
    altogether. What is among the `pictures` of the same preprocessing is not decoded again.
    Raises: UnreadableImage (a DataError) for a file that changed since it was scanned.
    """
    inputs = np.empty((len(indices), 3, preprocess.height_px, preprocess.width_px), dtype=np.float32)
    labels = np.empty(len(indices), dtype=np.int64)
    for place, index in enumerate(map(int, indices)):
        path = Path(images.root, images.paths[index])
        labels[place] = images.labels[index]
        if transform is not None:
            image = open_rgb(path, preprocess=preprocess, decode_budget_bytes=decode_budget_bytes)
            inputs[place] = transform(image, epoch, index)
            continue
        own = None if pictures is None or images.places is None else images.places[index]
        kept = None if pictures is None or own is None else pictures.get(own)
        if kept is None:
            image = open_rgb(path, preprocess=preprocess, decode_budget_bytes=decode_budget_bytes)
            image = resize_and_crop(image, preprocess)
            if pictures is not None and own is not None:
                pictures.put(own, image)
            kept = np.asarray(image)
        flip = hflip > 0 and flip_draw(seed, epoch, index) < hflip
        inputs[place] = normalise(kept, preprocess, flip=flip)
    return inputs, labels


def prefetch(iterable: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """The items of `iterable`, made up to `depth` ahead in one daemon thread.

    At most `depth` items exist beside the one the caller holds, the one being made counted. An exception in the
    thread is raised here, after the items made before it. Closing the generator (or Ctrl-C in it) stops the thread
    after the item at hand. With depth 0 there is no thread.
    """
    if depth < 0:
        raise UsageError(f"{depth} batches can't be loaded ahead. Use 0 or more.")
    if depth == 0:
        yield from iterable
        return
    made: queue.SimpleQueue[tuple[T | None, BaseException | None, bool]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(iterable, made, room, stop), name="edgetune-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error, ended = made.get()
            if error is not None:
                raise error
            if ended:
                return
            room.release()  # before the caller works on it: the next is made meanwhile
            yield item  # type: ignore[misc]  # an item of T, which may include None
    finally:
        stop.set()
        room.release()
        thread.join(_STOP_SECONDS)


def _produce(
    iterable: Iterable[T],
    made: queue.SimpleQueue[tuple[T | None, BaseException | None, bool]],
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        iterator = iter(iterable)
        room.acquire()
        while not stop.is_set():
            made.put((next(iterator), None, False))
            room.acquire()
        close = getattr(iterator, "close", None)
        if close is not None:
            close()  # a generator's own `finally` runs here, in the thread that ran it
    except StopIteration:
        made.put((None, None, True))
    except BaseException as error:  # handed to the consumer, whatever it is
        made.put((None, error, False))


def timm_augment(preprocess: Preprocess, seed: int, **options: Any) -> Transform:
    """timm's training transform for `load_batch`: a random resized crop, mirroring, colour jitter and what `options`
    add.

    `options` are those of `timm.data.create_transform` (`auto_augment`, `re_prob`, `scale`, ...). Its random numbers
    are a function of (seed, epoch, index): Python's, numpy's and torch's global generators are seeded for each image
    and put back afterwards. They are global, so it has to run in the thread that trains, not under `prefetch`.
    Raises: BackendUnavailable without timm; UsageError for options timm does not understand.
    """
    try:
        import torch
        from timm.data import create_transform
    except ImportError as error:
        raise BackendUnavailable("augmentation needs timm. Install it with: pip install 'edgetune[torch]'") from error
    given: dict[str, Any] = {"interpolation": preprocess.interpolation, **options}
    try:
        augment = create_transform(
            (preprocess.channels, preprocess.height_px, preprocess.width_px),
            is_training=True,
            mean=preprocess.mean,
            std=preprocess.std,
            **given,
        )
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise UsageError(f"timm can't augment with {options}: {error}.") from error

    def transform(image: Image.Image, epoch: int, index: int) -> Array:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        python_seed, numpy_seed, torch_seed = augment_seeds(seed, epoch, index)
        try:
            random.seed(python_seed)
            np.random.seed(numpy_seed)
            torch.default_generator.manual_seed(torch_seed)  # the CPU's alone: torch.manual_seed wakes the GPU
            values: Array = augment(image).numpy()
            return values
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    return transform
