"""What a run says of how far it is, where no bar can be drawn."""

from __future__ import annotations

import pytest

from edgetune.cli import progress
from edgetune.cli.progress import Terminal


def test_a_long_count_says_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Terminal(quiet=False, json=False) as terminal:
        for done in (10, 20, 100):
            terminal.progress("cache training images", done, 100)
            now[0] += 10.0
        terminal.progress("cache training images", 10, 100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cache training images 10/100"
    assert lines[1] == "cache training images 20/100  ETA 1 min 20 s"  # eighty left, one a second
    assert lines[2] == "cache training images 100/100"
    assert lines[3] == "cache training images 10/100"  # counted anew


def test_a_quiet_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(quiet=True, json=False) as terminal:
        terminal.progress("cache training images", 10, 100)
        terminal.note("a note")
    assert capsys.readouterr().out == ""
