"""A damaged store never gives wrong features: either the same values come back, or they are missing and it says so."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from feature_cases import chunk_files, fill, make_ids, make_key, make_values, read
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.features import FeaturesDamaged, FeatureStore, chunks

KEY, IDS = make_key(), make_ids(5)
VALUES = make_values(KEY, 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two chunks, of three and two entries."""
    folder = tmp_path_factory.mktemp("whole")
    fill(folder, KEY, IDS[:3], VALUES[:3])
    fill(folder, KEY, IDS, VALUES)
    assert len(chunk_files(folder)) == 2
    return folder


def check_and_complete(folder: Path) -> FeatureStore:
    """What is said to be there is right, and the rest can be added; returns the store as it was opened first."""
    store = FeatureStore.open(folder, KEY, IDS)
    places = np.flatnonzero(store.present)
    np.testing.assert_array_equal(read(store, places), VALUES[places])
    with FeatureStore.open(folder, KEY, IDS) as completed:
        assert completed.notes == ()
        completed.add(completed.missing(), VALUES[completed.missing()])
    assert completed.is_whole
    np.testing.assert_array_equal(read(completed, range(5)), VALUES)
    return store


CHUNK_SIZE = chunks.header_bytes(2) + 2 * KEY.entry_bytes


@settings(deadline=None, max_examples=150)
@given(position=st.integers(0, CHUNK_SIZE - 1), flip=st.integers(1, 255), which=st.integers(0, 1))
def test_any_byte_may_be_damaged(whole: Path, position: int, flip: int, which: int) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(shutil.copytree(whole, Path(base) / "copy"))
        path = chunk_files(folder)[which]
        data = bytearray(path.read_bytes())
        data[position] ^= flip
        path.write_bytes(data)
        store = check_and_complete(folder)
        assert not path.exists()
        (note,) = store.notes
        assert path.name in note
        assert 2 <= np.count_nonzero(store.present) <= 3


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, CHUNK_SIZE + 40))
def test_a_chunk_may_be_cut_off_anywhere_or_be_too_long(whole: Path, size: int) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(shutil.copytree(whole, Path(base) / "copy"))
        path = chunk_files(folder)[0]
        data = path.read_bytes()
        path.write_bytes(data[:size].ljust(size, b"\0"))
        store = check_and_complete(folder)
        assert len(store.notes) == (size != len(data))


def damaged_entry(folder: Path) -> Path:
    path = next(path for path in chunk_files(folder) if path.stat().st_size > CHUNK_SIZE)  # the chunk of three
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    return path


def test_the_note_says_which_chunk_and_how_many_entries_are_computed_again(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    path = damaged_entry(folder)
    store = FeatureStore.open(folder, KEY, IDS)
    assert store.notes == (f"{path} has 1 damaged of 3 entries: up to 3 entries are computed again.",)
    assert store.missing().tolist() == [0, 1, 2]


def test_damage_after_the_store_was_opened_is_an_error_and_never_wrong_values(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    store = FeatureStore.open(folder, KEY, IDS)
    path = damaged_entry(folder)
    np.testing.assert_array_equal(read(store, [0, 1, 3, 4]), VALUES[[0, 1, 3, 4]])
    with pytest.raises(FeaturesDamaged, match=rf"{path.name} does not match its checksum\.$"):
        read(store, [0, 2])


@pytest.mark.parametrize(("change", "what"), [("cut", "is cut off"), ("gone", "is not there any more")])
def test_a_chunk_that_goes_away_while_it_is_used_is_an_error(
    whole: Path, tmp_path: Path, change: str, what: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    store = FeatureStore.open(folder, KEY, IDS)
    for path in chunk_files(folder):
        if change == "cut":
            path.write_bytes(path.read_bytes()[:200])
        else:
            path.unlink()
    with pytest.raises(FeaturesDamaged, match=rf"\.chunk {what}\.$"):
        read(store, [4])


def test_a_chunk_that_the_disk_refuses_to_read_says_what_the_system_said(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore.open(Path(shutil.copytree(whole, tmp_path / "copy")), KEY, IDS)

    def refuse(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(chunks, "read_fully", refuse)
    with pytest.raises(FeaturesDamaged, match=r"\.chunk can't be read: Input/output error\.$"):
        read(store, [4])


def test_a_chunk_of_another_key_is_not_used(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    other = make_key(weights_sha256="00" * 32)  # same shapes, same images, other weights
    foreign = folder / other.folder_name()
    shutil.copytree(folder / KEY.folder_name(), foreign)
    store = FeatureStore.open(folder, other, IDS)
    assert not store.present.any()
    assert len(store.notes) == 2
    assert all("belongs to another cache" in note for note in store.notes)
    assert chunk_files(foreign) == []
    assert FeatureStore.open(folder, KEY, IDS).is_whole


def test_the_same_entries_in_two_chunks_are_harmless(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    for path in chunk_files(folder):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    store = check_and_complete(folder)
    assert store.notes == ()
    assert store.is_whole


def test_a_damaged_chunk_costs_nothing_if_another_holds_the_same(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    for path in chunk_files(folder):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    path = chunk_files(folder)[0]
    path.write_bytes(b"")
    store = check_and_complete(folder)
    assert len(store.notes) == 1
    assert store.is_whole


def test_a_chunk_that_cannot_be_read_is_said_and_left(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    unreadable = folder / KEY.folder_name() / "0.chunk"
    unreadable.mkdir()
    store = FeatureStore.open(folder, KEY, IDS)
    assert store.notes == (f"{unreadable} can't be read (Is a directory): it is not used.",)
    assert store.is_whole
    assert unreadable.exists()


def test_what_was_found_is_used_though_the_folder_then_fails(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))

    def fail(folder: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edgetune.features.store.bytes_in", fail)
    store = FeatureStore.open(folder, KEY, IDS)
    assert store.full == "Permission denied"
    np.testing.assert_array_equal(read(store, range(5)), VALUES)
