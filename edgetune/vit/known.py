"""What is known of models without timm: the architectures that `vit.plain` builds, by timm's names and tags, as data.

`assets/models.json` is made by `tools/make_models.py` from timm's own registry; tests hold every entry to timm. What is not
there, or asks for more than `vit.plain` has, is timm's to build.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from edgetune.vit.names import ModelSource, is_hub_name, local_folder, read_config
from edgetune.vit.plain import Architecture

_ALWAYS_KEPT = ("pool_size", "first_conv", "classifier")

MODELS_FILE = Path(__file__).parent.parent / "assets" / "models.json"


class PretrainedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a model's weights come from and what they want to see: timm's `PretrainedCfg`, its names and defaults."""

    url: str | None = None
    file: str | None = None
    hf_hub_id: str | None = None
    hf_hub_filename: str | None = None
    source: str | None = None
    architecture: str | None = None
    tag: str | None = None
    custom_load: bool | str = False
    input_size: tuple[int, int, int] = (3, 224, 224)
    test_input_size: tuple[int, int, int] | None = None
    min_input_size: tuple[int, int, int] | None = None
    fixed_input_size: bool = False
    interpolation: str = "bicubic"
    crop_pct: float | None = 0.875
    test_crop_pct: float | None = None
    crop_mode: str | None = "center"
    mean: tuple[float, ...] | None = (0.485, 0.456, 0.406)
    std: tuple[float, ...] | None = (0.229, 0.224, 0.225)
    num_classes: int = 1000
    label_offset: int | None = None
    label_names: Any = None
    label_descriptions: Any = None
    pool_size: Any = None
    test_pool_size: Any = None
    first_conv: str | None = None
    classifier: Any = None
    license: str | None = None
    description: str | None = None
    origin_url: str | None = None
    paper_name: str | None = None
    paper_ids: Any = None
    notes: Any = None


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    architecture: Architecture
    has_size: bool = False  # an image size belongs to the architecture, not to its weights
    tags: dict[str, PretrainedConfig]  # the first is what the name without a tag stands for


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be built without timm, before the number of classes is known."""

    name: str  # of the architecture
    architecture: Architecture
    config: PretrainedConfig
    has_size: bool  # whether the architecture or the folder's config names an image size
    saved_args: dict[str, Any]  # what a model folder's config was built with: it says what its weights are for


def described(source: ModelSource) -> Description | None:
    """What `vit.plain` builds a source from; None where timm has to. Raises: as `local_folder` and `read_config`."""
    folder = local_folder(source.name)
    if is_hub_name(source.name):
        return None
    try:
        found = _from_name(source.name) if folder is None else _from_config(read_config(folder), folder)
        if found is None or found.config.input_size[0] != 3:
            return None
        changes: dict[str, Any] = {}
        if source.image_px is not None:
            changes["img_size"] = source.image_px
        elif found.config.fixed_input_size and not found.has_size:
            # As timm's factory does: what names no size of its own is built for that of its weights.
            changes["img_size"] = found.config.input_size[1:]
        return msgspec.structs.replace(found, architecture=_changed(found.architecture, changes))
    except (msgspec.ValidationError, ValueError, TypeError):
        return None


def as_timm_has_it(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """The `pretrained_cfg` of a model: what is not None, and the keys that timm keeps either way."""
    table = {key: getattr(config, key) for key in config.__struct_fields__}
    kept = {key: value for key, value in table.items() if value is not None or key in _ALWAYS_KEPT}
    return {**kept, "architecture": architecture}


def known_models() -> list[str]:
    return list(_models())


def known_tags(architecture: str) -> list[str]:
    """`deit_tiny_patch16_224.fb_in1k` and the like; empty for a name that is not known."""
    known = _model(architecture)
    return [f"{architecture}.{tag}" for tag in known.tags if tag] if known else []


def _from_name(name: str) -> Description | None:
    name, _, tag = name.partition(".")
    known = _model(name)
    if known is None or (tag and tag not in known.tags):
        return None
    config = known.tags[tag] if tag else next(iter(known.tags.values()))
    return Description(
        name=name, architecture=known.architecture, config=config, has_size=known.has_size, saved_args={}
    )


def _from_config(saved: dict[str, Any], folder: Path) -> Description | None:
    """As timm reads a model folder: its arguments over the architecture's own, its numbers in place of the tag's."""
    name, args = saved["architecture"], dict(saved.get("model_args") or {})
    known = _model(name)
    if known is None or "pretrained_cfg" not in saved:
        return None
    table = {**saved["pretrained_cfg"], "file": str(folder), "source": "local-dir", "architecture": name}
    table.update({key: saved[key] for key in ("num_classes", "label_names", "label_descriptions") if key in saved})
    config = msgspec.convert(table, PretrainedConfig)
    architecture = _changed(known.architecture, args)
    if "img_size" in args and config.fixed_input_size:
        config = msgspec.structs.replace(config, input_size=(config.input_size[0], *architecture.image_px))
    has_size = known.has_size or "img_size" in args
    return Description(name=name, architecture=architecture, config=config, has_size=has_size, saved_args=args)


def _changed(architecture: Architecture, changes: dict[str, Any]) -> Architecture:
    return msgspec.convert({**msgspec.to_builtins(architecture), **changes}, Architecture)


def _model(name: str) -> KnownModel | None:
    entry = _models().get(name)
    return None if entry is None else msgspec.json.decode(entry, type=KnownModel)


@lru_cache(maxsize=1)
def _models() -> dict[str, msgspec.Raw]:
    """Every entry as it is written: a run needs one of them."""
    return msgspec.json.decode(MODELS_FILE.read_bytes(), type=dict[str, msgspec.Raw])
