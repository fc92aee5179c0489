"""The built wheel carries what a checkout has: installed alone, it finds and loads a device profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

LOADS = """
import json, edgetune
from edgetune import devices
profile = devices.find_device("jetson-nano")
from edgetune.web.folder import PAGE
page = sorted(path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.is_file())
print(json.dumps([edgetune.__file__, str(devices.bundled_dir()), profile.id, len(devices.list_devices()), page]))
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_profile_loads_from_the_installed_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the dev extra builds the wheel")
    dist, target = tmp_path / "dist", tmp_path / "installed"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(dist), cwd=CHECKOUT)
    (wheel,) = dist.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)

    # The folder named first wins over a checkout that this interpreter has installed in editable mode.
    environment = {"PYTHONPATH": str(target), "EDGETUNE_CONFIG_DIR": str(tmp_path / "config")}
    found = json.loads(run(sys.executable, "-c", LOADS, cwd=tmp_path, **environment))
    package, profiles, device, count, page = found
    assert Path(package).is_relative_to(target)
    assert Path(profiles).is_relative_to(target)
    assert device == "jetson-nano"
    assert count == len(list((CHECKOUT / "device_profiles").glob("*.toml")))
    own = CHECKOUT / "edgetune" / "web" / "page"
    assert page == sorted(path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file())
