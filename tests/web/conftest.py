"""Node, npm's runtime and a browser, where there are any; small artifacts of the bundled kind for the page to train from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import export_tiny, make_tiny_model

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
# Where `tools/install_web_tests.sh` puts them, or where somebody has them.
PACKAGES = Path(os.environ.get("EDGETUNE_NODE_MODULES", CHECKOUT / ".npm" / "node_modules"))
INSTALL = "tools/install_web_tests.sh installs it"

Core = Callable[..., Any]


@pytest.fixture(scope="session")
def ort_web() -> Path:
    folder = PACKAGES / "onnxruntime-web" / "dist"
    if not folder.is_dir():
        pytest.skip(f"npm's onnxruntime-web is not in {PACKAGES}: {INSTALL}")
    return folder


@pytest.fixture(scope="session")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip(f"no node: {INSTALL}")
    major = int(
        subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout[1:].split(".")[0]
    )
    if major < 18:
        pytest.skip(f"node {major} is too old, 18 is needed")
    return found


@pytest.fixture(scope="session")
def core(node: str) -> Core:
    """Run one job of core.mjs in Node."""

    def run(job: str, **request: Any) -> Any:
        done = subprocess.run(
            [node, "--no-warnings", str(HERE / "core.mjs"), job],
            input=json.dumps(request, default=str),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training artifacts of the small model."""
    for package in ("torch", "timm", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason="the export extra makes artifacts")
    folder = tmp_path_factory.mktemp("web")
    return export_tiny(make_tiny_model(folder / "model"), folder / "artifacts", checked=False)
