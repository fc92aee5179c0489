"""timm, for the models that `vit.plain` can't build and for weights in foreign layouts: imported when one is asked for.

On a small board that import is what does not fit (docs/decisions/0012-own-vit.md), and timm need not be installed at all.
"""

from __future__ import annotations

import difflib
import importlib
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from edgetune.errors import BackendUnavailable, EdgetuneError, UnknownModel, UnsupportedModel
from edgetune.vit import layers, plain
from edgetune.vit.hub import hub_errors_at_once
from edgetune.vit.known import known_models, known_tags
from edgetune.vit.names import MICRO_MODEL, ModelSource, is_hub_name, local_folder, read_config

_VIT = "timm.models.vision_transformer"


def stock(module: str = "timm", *, wanted: str) -> Any:
    """One of timm's modules. Raises: BackendUnavailable saying what is `wanted` of it where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"{wanted} needs timm, which is not here ({error}). Install it with: pip install 'edgetune[torch]'. Without it "
            f"{len(known_models())} of its Vision Transformers are known: deit_tiny_patch16_224, vit_base_patch16_224 ..."
        ) from error


def kinds(name: str) -> tuple[Any, ...]:
    """Our class of a name (`Block`, `Attention`, ...) and timm's, where timm has been imported: else nothing is of it."""
    own = getattr(plain, name, None) or getattr(layers, name, None)
    found = [own] if own is not None else []
    for module in (_VIT, "timm.layers"):
        theirs = getattr(sys.modules.get(module), name, None)
        if theirs is not None and theirs not in found:
            found.append(theirs)
    return tuple(found)


def known_names() -> list[str]:
    """Names that `--model` takes: the bundled model, timm's Vision Transformers, or without timm those that are known."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        return [MICRO_MODEL, *known_models()]
    return [MICRO_MODEL, *timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]


def create(source: ModelSource, classes: int) -> nn.Module:
    """The model as timm builds it.

    Raises: UnknownModel, UnsupportedModel, BackendUnavailable; WeightsError for a folder's damaged config.
    """
    folder = local_folder(source.name)
    if folder is not None:
        read_config(folder)
    else:
        _check_name(source.name)
    timm = stock(wanted=source.name)
    name = source.name if folder is None else f"local-dir:{folder}"
    size = {} if source.image_px is None else {"img_size": source.image_px}
    try:
        with hub_errors_at_once() if is_hub_name(name) else nullcontext():
            model: nn.Module = timm.create_model(name, num_classes=classes, **size)
            return model
    except EdgetuneError:
        raise
    except Exception as error:
        if "Invalid pretrained tag" in str(error):
            architecture = source.name.split(".", maxsplit=1)[0]
            raise _no_such_tag(source.name, timm.list_pretrained(f"{architecture}.*")) from error
        if is_hub_name(name):
            raise UnknownModel(
                f"the config of {source.name} can't be had from the hub ({reason(error)}). Connect to the network, or "
                "give a timm name or local-dir:FOLDER."
            ) from error
        raise UnsupportedModel(
            f"timm can't build {source.name} as a classifier"
            + (f" at {source.image_px} px" if source.image_px else "")
            + f" ({reason(error)}). Vision Transformers (vit_*, deit_*) can be trained."
        ) from error


def hub_model_args(name: str) -> dict[str, Any]:
    """What a hub model's config built it with, from the cache by now: the run folder's config has to build it too."""
    models = stock("timm.models", wanted=name)
    with hub_errors_at_once():
        return dict(models.load_model_config_from_hf(name.split(":", 1)[1])[2] or {})


def converted(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """A weights file's tensors as timm's own filter turns them into a model's. Raises: BackendUnavailable; what timm does."""
    vit = stock(_VIT, wanted="a weights file in a foreign layout")
    result: dict[str, Any] = vit.checkpoint_filter_fn(
        state, model, adapt_layer_scale=True, **_filter_options(model, vit)
    )
    return result


def fresh_layer(model: Any) -> Callable[[nn.Module, str], None]:
    """What gives a classifier of one of timm's models its fresh values."""
    mode = getattr(model, "weight_init_mode", "")  # older ones don't keep it, and no model of theirs sets one
    vit = stock(_VIT, wanted="a fresh classifier")
    result: Callable[[nn.Module, str], None] = vit.get_init_weights_vit(
        mode, -math.log(model.num_classes) if "nlhb" in mode else 0.0
    )
    return result


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _filter_options(model: Any, vit: Any) -> dict[str, Any]:
    """How timm resizes the few models that it treats apart (vision_transformer.py, `_create_vision_transformer`)."""
    architecture = str(model.pretrained_cfg.get("architecture"))
    options: dict[str, Any] = {"interpolation": "bilinear", "antialias": False}
    if "flexi" in architecture:
        return options
    if "radio" in architecture:
        corners = getattr(vit, "_RADIO_ALIGN_CORNERS", ())
        return {**options, "align_corners": any(name in architecture for name in corners)}
    return {}


def _check_name(name: str) -> None:
    """Raises: UnknownModel naming the nearest."""
    if is_hub_name(name):
        return
    architecture = name.split(".", maxsplit=1)[0]
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        if architecture in known_models():  # else `vit.plain` would have built it
            raise _no_such_tag(name, known_tags(architecture)) from None
        timm = None
    if timm is not None and timm.is_model(architecture):
        return
    known = known_names()
    nearest = difflib.get_close_matches(name, known, n=3)
    # `deit_tinny` is nearer to the start of deit_tiny_patch16_224 than to the whole of it.
    starts = {other[: len(name)]: other for other in reversed(known)}
    nearest += [starts[start] for start in difflib.get_close_matches(name, starts, n=3) if starts[start] not in nearest]
    hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"Try {MICRO_MODEL} or deit_tiny_patch16_224."
    if timm is None:
        raise UnknownModel(
            f"{name!r} is none of the {len(known)} models that are known without timm. {hint} timm knows more: "
            "pip install 'edgetune[torch]'."
        )
    raise UnknownModel(f"timm {timm.__version__} knows no model {name!r}. {hint}")


def _no_such_tag(name: str, tags: list[str]) -> UnknownModel:
    architecture = name.split(".", maxsplit=1)[0]
    return UnknownModel(f"{architecture} is known, but not as {name}. Try {' or '.join([architecture, *tags[:6]])}.")


def is_vision_transformer(model: Any) -> bool:
    return isinstance(model, kinds("VisionTransformer"))


def plain_forward(model: Any) -> bool:
    """Whether a model runs its parts as the Vision Transformer does that its class is made from."""
    return any(type(model).forward_features is kind.forward_features for kind in kinds("VisionTransformer"))
