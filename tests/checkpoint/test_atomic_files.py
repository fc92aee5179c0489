"""A file is whole or as it was before."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest

from edgetune.checkpoint import write_atomically
from edgetune.errors import RunFolderError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_bytes_and_a_writer_write_the_same(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"12345")
    write_atomically(tmp_path / "b", lambda file: file.write(b"12345"), expected_bytes=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"12345"
    assert names(tmp_path) == ["a", "b"]


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new(tmp_path: Path, failing_at: Callable[..., Any]) -> None:
    path = tmp_path / "a"
    for point in itertools.count():
        path.write_bytes(b"old")
        with failing_at(point) as happened:
            write_atomically(path, b"new")
        assert path.read_bytes() in (b"old", b"new")
        if not happened():
            break
    assert path.read_bytes() == b"new"
    assert point >= 3  # open, rename, sync of the folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path: Path, order: list[str]) -> None:
    write_atomically(tmp_path / "a", b"new")
    assert [step.partition(".tmp-")[0] for step in order] == ["sync ", "name a", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_in_the_middle_keeps_the_old_file(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"n" * 100_000)
        raise OSError(number, os.strerror(number))

    with pytest.raises(RunFolderError, match=os.strerror(number)) as caught:
        write_atomically(path, write)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", write)
    assert names(tmp_path) == []


def test_too_little_free_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(RunFolderError, match=r"needs 3\.0 MiB, its disk has 1\.0 MiB free"):
        write_atomically(tmp_path / "a", lambda _: pytest.fail("written all the same"), expected_bytes=3 * 2**20)
    write_atomically(tmp_path / "b", b"fits")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))  # some network file systems
    write_atomically(tmp_path / "c", b"size not told")
    assert names(tmp_path) == ["b", "c"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_open_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", b"")
        (tmp_path / "b").write_bytes(b"")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes == [0o666 & ~mask] * 2


def test_a_path_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "a", tmp_path / "file" / "a", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(RunFolderError, match="can't be written"):
            write_atomically(path, b"x")
    assert names(tmp_path) == ["file", "folder"]


def test_the_longest_name_allowed_can_be_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("n" * 255), b"x")
    assert names(tmp_path) == ["n" * 255]
