"""The PyTorch backend: one optimizer step over micro-batches, on the explicit loop of `vit.loop`."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.backends import nnpack

from edgetune.backends.base import Array, Images, Labels, Looked, StepResult
from edgetune.cost import Recompute, Selection, TokenScore
from edgetune.errors import UnsupportedModel
from edgetune.optim import Optimizer, OptimizerSettings, named_state
from edgetune.regions import region_of, trains
from edgetune.vit.half import store_half
from edgetune.vit.loop import apply_selection, at_end, forward, keep_tokens, look, prefix, prefix_whole_and_pruned
from edgetune.vit.plain import AnyViT, Architecture, build


class TorchBackend:
    """A ViT in training. The model's classes, keys and shapes stay what they are; only trained values change."""

    name = "pytorch"

    def __init__(
        self,
        model: AnyViT,
        optimizer: OptimizerSettings,
        *,
        class_weights: np.ndarray | None = None,
        label_smoothing: float = 0.0,
        at_peak: Callable[[], object] | None = None,
    ) -> None:
        """`at_peak` is called where a step holds the most: before each backward."""
        self.model = model
        self.optimizer = Optimizer(optimizer)
        self.label_smoothing = label_smoothing
        self._at_peak = at_peak
        self._score: TokenScore = "attention"
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights)
        depth = len(model.blocks)
        self._frozen = Selection((False,) * depth, (model.patch_embed.num_patches,) * depth)
        self._selected: tuple[tuple[bool, ...], bool] | None = None
        self._dropped: dict[str, Mapping[str, Array]] = {}  # parameters that left memory, and where they are read

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
        self._select(selection)
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        if not keeps_state:
            self.optimizer.evict({name for name, _ in trained})
            self.optimizer.reserve(trained)
        # Dropout and drop path draw from a function of (seed, step), so a resumed run draws the same.
        torch.manual_seed(seed)
        loss_sum, correct = 0.0, 0
        deltas = [0.0] * selection.depth
        updating = _UpdatesInBackward(self.optimizer, learning_rate) if updates_in_backward else None
        finite = True
        try:
            if updating is not None:
                updating.begin(trained)
            for number, (inputs, labels) in enumerate(micro_batches):
                if number and updating is not None:
                    raise ValueError("updates in the backward take one micro-batch: what the first one gave is used up")
                target = torch.from_numpy(labels)
                logits, batch_deltas = self._forward(
                    inputs, selection, with_deltas=with_deltas, cached_blocks=cached_blocks
                )
                loss = self._loss_sum(logits, target) / weight_sum
                value = loss.item()
                if not math.isfinite(value):
                    finite = False
                    break
                correct += int((logits.detach().argmax(dim=1) == target).sum())
                del logits
                if self._at_peak is not None:
                    self._at_peak()
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += value
                share = len(labels) / images
                for block, delta in enumerate(batch_deltas):
                    deltas[block] += delta.item() * share
            if updating is not None:
                finite = finite and updating.finite
            else:
                finite = finite and self._gradients_are_finite()
                if finite:
                    with torch.no_grad():
                        self.optimizer.step(trained, learning_rate)
            self.optimizer.finish()
        finally:
            # Also when memory ran out: nothing of the step may stay, so that it can be tried again with less.
            if updating is not None:
                updating.end()
            for _, parameter in trained:
                parameter.grad = None
        return StepResult(
            loss=loss_sum if finite else math.nan,
            correct=correct,
            images=images,
            class_token_deltas=tuple(deltas) if with_deltas else None,
            updated=finite,
        )

    def _forward(self, inputs: Array, selection: Selection, **how: Any) -> tuple[Tensor, list[Tensor]]:
        """`forward` of this model by this score; `how`: its other arguments."""
        return forward(self.model, torch.from_numpy(inputs), selection, score=self._score, **how)

    @torch.no_grad()
    def _gradients_are_finite(self) -> bool:
        """A finite loss can have a gradient that is not, and one such update would spoil the weights for good."""
        sums = [parameter.grad.sum() for parameter in self.model.parameters() if parameter.grad is not None]
        return bool(torch.isfinite(torch.stack(sums)).all())

    def _loss_sum(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy summed over the images, each weighted by its class.

        torch's own weighted mean divides by the weights of the micro-batch; dividing by those of the whole step
        instead makes the step independent of how it was cut.
        """
        return torch.nn.functional.cross_entropy(
            logits, target, weight=self.class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )

    def _select(self, selection: Selection) -> None:
        wanted = (selection.trains, selection.embeddings_train)  # what is recomputed changes no flag
        if wanted != self._selected:
            self._selected = None
            apply_selection(self.model, selection)
            for name, value in self.model.named_parameters():
                if value.requires_grad and value.dtype != torch.float32:
                    raise UnsupportedModel(
                        f"{name} is stored as {value.dtype} and can't train. Try float32 weights for frozen blocks, or a "
                        "higher split."
                    )
            self._selected = wanted

    def evaluate(self, inputs: Images, cached_blocks: int = 0, patch_tokens: tuple[int, ...] | None = None) -> Array:
        selection = self._frozen if patch_tokens is None else Selection(self._frozen.trains, patch_tokens)
        with self._evaluating():
            logits, _ = self._forward(inputs, selection, cached_blocks=cached_blocks)
            result: Array = logits.numpy().copy()
        return result

    @property
    def has_linear_head(self) -> bool:
        head = self.model.get_classifier()
        return isinstance(head, torch.nn.Linear) and head.bias is not None

    def head_inputs(self, inputs: Images, cached_blocks: int, patch_tokens: tuple[int, ...]) -> Array:
        selection = Selection(self._frozen.trains, patch_tokens)
        with self._evaluating():
            found, _ = self._forward(inputs, selection, cached_blocks=cached_blocks, classifies=False)
            result: Array = found.numpy().copy()
        return result

    def set_head(self, weight: Array, bias: Array) -> None:
        head = self.model.get_classifier()
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight))
            head.bias.copy_(torch.from_numpy(bias))

    def features(self, inputs: Images, patch_tokens: Sequence[int], *, pooled: bool) -> Array:
        with self._prefix_alone():
            found: Array = prefix(
                self.model, torch.from_numpy(inputs), patch_tokens, pooled=pooled, score=self._score
            ).numpy()
        return found

    def whole_and_pruned_features(self, inputs: Images, blocks: int, leaving: int) -> tuple[Array, Array]:
        with self._prefix_alone():
            whole, pruned = prefix_whole_and_pruned(self.model, torch.from_numpy(inputs), blocks, leaving, self._score)
        return whole.numpy(), pruned.numpy()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """All of the model in eval mode, without gradient."""
        if self._selected is not None or self.model.training:
            self._selected = None
            self.model.eval()
        with torch.inference_mode():
            yield

    @contextmanager
    def _prefix_alone(self) -> Iterator[None]:
        if self._selected is None:  # else what is frozen is in eval mode already, and what trains stays as it is
            self.model.eval()
        with torch.inference_mode():
            yield

    def use_token_score(self, score: TokenScore) -> None:
        self._score = score

    def look(self, inputs: Images, blocks: Sequence[int], *, scored: bool) -> Looked:
        with self._prefix_alone():
            found = look(self.model, torch.from_numpy(inputs), blocks, scored=scored)
        return Looked(
            [part.numpy() for part in found.at_blocks],
            found.tokens.numpy(),
            {score: values.numpy() for score, values in found.scores.items()},
        )

    def at_end(self, tokens: Array, blocks: int) -> Array:
        with self._evaluating():
            found: Array = at_end(self.model, torch.from_numpy(tokens), blocks).numpy()
        return found

    def pruned(self, tokens: Array, scores: Array, leaving: int) -> Array:
        given = (torch.from_numpy(tokens), torch.from_numpy(scores))
        with torch.inference_mode():
            kept: Array = keep_tokens(*given, leaving, self.model.num_prefix_tokens).numpy()
        return kept

    def drop_prefix(self, blocks: int, stored: Mapping[str, Array]) -> int:
        dropped = 0
        for name, value in self.model.named_parameters():
            region = region_of(name)
            if (region == "embeddings" or (isinstance(region, int) and region < blocks)) and value.numel():
                if name not in stored:
                    raise RuntimeError(f"{name} is not stored, and would be lost")
                dropped += value.numel() * value.element_size()
                value.requires_grad_(False)
                value.data = value.data.new_empty(0)
                self._dropped[name] = stored
        self._selected = None
        return dropped

    def bring_back_prefix(self) -> None:
        own = dict(self.model.named_parameters())
        for name in list(self._dropped):
            array = np.require(self._dropped[name][name], requirements=["W", "O"])
            own[name].data = torch.from_numpy(array).to(own[name].dtype)
            del self._dropped[name]

    def use_split(self, split_block: int, *, embeddings_train: bool) -> None:
        """Nothing to do: each selection says what trains."""

    def model_tensors(self) -> Mapping[str, Array]:
        return _Tensors(self.model.state_dict(), self._dropped)

    def trained_names(self, selection_space: Selection) -> set[str]:
        return {name for name, _ in self.model.named_parameters() if trains(region_of(name), selection_space)}

    def reserve(self, space: Selection) -> None:
        names = self.trained_names(space)
        self.optimizer.evict(names)
        self.optimizer.reserve((name, value) for name, value in self.model.named_parameters() if name in names)

    def store_half(self, blocks: int) -> None:
        store_half(self.model, blocks)

    def optimizer_tensors(self) -> Iterator[tuple[str, Array]]:
        for name, state in self.optimizer.state.items():
            for key, tensor in state.items():
                yield f"{name}|{key}", tensor.numpy()

    def optimizer_steps(self) -> dict[str, int]:
        return dict(self.optimizer.steps)

    def restore(self, model: Mapping[str, Array], optimizer: Mapping[str, Array], steps: Mapping[str, int]) -> None:
        own = self.model.state_dict()
        with torch.no_grad():
            for name, array in model.items():
                # torch warns of memory that can't be written to, as a file's bytes can't.
                own[name].copy_(torch.from_numpy(np.require(array, requirements="W")))
        self.optimizer.state = {}
        for name, part, array in named_state(
            self.optimizer.settings.name, optimizer, lambda name: tuple(own[name].shape)
        ):
            self.optimizer.state.setdefault(name, {})[part] = torch.from_numpy(
                np.require(array, requirements=["W", "O"])
            )
        self.optimizer.steps = dict(steps)


class _Tensors(Mapping[str, Array]):
    """A state dict as arrays, each made when it is asked for: what is stored as bfloat16 is widened one at a time, what
    left memory is read from where it is stored.
    """

    def __init__(self, state: Mapping[str, Tensor], dropped: Mapping[str, Mapping[str, Array]]) -> None:
        self._state, self._dropped = state, dict(dropped)

    def __getitem__(self, name: str) -> Array:
        if name in self._dropped:
            return self._dropped[name][name]
        tensor = self._state[name]
        array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class _UpdatesInBackward:
    """While a backward runs, each weight is updated as soon as its gradient is there, and the gradient goes.

    A gradient that is no finite number updates nothing, and from then on nothing below it is updated in this step.
    """

    def __init__(self, optimizer: Optimizer, learning_rate: float) -> None:
        self.finite = True
        self._optimizer, self._learning_rate = optimizer, learning_rate
        self._handles: list[Any] = []

    def begin(self, trained: list[tuple[str, torch.nn.Parameter]]) -> None:
        self._optimizer.reserve(trained)
        self._optimizer.reserve_scratch(trained)  # before anything changes
        for name, value in trained:
            hook = partial(self._update, name)
            self._handles.append(value.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _update(self, name: str, parameter: Tensor) -> None:
        if self.finite:
            with torch.no_grad():
                self.finite = self._optimizer.update_one(name, parameter, self._learning_rate)
        parameter.grad = None

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._optimizer.drop_scratch()


def own_kernels() -> None:
    """Let torch compute in this process without the libraries it would choose by what it is given, see
    docs/decisions/0006-memory-model.md.

    oneDNN compiles a kernel for each shape and keeps it (0.8 MiB of data segment each), takes scratch that grows with the
    threads, and does not survive running out of memory. NNPACK convolves from 16 images on, to other last bits than fewer
    images get, and keeps what it works in.
    """
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    nnpack.set_flags(False)  # type: ignore[no-untyped-call]


def warm_up(optimizer: OptimizerSettings) -> None:
    """Steps and an evaluation of a small model in every way a run may take, so that the code that it needs is in memory.

    What the process holds after it is the runtime; what comes later is training. (Kernels differ with the size of what
    they are given, so it is no smaller than it is.)
    """
    model = build(Architecture(img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3), classes=10)
    backend = TorchBackend(model, optimizer)
    inputs, labels = np.zeros((4, 3, 64, 64), np.float32), np.zeros(4, np.int64)
    for parts, level, in_backward in ((1, Recompute.MLP, True), (2, Recompute.BLOCK, False)):
        backend.step(
            [(inputs, labels)] * parts,
            Selection((True, True), (64, 40), embeddings_train=True, recompute=(level, level)),
            images=4 * parts,
            weight_sum=4.0 * parts,
            learning_rate=0.0,
            seed=0,
            with_deltas=True,
            updates_in_backward=in_backward,
        )
    backend.evaluate(inputs)
    del model, backend
    gc.collect()  # hooks and modules refer to one another: left alone, they would count as runtime for a while
