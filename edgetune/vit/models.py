"""Models by name, their weights from a file or timm's hub, and the config that plain timm loads them back with.

One load path: every local file goes through timm's own checkpoint filter (which resizes position embeddings and knows
foreign layouts), then must match the model in all but the classifier.
"""

from __future__ import annotations

import difflib
import json
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from edgetune.cost import ViTShape
from edgetune.data import Preprocess, shown
from edgetune.errors import EdgetuneError, UnknownModel, UnsupportedModel, WeightsError
from edgetune.shapes import check_image_size
from edgetune.vit.loop import check_supported, shape_of

MICRO_MODEL = "edgetune_micro"
MICRO_FOLDER = Path(__file__).parent.parent / "assets" / MICRO_MODEL
HUB_TIMEOUT_SECONDS = 5.0


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model comes from, as the command line names it."""

    name: str
    weights: str | None = None
    pretrained: bool = True
    image_px: int | None = None


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
    folder = _local_folder(source.name)
    model_args: dict[str, Any] = {}
    if folder is not None:
        model_args.update(_read_config(folder).get("model_args", {}))
    from_hub = source.pretrained and source.weights is None and folder is None
    kwargs = {"num_classes": classes}
    model = check_supported(_build(_timm_name(source.name), kwargs, source, from_hub), source.name)
    check_image_size(source.name, source.image_px, model.patch_embed.patch_size)
    if _is_hub_name(source.name):
        from timm.models import load_model_config_from_hf

        # What the hub's config built it with, from the cache by now: the run folder's config has to build it too.
        model_args.update(load_model_config_from_hf(source.name.split(":", 1)[1])[2] or {})
    if source.weights is not None:
        load_weights(model, Path(source.weights))
    elif source.pretrained and folder is not None:
        load_weights(model, weights_file(folder))
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


def describe(source: ModelSource, classes: int) -> tuple[ViTShape, Preprocess]:
    """What a model will cost and want to see, from an instance without memory (torch's meta device).

    Raises: as `load_model`, but for what concerns weights.
    """
    model, shape = build_meta(source, classes)
    return shape, preprocess_of(model)


def build_meta(source: ModelSource, classes: int) -> tuple[VisionTransformer, ViTShape]:
    """The model on torch's meta device, where it takes no memory, and its shape. Raises: as `describe`."""
    name, kwargs = _timm_name(source.name), {"num_classes": classes}
    with torch.device("meta"):
        model = check_supported(_build(name, kwargs, source, from_hub=False), source.name)
    check_image_size(source.name, source.image_px, model.patch_embed.patch_size)
    return model, shape_of(model, source.name)


def known_names() -> list[str]:
    """Names that `--model` takes: timm's Vision Transformers and the bundled model."""
    return [MICRO_MODEL, *timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]


def _timm_name(name: str) -> str:
    """What `timm.create_model` takes for a name. Raises: UnknownModel."""
    folder = _local_folder(name)
    if folder is not None:
        _read_config(folder)
        return f"local-dir:{folder}"
    _check_name(name)
    return name


def _check_name(name: str) -> None:
    if _is_hub_name(name):
        return
    if timm.is_model(name.split(".", maxsplit=1)[0]):
        return
    known = known_names()
    nearest = difflib.get_close_matches(name, known, n=3)
    # `deit_tinny` is nearer to the start of deit_tiny_patch16_224 than to the whole of it.
    starts = {other[: len(name)]: other for other in reversed(known)}
    nearest += [starts[start] for start in difflib.get_close_matches(name, starts, n=3) if starts[start] not in nearest]
    hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"Try {MICRO_MODEL} or deit_tiny_patch16_224."
    raise UnknownModel(f"timm {timm.__version__} knows no model {name!r}. {hint}")


def _is_hub_name(name: str) -> bool:
    return name.startswith(("hf-hub:", "hf_hub:"))


def _local_folder(name: str) -> Path | None:
    """The folder a name stands for: the bundled model's, or what follows `local-dir:`."""
    if name == MICRO_MODEL:
        return MICRO_FOLDER
    if not name.startswith("local-dir:"):
        return None
    folder = Path(name.removeprefix("local-dir:"))
    if not (folder / "config.json").is_file():
        raise UnknownModel(f"{folder} is no model folder: it has no config.json. A run folder of edgetune is one.")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder / 'config.json'} can't be read as JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise WeightsError(f"{folder / 'config.json'} names no `architecture`, so timm can't build the model.")
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(config.get(key, {}), dict):
            raise WeightsError(f"{folder / 'config.json'}: `{key}` is {config[key]!r:.60}, not an object.")
    return config


def weights_file(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin", "model.pth"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder} holds no model.safetensors. Give --weights FILE.")


def _build(name: str, kwargs: dict[str, Any], source: ModelSource, from_hub: bool) -> torch.nn.Module:
    if source.image_px is not None:
        kwargs["img_size"] = source.image_px
    try:
        with _hub_errors_at_once(from_hub or _is_hub_name(name)):
            model: torch.nn.Module = timm.create_model(name, pretrained=from_hub, **kwargs)
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
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if _is_hub_name(name) and not from_hub:
            raise UnknownModel(
                f"the config of {source.name} can't be had from the hub ({reason}). Connect to the network, or give "
                "a timm name or local-dir:FOLDER."
            ) from error
        if not from_hub:
            raise UnsupportedModel(
                f"timm can't build {source.name} as a classifier"
                + (f" at {source.image_px} px" if source.image_px else "")
                + f" ({reason}). Vision Transformers (vit_*, deit_*) can be trained."
            ) from error
        raise WeightsError(
            f"the pretrained weights of {source.name} can't be had from timm's hub ({reason}). "
            "Give --weights FILE.safetensors, or --no-pretrained to start from random weights "
            "(which needs far more data), or connect to the network."
        ) from error


@contextmanager
def _hub_errors_at_once(from_hub: bool) -> Iterator[None]:
    """Without a network the hub's client retries for most of a minute: see first whether its host answers."""
    if not from_hub:
        yield
        return
    import huggingface_hub.constants as hub
    from huggingface_hub.utils import logging as hub_logging

    offline, verbosity = hub.HF_HUB_OFFLINE, hub_logging.get_verbosity()
    host = hub.ENDPOINT.split("://", 1)[-1].split("/", 1)[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True  # files already in its cache still load
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        hub_logging.set_verbosity(verbosity)


def classifier_names(model: VisionTransformer) -> tuple[str, ...]:
    """The modules that are replaced for the data's classes."""
    return ("head", "head_dist") if hasattr(model, "head_dist") else ("head",)


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file, or of a .pth that holds nothing but tensors.

    Raises: WeightsError if it is missing, damaged, or would run code when loaded.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = shown(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__
        if type(error).__name__ == "UnpicklingError":  # torch's own words advise to load it without the safeguard
            reason = "it is damaged, or holds more than tensors"
        raise WeightsError(
            f"{path} can't be loaded as weights ({reason}). Wanted: a .safetensors file, or a .pth with tensors only "
            "(edgetune never unpickles code)."
        ) from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors.")
    return state


def load_weights(model: VisionTransformer, path: Path) -> None:
    """Load everything but the classifier, which stays fresh.

    Raises: WeightsError listing what is missing, unexpected, of another shape, or not a finite number.
    """
    state = read_state(path)
    for key in ("model_ema", "model", "state_dict"):  # training checkpoints wrap the weights
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    strange = [repr(name) for name in state if not isinstance(name, str)]
    if strange:
        raise WeightsError(f"{path} holds values under names that are no text ({', '.join(strange[:6])}).")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    except Exception as error:
        raise WeightsError(
            f"{path} does not look like weights of this model ({type(error).__name__}: {error})."
        ) from error
    heads = tuple(f"{name}." for name in classifier_names(model))
    own = model.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(heads)}
    missing = [name for name in own if name not in state and not name.startswith(heads)]
    unexpected = [name for name in state if name not in own and not name.startswith(("head", "fc_norm_"))]
    problems = [*_listed("missing", missing), *_listed("unexpected", unexpected)]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if isinstance(state.get(name), Tensor) and state[name].shape != own[name].shape and not name.startswith(heads)
    ]
    problems += _listed("of another shape", wrong)
    bad = [name for name, target in own.items() if name in state and not _usable(state[name], target)]
    problems += _listed("not finite numbers", bad)
    if problems:
        raise WeightsError(f"{path} does not fit the model: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, target in own.items():
            if name in state:
                target.copy_(state[name])


def _usable(value: object, target: Tensor) -> bool:
    """Whether a value is a plain tensor of finite numbers, of the kind that the model has there."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    if value.is_floating_point() is not target.is_floating_point() or value.is_complex():
        return False
    if not value.is_floating_point() or not value.numel():
        return True
    if value.element_size() < 2:
        value = value.float()  # torch finds no smallest number among 8-bit floats
    # min and max pass NaN on and make no copy of the tensor.
    return bool(torch.isfinite(torch.stack((value.min(), value.max()))).all())


def _listed(what: str, names: list[str], most: int = 6) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what} ({', '.join(names[:most])}{more})"]


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
    config = _read_config(folder)
    source = ModelSource(name=f"local-dir:{folder}", pretrained=False)
    model = check_supported(_build(source.name, {"num_classes": classes}, source, from_hub=False), source.name)
    state = read_state(weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{weights} does not fit {config['architecture']}: {str(error)[:300]}") from error
    return model.eval()
