"""What the trainer asks of a backend. Pure: numpy arrays go in and come out, so a fake one makes the trainer testable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edgetune.cost import Selection, TokenScore

Images = npt.NDArray[np.float32]  # (B, 3, H, W)
Labels = npt.NDArray[np.int64]  # (B,)
Array = npt.NDArray[Any]


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one optimizer step reports. The loss and the deltas are means over the step's images."""

    loss: float
    correct: int
    images: int
    class_token_deltas: tuple[float, ...] | None
    updated: bool = True  # False: the loss was no finite number, and nothing changed


class EvaluationResult(msgspec.Struct, frozen=True):
    """Logits (B, classes) of one batch."""

    logits: Any


class Looked(NamedTuple):
    """What `Backend.look` found, float32. A summary (B, 2 D): class token and mean patch token."""

    at_blocks: list[Array]
    tokens: Array  # (B, T, D), all that leave the deepest of the blocks
    scores: dict[TokenScore, Array]  # of each, (B, T); nothing where none was asked for


class Backend(Protocol):
    """A model that can be stepped, evaluated, saved and restored."""

    name: str

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
        """One optimizer step over `images` images, whose class weights add up to `weight_sum`.

        `updates_in_backward`: no gradient outlives its use (one micro-batch only). `keeps_state`: False drops the
        optimizer state of what this step does not train. `cached_blocks`: the inputs are what `features` made of the
        images with so many blocks, (B, T, D). If memory runs out the error comes through, and nothing of the
        step stays but whole updates of weights, which the next call with the same step leaves alone.
        """
        ...

    def evaluate(self, inputs: Images, cached_blocks: int = 0, patch_tokens: tuple[int, ...] | None = None) -> Array:
        """Logits (B, classes) in eval mode; nothing of the training state changes.

        `cached_blocks` as for `step`; `patch_tokens`: how many each block sees, by default all.
        """
        ...

    @property
    def has_linear_head(self) -> bool:
        """Whether one linear layer makes the logits."""
        ...

    def head_inputs(self, inputs: Images, cached_blocks: int, patch_tokens: tuple[int, ...]) -> Array:
        """What the classifier is given in eval mode, float32 (B, D). Arguments as for `evaluate`."""
        ...

    def set_head(self, weight: Array, bias: Array) -> None:
        """Put a classifier in place: weight (classes, D), bias (classes,)."""
        ...

    def use_token_score(self, score: TokenScore) -> None:
        """From now on patch tokens are dropped by this score; at first it is "attention"."""
        ...

    def look(self, inputs: Images, blocks: Sequence[int], *, scored: bool) -> Looked:
        """What the pretrained model makes of images after each of `blocks` blocks (rising); `scored`: with the scores by
        which tokens may be dropped after the last of these.
        """
        ...

    def at_end(self, tokens: Array, blocks: int) -> Array:
        """The summary at the model's end of `tokens` (B, T, D) that go on after `blocks` blocks."""
        ...

    def pruned(self, tokens: Array, scores: Array, leaving: int) -> Array:
        """Of looked `tokens` (B, T, D) those that go on where `leaving` patch tokens do, as `features` would have them."""
        ...

    def features(self, inputs: Images, patch_tokens: Sequence[int], *, pooled: bool) -> Array:
        """What the frozen prefix makes of images, float32 (B, T, D): the same whatever else is in the batch.

        `patch_tokens`: how many enter each of its blocks and, last, how many leave. `pooled`: the prefix tokens alone.
        """
        ...

    def whole_and_pruned_features(self, inputs: Images, blocks: int, leaving: int) -> tuple[Array, Array]:
        """`features` of the lowest `blocks` blocks on all tokens, and with `leaving` patch tokens that leave the last one."""
        ...

    def drop_prefix(self, blocks: int, stored: Mapping[str, Array]) -> int:
        """Let the weights of the embeddings and the lowest `blocks` blocks go; `stored` has them for whoever asks.

        Returns the bytes that were let go.
        """
        ...

    def bring_back_prefix(self) -> None:
        """Read what `drop_prefix` let go."""
        ...

    def use_split(self, split_block: int, *, embeddings_train: bool) -> None:
        """From now on nothing below a block trains (nor the embeddings, unless they are said to)."""
        ...

    def model_tensors(self) -> Mapping[str, Array]:
        """Every parameter and buffer by timm's name, float32; an array may be made when it is asked for."""
        ...

    def trained_names(self, selection_space: Selection) -> set[str]:
        """Names of the parameters that may train under a selection."""
        ...

    def reserve(self, space: Selection) -> None:
        """Make the optimizer state of everything that may ever train, so that memory does not grow step by step.

        State of what may train no longer goes.
        """
        ...

    def store_half(self, blocks: int) -> None:
        """Store the weights of the lowest `blocks` blocks, which never train, as bfloat16."""
        ...

    def optimizer_tensors(self) -> Iterator[tuple[str, Array]]: ...

    def optimizer_steps(self) -> dict[str, int]: ...

    def restore(self, model: Mapping[str, Array], optimizer: Mapping[str, Array], steps: Mapping[str, int]) -> None:
        """Put back what `model_tensors`, `optimizer_tensors` and `optimizer_steps` gave."""
        ...
