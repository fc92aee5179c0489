"""Whether the wheels of docs/boards.md still install: each class of system is resolved against the package index.

A class is a constraints file with the platform, glibc and Pythons of its systems. pip downloads nothing but metadata
(`--dry-run`); it judges markers by the machine it runs on, so every package is named and none is resolved further.
Exit code 1 and a line for each that no longer installs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class System(NamedTuple):
    """A row of docs/boards.md's table."""

    constraints: str
    glibc: int  # 2.x
    pythons: tuple[str, ...]


SYSTEMS = (
    System("board.txt", 28, ("3.10", "3.11", "3.12")),
    System("board-armv8.2.txt", 28, ("3.10", "3.11", "3.12")),
    System("board-glibc-2.27.txt", 27, ("3.10", "3.11", "3.12")),
)
# The oldest glibc that wheels name.
OLDEST_GLIBC = 17


def platforms(glibc: int) -> list[str]:
    """The platform tags of 64-bit Arm that a system with glibc 2.x takes, newest first."""
    return [*(f"manylinux_2_{minor}_aarch64" for minor in range(glibc, OLDEST_GLIBC - 1, -1)), "manylinux2014_aarch64"]


def wanted(path: Path) -> list[str]:
    """The packages that a constraints file pins."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def command(system: System, python: str, folder: Path) -> list[str]:
    options = [option for platform in platforms(system.glibc) for option in ("--platform", platform)]
    return [
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *options,
        "--target", str(folder / "nowhere"), *wanted(folder / system.constraints),
        *wanted(folder.parent / "tools" / "board" / "also.txt"), *(["tomli==2.2.1"] if python == "3.10" else []),
    ]  # fmt: skip


def problem(system: System, python: str, folder: Path) -> str | None:
    """What keeps a class of systems from installing its packages; None: nothing."""
    done = subprocess.run(command(system, python, folder), capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return errors[-1] if errors else done.stderr[-300:]


def main(folder: Path = ROOT / "constraints") -> int:
    failed = 0
    for system in SYSTEMS:
        for python in system.pythons:
            found = problem(system, python, folder)
            failed += found is not None
            print(f"{system.constraints}, Python {python}, glibc 2.{system.glibc}: {found or 'installs'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
