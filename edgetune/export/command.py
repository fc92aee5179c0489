"""`edgetune export`: the folder is made aside, by processes of its own, and appears under its name when all of it is right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgetune import errors
from edgetune.artifacts.manifest import MANIFEST_FILE, Manifest, Measured
from edgetune.artifacts.plan import variants_that_fit
from edgetune.artifacts.reading import read_manifest
from edgetune.checkpoint.files import TEMP_PREFIX, disk_errors
from edgetune.errors import EdgetuneError, RunFolderError
from edgetune.export.build import ERROR_FILE, PARITY_FILE, REQUEST_FILE, ExportRequest, write_manifest
from edgetune.store import read_stored
from edgetune.units import format_bytes

Note = Callable[[str], object]
_SECONDS = 3600


def export(
    request: ExportRequest, output: Path, *, room_bytes: int | None, measured: bool = True, note: Note = print
) -> Manifest:
    """Make the artifacts of a model in `output`, which must be new or empty.

    `room_bytes`: what a device has for training beside the runtime; variants that need more are left out. None: all stay.

    Raises: DoesNotFit if not even the smallest variant has room; UnsupportedModel, ArtifactsError and what loading a
    model raises. Nothing but the wanted folder is ever there afterwards.
    """
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RunFolderError(f"{output} is not empty, and artifacts are never overwritten. Name another folder.")
        work = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}export-", dir=output.parent))
    try:
        note("making the graphs" + (", and five steps of each beside torch's" if request.verify else ""))
        _build(work, request)
        manifest = read_manifest(work)
        parity = work / PARITY_FILE
        if parity.exists():
            note("as torch: " + ", ".join(f"{name} within {value:.0e}" for name, value in _parity(parity).items()))
            parity.unlink()
        if measured:
            note("measuring each variant in a process of its own")
            manifest = _measured(work, manifest)
        if room_bytes is not None and measured:
            kept = variants_that_fit(manifest, room_bytes)
            for variant in manifest.variants:
                if variant not in kept:
                    note(
                        f"variant {variant.name} is left out: it needs more than the {format_bytes(room_bytes)} there are"
                    )
                    _remove(work, variant.name)
            manifest = msgspec.structs.replace(manifest, variants=kept)
        manifest = write_manifest(work, manifest)
        with disk_errors(output):
            if output.exists():
                output.rmdir()
            work.chmod(0o755)
            work.rename(output)
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)


def model_of_run(run: Path) -> tuple[str, int, tuple[str, ...]]:
    """A run's best model as `--model` names it, how many classes it has, and which. Raises: RunFolderError."""
    stored = read_stored(run)
    return f"local-dir:{run.absolute()}", len(stored.classes), stored.classes


def _remove(folder: Path, variant: str) -> None:
    shutil.rmtree(folder / variant, ignore_errors=True)
    (folder / f"prefix-{variant}.onnx").unlink(missing_ok=True)


def _parity(path: Path) -> dict[str, float]:
    found: dict[str, float] = msgspec.json.decode(path.read_bytes())
    return {name.replace("_", " "): value for name, value in found.items()}


def _build(folder: Path, request: ExportRequest) -> None:
    """In a child: what crashes there, or takes all memory, ends this export and nothing else."""
    (folder / REQUEST_FILE).write_bytes(msgspec.json.encode(request))
    done = _child("edgetune.export.build", str(folder))
    error = folder / ERROR_FILE
    if error.exists():
        kind, _, message = error.read_text(encoding="utf-8").partition("\n")
        found = getattr(errors, kind, EdgetuneError)
        raise found(message) if found not in (errors.DoesNotFit, errors.Interrupted) else EdgetuneError(message)
    if done.returncode or not (folder / MANIFEST_FILE).exists():
        raise EdgetuneError(
            f"the export process ended with code {done.returncode}: {_last_line(done.stderr)}. Nothing was written."
        )


def _measured(folder: Path, manifest: Manifest) -> Manifest:
    variants = []
    for variant in manifest.variants:
        done = _child("edgetune.export.measure", str(folder), variant.name)
        if done.returncode:
            raise EdgetuneError(f"measuring variant {variant.name} failed: {_last_line(done.stderr)}")
        variants.append(msgspec.structs.replace(variant, measured=msgspec.json.decode(done.stdout, type=Measured)))
    return msgspec.structs.replace(manifest, variants=tuple(variants))


def _child(module: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    environment.pop("PYTHONWARNINGS", None)  # of what others' exporters deprecate nobody here can do anything
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, check=False, env=environment, timeout=_SECONDS
    )


def _last_line(text: bytes) -> str:
    lines = [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
