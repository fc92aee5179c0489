"""Records on disk for one process: what was added is read back to the byte, or is not there, and no file is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.scratch import Scratch


def record(number: int) -> bytes:
    return bytes([number] * 4)


def read(scratch: Scratch, number: int) -> bytes | None:
    into = np.empty(2, np.int16)
    return into.tobytes() if scratch.read(number, into) else None


def test_records_come_back_in_any_order_and_no_file_has_a_name(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 4, 100)
    assert [scratch.add(record(number)) for number in range(3)] == [0, 1, 2]
    assert [read(scratch, number) for number in (2, 0, 3)] == [record(2), record(0), None]
    assert scratch.written_bytes == 12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "fit"), [(-1, 0), (3, 0), (4, 1), (11, 2)])
def test_over_the_limit_nothing_is_written(tmp_path: Path, limit: int, fit: int) -> None:
    scratch = Scratch(tmp_path, 4, limit)
    assert [scratch.add(record(number)) is not None for number in range(3)] == [number < fit for number in range(3)]
    assert scratch.written_bytes == 4 * fit


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is asked for")
def test_a_disk_that_fills_up_keeps_what_is_there(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 4, 100)
    scratch.add(record(0))
    kept = scratch._file
    with Path("/dev/full").open("wb", buffering=0) as full:
        scratch._file = full
        assert scratch.add(record(1)) is None
    scratch._file = kept
    assert scratch.add(record(2)) is None
    assert [read(scratch, number) for number in range(2)] == [record(0), None]


def test_a_folder_that_can_t_be_written_holds_nothing(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "missing", 4, 100)
    assert scratch.add(record(0)) is None
    scratch.close()


def test_once_closed_nothing_is_there(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 4, 100)
    scratch.add(record(0))
    scratch.close()
    scratch.close()
    assert read(scratch, 0) is None
    assert scratch.add(record(1)) is None
