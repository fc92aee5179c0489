"""The page beside the artifacts: one folder that a browser needs nothing else than."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgetune import __version__
from edgetune.artifacts.manifest import Manifest
from edgetune.artifacts.reading import file_sha256, files_in
from edgetune.checkpoint import write_atomically
from edgetune.checkpoint.files import disk_errors
from edgetune.errors import ArtifactsError, BackendUnavailable

PAGE = Path(__file__).parent / "page"
SETTINGS_FILE, RUNTIME_FOLDER = "page.json", "ort"
RUNTIME_PACKAGE = "onnxruntime-web"
# npm's onnxruntime-web 1.19.2, the last with training, by its bytes: another version loads and then fails in the middle.
RUNTIME_FILES = {
    "ort.training.wasm.min.mjs": "2fe8e5163301d533c6c1fa6034de30349d24072d3a335e0324f541a49caf4faa",
    "ort-training-wasm-simd-threaded.mjs": "c5ffc8470dcb3cf94261f8532f2e7b82f61b8245f079010373db5d55a22b3f7f",
    "ort-training-wasm-simd-threaded.wasm": "55626e6eb7747e2137ee5d3f6ba8d3ba24921900b7178d07c6ec1cc0f49a3662",
}


class PageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`page.json`: what the page is told beside the manifest. No cap: the 4 GiB that the runtime can address."""

    edgetune: str = __version__
    cap_bytes: int | None = None
    device: str | None = None  # the profile that the cap is from


def find_runtime(path: Path, version: str) -> Path:
    """The folder of the runtime's three files: `path` itself, an installed or unpacked npm package, or what holds one.

    Raises: BackendUnavailable if they are not there, or of another version; RunFolderError if the path can't be read.
    """
    places = [path, path / "dist", path / "package" / "dist"]
    places += [path / RUNTIME_PACKAGE / "dist", path / "node_modules" / RUNTIME_PACKAGE / "dist"]
    with disk_errors(path, "read"):
        place = next((place for place in places if (place / next(iter(RUNTIME_FILES))).is_file()), None)
    if place is None:
        raise BackendUnavailable(
            f"--ort-web {path}: no {next(iter(RUNTIME_FILES))} there, nor in dist/ or node_modules/{RUNTIME_PACKAGE}/dist/ "
            f"below it. Get it with: {npm_line(version)}"
        )
    for name, wanted in RUNTIME_FILES.items():
        with disk_errors(place / name, "read"):
            found = file_sha256(place / name) if (place / name).is_file() else None
        if found != wanted:
            what = "is missing" if found is None else "has other bytes"
            raise BackendUnavailable(
                f"{place / name} {what}; wanted: the file of {RUNTIME_PACKAGE} {version}, the last version with training. "
                f"Get it with: {npm_line(version)}"
            )
    return place


def npm_line(version: str) -> str:
    return f"npm install --ignore-scripts --prefix ort-web {RUNTIME_PACKAGE}@{version}"


def has_runtime(folder: Path) -> bool:
    return all((folder / RUNTIME_FOLDER / name).is_file() for name in RUNTIME_FILES)


def write_page(folder: Path, manifest: Manifest, settings: PageSettings, runtime: Path | None) -> None:
    """Put the page into a folder of artifacts, over an older one. `runtime`: of `find_runtime`; None leaves what is there.

    Raises: RunFolderError; ArtifactsError if the artifacts have a file where the page needs one.
    """
    own = sorted(files_in(PAGE))
    taken = {*own, SETTINGS_FILE} & manifest.files.keys()
    if taken:
        raise ArtifactsError(f"the artifacts in {folder} hold {', '.join(sorted(taken))}, which the page needs.")
    if runtime is not None:
        for name in RUNTIME_FILES:
            _copy(runtime / name, folder / RUNTIME_FOLDER / name)
    write_atomically(folder / SETTINGS_FILE, msgspec.json.encode(settings) + b"\n")
    # What the others are needed by comes last.
    for name in sorted(own, key=lambda name: name == "index.html"):
        _copy(PAGE / name, folder / name)


def _copy(source: Path, target: Path) -> None:
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(source, "read"):
        data = source.read_bytes()
    write_atomically(target, data)
