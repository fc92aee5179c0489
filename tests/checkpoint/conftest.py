"""A hook that makes file operations fail: every one from a point on (a kill), or one of them (a disk's refusal)."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_OPERATIONS = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"})


class Killed(BaseException):
    """What a process sees of SIGKILL: from here on nothing it does reaches the disk, cleaning up included."""


class _Faults:
    """An audit hook can't be taken back, so there is one, which does nothing most of the time."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.error: Callable[[], BaseException] = Killed
        self.once = False
        self.happened = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.left is None or event not in _OPERATIONS:
            return
        self.left -= 1
        if self.left == -1 or (self.left < -1 and not self.once):
            self.happened = True
            raise self.error()


_faults = _Faults()


@pytest.fixture
def failing_at() -> Callable[..., Any]:
    """`with failing_at(7) as happened:` a kill before the eighth file operation; with `error=`, only that one fails."""

    @contextmanager
    def failing(point: int, error: Callable[[], BaseException] | None = None) -> Iterator[Callable[[], bool]]:
        _faults.left, _faults.happened = point, False
        _faults.error, _faults.once = error or Killed, error is not None
        try:
            yield lambda: _faults.happened
        except Killed:
            pass
        finally:
            _faults.left = None

    return failing


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, renamed and removed, in order: `sync NAME`, `name NAME` (the new one), `remove`."""
    steps: list[str] = []
    sync, rename, replace, rmtree = os.fsync, Path.rename, Path.replace, shutil.rmtree

    def record_sync(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        sync(descriptor)

    def record(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def recorded(self: Path, target: Path) -> Path:
            steps.append(f"name {target.name}")
            return move(self, target)

        return recorded

    def record_removal(folder: Path, **options: Any) -> None:
        steps.append("remove")
        rmtree(folder, **options)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record(rename))
    monkeypatch.setattr(Path, "replace", record(replace))
    monkeypatch.setattr(shutil, "rmtree", record_removal)
    return steps
