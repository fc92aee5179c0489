"""Models by name: built, given their weights, described; and the config that plain timm loads them back with.

A model that gets weights is built without memory first, so that loading never holds two copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from edgetune.cost import ViTShape
from edgetune.data import Preprocess
from edgetune.errors import WeightsError
from edgetune.shapes import check_image_size, known_shape
from edgetune.vit import stock
from edgetune.vit.hub import hub_errors_at_once, pretrained_file
from edgetune.vit.known import as_timm_has_it, described
from edgetune.vit.loop import check_supported
from edgetune.vit.names import (
    MICRO_FOLDER,
    MICRO_MODEL,
    ModelSource,
    is_hub_name,
    local_folder,
    read_config,
    weights_file,
)
from edgetune.vit.plain import AnyViT, build
from edgetune.vit.shape import shape_of
from edgetune.vit.stock import known_names
from edgetune.vit.weights import built_empty, classifier_names, load_all_weights, load_weights, reading_bytes

__all__ = [
    "MICRO_FOLDER",
    "MICRO_MODEL",
    "LoadedModel",
    "ModelSource",
    "build_meta",
    "classifier_names",
    "describe",
    "known_names",
    "load_copies",
    "load_model",
    "load_saved",
    "needs_timm",
    "preprocess_of",
    "timm_config",
]


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    model: Any  # VisionTransformer; Any because msgspec would ask for its schema
    name: str
    architecture: str
    model_args: dict[str, Any]
    pretrained: bool
    preprocess: Preprocess


def load_model(source: ModelSource, classes: int) -> LoadedModel:
    """The model with a fresh head for `classes` classes, on the CPU, in float32.

    Raises: UnknownModel, UnsupportedModel, UsageError (image size), WeightsError.
    """
    folder = local_folder(source.name)
    gets_weights = source.pretrained or source.weights is not None
    model = _built(source, classes, empty=gets_weights)
    model_args: dict[str, Any] = {}
    if folder is not None:
        model_args.update(read_config(folder).get("model_args", {}))
    elif is_hub_name(source.name):
        model_args.update(stock.hub_model_args(source.name))
    if source.weights is not None:
        load_weights(model, Path(source.weights))
    elif source.pretrained and folder is not None:
        load_weights(model, weights_file(folder))
    elif source.pretrained:
        # Some files hold more than the model that names them: towers for text, other poolings.
        load_weights(model, _hub_weights(source.name, model), strangers=True)
    model.float()
    model.requires_grad_(False)
    return LoadedModel(
        model=model,
        name=source.name,
        architecture=str(model.pretrained_cfg["architecture"]),
        model_args=model_args,
        pretrained=source.pretrained,
        preprocess=preprocess_of(model),
    )


def load_copies(source: ModelSource, weights_bytes: int) -> float:
    """How often a model of `weights_bytes` exists at the most while it is loaded, its largest tensor apart: 1.0.

    More only for a file that holds more than the model, as a training checkpoint with its optimizer's state does. What
    the hub has is taken to hold the model alone.

    Raises: UnknownModel, WeightsError if the file is missing or damaged.
    """
    folder = local_folder(source.name)
    if source.weights is not None:
        path = Path(source.weights)
    elif source.pretrained and folder is not None:
        path = weights_file(folder)
    else:
        return 1.0
    return max(1.0, reading_bytes(path) / weights_bytes)


def _hub_weights(name: str, model: AnyViT) -> Path:
    """The file of a model's pretrained weights on this disk. Raises: WeightsError if it can't be had."""
    try:
        with hub_errors_at_once():
            return pretrained_file(model.pretrained_cfg)
    except Exception as error:
        raise WeightsError(
            f"the pretrained weights of {name} can't be had from timm's hub ({stock.reason(error)}). "
            "Give --weights FILE.safetensors, or --no-pretrained to start from random weights "
            "(which needs far more data), or connect to the network."
        ) from error


def describe(source: ModelSource, classes: int) -> tuple[ViTShape, Preprocess]:
    """What a model will cost and want to see, from an instance without memory (torch's meta device).

    Raises: as `load_model`, but for what concerns weights.
    """
    description = described(source)
    if description is not None:
        image_px = description.architecture.image_px
        check_image_size(source.name, source.image_px, (description.architecture.patch_size,) * 2)
        # A folder's config may change an architecture; the bundled one's is known.
        named = source.name == MICRO_MODEL or local_folder(source.name) is None
        shape = known_shape(source.name.split(".", maxsplit=1)[0], classes, image_px[0]) if named else None
        if shape is not None and shape.image_px == image_px:
            config = as_timm_has_it(description.config, description.name)
            return msgspec.structs.replace(shape, name=source.name), _preprocess(config, image_px)
    model, shape = build_meta(source, classes)
    return shape, preprocess_of(model)


def needs_timm(source: ModelSource) -> bool:
    """Whether timm has to build the model. Raises: UnknownModel; WeightsError for a folder's damaged config."""
    return described(source) is None


def build_meta(source: ModelSource, classes: int) -> tuple[AnyViT, ViTShape]:
    """The model on torch's meta device, where it takes no memory, and its shape. Raises: as `describe`."""
    with torch.device("meta"):
        model = _built(source, classes, empty=False)
    return model, shape_of(model, source.name)


def _built(source: ModelSource, classes: int, *, empty: bool) -> AnyViT:
    """The model with random weights, or `empty` for weights to come; its classifier is for `classes`."""

    def create() -> AnyViT:
        description = described(source)
        if description is None:
            return check_supported(stock.create(source, classes), source.name)
        model = build(description.architecture, classes)
        model.pretrained_cfg = as_timm_has_it(description.config, description.name)
        model.pretrained_model_args = description.saved_args
        return model

    model = built_empty(create) if empty else create()
    check_image_size(source.name, source.image_px, model.patch_embed.patch_size)
    return model


def preprocess_of(model: AnyViT) -> Preprocess:
    """The evaluation preprocessing that the model's config asks for, at the size it was built for.

    Raises: WeightsError or DataError if the config's numbers can't be used.
    """
    config = model.pretrained_cfg
    height, width = model.patch_embed.img_size or config.get("input_size", (3, 224, 224))[1:]
    return _preprocess(config, (int(height), int(width)))


def _preprocess(config: Mapping[str, Any], image_px: tuple[int, int]) -> Preprocess:
    """What timm's `resolve_data_config` makes of a `pretrained_cfg` (tests hold the two equal)."""
    try:
        return Preprocess(
            height_px=image_px[0],
            width_px=image_px[1],
            interpolation=config.get("interpolation") or "bicubic",
            crop_pct=float(config.get("crop_pct") or 0.875),
            crop_mode=config.get("crop_mode") or "center",
            mean=_three(config.get("mean") or (0.485, 0.456, 0.406)),
            std=_three(config.get("std") or (0.229, 0.224, 0.225)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the model's config holds a preprocessing that can't be used: {error}.") from error


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def timm_config(loaded: LoadedModel, labels: tuple[str, ...]) -> dict[str, Any]:
    """The `config.json` with which `timm.create_model('local-dir:FOLDER', pretrained=True)` builds this model."""
    model, preprocess = loaded.model, loaded.preprocess
    source = model.pretrained_cfg
    size = [3, preprocess.height_px, preprocess.width_px]
    return {
        "architecture": loaded.architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "label_names": list(labels),
        "model_args": {**loaded.model_args, "img_size": [preprocess.height_px, preprocess.width_px]},
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": preprocess.crop_mode,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": source.get("first_conv", "patch_embed.proj"),
            "classifier": source.get("classifier", "head"),
            "license": source.get("license"),
        },
    }


def load_saved(folder: Path, weights: Path, classes: int) -> AnyViT:
    """A run folder's model with its head, in eval mode.

    Raises: WeightsError if its weights are missing, damaged, or not those of its config.
    """
    config = read_config(folder)
    model = _built(ModelSource(name=f"local-dir:{folder}"), classes, empty=True)
    try:
        load_all_weights(model, weights)
    except RuntimeError as error:
        raise WeightsError(f"{weights} does not fit {config['architecture']}: {str(error)[:300]}") from error
    return model.eval()
