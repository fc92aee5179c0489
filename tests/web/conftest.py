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
from serving import served

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


@pytest.fixture(scope="session")
def page_folder(artifacts: Path, ort_web: Path) -> Path:
    """The artifacts with a page. Its 16 patch tokens are dropped one by one, not in eights, so that something is pruned."""
    import msgspec

    from edgetune.artifacts.reading import read_manifest
    from edgetune.checkpoint import write_atomically
    from edgetune.web.folder import PageSettings, write_page

    folder = artifacts.parent / "page"
    shutil.copytree(artifacts, folder)
    manifest = read_manifest(folder)
    assert manifest.adaptive is not None
    manifest = msgspec.structs.replace(manifest, adaptive=msgspec.structs.replace(manifest.adaptive, token_multiple=1))
    write_atomically(folder / "manifest.json", msgspec.json.encode(manifest))
    write_page(folder, manifest, PageSettings(cap_bytes=64 * 2**20, device="a phone of the tests"), ort_web)
    return folder


Browser = Callable[..., Any]


@pytest.fixture(scope="session")
def browser(node: str) -> Browser:
    """Do acts of browser.mjs with a folder's page; what each found. Nothing may be asked of any other place."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip(f"no Chromium: {INSTALL}")
    if not (PACKAGES / "playwright-core").is_dir():
        pytest.skip(f"npm's playwright-core is not in {PACKAGES}: {INSTALL}")

    def run(folder: Path, *acts: dict[str, Any], scheme: str = "light") -> list[Any]:
        with served(folder) as url:
            request = {"url": url, "packages": PACKAGES, "chromium": chromium, "scheme": scheme, "acts": acts}
            done = subprocess.run(
                [node, "--no-warnings", str(HERE / "browser.mjs")],
                input=json.dumps(request, default=str),
                capture_output=True,
                text=True,
                timeout=120,
            )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["strangers"] == []
        assert answer["complaints"] == []
        found: list[Any] = answer["found"]
        return found

    return run
