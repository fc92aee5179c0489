"""What the walk of a step is written in: a tape of live bytes, a block's tensors by size. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from edgetune.cost.values import ViTShape

FLOAT_BYTES = 4
INDEX_BYTES = 8
# State of torch's generator, kept where a recomputed block may draw from it.
RANDOM_STATE_BYTES = 5056


class Mode(NamedTuple):
    """How a step treats gradients, and with how many threads it runs."""

    accumulates: bool = False  # a weight's new gradient is added to one that is there, and goes
    updates_in_backward: bool = False  # a weight's gradient goes as soon as the weight is updated
    threads: int = 1
    half_weights: bool = False  # a weight is a float32 copy of what is stored as bfloat16, while its module runs

    @property
    def gradients_stay(self) -> bool:
        return not (self.accumulates or self.updates_in_backward)

    @property
    def gradients_way(self) -> int:
        """0 where gradients stay, 1 where they are added to others, 2 where they are used up."""
        return 1 if self.accumulates else 2 if self.updates_in_backward else 0


class Tape:
    """Live bytes now and at most."""

    __slots__ = ("live", "peak")

    def __init__(self) -> None:
        self.live = self.peak = 0

    def take(self, size: int) -> None:
        self.live += size
        if self.live > self.peak:
            self.peak = self.live

    def free(self, size: int) -> None:
        self.live -= size

    def touch(self, size: int) -> None:
        """Take and give back."""
        if self.live + size > self.peak:
            self.peak = self.live + size


class Sizes(NamedTuple):
    stream: int  # (B, T, D)
    attention: int  # (B, T, A)
    hidden: int  # (B, T, M)
    statistic: int  # one float a token
    head_statistic: int  # one float a token and head
    query_rows: int  # rows of queries that a thread of fused attention works on at once
    tokens: int
    batch: int


def block_sizes(shape: ViTShape, tokens: int, batch: int) -> Sizes:
    token = batch * tokens * FLOAT_BYTES
    rows = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    return Sizes(
        stream=token * shape.width,
        attention=token * shape.attention_width,
        hidden=token * shape.mlp_width,
        statistic=token,
        head_statistic=token * shape.heads,
        query_rows=min(rows, tokens),
        tokens=tokens,
        batch=batch,
    )


def plain_saved_floats(shape: ViTShape, trained: bool) -> int:
    """Floats a token that autograd keeps of timm's plain `Block` (frozen on the path, or trained)."""
    width, mlp, attention = shape.width, shape.mlp_width, shape.attention_width
    # Inputs of both norms; q, k, v; attention's output; mean and rstd of both norms; log-sum-exp of each head's rows.
    floats = 2 * width + 4 * attention + 4 + shape.heads
    if shape.qk_norm:
        floats += 2 * attention + 4 * shape.heads + (attention if trained else 0)
    # The activation's input. A gated MLP keeps both halves and the activated one.
    floats += 3 * mlp if shape.gated_mlp else mlp
    if trained:
        floats += 2 * width + mlp + (2 * width if shape.layer_scale else 0)  # inputs of qkv, fc1, fc2 and the scales
    return floats
