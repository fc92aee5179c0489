"""metrics.csv holds every step once, also of a run that was killed and resumed."""

from __future__ import annotations

import csv
import errno
import math
import os
from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import RunFolderError
from edgetune.report import MetricsLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def filled(path: Path, steps: int) -> MetricsLog:
    """Every second step is followed by an evaluation."""
    log = MetricsLog(path)
    for step in range(1, steps + 1):
        log.append({"step": step, "epoch": step / 2, "loss": 1 / step})
        if step % 2 == 0:
            log.append({"step": step, "epoch": step / 2, "val_loss": 0.5, "val_accuracy": 0.25})
    return log


def test_a_row_is_in_the_file_at_once_and_exact(path: Path) -> None:
    log = MetricsLog(path)
    assert rows(path) == []
    log.append({"step": 1, "loss": 0.1 + 0.2, "memory_bytes": 2**40, "learning_rate": np.float64(1 / 3)})
    (row,) = rows(path)
    assert row["step"] == "1"
    assert float(row["loss"]) == 0.1 + 0.2
    assert float(row["learning_rate"]) == 1 / 3
    assert int(row["memory_bytes"]) == 2**40
    assert row["val_accuracy"] == ""


def test_what_is_no_number_is_written_as_such(path: Path) -> None:
    MetricsLog(path).append({"step": 1, "loss": math.nan, "train_accuracy": None, "seconds": math.inf})
    (row,) = rows(path)
    assert math.isnan(float(row["loss"]))
    assert math.isinf(float(row["seconds"]))
    assert row["train_accuracy"] == ""
    MetricsLog(path).truncate_after(1)
    assert rows(path) == [row]


def test_a_column_that_there_is_not_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="no column lose"):
        MetricsLog(path).append({"step": 1, "lose": 1.0})


def test_resuming_removes_what_is_past_the_checkpoint(path: Path) -> None:
    log = filled(path, 6)
    whole = path.read_bytes()
    log.truncate_after(4)
    assert [row["step"] for row in rows(path)] == ["1", "2", "2", "3", "4", "4"]
    for step in (5, 6):
        log.append({"step": step, "epoch": step / 2, "loss": 1 / step})
    log.append({"step": 6, "epoch": 3.0, "val_loss": 0.5, "val_accuracy": 0.25})
    assert path.read_bytes() == whole


def test_an_evaluation_that_will_be_done_again_goes_too(path: Path) -> None:
    filled(path, 4).truncate_after(4, keep_evaluation=False)
    assert [(row["step"], row["val_loss"]) for row in rows(path)][-2:] == [("3", ""), ("4", "")]
    assert len([row for row in rows(path) if row["val_loss"]]) == 1


def test_truncating_to_the_start_or_past_the_end_is_fine(path: Path) -> None:
    log = filled(path, 3)
    whole = path.read_bytes()
    log.truncate_after(99)
    assert path.read_bytes() == whole
    log.truncate_after(0)
    assert path.read_bytes() == whole.splitlines(keepends=True)[0]


def test_a_row_cut_off_by_a_kill_is_dropped_wherever_it_was_cut(path: Path) -> None:
    filled(path, 3)
    *kept, last = path.read_bytes().splitlines(keepends=True)
    for length in range(1, len(last)):
        path.write_bytes(b"".join(kept) + last[:length])
        log = MetricsLog(path)
        log.append({"step": 3, "epoch": 1.5, "loss": 1 / 3})
        assert path.read_bytes() == b"".join(kept) + last


def test_damaged_rows_go_on_resume(path: Path) -> None:
    log = filled(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0\0\n1,2\nnan,,,\n\xff\xfe\n\n")
    log.truncate_after(99)
    assert path.read_bytes() == whole


def test_an_empty_file_gets_its_header_and_another_table_is_left_alone(path: Path) -> None:
    path.write_bytes(b"")
    MetricsLog(path).append({"step": 1})
    assert [row["step"] for row in rows(path)] == ["1"]
    for other in (b"a,b\n1,2\n", b"step", b"\xff" * 1000, b"\n"):
        path.write_bytes(other)
        with pytest.raises(RunFolderError, match="no table"):
            MetricsLog(path)
        assert path.read_bytes() == other


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_clear_error(path: Path) -> None:
    log = MetricsLog(path)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=os.strerror(errno.ENOSPC)):
        log.append({"step": 1})


def test_a_folder_that_is_gone_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="can't be written"):
        MetricsLog(tmp_path / "gone" / "metrics.csv")
