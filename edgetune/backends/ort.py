"""The ONNX Runtime backend: the same steps as torch's, from a folder of artifacts, with no torch installed.

The runtime computes losses and gradients; the update runs here, by the rules of `optim.py`, in the runtime's own memory:
so a step may train any of the blocks that its graph gives gradients for, and optimizer state survives a change of graph.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgetune.artifacts.agreement import check_variant
from edgetune.artifacts.manifest import Manifest, Variant, variant_at
from edgetune.backends.arrays import ArrayTensor
from edgetune.backends.base import Array, Images, Labels, Looked, StepResult
from edgetune.backends.ort_runtime import inference, session_options, training_api
from edgetune.checkpoint.tensors import open_tensors
from edgetune.cost import Selection, TokenScore
from edgetune.errors import ArtifactsError, DataError, EdgetuneError, UnsupportedModel
from edgetune.optim import Optimizer, OptimizerSettings, named_state
from edgetune.regions import region_of, trains

Floats = npt.NDArray[np.float32]

# How the runtime says that a graph is not what it was fed or opened for. Whatever else it says while it runs may be memory.
_REFUSALS = (
    "INVALID_ARGUMENT",
    "INVALID_GRAPH",
    "INVALID_PROTOBUF",
    "NOT_IMPLEMENTED",
    "Non-zero status code returned",
)


class _Live(NamedTuple):
    """A variant's graphs in memory. The arrays are the runtime's own."""

    variant: Variant
    module: Any
    state: Any  # keeps the arrays alive
    values: dict[str, Floats]
    gradients: dict[str, Floats]


class OrtBackend:
    """A variant of the artifacts in training. Everything is read when it is first needed."""

    name = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        variant: Variant,
        optimizer: OptimizerSettings,
        *,
        threads: int = 1,
        class_weights: npt.NDArray[np.float32] | None = None,
        label_smoothing: float = 0.0,
        at_peak: Callable[[], object] | None = None,
    ) -> None:
        """`at_peak` is called where a step's gradients are there and its parts are not yet freed."""
        self.folder, self.manifest, self.variant = folder, manifest, variant
        self.optimizer = Optimizer(optimizer)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self._threads, self._at_peak = threads, at_peak
        weights = folder / manifest.weights
        self._stored = open_tensors(weights, manifest.files[manifest.weights].sha256)
        self._live: _Live | None = None
        self._prefix: Any = None
        self._given: list[Any] = []
        self._changed: dict[str, Array] = {}  # of a suffix that is not in memory, what differs from the file

    # ---------------------------------------------------------------------------------------------------------- steps

    def step(
        self,
        micro_batches: Iterable[tuple[Images, Labels]],
        selection: Selection,
        *,
        images: int,
        weight_sum: float,
        learning_rate: float,
        seed: int,
        with_deltas: bool,
        updates_in_backward: bool = False,
        keeps_state: bool = True,
        cached_blocks: int = 0,
    ) -> StepResult:
        if updates_in_backward:
            raise ValueError("ONNX Runtime's backward has no place for updates inside")
        live = self._loaded()
        trained = self._trained(live, selection)
        if not keeps_state:
            self.optimizer.evict({name for name, _ in trained})
            self.optimizer.reserve(trained)
        live.module.train()
        live.module.lazy_reset_grad()
        loss_sum, correct, finite = 0.0, 0, True
        deltas = np.zeros(selection.depth)
        for inputs, labels in micro_batches:
            stream, below = self._stream(inputs, selection.tokens, cached_blocks)
            targets = self._targets(labels, weight_sum)
            found = self._run(live, stream, targets, selection.tokens)
            loss, logits = float(found["loss"]), found["logits"]
            above = found.get("deltas", np.zeros(0, np.float32))
            if not math.isfinite(loss):
                finite = False
                break
            if self._at_peak is not None:
                self._at_peak()
            loss_sum += loss
            correct += int((logits.argmax(axis=1) == labels).sum())
            share = len(labels) / images
            deltas[: len(below)] += share * below
            deltas[len(deltas) - len(above) :] += share * above
        # A finite loss can have a gradient that is not; an infinite or missing number makes the sum one.
        finite = finite and all(
            math.isfinite(value.grad.sum().item()) for _, value in trained if value.grad is not None
        )
        if finite:
            self.optimizer.step(trained, learning_rate)
        self.optimizer.finish()
        return StepResult(
            loss=loss_sum if finite else math.nan,
            correct=correct,
            images=images,
            class_token_deltas=tuple(float(delta) for delta in deltas) if with_deltas else None,
            updated=finite,
        )

    def _trained(self, live: _Live, selection: Selection) -> list[tuple[str, ArrayTensor]]:
        """Raises: UnsupportedModel if the selection trains what this variant's graph has no gradient for."""
        lacking = selection.lowest_trained_block < self.variant.split_block
        if lacking or (selection.embeddings_train and not self.variant.embeddings_train):
            raise UnsupportedModel(f"the artifacts' variant {self.variant.name} has no gradients below its split block")
        return [
            (name, ArrayTensor(live.values[name], ArrayTensor(gradient)))
            for name, gradient in live.gradients.items()
            if trains(region_of(name), selection)
        ]

    def _targets(self, labels: Labels, weight_sum: float) -> Floats:
        """(B, classes): each image's share of the step's loss, put on its class (and, smoothed, on all).

        Raises: DataError for a label that the model has no logit for.
        """
        classes = self.manifest.shape.classes
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise DataError(
                f"labels must be from 0 to {classes - 1}; found {int(labels.min())} to {int(labels.max())}."
            )
        weights = np.ones(classes, np.float32) if self.class_weights is None else self.class_weights
        smooth = self.label_smoothing
        targets = np.broadcast_to(weights * np.float32(smooth / classes), (len(labels), classes)).astype(np.float32)
        targets[np.arange(len(labels)), labels] += (1 - smooth) * weights[labels]
        targets /= np.float32(weight_sum)
        return targets

    def _run(self, live: _Live, stream: Array, targets: Floats, tokens: Sequence[int]) -> dict[str, Floats]:
        """The graph's outputs by name: loss, logits (B, classes), head_inputs (B, D), deltas of the blocks above the split."""
        depth = self.manifest.shape.depth
        feeds = {
            live.variant.inputs[0].name: np.ascontiguousarray(stream, np.float32),
            "targets": targets,
            "tokens": np.asarray(tokens, np.int64),
        }
        if len(tokens) != depth:
            raise ValueError(f"{len(tokens)} token counts for {depth} blocks")
        with _in_words(self.folder, f"variant {live.variant.name} can't be run", _REFUSALS):
            found = live.module(*(feeds[each.name] for each in live.variant.inputs))
        return dict(zip(live.variant.outputs, found, strict=True))

    def _stream(self, inputs: Array, tokens: Sequence[int], cached_blocks: int) -> tuple[Array, Floats]:
        """What enters the suffix, and the deltas of the blocks below it (none where they are cached)."""
        if cached_blocks not in (0, self.variant.split_block):
            raise ValueError(
                f"features of {cached_blocks} blocks for a graph that begins at {self.variant.split_block}"
            )
        if cached_blocks or self.variant.prefix_graph is None:
            return inputs, np.zeros(0, np.float32)
        return self._through_prefix(inputs, tokens)

    def evaluate(self, inputs: Images, cached_blocks: int = 0, patch_tokens: tuple[int, ...] | None = None) -> Array:
        tokens = patch_tokens or (self.manifest.shape.patch_tokens,) * self.manifest.shape.depth
        return self._evaluated(inputs, cached_blocks, tokens)["logits"]

    def _evaluated(self, inputs: Images, cached_blocks: int, tokens: tuple[int, ...]) -> dict[str, Floats]:
        stream, _ = self._stream(inputs, tokens, cached_blocks)
        live = self._loaded()
        live.module.eval()
        return self._run(live, stream, np.zeros((len(inputs), self.manifest.shape.classes), np.float32), tokens)

    @property
    def has_linear_head(self) -> bool:
        return self.manifest.classifier is not None

    def head_inputs(self, inputs: Images, cached_blocks: int, patch_tokens: tuple[int, ...]) -> Array:
        return self._evaluated(inputs, cached_blocks, patch_tokens)["head_inputs"]

    def set_head(self, weight: Array, bias: Array) -> None:
        values = self._loaded().values
        np.copyto(values[f"{self.manifest.classifier}.weight"], weight)
        np.copyto(values[f"{self.manifest.classifier}.bias"], bias)

    # ----------------------------------------------------------------------------------------------------- the prefix

    def features(self, inputs: Images, patch_tokens: Sequence[int], *, pooled: bool) -> Array:
        shape = self.manifest.shape
        tokens = (*patch_tokens, *(patch_tokens[-1],) * shape.depth)[: shape.depth]
        found, _ = self._through_prefix(inputs, tokens)
        return found[:, : shape.prefix_tokens] if pooled else found

    def whole_and_pruned_features(self, inputs: Images, blocks: int, leaving: int) -> tuple[Array, Array]:
        # The graph prunes inside: each is a pass of its own.
        all_tokens = (self.manifest.shape.patch_tokens,) * blocks
        return (
            self.features(inputs, (*all_tokens, all_tokens[0]), pooled=False),
            self.features(inputs, (*all_tokens, leaving), pooled=False),
        )

    def _through_prefix(self, images: Images, tokens: Sequence[int]) -> tuple[Array, Floats]:
        if self._prefix is None:
            assert self.variant.prefix_graph is not None
            options = session_options(self._threads)
            # Weights laid out anew for products would be a second copy of them.
            options.add_session_config_entry("session.disable_prepacking", "1")
            self._give_changed(options)
            path = str(self.folder / self.variant.prefix_graph)
            with _in_words(self.folder, f"{self.variant.prefix_graph} can't be loaded"):
                self._prefix = inference().InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {"images": np.ascontiguousarray(images, np.float32), "tokens": np.asarray(tokens, np.int64)}
        wanted = [each.name for each in self.variant.prefix_inputs]
        with _in_words(self.folder, f"{self.variant.prefix_graph} can't be run", _REFUSALS):
            found = self._prefix.run(None, {name: feeds[name] for name in wanted})
        return found[0], found[1] if len(found) > 1 else np.zeros(0, np.float32)

    def _give_changed(self, options: Any) -> None:
        """Blocks that were trained before the split rose are in the prefix now: its session gets them as they are."""
        below = self._frozen_regions()
        names = [name for name in self._changed if region_of(name) in below]
        if names:
            values = [inference().OrtValue.ortvalue_from_numpy(self._changed[name]) for name in names]
            options.add_external_initializers(names, values)
            self._given = values  # they borrow the arrays' memory, and the session theirs

    def use_token_score(self, score: TokenScore) -> None:
        if score != "attention":
            raise UnsupportedModel(f"artifacts drop tokens by attention, not by {score}: --token-score attention.")

    def look(self, inputs: Images, blocks: Sequence[int], *, scored: bool) -> Looked:
        raise UnsupportedModel("artifacts have no outputs in between to look for a split at: name one with --split.")

    def at_end(self, tokens: Array, blocks: int) -> Array:
        raise NotImplementedError  # of what was looked at

    def pruned(self, tokens: Array, scores: Array, leaving: int) -> Array:
        raise NotImplementedError  # of what was looked at

    def drop_prefix(self, blocks: int, stored: Mapping[str, Array]) -> int:
        if self._prefix is None:
            return 0
        self._prefix = None
        gc.collect()
        own = {each.name for each in self.variant.parameters}
        return sum(int(self._stored[name].nbytes) for name in self._stored if name not in own)

    def bring_back_prefix(self) -> None:
        """Nothing to do: it is read when it is next needed."""

    # ------------------------------------------------------------------------------------------------------ the suffix

    def _loaded(self) -> _Live:
        if self._live is None:
            self._live = load_variant(self.folder, self.variant, self._threads)
            for name in self._changed.keys() & self._live.values.keys():
                np.copyto(self._live.values[name], self._changed.pop(name))
        return self._live

    def use_variant(self, variant: Variant) -> None:
        """From now on another variant's graphs: parameters and optimizer state go on by their names."""
        if variant.name == self.variant.name:
            return
        if self._live is not None:
            self._changed |= {name: values.copy() for name, values in self._live.values.items()}
        self._live = self._prefix = None
        gc.collect()
        check_variant(self.folder, self.manifest, variant)  # which nobody has looked at yet
        self.variant = variant

    def use_split(self, split_block: int, *, embeddings_train: bool) -> None:
        """Raises: ArtifactsError if the artifacts have no variant of it."""
        self.use_variant(variant_at(self.manifest, split_block, embeddings_train=embeddings_train))

    def model_tensors(self) -> Mapping[str, Array]:
        return _Tensors(self._stored, self._changed, {} if self._live is None else self._live.values)

    def trained_names(self, selection_space: Selection) -> set[str]:
        parameters = {each.name for variant in self.manifest.variants for each in variant.parameters}
        return {name for name in parameters if trains(region_of(name), selection_space)}

    def reserve(self, space: Selection) -> None:
        names = self.trained_names(space)
        self.optimizer.evict(names)
        live = self._loaded()
        self.optimizer.reserve((name, ArrayTensor(live.values[name])) for name in sorted(names & live.gradients.keys()))

    def store_half(self, blocks: int) -> None:
        raise UnsupportedModel("--frozen-weights bfloat16: artifacts hold float32 weights. Leave it out.")

    def optimizer_tensors(self) -> Iterator[tuple[str, Array]]:
        for name, state in self.optimizer.state.items():
            for key, tensor in state.items():
                yield f"{name}|{key}", tensor.values

    def optimizer_steps(self) -> dict[str, int]:
        return dict(self.optimizer.steps)

    def restore(self, model: Mapping[str, Array], optimizer: Mapping[str, Array], steps: Mapping[str, int]) -> None:
        for name, array in model.items():
            stored = self._stored[name]  # KeyError: not this model's
            if stored.shape != array.shape:
                raise RuntimeError(f"{name} is {array.shape}, not {stored.shape}")
            if self._live is not None and name in self._live.values:
                np.copyto(self._live.values[name], array)
            elif not np.array_equal(stored, array):
                self._changed[name] = np.array(array)
                self._prefix = None  # which may hold it
            else:
                self._changed.pop(name, None)
        self.optimizer.state = {} if optimizer else self.optimizer.state
        for name, part, array in named_state(
            self.optimizer.settings.name, optimizer, lambda name: tuple(self._stored[name].shape)
        ):
            self.optimizer.state.setdefault(name, {})[part] = ArrayTensor(np.array(array, np.float32))
        if optimizer or steps:
            self.optimizer.steps = dict(steps)

    def _frozen_regions(self) -> set[str | int]:
        split = self.variant.split_block
        return {"embeddings", *range(split)} if not self.variant.embeddings_train else set()


class _Tensors(Mapping[str, Array]):
    """The model by timm's names: what is in memory from there, everything else read from its file when it is asked for."""

    def __init__(self, stored: Mapping[str, Array], changed: Mapping[str, Array], live: Mapping[str, Array]) -> None:
        self._stored, self._changed, self._live = stored, changed, live

    def __getitem__(self, name: str) -> Array:
        for place in (self._live, self._changed):
            if name in place:
                return place[name]
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def load_variant(folder: Path, variant: Variant, threads: int) -> _Live:
    """A variant's training and eval graphs, at the weights of its checkpoint; `check_variant` is to be called before.

    Raises: ArtifactsError if the runtime refuses them, or they hold other parameters than the manifest says.
    """
    api = training_api()
    with _in_words(folder, f"variant {variant.name} can't be loaded"):
        state = api.CheckpointState.load_checkpoint(str(folder / variant.checkpoint))
        module = api.Module(
            str(folder / variant.training_graph),
            state,
            str(folder / variant.eval_graph),
            session_options=session_options(threads),
        )
    values, gradients = {}, {}
    for each in variant.parameters:
        if each.name not in state.parameters:
            raise ArtifactsError(
                f"{folder}: the checkpoint of variant {variant.name} lacks {each.name}. Export it again."
            )
        with _in_words(folder, f"{each.name} of variant {variant.name} can't be reached"):
            parameter = state.parameters[each.name]._parameter
            data, gradient = parameter.data, parameter.grad if each.trained else None
        place = f"{folder}: the checkpoint of variant {variant.name}"
        values[each.name] = _view(data, each.shape, f"{place} has {each.name}")
        if each.trained:
            gradients[each.name] = _view(gradient, each.shape, f"{place} has the gradient of {each.name}")
    return _Live(variant, module, state, values, gradients)


@contextmanager
def _in_words(folder: Path, what: str, signs: tuple[str, ...] = ("",)) -> Iterator[None]:
    """What the runtime refuses (with one of `signs` in its message) as an ArtifactsError.

    What may be memory that ran out goes on as it is: whoever runs the steps sees to that.
    """
    try:
        yield
    except Exception as error:  # some of the runtime's errors have no kind in common but this
        text = str(error)
        memory = isinstance(error, MemoryError) or "alloc" in text.lower()
        if memory or isinstance(error, EdgetuneError) or not any(sign in text for sign in signs):
            raise
        own = " ".join(
            text.rsplit("[ONNXRuntimeError] : ", 1)[-1].split()
        )  # before that stands the runtime's source code
        raise ArtifactsError(
            f"{folder}: {what}: {own[:300]}. It is damaged, or contradicts the manifest: export it again."
        ) from error


def _view(value: Any, shape: Sequence[int], whose: str) -> Floats:
    """The runtime's own memory as an array. Raises: ArtifactsError if it has another shape or type."""
    if tuple(value.shape()) != tuple(shape) or value.data_type() != "tensor(float)":
        kind = "float32" if value.data_type() == "tensor(float)" else value.data_type()
        raise ArtifactsError(
            f"{whose} as {kind} {list(value.shape())}, the manifest as float32 {list(shape)}. Export it again."
        )
    floats = (ctypes.c_float * math.prod(shape)).from_address(value.data_ptr())
    return np.ctypeslib.as_array(floats).reshape(shape)
