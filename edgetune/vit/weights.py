"""Weights files into models: read one tensor at a time, checked, then given to the model as they are, with no second copy.

A model that gets weights is built without memory (`built_empty`). Every file is brought into the model's layout (`layouts`:
position embeddings are resized, foreign layouts go through timm's own filter), then must match the model in all but the
classifier.
At most one tensor exists twice at any moment, but for two kinds of foreign files: layouts that the filter joins from
parts (BEiT-3's q, k and v), and a .pth whose tensors are all cut from one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.checkpoint.tensors import read_into, read_layout
from edgetune.data import shown
from edgetune.errors import EdgetuneError, WeightsError
from edgetune.vit import stock
from edgetune.vit.layouts import as_the_models
from edgetune.vit.plain import AnyViT, VisionTransformer, fresh_linear

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_ANY_CLASSIFIER = ("head.", "head_dist.")


def built_empty(build: Callable[[], AnyViT]) -> AnyViT:
    """The model on torch's meta device, where it takes no memory until `load_weights` or `load_all_weights` fills it.

    What timm computes while it builds and no file holds (position grids, say) is taken from a model built in full,
    where there is any; that model is gone before any weight is read.
    """
    with torch.device("meta"):
        model = build()
    places = [(path, name) for path, name, _ in _computed(model)]
    if places:
        values = {(path, name): value for path, name, value in _computed(build())}
        for path, name in places:
            setattr(model.get_submodule(path), name, values[path, name])
    return model


def _computed(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(module, attribute, tensor) of buffers that are not saved, and of tensors that are plain attributes."""
    saved = model.state_dict().keys()
    for path, module in model.named_modules():
        for name, value in [*module.named_buffers(recurse=False), *vars(module).items()]:
            if isinstance(value, Tensor) and (f"{path}.{name}" if path else name) not in saved:
                yield path, name, value


def load_weights(model: AnyViT, path: Path, *, strangers: bool = False) -> None:
    """Fill an empty model with everything but the classifier, which gets fresh values from torch's generator.

    Tensors that the model has no place for are refused, unless `strangers` are welcome.

    Raises: WeightsError listing what is missing, unexpected, of another shape, or not a finite number.
    """
    heads = tuple(f"{name}." for name in classifier_names(model))
    state = _unwrapped(read_state(path, without=_ANY_CLASSIFIER), path)
    try:
        state = as_the_models(state, model)
    except EdgetuneError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{path} does not look like weights of this model ({type(error).__name__}: {error})."
        ) from error
    own = {name: target for name, target in model.state_dict().items() if not name.startswith(heads)}
    problems = _misfits(state, own, strangers=strangers)
    if problems:
        raise WeightsError(f"{path} does not fit the model: {'; '.join(problems)}.")
    for name in [name for name in state if name not in own]:
        del state[name]
    _make_own(state, own)
    model.load_state_dict(state, strict=False, assign=True)
    _fresh_classifier(model)


def load_all_weights(model: AnyViT, path: Path) -> None:
    """Fill an empty model with exactly its own tensors, the classifier's included.

    Raises: WeightsError if the file is missing or damaged; RuntimeError, in torch's words, if it does not fit.
    """
    state = read_state(path)
    _make_own(state, model.state_dict())
    model.load_state_dict(state, assign=True)


def reading_bytes(path: Path) -> int:
    """The most that reading a weights file holds at once, in bytes: with `load_weights` all of it but the classifier.

    For a safetensors file its header says it. Of a .pth file it is the file's size, the classifier and whatever else a
    training checkpoint holds included. One tensor at a time exists twice on top. Tensors in half precision grow to the
    model's own size as they are converted, so count the larger of this and the model's weights.

    Raises: WeightsError if it is missing or damaged.
    """
    with _readable(path):
        if path.suffix != ".safetensors":
            return path.stat().st_size
        with path.open("rb") as file:
            entries = [entry for name, entry in read_layout(file)[1] if not _is_of(name, _ANY_CLASSIFIER)]
    # A float64 is read as what it becomes.
    sizes = [(entry.data_offsets[1] - entry.data_offsets[0]) // (1 + (entry.dtype == "F64")) for entry in entries]
    return sum(sizes)


def read_state(path: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tensors of a .safetensors file, or of a .pth that holds nothing but tensors, in memory of their own.

    Of a .safetensors file, what starts with one of `without` is not read.

    Raises: WeightsError if it is missing, damaged, or would run code when loaded.
    """
    with _readable(path):
        if path.suffix == ".safetensors":
            return _read_safetensors(path, without)
        # timm's training checkpoints hold their command line, which is plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise WeightsError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors.")
    return state


def _read_safetensors(path: Path, without: tuple[str, ...]) -> dict[str, Any]:
    """By plain reads: the library maps the file, whose pages count as this process's until the model is a copy of them."""
    state: dict[str, Any] = {}
    with path.open("rb") as file:
        for name, entry in read_layout(file)[1]:
            if _is_of(name, without):
                file.seek(entry.data_offsets[1] - entry.data_offsets[0], os.SEEK_CUR)
                continue
            tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
            read_into(file, tensor.view(-1).view(torch.uint8).numpy())
            # Wider than the model: made narrow before the next one is read.
            state[name] = tensor.float() if tensor.dtype is torch.float64 else tensor
    return state


def _is_of(name: str, prefixes: tuple[str, ...]) -> bool:
    return bool(prefixes) and name.removeprefix("module.").startswith(prefixes)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        there = path.is_file()
    except OSError as error:
        raise WeightsError(f"{path} can't be read as weights: {error.strerror}. Check the path.") from error
    if not there:
        raise WeightsError(f"no weights file at {path}.")
    try:
        yield
    except Exception as error:
        reason = shown(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__
        if type(error).__name__ == "UnpicklingError":  # torch's own words advise to load it without the safeguard
            reason = "it is damaged, or holds more than tensors"
        raise WeightsError(
            f"{path} can't be loaded as weights ({reason}). Wanted: a .safetensors file, or a .pth with tensors only "
            "(edgetune never unpickles code)."
        ) from error


def _unwrapped(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The weights in a training checkpoint, under the model's own names."""
    for key in ("model_ema", "model", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    strange = [repr(name) for name in state if not isinstance(name, str)]
    if strange:
        raise WeightsError(f"{path} holds values under names that are no text ({', '.join(strange[:6])}).")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _misfits(state: dict[str, Any], own: dict[str, Tensor], *, strangers: bool) -> list[str]:
    """What keeps a file's tensors from being the model's own."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own and not name.startswith(("head", "fc_norm_"))]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(target.shape)}"
        for name, target in own.items()
        if isinstance(state.get(name), Tensor) and state[name].shape != target.shape
    ]
    bad = [name for name, target in own.items() if name in state and not _usable(state[name], target)]
    return [
        *_listed("missing", missing),
        *([] if strangers else _listed("unexpected", unexpected)),
        *_listed("of another shape", wrong),
        *_listed("not finite numbers", bad),
    ]


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


def _make_own(state: dict[str, Any], own: Mapping[str, Tensor]) -> None:
    """Turn a file's tensors into the model's, one after the other."""
    taken: set[int] = set()
    for name, target in own.items():
        if name in state:
            state[name] = _owned(state.pop(name), target, taken)


def _owned(value: Tensor, target: Tensor, taken: set[int]) -> Tensor:
    """A tensor in the model's dtype and in memory that nothing else uses.

    In a .pth, or after the filter, it may be a view of another or of more than itself: as a parameter it would change
    with its neighbour, or keep what it was cut from.
    """
    value = value.detach().to(target.dtype).resolve_neg()
    memory = value.untyped_storage()
    if memory.data_ptr() in taken or memory.nbytes() != value.nbytes or value.stride() != target.stride():
        value = value.clone(memory_format=torch.contiguous_format)
    taken.add(value.untyped_storage().data_ptr())
    return value


def _fresh_classifier(model: AnyViT) -> None:
    """The values with which timm builds a classifier, from torch's generator."""
    ours = isinstance(model, VisionTransformer)
    initialise = (lambda layer, _name: fresh_linear(layer)) if ours else stock.fresh_layer(model)
    for name in classifier_names(model):
        layer = model.get_submodule(name)
        for key, value in layer.named_parameters():  # `to_empty` would import sympy
            setattr(layer, key, nn.Parameter(torch.empty(value.shape)))
        initialise(layer, name)


def classifier_names(model: AnyViT) -> tuple[str, ...]:
    """The modules that are replaced for the data's classes."""
    return ("head", "head_dist") if hasattr(model, "head_dist") else ("head",)
