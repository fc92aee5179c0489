"""Run the torch-free tests on the oldest and the newest Python from 3.10 on that are found and run (`--all`: on every one),
each in a venv of its own without torch.

Tests that need torch skip themselves there. Venvs are kept in `.venv/pythons` and reused.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venv" / "pythons"
OLDEST = (3, 10)
# The arithmetic is the same on every Python: a few examples of each property tell whether it runs.
FEW = ["--hypothesis-profile", "few"]
PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
TEST_PACKAGES = ["pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "jsonschema", "scikit-learn"]


def find_pythons() -> dict[tuple[int, int], Path]:
    """Version -> interpreter, from PATH and from pyenv, one a minor version."""
    folders = [Path(part) for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    folders += sorted(Path.home().glob(".pyenv/versions/*/bin"))
    found: dict[tuple[int, int], Path] = {}
    for folder in folders:
        for python in sorted(folder.glob("python3*")):
            if re.fullmatch(r"python3(\.\d+)?", python.name):
                version = version_of(python)
                if version is not None and version >= OLDEST:
                    found.setdefault(version, python)
    return dict(sorted(found.items()))


def version_of(python: Path) -> tuple[int, int] | None:
    """None if it does not run (a shim without its Python) or has no venv module."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)


def environment(version: tuple[int, int], python: Path) -> Path:
    """The Python of a venv with the core install and the test tools, made if it is not there."""
    folder = VENVS / f"{version[0]}.{version[1]}"
    own = folder / "bin" / "python"
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        install: list[str | Path] = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-e", str(ROOT), *TEST_PACKAGES], check=True)
        stamp.touch()
    return own


def main() -> int:
    failed = []
    found = find_pythons()
    ends = (
        found.items()
        if "--all" in sys.argv[1:]
        else [item for item in found.items() if item[0] in (min(found), max(found))]
    )
    for version, python in ends:
        label = f"Python {version[0]}.{version[1]}"
        print(f"== torch-free core on {label} ({python})", flush=True)
        own = environment(version, python)
        options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", *FEW, *PARALLEL]
        done = subprocess.run([own, "-m", "pytest", *options], cwd=ROOT)
        if done.returncode:
            failed.append(label)
    if failed:
        print(f"failed on {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
