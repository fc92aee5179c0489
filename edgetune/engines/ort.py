"""A run from artifacts: the model, its shape and its memory are what the manifest says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from edgetune import runtimes
from edgetune.artifacts import plan as planning
from edgetune.artifacts.agreement import check_variant, check_weights
from edgetune.artifacts.manifest import Manifest, variant_at
from edgetune.artifacts.reading import read_manifest
from edgetune.cost import ViTShape
from edgetune.data import DataFolder, Preprocess, some
from edgetune.engines.base import Built, ClassWeights
from edgetune.errors import DataError
from edgetune.optim import OptimizerSettings
from edgetune.planner import Plan, PlanRequest
from edgetune.settings import RunSettings


def manifest_of(settings: RunSettings) -> tuple[Path, Manifest]:
    assert settings.artifacts is not None
    folder = Path(settings.artifacts)
    return folder, read_manifest(folder)


def warm_up(settings: RunSettings, threads: int) -> tuple[str, ...]:
    """Import ONNX Runtime's training API."""
    from edgetune.backends.ort_runtime import training_api

    training_api()
    return runtimes.ORT


def describe(settings: RunSettings, classes: int) -> tuple[ViTShape, Preprocess]:
    """The artifacts' own shape, whose number of classes is fixed, once it is known to be that of their weights.

    Raises: ArtifactsError.
    """
    folder, manifest = manifest_of(settings)
    check_weights(folder, manifest)
    return manifest.shape, manifest.preprocess


def fitted(settings: RunSettings, data: DataFolder) -> DataFolder:
    manifest = manifest_of(settings)[1]
    count = manifest.shape.classes
    if manifest.classes:
        if data.classes != manifest.classes:
            raise DataError(
                f"the images have other classes than the artifacts: {some(data.classes)} instead of "
                f"{some(manifest.classes)}. Export with --data, or with --classes {len(data.classes)} to name them here."
            )
        return data
    if len(data.classes) > count:
        raise DataError(
            f"the images have {len(data.classes)} classes, the artifacts room for {count}. Export with --classes "
            f"{len(data.classes)}."
        )
    spare = tuple(f"unused {number}" for number in range(len(data.classes) + 1, count + 1))
    notes = (*data.notes, f"{len(spare)} of the artifacts' {count} classes stay unused") if spare else data.notes
    return msgspec.structs.replace(data, classes=data.classes + spare, notes=notes)


def load_copies(settings: RunSettings, shape: ViTShape) -> float:
    return 0.0  # part of what was measured


def plan(settings: RunSettings, request: PlanRequest, smaller: Iterable[ViTShape] = ()) -> Plan:
    return planning.plan(manifest_of(settings)[1], request)


def reserved_bytes(settings: RunSettings, plan: Plan) -> int:
    manifest = manifest_of(settings)[1]
    measured = variant_at(manifest, plan.split_block, embeddings_train=plan.embeddings_train).measured
    return 0 if measured is None else measured.reserved_bytes


def build(
    settings: RunSettings,
    plan: Plan,
    classes: tuple[str, ...],
    *,
    pretrained: bool,
    class_weights: ClassWeights | None,
    at_peak: Callable[[], object],
) -> Built:
    """Raises: ArtifactsError for files that are damaged, and a plan for blocks that they are not cut at."""
    from edgetune.backends.ort import OrtBackend

    folder, manifest = manifest_of(settings)
    variant = variant_at(manifest, plan.split_block, embeddings_train=plan.embeddings_train)
    check_variant(folder, manifest, variant)
    backend = OrtBackend(
        folder,
        manifest,
        variant,
        OptimizerSettings(name=plan.optimizer, weight_decay=settings.weight_decay),
        threads=plan.threads,
        class_weights=class_weights,
        label_smoothing=settings.label_smoothing,
        at_peak=at_peak,
    )
    config = manifest.config | {"num_classes": len(classes), "label_names": list(classes)}
    return Built(backend, manifest.architecture, manifest.model_args, config)
