"""What comes out of the artifacts is what comes out of torch: the same batches, the same selections, side by side."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgetune.artifacts.manifest import Manifest, Variant
from edgetune.backends.arrays import ArrayTensor
from edgetune.backends.base import Images, Labels
from edgetune.backends.ort import OrtBackend, load_variant
from edgetune.backends.ort_runtime import training_api
from edgetune.backends.pytorch import TorchBackend
from edgetune.cost import Selection
from edgetune.errors import ArtifactsError, UnsupportedModel
from edgetune.optim import Optimizer, OptimizerSettings

STEPS, BATCH = 5, 2
# AdamW's first steps move every weight by the rate: at 1e-3 a fresh model's ranking of tokens flips on rounding alone.
SGD_RATE, ADAMW_RATE = 1e-2, 1e-4
LEAST_KEPT = 0.8  # of its patch tokens, what a block passes on at the least in these steps
SGD_TOLERANCE = LOSS_TOLERANCE = GRADIENT_TOLERANCE = 1e-5
RULE_TOLERANCE = 1e-6
# Of the largest element of all gradients: below it a gradient is rounding alone (a key's bias has none at all).
NOISE_SHARE = 1e-3


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """The largest differences that were seen. Losses (up to 1) and parameters are absolute, gradients relative."""

    sgd_loss: float = 0.0
    sgd_parameter: float = 0.0
    sgd_delta: float = 0.0
    adamw_loss: float = 0.0
    gradient: float = 0.0
    rule: float = 0.0

    def failures(self) -> list[str]:
        limits = {
            "sgd_loss": SGD_TOLERANCE,
            "sgd_parameter": SGD_TOLERANCE,
            "adamw_loss": LOSS_TOLERANCE,
            "gradient": GRADIENT_TOLERANCE,
            "rule": RULE_TOLERANCE,
        }
        return [
            f"{name} differs by {getattr(self, name):.1e}, allowed {limit:.0e}"
            for name, limit in limits.items()
            if not getattr(self, name) <= limit
        ]


def verify(folder: Path, manifest: Manifest, model: Any, *, threads: int = 1) -> Parity:
    """Five steps of each variant under SGD and of the largest under AdamW; parameters go on from variant to variant.

    Raises: ArtifactsError if anything differs by more than it may.
    """
    torch.set_num_threads(threads)
    try:
        found = _sgd(folder, manifest, model, threads)
        found = _adamw(folder, manifest, model, threads, found)
        found = msgspec.structs.replace(found, rule=_rules(folder, manifest, threads))
    except RuntimeError as error:
        raise UnsupportedModel(
            f"ONNX Runtime can't run a step of this model: {' '.join(str(error).split())[-300:]}. Train it with torch "
            "(--backend torch)."
        ) from error
    failures = found.failures()
    if failures:
        raise ArtifactsError(
            f"the artifacts do not train as torch does: {'; '.join(failures)}. Nothing was exported; please report this "
            "with the model's name, or export with --no-verify at your own risk."
        )
    return found


def selections(manifest: Manifest, variant: Variant, seed: int) -> Iterator[Selection]:
    """Draws of the kind that ALaST makes: some blocks of those above the split, fewer and fewer tokens, others each step."""
    shape, rng = manifest.shape, random.Random(seed)
    while True:
        trains = tuple(block >= variant.split_block and rng.random() < 0.75 for block in range(shape.depth))
        tokens = [shape.patch_tokens] * (variant.split_block + 1)
        while len(tokens) < shape.depth and manifest.adaptive is not None:
            tokens.append(max(1, int(tokens[-1] * rng.uniform(LEAST_KEPT, 1.0))))
        tokens += [shape.patch_tokens] * (shape.depth - len(tokens))
        yield Selection(trains, tuple(tokens[: shape.depth]), variant.embeddings_train)


def batches(manifest: Manifest, seed: int) -> Iterator[tuple[Images, Labels]]:
    rng, preprocess = np.random.default_rng(seed), manifest.preprocess
    while True:
        size = (BATCH, 3, preprocess.height_px, preprocess.width_px)
        yield rng.standard_normal(size, np.float32), rng.integers(0, manifest.shape.classes, BATCH)


def _sgd(folder: Path, manifest: Manifest, model: Any, threads: int) -> Parity:
    settings = OptimizerSettings(name="sgd")
    torch_side = TorchBackend(_copy(model), settings)
    ort_side = OrtBackend(folder, manifest, manifest.variants[0], settings, threads=threads)
    loss = parameter = delta = 0.0
    data = batches(manifest, 0)
    for number, variant in enumerate(manifest.variants):
        ort_side.use_variant(variant)
        for _, selection, batch in zip(range(STEPS), selections(manifest, variant, number), data, strict=False):
            one, other = _step(torch_side, batch, selection, SGD_RATE), _step(ort_side, batch, selection, SGD_RATE)
            loss = _worst(loss, _apart(one.loss, other.loss))
            if manifest.adaptive is not None:
                delta = _worst(delta, *np.subtract(one.class_token_deltas, other.class_token_deltas))
        values = ort_side.model_tensors()
        for name, value in torch_side.model_tensors().items():
            parameter = _worst(parameter, np.abs(value - values[name]).max() if value.size else 0.0)
    return Parity(sgd_loss=loss, sgd_parameter=parameter, sgd_delta=delta)


def _adamw(folder: Path, manifest: Manifest, model: Any, threads: int, found: Parity) -> Parity:
    settings, variant = OptimizerSettings(name="adamw", weight_decay=manifest.weight_decay), manifest.variants[0]
    torch_side = TorchBackend(_copy(model), settings)
    ort_side = OrtBackend(folder, manifest, variant, settings, threads=threads)
    loss = gradient = 0.0
    data = batches(manifest, 1)
    for step, selection, batch in zip(range(STEPS), selections(manifest, variant, 99), data, strict=False):
        if step == 0:
            gradient = _gradient_difference(torch_side, ort_side, selection, batch)
        one = _step(torch_side, batch, selection, ADAMW_RATE)
        other = _step(ort_side, batch, selection, ADAMW_RATE)
        loss = _worst(loss, _apart(one.loss, other.loss))
    return msgspec.structs.replace(found, adamw_loss=loss, gradient=gradient)


def _gradient_difference(
    torch_side: TorchBackend, ort_side: OrtBackend, selection: Selection, batch: tuple[Images, Labels]
) -> float:
    """The largest relative difference of a parameter's gradient, at the same parameters: SGD at rate 1 shows them."""
    seen: dict[str, dict[str, Any]] = {}
    for side in (torch_side, ort_side):
        own, side.optimizer = side.optimizer, _Recorder()
        _step(side, batch, selection, 1.0)
        seen[side.name] = side.optimizer.seen
        side.optimizer = own
    one, other = seen[torch_side.name], seen[ort_side.name]
    if one.keys() != other.keys():
        return math.inf
    largest = max(float(np.abs(value).max()) for value in one.values())
    return max(
        float(np.abs(value - other[name]).max()) / max(float(np.abs(value).max()), NOISE_SHARE * largest)
        for name, value in one.items()
    )


class _Recorder(Optimizer):
    """Takes gradients down instead of using them."""

    def __init__(self) -> None:
        super().__init__(OptimizerSettings(name="sgd"))
        self.seen: dict[str, Any] = {}

    def step(self, named_parameters: Any, learning_rate: float) -> None:
        self.seen = {name: value.grad.numpy().copy() for name, value in named_parameters}


def _rules(folder: Path, manifest: Manifest, threads: int) -> float:
    """How far updates from the same gradients are apart: torch's tensors, numpy's arrays, and the optimizer graph."""
    variant = manifest.variants[-1]
    worst = 0.0
    for kind in ("adamw", "sgd"):
        live = load_variant(folder, variant, threads)
        api = training_api()
        graph = folder / manifest.optimizers[kind].plain
        optimizer = api.Optimizer(str(graph), live.module)
        optimizer.set_learning_rate(1e-3)
        settings = OptimizerSettings(name=kind, weight_decay=manifest.weight_decay)
        rules = (_Uniform(settings), _Uniform(settings))
        own = {name: live.values[name].copy() for name in live.gradients}
        tensors = {name: torch.from_numpy(value.copy()) for name, value in own.items()}
        shape = manifest.shape
        backend = OrtBackend(folder, manifest, variant, settings, threads=threads)
        for _, (images, labels) in zip(range(3), batches(manifest, 2), strict=False):
            live.module.train()
            live.module.lazy_reset_grad()
            tokens = (shape.patch_tokens,) * shape.depth
            stream, _ = backend._stream(images, tokens, 0)
            backend._run(live, stream, backend._targets(labels, BATCH), tokens)
            arrays = [(name, ArrayTensor(own[name], ArrayTensor(grad.copy()))) for name, grad in live.gradients.items()]
            for name, grad in live.gradients.items():
                tensors[name].grad = torch.from_numpy(grad.copy())
            rules[0].step(arrays, 1e-3)
            with torch.no_grad():
                rules[1].step(list(tensors.items()), 1e-3)
            optimizer.step()
            for name in live.gradients:
                worst = _worst(worst, np.abs(own[name] - tensors[name].numpy()).max())
                worst = _worst(worst, np.abs(own[name] - live.values[name]).max())
    return worst


class _Uniform(Optimizer):
    """Decays every parameter, as the optimizer graph does; SGD's graph decays none."""

    def _decay(self, name: str, parameter: Any) -> float:
        return self.settings.weight_decay if self.settings.name == "adamw" else 0.0


def _step(side: TorchBackend | OrtBackend, batch: tuple[Images, Labels], selection: Selection, rate: float) -> Any:
    return side.step(
        [batch],
        selection,
        images=BATCH,
        weight_sum=float(BATCH),
        learning_rate=rate,
        seed=0,
        with_deltas=True,
    )


def _apart(loss: float, other: float) -> float:
    """The difference of two losses; of those above 1, relative: float32 has no more digits."""
    return (loss - other) / max(1.0, abs(loss))


def _worst(before: float, *values: float) -> float:
    """The largest absolute value; infinite where one is no number."""
    return max(before, *(abs(float(value)) if math.isfinite(value) else math.inf for value in values))


def _copy(model: Any) -> Any:
    """A second model, so that the first stays as it was exported; nothing in it drops at random, as in the graphs."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name in ("p", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return twin
