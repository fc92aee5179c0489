"""The PyTorch backend: one optimizer step over micro-batches, on the explicit loop of `vit.loop`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from edgetune.backends.base import Array, Images, Labels, StepResult
from edgetune.cost import Selection, all_tokens_kept
from edgetune.optim import Optimizer, OptimizerSettings
from edgetune.vit.loop import apply_selection, forward, region_of, shape_of, trains


class TorchBackend:
    """A timm ViT in training. The model's classes, keys and shapes stay what they are; only trained values change."""

    name = "pytorch"

    def __init__(
        self,
        model: VisionTransformer,
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
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights)
        shape = shape_of(model, "model")
        self._frozen = all_tokens_kept(shape, (False,) * shape.depth)
        self._selected: tuple[tuple[bool, ...], bool] | None = None

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
    ) -> StepResult:
        self._select(selection)
        # Dropout and drop path draw from a function of (seed, step), so a resumed run draws the same.
        torch.manual_seed(seed)
        loss_sum, correct = 0.0, 0
        deltas = [0.0] * selection.depth
        finite = True
        for inputs, labels in micro_batches:
            target = torch.from_numpy(labels)
            logits, batch_deltas = forward(self.model, torch.from_numpy(inputs), selection, with_deltas=with_deltas)
            loss = self._loss_sum(logits, target) / weight_sum
            value = loss.item()
            if not math.isfinite(value):
                finite = False
                break
            if self._at_peak is not None:
                self._at_peak()
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += value
            correct += int((logits.detach().argmax(dim=1) == target).sum())
            share = len(labels) / images
            for block, delta in enumerate(batch_deltas):
                deltas[block] += delta.item() * share
        finite = finite and self._gradients_are_finite()
        if finite:
            with torch.no_grad():
                self.optimizer.step(self.model.named_parameters(), learning_rate)
        for parameter in self.model.parameters():
            parameter.grad = None
        return StepResult(
            loss=loss_sum if finite else math.nan,
            correct=correct,
            images=images,
            class_token_deltas=tuple(deltas) if with_deltas else None,
            updated=finite,
        )

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
        wanted = (selection.trains, selection.embeddings_train)
        if wanted != self._selected:
            apply_selection(self.model, selection)
            self._selected = wanted

    def evaluate(self, inputs: Images) -> Array:
        if self._selected is not None or self.model.training:
            self._selected = None
            self.model.eval()
        with torch.inference_mode():
            logits, _ = forward(self.model, torch.from_numpy(inputs), self._frozen)
            result: Array = logits.numpy().copy()
        return result

    def model_tensors(self) -> Iterator[tuple[str, Array]]:
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.numpy()

    def trained_names(self, selection_space: Selection) -> set[str]:
        return {name for name, _ in self.model.named_parameters() if trains(region_of(name), selection_space)}

    def reserve(self, space: Selection) -> None:
        names = self.trained_names(space)
        self.optimizer.reserve((name, value) for name, value in self.model.named_parameters() if name in names)

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
        for key, array in optimizer.items():
            name, _, part = key.rpartition("|")
            self.optimizer.state.setdefault(name, {})[part] = torch.from_numpy(np.array(array))
        self.optimizer.steps = dict(steps)


def warm_up(optimizer: OptimizerSettings) -> None:
    """One training step and one evaluation of a model of no size, so that the code that any run needs is in memory.

    What the process holds after it is the runtime; what comes later is training.
    """
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=2)
    backend = TorchBackend(model, optimizer)
    inputs, labels = np.zeros((1, 3, 32, 32), np.float32), np.zeros(1, np.int64)
    backend.step(
        [(inputs, labels)],
        Selection((True, True), (4, 2), embeddings_train=True),
        images=1,
        weight_sum=1.0,
        learning_rate=0.0,
        seed=0,
        with_deltas=True,
    )
    backend.evaluate(inputs)
