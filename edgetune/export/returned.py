"""A run folder from what a phone or a page hands back: `evaluate`, `predict` and `export` take it as any other."""

from __future__ import annotations

from pathlib import Path

from edgetune.artifacts.importing import class_names, import_parameters
from edgetune.artifacts.reading import read_manifest
from edgetune.store import write_imported


def import_run(
    buffer: Path, artifacts: Path, output: Path, variant: str | None = None, labels: Path | None = None
) -> list[str]:
    """As `import_parameters`, with the run.json that makes a run folder of it. Raises: as that."""
    said = import_parameters(buffer, artifacts, output, variant, labels)
    manifest = read_manifest(artifacts)
    write_imported(
        output,
        model=manifest.model,
        artifacts=artifacts.absolute(),
        classes=class_names(manifest, labels),
        preprocess=manifest.preprocess,
        architecture=manifest.architecture,
        model_args=manifest.model_args,
    )
    return said
