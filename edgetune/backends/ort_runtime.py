"""ONNX Runtime's training API, imported without torch.

`onnxruntime.training` imports torch for parts that training from artifacts does not need (40 MiB become 700), and so does
`onnxruntime` itself where torch is installed. Here torch is hidden while they are imported, and an empty package stands in
for `onnxruntime.training`.
"""

from __future__ import annotations

import importlib
import platform
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from edgetune.artifacts.manifest import RUNTIME_VERSION as VERSION
from edgetune.errors import BackendUnavailable

DISTRIBUTION = "onnxruntime-training-cpu"
_WHEELS = "Linux on x86-64, macOS and Windows, with Python 3.8 to 3.12"


def training_api() -> Any:
    """The module `onnxruntime.training.api`. Raises: BackendUnavailable saying what is wrong and what would be right."""
    return _imported("onnxruntime.training.api")


def artifacts_api() -> tuple[Any, Any]:
    """The modules `onnxruntime.training.artifacts` and `onnxruntime.training.onnxblock`. Raises: as `training_api`."""
    return _imported("onnxruntime.training.artifacts"), _imported("onnxruntime.training.onnxblock")


def inference() -> Any:
    """The module `onnxruntime`. Raises: as `training_api`."""
    _imported("onnxruntime.training.api")
    return sys.modules["onnxruntime"]


def _imported(name: str) -> Any:
    try:
        with _without_torch():
            runtime = importlib.import_module("onnxruntime")
            _check(runtime)
            if "onnxruntime.training" not in sys.modules:
                package = types.ModuleType("onnxruntime.training")
                package.__path__ = [str(_training_folder(runtime))]
                sys.modules["onnxruntime.training"] = package
                setattr(runtime, "training", package)  # noqa: B010 - what the import system would do
            found = importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(_missing(error)) from error
    runtime.set_default_logger_severity(3)
    return found


def _check(runtime: Any) -> None:
    """Raises: BackendUnavailable for an `onnxruntime` that is not the training package's; ImportError for an empty one."""
    if (
        getattr(runtime, "__file__", None) is None
    ):  # a folder that pip left behind: Python takes it for a package without code
        raise ImportError(f"{', '.join(runtime.__path__)} is there, without the package's code")
    version = str(getattr(runtime, "__version__", "of an unknown version"))
    if not version.startswith("1.19."):
        raise BackendUnavailable(
            f"ONNX Runtime {version} is installed; artifacts are for {VERSION}, the last with a training API. Plain "
            f"`onnxruntime` may lie in the place of `{DISTRIBUTION}`. {_reinstall()}"
        )
    # Plain onnxruntime of the same version leaves the folder as it was, and puts a library without training into its place.
    library = importlib.import_module("onnxruntime.capi._pybind_state")
    if not _training_folder(runtime).is_dir() or not hasattr(library, "CheckpointState"):
        raise BackendUnavailable(
            f"the onnxruntime that is installed ({version}) can't train: plain `onnxruntime` lies in the place of "
            f"`{DISTRIBUTION}`. {_reinstall()}"
        )


def _training_folder(runtime: Any) -> Path:
    return Path(runtime.__file__).parent / "training"


@contextmanager
def _without_torch() -> Iterator[None]:
    """Until this ends, `import torch` fails as if it were not installed."""
    hidden = sys.modules.get("torch")
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden is None:
            del sys.modules["torch"]
        else:
            sys.modules["torch"] = hidden


def _reinstall() -> str:
    """For where pip believes that all is there, and would do nothing."""
    return f"Try: pip uninstall onnxruntime {DISTRIBUTION}; pip install --force-reinstall {DISTRIBUTION}=={VERSION}"


def _missing(error: ImportError) -> str:
    here = f"{platform.system()} on {platform.machine()} with Python {platform.python_version()}"
    if not has_wheel(platform.system(), platform.machine(), sys.version_info[:2]):
        return (
            f"training from artifacts needs {DISTRIBUTION} {VERSION}, which has no wheel for {here}; there are wheels for "
            f"{_WHEELS}. Use one of these, or train with torch: --backend torch."
        )
    try:
        metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"training from artifacts needs {DISTRIBUTION} ({error}). Install it with: pip install 'edgetune[ort]'"
    return f"{DISTRIBUTION} is installed and can't be imported ({error}): it is damaged. {_reinstall()}"


def has_wheel(system: str, machine: str, python: tuple[int, ...]) -> bool:
    """Whether upstream published a wheel of this version for a platform."""
    if not (3, 8) <= tuple(python[:2]) <= (3, 12):
        return False
    return system in ("Darwin", "Windows") or (system == "Linux" and machine.lower() in ("x86_64", "amd64"))


def session_options(threads: int) -> Any:
    """Options under which memory goes back to the allocator after each step, whatever its shapes were."""
    options = inference().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.enable_mem_reuse = True
    # Threads that spin while they wait starve whatever else runs on a small machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
