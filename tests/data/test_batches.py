"""Batches are a function of their arguments; reading ahead neither loses, reorders, hides nor hangs."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import picture

from edgetune.data import ImageSet, Preprocess, flip_draw, load_batch, load_image, prefetch
from edgetune.errors import DataError, UsageError


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    for index in range(20):
        picture(seed=index).save(tmp_path / f"{index}.png")
    return ImageSet(
        str(tmp_path), tuple(f"{index}.png" for index in range(20)), tuple(index % 3 for index in range(20))
    )


PREPROCESS = Preprocess(8, 6)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_a_batch_of_any_size_has_its_shape_and_labels(images: ImageSet, size):
    inputs, labels = load_batch(images, np.arange(size), PREPROCESS, seed=0, epoch=0)
    assert (inputs.shape, inputs.dtype) == ((size, 3, 8, 6), np.float32)
    assert (labels.tolist(), labels.dtype) == ([index % 3 for index in range(size)], np.int64)


def test_what_an_image_becomes_does_not_depend_on_its_batch(images: ImageSet):
    whole, _ = load_batch(images, range(20), PREPROCESS, seed=1, epoch=2, hflip=0.5)
    for index in (3, 11, 19):
        alone, _ = load_batch(images, [index], PREPROCESS, seed=1, epoch=2, hflip=0.5)
        assert np.array_equal(alone[0], whole[index])


def test_images_are_mirrored_as_drawn_and_never_without_hflip(images: ImageSet):
    mirrored, _ = load_batch(images, range(20), PREPROCESS, seed=1, epoch=2, hflip=0.5)
    plain, _ = load_batch(images, range(20), PREPROCESS, seed=1, epoch=2)
    flips = [flip_draw(1, 2, index) < 0.5 for index in range(20)]
    assert 0 < sum(flips) < 20
    for index, flip in enumerate(flips):
        path = Path(images.root, images.paths[index])
        assert np.array_equal(plain[index], load_image(path, PREPROCESS))
        assert np.array_equal(mirrored[index], load_image(path, PREPROCESS, flip=flip))


def test_a_transform_gets_the_image_the_epoch_and_the_index(images: ImageSet):
    def transform(image, epoch, index):
        assert image.size == (12, 10)
        return np.full((3, 8, 6), 100 * epoch + index, dtype=np.float32)

    inputs, _ = load_batch(images, [5, 4], PREPROCESS, seed=0, epoch=3, transform=transform)
    assert inputs[:, 0, 0, 0].tolist() == [305, 304]


def test_a_file_lost_after_the_scan_is_named(images: ImageSet):
    Path(images.root, "4.png").unlink()
    with pytest.raises(DataError, match=r"4\.png"):
        load_batch(images, [3, 4], PREPROCESS, seed=0, epoch=0)


# ---- prefetch


def threads() -> int:
    return sum(thread.name == "edgetune-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_none_included(depth):
    assert list(prefetch(iter([1, None, 3, *range(50)]), depth)) == [1, None, 3, *range(50)]
    assert list(prefetch([], depth)) == []
    assert threads() == 0


def test_no_more_than_depth_items_are_made_ahead_and_one_is():
    made = []

    def source():
        for item in range(10):
            made.append(item)
            yield item

    ahead = prefetch(source(), depth=2)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    ahead.close()
    assert threads() == 0


def test_the_next_item_is_made_while_the_caller_works():
    started = threading.Event()

    def source():
        yield 0
        started.set()
        yield 1

    ahead = prefetch(source())
    next(ahead)
    assert started.wait(5)
    ahead.close()


def test_an_error_in_the_thread_is_raised_after_the_items_before_it():
    def source():
        yield 1
        yield 2
        raise DataError("lost.png: gone")

    ahead = prefetch(source())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(DataError, match="gone"):
        next(ahead)
    assert threads() == 0


def test_a_source_that_fails_at_once_raises_here():
    class Broken:
        def __iter__(self):
            raise DataError("no iterator")

    with pytest.raises(DataError, match="no iterator"):
        next(prefetch(Broken()))


@pytest.mark.parametrize("wait", [0.0, 0.05])
def test_closing_stops_the_thread_and_ends_the_source(wait):
    ended = threading.Event()

    def source():
        try:
            while True:
                yield bytes(10)
        finally:
            ended.set()

    ahead = prefetch(source())
    next(ahead)
    time.sleep(wait)
    began = time.monotonic()
    ahead.close()
    assert time.monotonic() - began < 1
    assert ended.is_set()
    assert threads() == 0


def test_an_error_of_the_consumer_stops_the_thread():
    def consume() -> None:
        for item in prefetch(range(10)):
            1 // item

    with pytest.raises(ZeroDivisionError) as caught:
        consume()
    del caught  # its traceback holds the generator
    gc.collect()
    assert threads() == 0


def test_a_negative_depth_is_a_usage_error():
    with pytest.raises(UsageError):
        next(prefetch([1], depth=-1))


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_waiting_for_a_slow_item_ends_at_once():
    program = (
        "import time\n"
        "from edgetune.data import prefetch\n"
        "def source():\n"
        "    yield 1\n"
        "    time.sleep(0.4)\n"
        "    yield 2\n"
        "    time.sleep(60)\n"
        "try:\n"
        "    for item in prefetch(source()):\n"
        "        print(item, flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped', flush=True)\n"
    )
    # The item at hand sleeps for a minute: the end must not wait for it longer than its few seconds of grace.
    program = "import edgetune.data.batches as b; b._STOP_SECONDS = 0.2\n" + program
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["1\n", "2\n"]
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "stopped\n"
        assert process.wait(10) == 0


def test_the_package_imports_neither_torch_nor_timm():
    program = "import edgetune.data, sys; print(sorted({'torch', 'timm', 'sklearn'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"
