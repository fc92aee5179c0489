"""The public names: what `__all__` promises is there, and importing edgetune costs nothing."""

from __future__ import annotations

import subprocess
import sys

import edgetune


def test_all_public_names_are_there_and_no_others_are_promised() -> None:
    assert set(edgetune.__all__) == {*edgetune._HOMES, "__version__"}
    for name in edgetune.__all__:
        if name != "__version__":
            assert getattr(edgetune, name).__name__ == name


def test_importing_edgetune_imports_nothing_else() -> None:
    code = "import sys, edgetune; print([name for name in sys.modules if name.startswith(('edgetune.', 'numpy', 'torch'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(edgetune, "nothing")
