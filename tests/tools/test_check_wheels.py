"""The wheel table is what the constraints say, asks for the platform it names, and fails when a row no longer installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import check_wheels
    finally:
        sys.path.pop(0)
    return check_wheels


def test_every_constraints_file_is_a_row_and_in_the_docs(wheels: ModuleType) -> None:
    files = {path.name for path in (ROOT / "constraints").glob("*.txt")}
    assert {system.constraints for system in wheels.SYSTEMS} == files
    docs = (ROOT / "docs" / "boards.md").read_text()
    for system in wheels.SYSTEMS:
        pinned = dict(line.split("==") for line in wheels.wanted(ROOT / "constraints" / system.constraints))
        rows = [line for line in docs.splitlines() if f"`{system.constraints}`" in line and line.startswith("|")]
        assert rows
        assert all(pinned["torch"] in row for row in rows)
        assert tuple(map(int, pinned["torch"].split(".")[:2])) < (2, 11)


def test_every_arm_profile_that_trains_with_torch_is_in_the_docs() -> None:
    docs = (ROOT / "docs" / "boards.md").read_text()
    for path in (ROOT / "device_profiles").glob("*.toml"):
        if "[runtime.torch]" in path.read_text():
            known = any(
                path.stem.startswith(start) for start in ("raspberry-pi-4", "raspberry-pi-5", "coral-dev-board")
            )
            known = known or path.stem.startswith("jetson-orin-nano") or path.stem in docs
            assert known or path.stem.removeprefix("raspberry-pi") in docs, path.stem


def test_no_wheel_for_a_newer_glibc_is_asked_for(wheels: ModuleType) -> None:
    old = next(system for system in wheels.SYSTEMS if system.glibc == 27)
    asked = wheels.command(old, "3.10", ROOT / "constraints")
    assert "manylinux_2_27_aarch64" in asked
    assert not any("2_28" in word or "x86" in word for word in asked)
    assert "torch==2.5.1" in asked


@pytest.mark.parametrize(("code", "said", "wanted"), [(0, "", 0), (1, "ERROR: No matching distribution for torch", 1)])
def test_a_row_that_does_not_install_fails_and_is_named(
    wheels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    said: str,
    wanted: int,
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        failed = code if "torch==2.5.1" in command else 0
        return subprocess.CompletedProcess(command, failed, "", f"WARNING: other\n{said}\n")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    assert wheels.main() == wanted
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == sum(len(system.pythons) for system in wheels.SYSTEMS)
    assert [line for line in printed if "No matching" in line] == [line for line in printed if code and "2.27" in line]
