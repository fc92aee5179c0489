"""What stands in for the real thing in tests: small image folders, a backend without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edgetune.backends.base import Array, Images, Labels, Looked, StepResult
from edgetune.cost import Selection, TokenScore


def make_images(root: Path, counts: Mapping[str, int], size: int = 32, seed: int = 0) -> Path:
    """Class folders of PNGs that can be told apart: a square whose place and colour depend on the class, in noise."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 80, (size, size, 3), dtype=np.uint8)
            row = (label * 7) % (size - 12) + int(rng.integers(0, 3))
            pixels[row : row + 10, 4:20, label % 3] += 150
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return root


class FakeBackend:
    """A linear classifier in numpy: everything of the protocol, nothing of torch. It records what it was asked.

    `fail_at` are calls of `step` (from 1) with a loss that is no number. `raises[done]` are raised by the next calls
    after `done` whole steps, one each, when `raises_after` micro-batches are computed; `evaluation_raises` by the next
    calls of `evaluate`, None letting one through.
    """

    name = "fake"

    def __init__(self, classes: int, pixels: int, depth: int = 4) -> None:
        self.weight = np.zeros((pixels, classes), np.float32)
        self.depth = depth
        self.selections: list[Selection] = []
        self.batches: list[list[int]] = []
        self.rates: list[float] = []
        self.fail_at: set[int] = set()
        self.raises: dict[int, list[Exception]] = {}
        self.raises_after = 1
        self.evaluation_raises: list[Exception | None] = []
        self.evaluated: list[int] = []
        self.seen: list[list[bytes]] = []  # of each whole step, its images in order
        self._steps = 0

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
        gradient, loss, correct, sizes = np.zeros_like(self.weight), 0.0, 0, []
        planned, seen = self.raises.get(self._steps), []
        for inputs, labels in micro_batches:
            if planned and len(sizes) == self.raises_after:
                raise planned.pop(0)
            seen += [image.tobytes() for image in inputs]
            flat = inputs.reshape(len(labels), -1)
            probabilities = _softmax(flat @ self.weight)
            rows = np.arange(len(labels))
            loss -= float(np.log(probabilities[rows, labels]).sum())
            correct += int((probabilities.argmax(axis=1) == labels).sum())
            probabilities[rows, labels] -= 1
            gradient += flat.T @ probabilities.astype(np.float32)
            sizes.append(len(labels))
            if self._steps + 1 in self.fail_at:
                break
        if planned:
            raise planned.pop(0)
        self._steps += 1
        self.seen.append(seen)
        self.selections.append(selection)
        self.batches.append(sizes)
        self.rates.append(learning_rate)
        if self._steps in self.fail_at:
            return StepResult(loss=float("nan"), correct=0, images=images, class_token_deltas=None, updated=False)
        self.weight -= learning_rate * gradient / weight_sum
        deltas = (
            tuple(0.1 * (block + 1) + seed % (97 + block) / 970 for block in range(self.depth)) if with_deltas else None
        )
        return StepResult(loss=loss / weight_sum, correct=correct, images=images, class_token_deltas=deltas)

    def evaluate(self, inputs: Images, cached_blocks: int = 0, patch_tokens: tuple[int, ...] | None = None) -> Array:
        error = self.evaluation_raises.pop(0) if self.evaluation_raises else None
        if error is not None:
            raise error
        self.evaluated.append(len(inputs))
        return inputs.reshape(len(inputs), -1) @ self.weight

    def features(self, inputs: Images, patch_tokens: Sequence[int], *, pooled: bool) -> Array:
        raise NotImplementedError

    def whole_and_pruned_features(self, inputs: Images, blocks: int, leaving: int) -> tuple[Array, Array]:
        raise NotImplementedError

    has_linear_head = False

    def head_inputs(self, inputs: Images, cached_blocks: int, patch_tokens: tuple[int, ...]) -> Array:
        raise NotImplementedError

    def set_head(self, weight: Array, bias: Array) -> None:
        raise NotImplementedError

    def use_token_score(self, score: TokenScore) -> None: ...

    def look(self, inputs: Images, blocks: Sequence[int], *, scored: bool) -> Looked:
        raise NotImplementedError

    def at_end(self, tokens: Array, blocks: int) -> Array:
        raise NotImplementedError

    def pruned(self, tokens: Array, scores: Array, leaving: int) -> Array:
        raise NotImplementedError

    def drop_prefix(self, blocks: int, stored: Mapping[str, Array]) -> int:
        raise NotImplementedError

    def bring_back_prefix(self) -> None:
        raise NotImplementedError

    def model_tensors(self) -> Mapping[str, Array]:
        return {"head.weight": self.weight}

    def trained_names(self, selection_space: Selection) -> set[str]:
        return {"head.weight"}

    def reserve(self, space: Selection) -> None: ...

    def store_half(self, blocks: int) -> None: ...

    def use_split(self, split_block: int, *, embeddings_train: bool) -> None: ...

    def optimizer_tensors(self) -> Iterator[tuple[str, Array]]:
        yield from ()

    def optimizer_steps(self) -> dict[str, int]:
        return {"head.weight": self._steps}

    def restore(self, model: Mapping[str, Array], optimizer: Mapping[str, Array], steps: Mapping[str, int]) -> None:
        if "head.weight" in model:
            self.weight = np.array(model["head.weight"])
        self._steps = steps.get("head.weight", 0)


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result
