"""What was added is read back, from this process's store or a later one's; what is not there is said to be missing."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_cases import chunk_files, disk_bytes, fill, make_ids, make_key, make_values, read
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgetune.errors import EdgetuneError
from edgetune.features import FeaturesDamaged, FeaturesOverflow, FeatureStore, chunks


@pytest.fixture
def four_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four entries of `make_key()`, so that a few images make several chunks."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * make_key().entry_bytes)


not_finite = st.sampled_from([np.nan, np.inf, -np.inf])
any_float32 = st.floats(width=32) | not_finite
# The last float32 below 65520, which float16 rounds to 65504.
within_float16 = st.floats(-65519.99609375, 65519.99609375, width=32) | not_finite


@settings(deadline=None, max_examples=60)
@given(values=arrays(np.float32, (3, 2, 3), elements=any_float32), order=st.permutations(range(3)))
def test_float32_is_kept_to_the_bit(values: Any, order: list[int]) -> None:
    key = make_key(stored_tokens=2, width=3)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), key, make_ids(3), values)
        store = FeatureStore.open(Path(folder), key, make_ids(3))
        assert read(store, order).tobytes() == values[order].tobytes()


@settings(deadline=None, max_examples=60)
@given(values=arrays(np.float32, (3, 2, 3), elements=within_float16))
def test_float16_is_what_numpy_makes_of_it(values: Any) -> None:
    key = make_key(stored_tokens=2, width=3, precision="float16")
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), key, make_ids(3), values)
        found = read(FeatureStore.open(Path(folder), key, make_ids(3)), range(3))
    np.testing.assert_array_equal(found, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30])
def test_a_finite_value_that_turns_infinite_in_float16_is_refused(tmp_path: Path, value: float) -> None:
    key = make_key(precision="float16")
    values = make_values(key, 3)
    values[1, 2, 3] = value
    values[1, 0, 0] = np.nan
    with FeatureStore.open(tmp_path, key, make_ids(3)) as store:
        with pytest.raises(FeaturesOverflow, match=r"image 1 is (65520|1e\+30), .*65504.*float32"):
            store.add(range(3), values)
        store.flush()
        assert store.present.tolist() == [True, False, False]
    with FeatureStore.open(tmp_path, make_key(precision="float32"), make_ids(3)) as store:
        store.add(range(3), values)
        store.flush()
        assert read(store, [1])[0, 2, 3] == np.float32(value)


def test_what_is_not_finite_already_is_no_overflow(tmp_path: Path) -> None:
    key = make_key(precision="float16")
    values = make_values(key, 1)
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    store = fill(tmp_path, key, make_ids(1), values)
    np.testing.assert_array_equal(read(store, [0])[0, 0, :3], [np.nan, np.inf, -np.inf])


def test_a_new_store_misses_everything_and_writes_nothing(tmp_path: Path) -> None:
    store = FeatureStore.open(tmp_path / "cache", make_key(), make_ids(3))
    assert not store.is_whole
    assert store.missing().tolist() == [0, 1, 2]
    assert store.missing().dtype == np.int64
    assert (store.stored_bytes, store.written_bytes, store.full, store.notes) == (0, 0, None, ())
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_no_images_is_whole(tmp_path: Path) -> None:
    store = FeatureStore.open(tmp_path, make_key(), [])
    assert store.is_whole
    assert store.missing().tolist() == []


@pytest.mark.usefixtures("four_a_chunk")
def test_entries_are_there_once_their_chunk_is_written(tmp_path: Path) -> None:
    key, ids = make_key(), make_ids(6)
    values = make_values(key, 6)
    with FeatureStore.open(tmp_path, key, ids) as store:
        store.add([5, 0, 3], values[[5, 0, 3]])
        assert not store.present.any()
        store.add([1, 2], values[[1, 2]])
        assert store.present.tolist() == [True, True, False, True, False, True]
        assert store.missing().tolist() == [2, 4]
        np.testing.assert_array_equal(read(store, [3, 0, 5, 1, 3]), values[[3, 0, 5, 1, 3]])
        store.flush()
        assert store.missing().tolist() == [4]
    assert len(chunk_files(tmp_path)) == 2


@pytest.mark.usefixtures("four_a_chunk")
def test_a_later_store_goes_on_where_this_one_stopped(tmp_path: Path) -> None:
    key, ids = make_key(), make_ids(11)
    values = make_values(key, 11)
    with FeatureStore.open(tmp_path, key, ids) as store:
        store.add(range(5), values[:5])
    before = disk_bytes(tmp_path)
    with FeatureStore.open(tmp_path, key, ids) as store:
        assert store.missing().tolist() == [5, 6, 7, 8, 9, 10]
        assert (store.stored_bytes, store.written_bytes) == (before, 0)
        store.add(store.missing(), values[store.missing()])
    assert store.is_whole
    np.testing.assert_array_equal(read(store, range(11)), values)
    assert store.stored_bytes == disk_bytes(tmp_path) == before + store.written_bytes


def test_bytes_are_those_on_the_disk(tmp_path: Path) -> None:
    store = fill(tmp_path, make_key(), make_ids(9), make_values(make_key(), 9))
    assert store.stored_bytes == store.written_bytes == disk_bytes(tmp_path)


def test_another_key_is_another_store(tmp_path: Path) -> None:
    ids, values = make_ids(3), make_values(make_key(), 3)
    fill(tmp_path, make_key(), ids, values)
    other = FeatureStore.open(tmp_path, make_key(split_block=7), ids)
    assert other.missing().tolist() == [0, 1, 2]
    assert other.notes == ()
    assert FeatureStore.open(tmp_path, make_key(), ids).is_whole


def test_the_data_set_may_lose_gain_and_reorder_images(tmp_path: Path) -> None:
    key, ids = make_key(), make_ids(6)
    values = make_values(key, 6)
    stored = fill(tmp_path, key, ids[:4], values[:4])
    later = [3, 5, 1, 4]
    with FeatureStore.open(tmp_path, key, [ids[image] for image in later]) as store:
        assert store.present.tolist() == [True, False, True, False]
        assert store.stored_bytes == stored.stored_bytes  # those of images that left included
        store.add([1, 3], values[[5, 4]])
    np.testing.assert_array_equal(read(store, range(4)), values[later])
    assert FeatureStore.open(tmp_path, key, ids).is_whole


def test_ids_may_come_as_an_array(tmp_path: Path) -> None:
    key, ids = make_key(), make_ids(3)
    fill(tmp_path, key, ids, make_values(key, 3))
    array = np.frombuffer(b"".join(ids), np.uint8).reshape(3, 16)
    assert FeatureStore.open(tmp_path, key, array).is_whole


def test_ids_that_end_in_zeros_are_told_apart(tmp_path: Path) -> None:
    key, ids = make_key(), [b"a" * 14 + end for end in (b"\0\0", b"\0a", b"a\0")] + [bytes(16)]
    values = make_values(key, 4)
    fill(tmp_path, key, ids, values)
    np.testing.assert_array_equal(read(FeatureStore.open(tmp_path, key, ids), range(4)), values)


def test_identical_images_are_computed_and_stored_once(tmp_path: Path) -> None:
    key, (a, b, c) = make_key(), make_ids(3)
    values = make_values(key, 3)
    with FeatureStore.open(tmp_path, key, [b, a, b, c, a]) as store:
        assert store.missing().tolist() == [0, 1, 3]
        store.add([0, 1, 2], values[[1, 0, 1]])
        store.flush()
        assert store.present.tolist() == [True, True, True, False, True]
        assert store.missing().tolist() == [3]
        store.add([3], values[[2]])
    assert store.is_whole
    np.testing.assert_array_equal(read(store, range(5)), values[[1, 0, 1, 2, 0]])
    expected = chunks.header_bytes(2) + chunks.header_bytes(1) + 3 * key.entry_bytes
    assert sum(path.stat().st_size for path in chunk_files(tmp_path)) == expected


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    key, ids = make_key(), make_ids(3)
    values = make_values(key, 3)
    fill(tmp_path, key, ids, values)
    again = fill(tmp_path, key, ids, values + 1)
    assert again.written_bytes == 0
    np.testing.assert_array_equal(read(again, range(3)), values)


def test_removing_leaves_nothing_and_stores_nothing_more(tmp_path: Path) -> None:
    key, ids = make_key(), make_ids(3)
    store = fill(tmp_path, key, ids, make_values(key, 3))
    store.remove()
    store.add(range(3), make_values(key, 3))
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert store.missing().tolist() == [0, 1, 2]


def test_one_thread_reads_while_another_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * make_key().entry_bytes)
    key, ids = make_key(), make_ids(200)
    values = make_values(key, 200)
    store = FeatureStore.open(tmp_path, key, ids)
    failures: list[BaseException] = []
    started = threading.Event()

    def reader() -> None:
        random = np.random.default_rng(0)
        try:
            while not store.is_whole:
                places = np.flatnonzero(store.present)
                if len(places):
                    places = random.choice(places, 8)
                    np.testing.assert_array_equal(read(store, places), values[places])
                    started.set()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        store.add(range(100), values[:100])
        assert started.wait(30)
        store.add(range(100, 200), values[100:])
        store.close()
    finally:
        for place in range(200):
            store.present[place] = True  # ends the reader if adding failed
        thread.join(30)
    assert not thread.is_alive()
    assert failures == []


@pytest.mark.parametrize("ids", [[b"short"], [b"x" * 17]])
def test_ids_of_another_length_are_refused(tmp_path: Path, ids: list[bytes]) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        FeatureStore.open(tmp_path, make_key(), ids)


def test_shapes_and_places_are_checked(tmp_path: Path) -> None:
    store = fill(tmp_path, make_key(), make_ids(1), make_values(make_key(), 1))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 5\), wanted \(1, 4, 6\)"):
        store.add([0], np.zeros((1, 4, 5), np.float32))
    with pytest.raises(ValueError, match="wanted"):
        store.read([0], np.zeros((2, 4, 6), np.float32))
    other = FeatureStore.open(tmp_path, make_key(), make_ids(3))
    with pytest.raises(ValueError, match="image 2 are not stored"):
        read(other, [0, 2])


def test_its_errors_are_among_those_a_user_can_meet() -> None:
    assert issubclass(FeaturesDamaged, EdgetuneError)
    assert issubclass(FeaturesOverflow, EdgetuneError)


def test_progress_ends_at_all_of_the_bytes(tmp_path: Path) -> None:
    key, ids = make_key(), make_ids(3)
    for place in range(3):
        fill(tmp_path, key, ids[: place + 1], make_values(key, place + 1))
    told: list[tuple[int, int]] = []
    FeatureStore.open(tmp_path, key, ids, progress=lambda done, total: told.append((done, total)))
    sizes = [path.stat().st_size for path in chunk_files(tmp_path)]
    assert told == [(sum(sizes[: n + 1]), sum(sizes)) for n in range(3)]
