"""Several runs that fill one cache at once: each entry is written once, and what one has written serves all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from feature_cases import chunk_files, disk_bytes, fill, make_ids, make_key, make_values, read, stored_ids

from edgetune.features import FeatureStore, chunks

KEY = make_key()
COUNT = 10
IDS = make_ids(COUNT)
VALUES = make_values(KEY, COUNT)
# What the whole store takes in chunks of four, four and two.
WHOLE_BYTES = len(KEY.as_text()) + 2 * chunks.header_bytes(4) + chunks.header_bytes(2) + COUNT * KEY.entry_bytes


@pytest.fixture(autouse=True)
def _four_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * KEY.entry_bytes)


def check_whole(store: FeatureStore, values: np.ndarray = VALUES) -> None:
    """All is present and right, here and in a new store, and each entry is on the disk once."""
    for one in (store, FeatureStore.open(store.folder.parent, store.key, make_ids(len(values)))):
        assert one.is_whole
        np.testing.assert_array_equal(read(one, range(len(values))), values)
    assert sorted(stored_ids(store.folder, KEY)) == sorted(make_ids(len(values)))


@pytest.mark.parametrize("limit", [None, WHOLE_BYTES])
def test_what_another_store_has_written_meanwhile_is_taken_and_not_written_again(
    tmp_path: Path, limit: int | None
) -> None:
    one, two = (FeatureStore.open(tmp_path, KEY, IDS, limit_bytes=limit) for _ in range(2))
    with one, two:
        for start in range(0, COUNT, 3):
            for store in (one, two):
                store.add(range(COUNT)[start : start + 3], VALUES[start : start + 3])
    for store in (one, two):
        assert store.full is None
        check_whole(store)
    assert one.written_bytes + two.written_bytes == disk_bytes(tmp_path) == WHOLE_BYTES
    assert two.meets_another


def test_of_a_chunk_only_what_is_still_missing_is_written(tmp_path: Path) -> None:
    with FeatureStore.open(tmp_path, KEY, IDS) as store:
        store.add([0, 1, 2], VALUES[:3])
        fill(tmp_path, KEY, [IDS[1], IDS[7]], VALUES[[1, 7]])
        store.add([3], VALUES[3:4])
        assert np.flatnonzero(store.present).tolist() == [0, 1, 2, 3, 7]
        assert store.stored_bytes == disk_bytes(tmp_path)
    np.testing.assert_array_equal(read(store, [0, 1, 2, 3, 7]), VALUES[[0, 1, 2, 3, 7]])
    assert len(stored_ids(tmp_path, KEY)) == 5


def test_what_another_wrote_is_not_taken_where_it_is_damaged(tmp_path: Path) -> None:
    with FeatureStore.open(tmp_path, KEY, IDS) as store:
        fill(tmp_path, KEY, IDS[:4], VALUES[:4])
        (path,) = chunk_files(tmp_path)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        store.add(range(COUNT), VALUES)
    assert store.notes == (f"{path} has 1 damaged of 4 entries: up to 4 entries are computed again.",)
    assert not path.exists()
    check_whole(store)


def test_chunks_of_other_images_are_not_read_through_while_entries_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and validation images may share a folder: what one adds is nothing to the other."""
    train, val = FeatureStore.open(tmp_path, KEY, IDS[:6]), FeatureStore.open(tmp_path, KEY, IDS[6:])
    with train:
        train.add(range(6), VALUES[:6])
    monkeypatch.setattr(chunks, "check_entries", lambda *_: pytest.fail("entries were read"))
    with val:
        val.add(range(4), VALUES[6:])
    assert val.is_whole
    assert not val.meets_another
    np.testing.assert_array_equal(read(val, range(4)), VALUES[6:])


def test_a_chunk_that_cannot_be_read_is_said_once(tmp_path: Path) -> None:
    with FeatureStore.open(tmp_path, KEY, IDS) as store:
        (store.folder / "0.chunk").mkdir(parents=True)
        store.add(range(COUNT), VALUES)
    assert len(store.notes) == 1
    assert store.is_whole


def test_one_thread_reads_while_another_takes_what_a_third_wrote(tmp_path: Path) -> None:
    count = 400
    ids, values = make_ids(count), make_values(KEY, count)
    store, other = (FeatureStore.open(tmp_path, KEY, ids) for _ in range(2))

    def read_all() -> int:
        found = 0
        while not store.is_whole:
            places = np.flatnonzero(store.present)
            np.testing.assert_array_equal(read(store, places), values[places])
            found += len(places)
        return found

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read_all)
        try:
            with other, store:
                for start in range(0, count, 4):
                    other.add(range(start, start + 4), values[start : start + 4])
                    store.add([start, count - 1 - start], values[[start, count - 1 - start]])
                store.add(store.missing(), values[store.missing()])
        finally:
            places = np.flatnonzero(store.present)
            store.present[:] = True  # ends the reader if adding failed
        assert reader.result(60) > 0
    assert len(places) == count
    check_whole(store, values)
