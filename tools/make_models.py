"""Write `edgetune/assets/models.json`: timm's Vision Transformers that `vit.plain` can build, by name, with their tags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import timm
import torch
from timm.layers import LayerNorm
from timm.models import deit, get_pretrained_cfg, vision_transformer

from edgetune.vit.known import MODELS_FILE, KnownModel, PretrainedConfig
from edgetune.vit.plain import Architecture

# What the factory is told beside the model's arguments.
_OF_THE_FACTORY = {
    "pretrained_filter_fn", "pretrained_strict", "feature_cfg", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir",
}  # fmt: skip
# Not needed to build, load or save a model.
_LEFT_OUT = ("description", "origin_url", "paper_name", "paper_ids", "notes", "architecture")
_ACTIVATIONS = {torch.nn.GELU: "gelu"}


class _Asked(Exception):
    def __init__(self, kind: type, args: dict[str, Any]) -> None:
        self.kind, self.arguments = kind, args


def asked_of(name: str) -> tuple[type, dict[str, Any]]:
    """The class that timm builds a model of, and with which arguments, without building it."""

    def build(kind: type, _variant: str, _pretrained: bool, **arguments: Any) -> None:
        raise _Asked(kind, {key: value for key, value in arguments.items() if key not in _OF_THE_FACTORY})

    with ExitStack() as patches:
        for module in (vision_transformer, deit):
            patches.enter_context(patch.object(module, "build_model_with_cfg", build))
        try:
            timm.create_model(name)
        except _Asked as asked:
            return asked.kind, asked.arguments
    raise LookupError(f"timm builds {name} in another way")


def architecture_of(name: str) -> Architecture | None:
    """What `vit.plain` builds a model of timm's from; None if it can't."""
    kind, arguments = asked_of(name)
    if kind not in (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled):
        return None
    norm = arguments.pop("norm_layer", None)
    if norm is not None:
        if not isinstance(norm, partial) or norm.func is not LayerNorm or set(norm.keywords) != {"eps"}:
            return None
        arguments["norm_eps"] = norm.keywords["eps"]
    if "act_layer" in arguments:
        arguments["act_layer"] = _ACTIVATIONS.get(arguments["act_layer"], arguments["act_layer"])
    arguments["distilled"] = kind is deit.VisionTransformerDistilled
    try:
        return msgspec.convert(arguments, Architecture)
    except msgspec.ValidationError:
        return None


def tags_of(name: str) -> Iterator[tuple[str, PretrainedConfig]]:
    """The tags of an architecture, its default first; "" where it has none."""
    first = get_pretrained_cfg(name)
    others = [full.split(".", 1)[1] for full in timm.list_pretrained(f"{name}.*")]
    for tag in dict.fromkeys([first.tag or "", *others]):
        config = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
        kept = {key: value for key, value in config.to_dict().items() if key not in _LEFT_OUT}
        yield tag, msgspec.convert(kept, PretrainedConfig)


def main(path: Path = MODELS_FILE) -> None:
    lines = []
    for name in [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]:
        architecture = architecture_of(name)
        if architecture is None:
            print(f"timm's to build: {name}")
            continue
        values = msgspec.to_builtins(architecture)
        changed = {key: value for key, value in values.items() if value != getattr(Architecture(), key)}
        tags = {tag: msgspec.to_builtins(config) for tag, config in tags_of(name)}
        entry: dict[str, object] = {"architecture": changed, "tags": tags}
        if "img_size" in asked_of(name)[1]:
            entry["has_size"] = True
        msgspec.convert(entry, KnownModel)
        lines.append(msgspec.json.encode(name) + b": " + msgspec.json.encode(entry))
    path.write_bytes(b"{\n" + b",\n".join(lines) + b"\n}\n")


if __name__ == "__main__":
    main()
