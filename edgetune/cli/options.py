"""Option types that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Any

from edgetune.errors import UsageError


class MethodName(str, Enum):
    full = "full"
    head = "head"
    last_k = "last-k"
    random_k = "random-k"
    alast = "alast"


class BackendChoice(str, Enum):
    torch = "torch"
    ort = "ort"


class OptimizerChoice(str, Enum):
    adamw = "adamw"
    momentum = "momentum"
    sgd = "sgd"
    adafactor = "adafactor"


class RecomputeLevel(str, Enum):
    auto = "auto"
    none = "none"
    mlp = "mlp"
    block = "block"


class Embeddings(str, Enum):
    auto = "auto"
    train = "train"
    freeze = "freeze"


class OptimizerState(str, Enum):
    auto = "auto"
    keep = "keep"
    evict = "evict"


class FrozenWeights(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class CachePrecision(str, Enum):
    float16 = "float16"
    float32 = "float32"


class TokenScore(str, Enum):
    attention = "attention"
    distance = "distance"


class Enforce(str, Enum):
    auto = "auto"
    rlimit = "rlimit"
    cgroup = "cgroup"
    none = "none"


def plan_settings(
    *,
    token_floor: float | None,
    token_ceiling: float | None,
    split_tokens: float | None,
    token_score: TokenScore | None,
    embeddings: Embeddings | None,
    recompute: RecomputeLevel | None,
    step_in_backward: bool | None,
    optimizer_state: OptimizerState | None,
    frozen_weights: FrozenWeights | None,
) -> dict[str, Any]:
    """The levers as `RunSettings` and `PlanRequest` name them; those not given are absent."""
    kept = {None: None, "auto": None, "keep": True, "evict": False}
    given: dict[str, Any] = {
        "token_floor": token_floor,
        "token_ceiling": token_ceiling,
        "split_tokens": split_tokens,
        "token_score": None if token_score is None else token_score.value,
        "embeddings": None if embeddings is None else embeddings.value,
        "recompute": None if recompute is None else recompute.value,
        "updates_in_backward": step_in_backward,
        "keeps_state": kept[None if optimizer_state is None else optimizer_state.value],
        "half_frozen": None if frozen_weights is None else frozen_weights is FrozenWeights.bfloat16,
    }
    return {name: value for name, value in given.items() if value is not None}


def parse_split(text: str | None) -> int | None:
    """The block that was named; None for `auto` and `lowest`."""
    if text is None or text in SPLIT_CHOICES:
        return None
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"--split takes `auto`, `lowest` or a block's number, not {text!r}.")
    return int(text)


SPLIT_CHOICES = ("auto", "lowest")


def parse_views(text: str | None) -> int | None:
    """A number of views; 0 for `auto`."""
    if text is None:
        return None
    if text == "auto":
        return 0
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--augment-views takes `auto` or a number from 1, not {text!r}.")
    return int(text)
