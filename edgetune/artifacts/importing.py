"""A model folder from the flat buffer of parameters that a phone or a page hands back."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np

from edgetune.artifacts.agreement import check_weights
from edgetune.artifacts.manifest import Manifest, Variant
from edgetune.artifacts.reading import check_files, read_manifest
from edgetune.checkpoint import load_tensors, save_tensors, write_atomically
from edgetune.checkpoint.files import disk_errors
from edgetune.cost import FLOAT_BYTES
from edgetune.errors import ArtifactsError, DataError, RunFolderError


def import_parameters(
    buffer: Path, artifacts: Path, output: Path, variant: str | None = None, labels: Path | None = None
) -> list[str]:
    """Write `output` (new or empty): model.safetensors and config.json, which timm loads, and labels.txt.

    `buffer`: every parameter of a variant (or those that train) as little-endian float32, in the manifest's order.
    `variant`: whose; by default the one whose size it has. `labels`: a file of class names, one a line, for classes that
    were named on the device; spare ones keep their numbers. Returns sentences on what was found.

    Raises: ArtifactsError for a buffer that fits no variant, or holds what is no number; DataError for labels that don't
    fit; RunFolderError.
    """
    manifest = read_manifest(artifacts)
    check_files(artifacts, manifest, (manifest.weights,))
    check_weights(artifacts, manifest)
    with disk_errors(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RunFolderError(f"{output} is not empty. Name another folder for --output.")
    classes = class_names(manifest, labels)
    with disk_errors(buffer, "read"):
        values = np.fromfile(buffer, "<f4")
        odd = buffer.stat().st_size % FLOAT_BYTES
    if odd:
        raise ArtifactsError(f"{buffer} is no buffer of float32: its size is no multiple of {FLOAT_BYTES}.")
    found, trained_only = _fitting(manifest, values.size, variant, buffer)
    if not np.isfinite(values).all():
        raise ArtifactsError(
            f"{buffer} holds values that are no finite numbers: the training diverged, or it is damaged."
        )
    tensors = load_tensors(artifacts / manifest.weights, manifest.files[manifest.weights].sha256)
    start, changed = 0, 0
    for each in found.parameters:
        if trained_only and not each.trained:
            continue
        size = math.prod(each.shape)
        new = values[start : start + size].reshape(each.shape)
        changed += not np.array_equal(new, tensors[each.name])
        tensors[each.name] = new
        start += size
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    config = {**manifest.config, "label_names": list(classes)}
    write_atomically(output / "config.json", msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    write_atomically(output / "labels.txt", "".join(f"{name}\n" for name in classes).encode("utf-8", "surrogateescape"))
    save_tensors(output / "model.safetensors", tensors, {"format": "pt"})
    return [
        f"{found.name}: {changed} of its {len(found.parameters)} parameters differ from the artifacts'",
        f"run folder: {output} (timm.create_model('local-dir:{output}', pretrained=True))",
    ]


def class_names(manifest: Manifest, labels: Path | None) -> tuple[str, ...]:
    """One name a logit. `labels`: as `import_parameters`. Raises: DataError."""
    numbered = tuple(f"class {number}" for number in range(manifest.shape.classes))
    if labels is None:
        return manifest.classes or numbered
    with disk_errors(labels, "read"):
        try:
            names = tuple(labels.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError as error:
            raise DataError(f"{labels} is not UTF-8 text (byte {error.start}). Wanted: a class name a line.") from error
    if not 1 <= len(names) <= len(numbered) or not all(names) or len(set(names)) < len(names):
        raise DataError(
            f"{labels} holds {len(names)} lines; wanted: 1 to {len(numbered)} class names, one a line, none twice or empty."
        )
    if manifest.classes and names != manifest.classes:
        raise DataError(f"{labels} names other classes than the artifacts, which have theirs. Leave --labels out.")
    return names + numbered[len(names) :]


def _fitting(manifest: Manifest, floats: int, name: str | None, buffer: Path) -> tuple[Variant, bool]:
    """(the variant that a buffer of so many floats is of, whether it holds its trained parameters alone)"""
    sizes = {}
    for variant in manifest.variants:
        for trained_only in (False, True):
            parameters = [each for each in variant.parameters if each.trained or not trained_only]
            sizes[variant.name, trained_only] = sum(math.prod(each.shape) for each in parameters)
    if name is not None and (name, False) not in sizes:
        raise ArtifactsError(f"the artifacts hold no variant {name!r}: {', '.join(v.name for v in manifest.variants)}.")
    for (found, trained_only), size in sizes.items():
        if size == floats and name in (None, found):
            return manifest.variant(found), trained_only
    wanted = ", ".join(f"{found} {size}" for (found, trained_only), size in sizes.items() if not trained_only)
    raise ArtifactsError(f"{buffer} holds {floats} values; the variants have {wanted}. Is it of these artifacts?")
