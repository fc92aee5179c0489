"""What `--model` may say: a timm name, the bundled model, a model folder (`local-dir:`), a repository of the hub (`hf-hub:`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from edgetune.errors import UnknownModel, WeightsError

MICRO_MODEL = "edgetune_micro"
MICRO_FOLDER = Path(__file__).parent.parent / "assets" / MICRO_MODEL


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model comes from, as the command line names it."""

    name: str
    weights: str | None = None
    pretrained: bool = True
    image_px: int | None = None


def is_hub_name(name: str) -> bool:
    return name.startswith(("hf-hub:", "hf_hub:"))


def local_folder(name: str) -> Path | None:
    """The folder a name stands for: the bundled model's, or what follows `local-dir:`. Raises: UnknownModel."""
    if name == MICRO_MODEL:
        return MICRO_FOLDER
    if not name.startswith("local-dir:"):
        return None
    folder = Path(name.removeprefix("local-dir:"))
    try:
        there = (folder / "config.json").is_file()
    except OSError as error:
        raise UnknownModel(f"{folder} can't be read as a model folder: {error.strerror}. Check the path.") from error
    if not there:
        raise UnknownModel(f"{folder} is no model folder: it has no config.json. A run folder of edgetune is one.")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises: WeightsError if timm could build nothing from it."""
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
    """A model folder's weights. Raises: WeightsError if it has none."""
    for name in ("model.safetensors", "pytorch_model.bin", "model.pth"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder} holds no model.safetensors. Give --weights FILE.")
