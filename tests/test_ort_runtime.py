"""What stands in the place of ONNX Runtime's training package is told apart, with the line that puts it right. No runtime here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running import environment

PROGRAM = """
from edgetune.backends.ort_runtime import training_api
from edgetune.errors import BackendUnavailable
try:
    training_api()
except BackendUnavailable as error:
    print(error)
"""
REINSTALL = "Try: pip uninstall onnxruntime onnxruntime-training-cpu; pip install --force-reinstall onnxruntime-training-cpu==1.19.2"
INSTALL = "Install it with: pip install 'edgetune[ort]'"


def make_package(
    folder: Path, version: str, *, training: bool, library: str = "CheckpointState = Module = object"
) -> None:
    """An `onnxruntime` of pip's, as far as it is looked at."""
    package = folder / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}\ndef set_default_logger_severity(level): ...\n")
    (package / "capi" / "__init__.py").touch()
    (package / "capi" / "_pybind_state.py").write_text(library)
    if training:
        (package / "training" / "api").mkdir(parents=True)
        (package / "training" / "api" / "__init__.py").write_text("from onnxruntime.capi._pybind_state import Module\n")


def make_record(folder: Path) -> None:
    """What pip keeps of an installed training package."""
    record = folder / "onnxruntime_training_cpu-1.19.2.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-training-cpu\nVersion: 1.19.2\n")


def told(folder: Path, *, has_record: bool = False) -> str:
    """What a process says for which `folder` is all there is of ONNX Runtime."""
    hidden = "" if has_record else (
        "from importlib import metadata\n"
        "def nothing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = nothing\n"
    )  # fmt: skip
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{hidden}{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


@pytest.fixture(autouse=True)
def _has_wheel() -> None:
    import platform

    from edgetune.backends.ort_runtime import has_wheel

    if not has_wheel(platform.system(), platform.machine(), sys.version_info[:2]):
        pytest.skip("another message where there is no wheel")


def test_the_training_package_is_taken(tmp_path: Path) -> None:
    make_package(tmp_path, "1.19.2", training=True)
    assert told(tmp_path) == ""


def test_plain_onnxruntime_over_the_training_package_is_told_with_how_to_get_rid_of_it(tmp_path: Path) -> None:
    make_package(tmp_path, "1.32.0", training=True)  # whose folder survives
    said = told(tmp_path)
    assert said.startswith("ONNX Runtime 1.32.0 is installed; artifacts are for 1.19.2")
    assert "Plain `onnxruntime` may lie in the place of `onnxruntime-training-cpu`" in said
    assert said.endswith(REINSTALL)


@pytest.mark.parametrize("training", [True, False])
def test_plain_onnxruntime_of_the_same_version_is_told_too(tmp_path: Path, training: bool) -> None:
    make_package(tmp_path, "1.19.2", training=training, library="")
    said = told(tmp_path)
    assert "the onnxruntime that is installed (1.19.2) can't train: plain `onnxruntime` lies in the place" in said
    assert said.endswith(REINSTALL)


@pytest.mark.parametrize("left", ["onnxruntime", "onnxruntime/training/api", "onnxruntime/capi"])
def test_a_folder_that_pip_left_behind_is_not_taken_for_a_runtime(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir(parents=True)
    # Behind what is really installed nothing is looked for: this environment's own must not be found.
    said = told_alone(tmp_path)
    assert f"{tmp_path}/onnxruntime is there, without the package's code" in said
    assert said.endswith(INSTALL)


def told_alone(folder: Path) -> str:
    """As `told`, where the real package, which Python prefers to a folder without code, can't be found."""
    blind = (
        "import importlib.machinery as m, sys\n"
        f"found = m.PathFinder.find_spec\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        return found(name, [{str(folder)!r}], target) if name == 'onnxruntime' else None\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from importlib import metadata\n"
        "def nothing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = nothing\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blind + PROGRAM], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def test_where_pip_believes_that_it_is_installed_it_is_told_to_do_it_again(tmp_path: Path) -> None:
    make_package(tmp_path, "1.19.2", training=True, library="CheckpointState = object")
    make_record(tmp_path)
    said = told(tmp_path, has_record=True)
    assert "is installed and can't be imported" in said
    assert "Module" in said
    assert said.endswith(REINSTALL)
