"""A limit, a full or a read-only disk, a kill and a second writer: a run never fails for its cache."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from feature_cases import (
    chunk_files,
    disk_bytes,
    fill,
    make_ids,
    make_key,
    make_values,
    read,
    small_disk,
    start_python,
    stored_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.features import FeatureStore, chunks, folder
from edgetune.units import KIB, MIB

KEY = make_key()
COUNT = 10
IDS = make_ids(COUNT)
VALUES = make_values(KEY, COUNT)
# What the whole store takes in chunks of four, four and two.
KEY_BYTES = len(KEY.as_text())
WHOLE_BYTES = KEY_BYTES + 2 * chunks.header_bytes(4) + chunks.header_bytes(2) + COUNT * KEY.entry_bytes


@pytest.fixture(autouse=True)
def _four_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * KEY.entry_bytes)


def check_right(store: FeatureStore, values: np.ndarray = VALUES) -> int:
    """How many are present, once what is present was found right here and in a new store."""
    for one in (store, FeatureStore.open(store.folder.parent, store.key, make_ids(len(values)))):
        places = np.flatnonzero(one.present)
        np.testing.assert_array_equal(read(one, places), values[places])
        assert np.array_equal(one.present, store.present)
        assert one.notes == ()
    return len(places)


@settings(deadline=None, max_examples=80)
@given(limit=st.integers(1, WHOLE_BYTES + 10))
def test_a_limit_is_used_and_never_passed(tmp_path_factory: pytest.TempPathFactory, limit: int) -> None:
    base = tmp_path_factory.mktemp("limit")
    store = fill(base, KEY, IDS, VALUES, limit_bytes=limit)
    assert store.stored_bytes == disk_bytes(base) <= limit
    stored = check_right(store)
    if limit >= WHOLE_BYTES:
        assert stored == COUNT
        assert store.full is None
    else:
        assert stored < COUNT
        assert store.full.startswith("--cache-limit ")
        # One more would not have fitted.
        more = KEY.entry_bytes + chunks.INDEX_BYTES + chunks.header_bytes(0) * (stored % 4 == 0)
        assert max(store.stored_bytes, KEY_BYTES) + more > limit


def test_a_limit_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    limit = WHOLE_BYTES - chunks.header_bytes(2) - 2 * KEY.entry_bytes
    fill(tmp_path, KEY, IDS[:8], VALUES[:8], limit_bytes=limit)
    assert FeatureStore.open(tmp_path, KEY, IDS[:8], limit_bytes=limit).full is None  # whole: nothing is refused
    store = FeatureStore.open(tmp_path, KEY, IDS, limit_bytes=limit)
    assert store.full == f"--cache-limit {limit / KIB:.1f} KiB"
    assert store.missing().tolist() == [8, 9]


def test_what_is_there_stays_under_a_lower_limit(tmp_path: Path) -> None:
    before = fill(tmp_path, KEY, IDS[:8], VALUES[:8]).stored_bytes
    store = fill(tmp_path, KEY, IDS, VALUES, limit_bytes=1 * KIB)
    assert store.full == "--cache-limit 1.0 KiB"
    assert store.stored_bytes == before
    assert check_right(store) == 8


def test_entries_of_images_that_left_count_towards_the_limit(tmp_path: Path) -> None:
    before = fill(tmp_path, KEY, IDS[:4], VALUES[:4]).stored_bytes
    store = FeatureStore.open(tmp_path, KEY, IDS[4:], limit_bytes=before + 10)
    assert store.full is not None
    assert store.stored_bytes == before


def test_some_of_the_disk_is_kept_for_the_run(tmp_path: Path) -> None:
    store = fill(tmp_path / "cache", KEY, IDS, VALUES, keep_free_bytes=2**60)
    assert store.full == "No space left on device (1073741824 GiB are kept free for the run)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_ends_the_caching_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with FeatureStore.open(tmp_path, KEY, IDS) as store:
        store.add(range(5), VALUES[:5])

        def refuse(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            store.add(range(5, 10), VALUES[5:])
            assert store.full == os.strerror(number)
            store.add(range(5, 10), VALUES[5:])
            store.flush()
        assert store.missing().tolist() == [4, 5, 6, 7, 8, 9]
        assert store.written_bytes > store.stored_bytes == disk_bytes(tmp_path)  # flash wore for nothing
    assert check_right(store) == 4
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".chunk", ".json"]


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
from feature_cases import fill, make_ids, make_key, make_values, read
import numpy as np
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
key = make_key(stored_tokens=64, width=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = fill(Path(sys.argv[1]), key, make_ids(10), make_values(key, 10))
print(store.full, store.present.sum(), sorted(path.name for path in store.folder.iterdir()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the size of files")
def test_a_write_that_really_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with start_python(FILE_LIMIT, tmp_path) as child:
        out, _ = child.communicate(timeout=60)
    assert out == "File too large 0 ['key.json']\n"


def test_a_small_disk_takes_as_many_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 256 * KIB)
    key = make_key(stored_tokens=64, width=64)  # 16 KiB an entry
    values = make_values(key, 100)
    with small_disk(tmp_path / "disk", 1 * MIB) as disk:
        store = fill(disk, key, make_ids(100), values)
        assert store.full == "No space left on device"
        assert 50 <= check_right(store, values) <= 63
        assert not [path for path in store.folder.iterdir() if path.name.startswith(".tmp-")]


def test_a_disk_that_lies_about_its_room_is_met_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota, say, is not in the free bytes: then the write itself meets ENOSPC."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 256 * KIB)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"total": 0, "free": 0}))
    key = make_key(stored_tokens=64, width=64)
    values = make_values(key, 100)
    with small_disk(tmp_path / "disk", 1 * MIB) as disk:
        store = fill(disk, key, make_ids(100), values)
        assert store.full == "No space left on device"
        assert check_right(store, values) == 48  # three chunks of 16
        assert not [path for path in store.folder.iterdir() if path.name.startswith(".tmp-")]


def test_a_whole_store_on_a_read_only_disk_serves(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 * MIB) as disk:
        fill(disk, KEY, IDS, VALUES)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        with FeatureStore.open(disk, KEY, IDS) as store:
            assert (store.is_whole, store.full, store.notes) == (True, None, ())
            np.testing.assert_array_equal(read(store, range(COUNT)), VALUES)
        more = fill(disk, KEY, make_ids(COUNT + 1), make_values(KEY, COUNT + 1))
        assert more.full == "Read-only file system"
        assert more.missing().tolist() == [COUNT]


def test_damage_on_a_read_only_disk_is_said_and_not_used(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 * MIB) as disk:
        fill(disk, KEY, IDS, VALUES)
        path = chunk_files(disk)[0]
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        store = FeatureStore.open(disk, KEY, IDS)
        places = np.flatnonzero(store.present)
        assert COUNT - 4 <= len(places) < COUNT
        np.testing.assert_array_equal(read(store, places), VALUES[places])
        assert store.notes[1] == f"{path} can't be removed: Read-only file system."


def test_opening_a_whole_store_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, KEY, IDS, VALUES)

    def look() -> list[tuple[str, int, int]]:
        return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*"))

    before = look()
    with FeatureStore.open(tmp_path, KEY, IDS) as store:
        read(store, range(COUNT))
    assert look() == before
    assert store.written_bytes == 0


@pytest.mark.parametrize("place", ["base", "store"])
def test_a_file_where_the_folder_should_be_is_met_as_a_full_disk(tmp_path: Path, place: str) -> None:
    base = tmp_path / "cache"
    if place == "base":
        base.write_bytes(b"mine")
    else:
        base.mkdir()
        (base / KEY.folder_name()).write_bytes(b"mine")
    store = fill(base, KEY, IDS, VALUES)
    assert store.full == "Not a directory"
    assert not store.present.any()
    assert (base if place == "base" else base / KEY.folder_name()).read_bytes() == b"mine"


def test_a_folder_whose_path_is_too_long_is_met_as_a_full_disk(tmp_path: Path) -> None:
    store = fill(tmp_path / ("x" * 300), KEY, IDS, VALUES)
    assert store.full == "File name too long"
    assert not store.present.any()


def test_what_a_killed_process_left_half_made_is_removed(tmp_path: Path) -> None:
    store = fill(tmp_path, KEY, IDS, VALUES)
    half = store.folder / ".tmp-0123456789ab"
    half.write_bytes(b"half")
    again = FeatureStore.open(tmp_path, KEY, IDS)
    assert not half.exists()
    assert again.stored_bytes == disk_bytes(tmp_path)


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    store = fill(tmp_path, KEY, IDS, VALUES)
    fresh, old = store.folder / ".tmp-0123456789ab", store.folder / ".tmp-cdef01234567"
    with folder.locked(store.folder, wait_seconds=0.0) as held:
        assert held
        fresh.write_bytes(b"half")
        old.write_bytes(b"half")
        os.utime(old, (time.time() - 7200,) * 2)
        FeatureStore.open(tmp_path, KEY, IDS)
        assert fresh.exists()
        assert not old.exists()


def test_a_disk_without_locks_still_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert check_right(fill(tmp_path, KEY, IDS, VALUES)) == COUNT


WRITER = """
import sys, time
from pathlib import Path
from feature_cases import make_ids, make_key, make_values
from edgetune.features import FeatureStore, chunks
folder, count, limit, pause, order = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
key = make_key()
chunks.CHUNK_BYTES = 4 * key.entry_bytes
values = make_values(key, count)
store = FeatureStore.open(folder, key, make_ids(count), limit_bytes=limit or None)
print("ready", flush=True)
for place in range(count)[::order]:
    store.add([place], values[place:place + 1])
    time.sleep(pause)
store.close()
print(store.full)
"""


def ready(child: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_after_a_kill_what_was_renamed_is_there_and_the_rest_can_be_added(tmp_path: Path) -> None:
    count = 2000
    values = make_values(KEY, count)
    for _ in range(3):  # killed at three moments, each going on where the last stopped
        before = len(chunk_files(tmp_path))
        with ready(start_python(WRITER, tmp_path, count, 0, 0.0005, 1)) as child:
            wait_for(lambda before=before: len(chunk_files(tmp_path)) > before + 3)
            child.send_signal(signal.SIGKILL)
            assert child.wait(30) == -signal.SIGKILL
        names = len(chunk_files(tmp_path))
        store = FeatureStore.open(tmp_path, KEY, make_ids(count))
        assert np.count_nonzero(store.present) == 4 * names < count
        assert check_right(store, values)
        assert not [path for path in store.folder.iterdir() if path.name.startswith(".tmp-")]
    with FeatureStore.open(tmp_path, KEY, make_ids(count)) as store:
        missing = store.missing()
        assert missing.tolist() == list(range(count))[-len(missing) :]
        store.add(missing, values[missing])
    assert check_right(store, values) == count


@pytest.mark.parametrize("orders", [(1, -1), (1, 1)])
@pytest.mark.parametrize("limit", [0, 8000])
def test_two_writers_at_once_complete_one_store_within_one_limit(
    tmp_path: Path, limit: int, orders: tuple[int, int]
) -> None:
    count = 100
    values = make_values(KEY, count)
    children = [start_python(WRITER, tmp_path, count, limit, 0.001, order) for order in orders]
    for child in children:
        ready(child)
    most = 0
    while any(child.poll() is None for child in children):
        most = max(most, disk_bytes_now(tmp_path))
    for child in children:
        assert child.stdout is not None
        # Not communicate(), which passes over what `ready` has read beyond its line.
        out = child.stdout.read()
        child.stdout.close()
        assert out == ("--cache-limit 7.8 KiB\n" if limit else "None\n")
        assert child.returncode == 0
    store = FeatureStore.open(tmp_path, KEY, make_ids(count))
    present = check_right(store, values)
    assert len(stored_ids(tmp_path, KEY)) == present  # each once
    if limit:
        assert most <= limit
        assert store.stored_bytes == disk_bytes(tmp_path) <= limit
        assert 0 < present < count
    else:
        assert present == count


def disk_bytes_now(base: Path) -> int:
    """As `disk_bytes`, of a folder that others are writing to."""
    while True:
        try:
            return disk_bytes(base)
        except FileNotFoundError:
            continue
