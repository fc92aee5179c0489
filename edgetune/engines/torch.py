"""A run on torch: models of timm, planned by the memory model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from edgetune import runtimes
from edgetune.cost import FLOAT_BYTES, ViTShape
from edgetune.data import DataFolder, Preprocess
from edgetune.engines.base import Built, ClassWeights
from edgetune.errors import BackendUnavailable
from edgetune.optim import OptimizerSettings
from edgetune.planner import Plan, PlanRequest
from edgetune.planner import plan as make_plan
from edgetune.settings import RunSettings

if TYPE_CHECKING:
    from edgetune.vit.models import ModelSource


def warm_up(settings: RunSettings, threads: int) -> tuple[str, ...]:
    """Import torch, timm where it has to build the model, and take a step on nothing.

    Raises: BackendUnavailable; UnknownModel, WeightsError for a model that can't be.
    """
    try:
        import torch

        from edgetune.backends import pytorch
        from edgetune.vit import stock
        from edgetune.vit.models import needs_timm
    except ImportError as error:
        raise BackendUnavailable(
            f"fine-tuning needs torch ({error}). Install it with: pip install 'edgetune[torch]'. "
            "From artifacts (edgetune export) a run needs none: --backend ort --artifacts FOLDER."
        ) from error
    torch.set_num_threads(threads)
    pytorch.own_kernels()
    timm = settings.augment or needs_timm(model_source(settings, pretrained=False))
    if timm:
        stock.stock(wanted="--augment" if settings.augment else settings.model)
    pytorch.warm_up(OptimizerSettings(name=settings.optimizer))
    return runtimes.TORCH_AND_TIMM if timm else runtimes.TORCH


def describe(settings: RunSettings, classes: int) -> tuple[ViTShape, Preprocess]:
    from edgetune.vit.models import describe as describe_model

    return describe_model(model_source(settings, pretrained=False), classes)


def fitted(settings: RunSettings, data: DataFolder) -> DataFolder:
    return data


def load_copies(settings: RunSettings, shape: ViTShape) -> float:
    from edgetune.vit.models import load_copies as copies

    return copies(model_source(settings, pretrained=settings.pretrained), shape.parameters * FLOAT_BYTES)


def plan(settings: RunSettings, request: PlanRequest, smaller: Iterable[ViTShape] = ()) -> Plan:
    return make_plan(request, smaller_models=smaller)


def reserved_bytes(settings: RunSettings, plan: Plan) -> int:
    return 0


def build(
    settings: RunSettings,
    plan: Plan,
    classes: tuple[str, ...],
    *,
    pretrained: bool,
    class_weights: ClassWeights | None,
    at_peak: Callable[[], object],
) -> Built:
    import torch

    from edgetune.backends.pytorch import TorchBackend
    from edgetune.vit.models import load_model, timm_config

    torch.set_num_threads(plan.threads)
    torch.manual_seed(settings.seed)  # the new head's weights
    loaded = load_model(model_source(settings, pretrained=pretrained), len(classes))
    backend = TorchBackend(
        loaded.model,
        OptimizerSettings(name=plan.optimizer, weight_decay=settings.weight_decay),
        class_weights=class_weights,
        label_smoothing=settings.label_smoothing,
        at_peak=at_peak,
    )
    if plan.half_frozen:
        backend.store_half(plan.split_block)
    return Built(backend, loaded.architecture, loaded.model_args, timm_config(loaded, classes))


def model_source(settings: RunSettings, *, pretrained: bool) -> ModelSource:
    from edgetune.vit.models import ModelSource

    return ModelSource(
        name=settings.model,
        weights=settings.weights if pretrained else None,
        pretrained=pretrained,
        image_px=settings.image_px,
    )
