"""Models by name: built, given their weights, described; and the config that plain timm loads them back with.

A model that gets weights is built without memory first, so that loading never holds two copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer

from edgetune.cost import ViTShape
from edgetune.data import Preprocess
from edgetune.errors import EdgetuneError, UnknownModel, UnsupportedModel, WeightsError
from edgetune.shapes import check_image_size
from edgetune.vit.hub import hub_errors_at_once, pretrained_file
from edgetune.vit.loop import check_supported
from edgetune.vit.names import (
    MICRO_FOLDER,
    MICRO_MODEL,
    ModelSource,
    is_hub_name,
    known_names,
    local_folder,
    read_config,
    timm_name,
    weights_file,
)
from edgetune.vit.shape import shape_of
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
        from timm.models import load_model_config_from_hf

        # What the hub's config built it with, from the cache by now: the run folder's config has to build it too.
        with hub_errors_at_once():
            model_args.update(load_model_config_from_hf(source.name.split(":", 1)[1])[2] or {})
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


def _hub_weights(name: str, model: VisionTransformer) -> Path:
    """The file of a model's pretrained weights on this disk. Raises: WeightsError if it can't be had."""
    try:
        with hub_errors_at_once():
            return pretrained_file(model.pretrained_cfg)
    except Exception as error:
        raise WeightsError(
            f"the pretrained weights of {name} can't be had from timm's hub ({_reason(error)}). "
            "Give --weights FILE.safetensors, or --no-pretrained to start from random weights "
            "(which needs far more data), or connect to the network."
        ) from error


def describe(source: ModelSource, classes: int) -> tuple[ViTShape, Preprocess]:
    """What a model will cost and want to see, from an instance without memory (torch's meta device).

    Raises: as `load_model`, but for what concerns weights.
    """
    model, shape = build_meta(source, classes)
    return shape, preprocess_of(model)


def build_meta(source: ModelSource, classes: int) -> tuple[VisionTransformer, ViTShape]:
    """The model on torch's meta device, where it takes no memory, and its shape. Raises: as `describe`."""
    with torch.device("meta"):
        model = _built(source, classes, empty=False)
    return model, shape_of(model, source.name)


def _built(source: ModelSource, classes: int, *, empty: bool) -> VisionTransformer:
    """The model with random weights, or `empty` for weights to come; its classifier is for `classes`."""

    def build() -> VisionTransformer:
        return check_supported(_create(source, classes), source.name)

    model = built_empty(build) if empty else build()
    check_image_size(source.name, source.image_px, model.patch_embed.patch_size)
    return model


def _create(source: ModelSource, classes: int) -> torch.nn.Module:
    name = timm_name(source.name)
    size = {} if source.image_px is None else {"img_size": source.image_px}
    try:
        with hub_errors_at_once() if is_hub_name(name) else nullcontext():
            model: torch.nn.Module = timm.create_model(name, num_classes=classes, **size)
            return model
    except EdgetuneError:
        raise
    except Exception as error:
        if "Invalid pretrained tag" in str(error):
            architecture = source.name.split(".", maxsplit=1)[0]
            tags = timm.list_pretrained(f"{architecture}.*")
            raise UnknownModel(
                f"timm {timm.__version__} knows {architecture}, but not as {source.name}. "
                f"Try {' or '.join([architecture, *tags[:6]])}."
            ) from error
        if is_hub_name(name):
            raise UnknownModel(
                f"the config of {source.name} can't be had from the hub ({_reason(error)}). Connect to the network, or "
                "give a timm name or local-dir:FOLDER."
            ) from error
        raise UnsupportedModel(
            f"timm can't build {source.name} as a classifier"
            + (f" at {source.image_px} px" if source.image_px else "")
            + f" ({_reason(error)}). Vision Transformers (vit_*, deit_*) can be trained."
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def preprocess_of(model: VisionTransformer) -> Preprocess:
    """The evaluation preprocessing that the model's config asks for, at the size it was built for.

    Raises: WeightsError or DataError if the config's numbers can't be used.
    """
    config = resolve_model_data_config(model)
    height, width = (int(side) for side in (model.patch_embed.img_size or config["input_size"][1:]))
    try:
        return Preprocess(
            height_px=height,
            width_px=width,
            interpolation=config["interpolation"],
            crop_pct=float(config["crop_pct"]),
            crop_mode=config["crop_mode"],
            mean=_three(config["mean"]),
            std=_three(config["std"]),
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


def load_saved(folder: Path, weights: Path, classes: int) -> VisionTransformer:
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
