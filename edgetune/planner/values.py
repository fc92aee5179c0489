"""What a plan is a function of, and the plan. Values only."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgetune.cost import BlockState, Recompute, Selection, StepCost, TokenScore, ViTShape, block_states
from edgetune.optim import OptimizerName
from edgetune.units import MIB

# What a run's process holds beyond live tensors: a share (blocks the allocator keeps, alignment) and a fixed part
# (Python objects, code paged in by kernels the warm-up did not meet, report). Measured by `benchmarks/cap.py`.
ALLOCATOR_SHARE = 0.03
PROCESS_BYTES = 5 * MIB
# What small tensors of blocks that train leave as holes, where all of them may train; else their share of it.
HOLES_BYTES = 3 * MIB
# More of them where the number of tokens changes from step to step.
TOKEN_HOLES_BYTES = MIB
# Where RLIMIT_DATA holds the cap: it must leave room for code that is paged in later, which it does not count.
LIMIT_BYTES = 6 * MIB
# Micro-batches that exist beside the one being computed: one being loaded, one waiting.
PREFETCHED_BATCHES = 2
# Tokens that a pass without gradient takes at once, at most (of one image all). More at once are no faster, on one or two
# x86 threads, from the bundled model up to ViT-B; where freed memory is given back they are slower.
PASS_TOKENS = 1024
# Training images that a classifier fitted in closed form is judged by, each left out of what tells it.
JUDGED_IMAGES = 512
TOKEN_MULTIPLE = 8
# Passes over the images from which on it pays to look for the split.
LEAST_PASSES = 3
# Training images without which a look tells nothing: of fewer, one more or less told right is over 3 points, about what splits
# differ by (benchmarks/split_study.md). One that is alone in its class does not count: left out, nothing else can tell it.
LEAST_LOOKED_AT = 32

RecomputeChoice = Literal["auto", "none", "mlp", "block"]
EmbeddingsChoice = Literal["auto", "train", "freeze"]


PLAN_FORMAT_VERSION = 5


class MethodSpace(msgspec.Struct, frozen=True, kw_only=True):
    """What a method lets the planner choose from. `methods.py` makes one for each method."""

    name: str
    splits: tuple[int, ...]
    # K for each split, best first.
    trained_blocks: dict[int, tuple[int, ...]]
    # Whether the embeddings train, best first.
    embeddings: tuple[bool, ...] = (False,)
    prunes_tokens: bool = False
    # Blocks are drawn anew each step from those above the split (else the top K train throughout).
    draws: bool = False


class CacheRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a run that may cache its frozen prefix is like."""

    train_images: int
    val_images: int
    steps: int  # of the whole run
    views: int = 1  # fixed augmented views of an image
    float_bytes: int = 2
    limit_bytes: int | None = None  # that it may take on disk
    asked: bool = False  # whether or not it saves time
    blocks: int | None = None  # of the cache that there is already


class CachedPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """What a run keeps of its frozen prefix on disk: for each image (each view of it) what its last block puts out.

    `whole`: all of it fits, so the prefix leaves memory once it is there. Otherwise as much as fits is kept, and memory is
    planned as if nothing were.
    """

    blocks: int
    pooled: bool  # the prefix tokens alone, which are all that a head reads
    patch_tokens: int  # that enter the first block above
    stored_tokens: int  # of an image, prefix tokens included
    width: int
    float_bytes: int
    views: int
    train_bytes: int
    val_bytes: int
    whole: bool

    @property
    def total_bytes(self) -> int:
        return self.train_bytes + self.val_bytes


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a plan is a function of. None and "auto": the planner's choice."""

    shape: ViTShape
    space: MethodSpace
    batch_size: int
    optimizer: OptimizerName
    cap_bytes: int
    runtime_bytes: int
    token_floor: float | None = None
    token_ceiling: float | None = None  # most of its tokens that a block may pass on, a share
    split_tokens: float | None = None  # of the patch tokens, the share that goes on at the split
    token_score: TokenScore = "attention"  # by which tokens are dropped
    accumulation: int | None = None
    recompute: RecomputeChoice = "auto"
    updates_in_backward: bool | None = None
    keeps_state: bool | None = None
    half_frozen: bool = False
    decode_bytes: int = 0  # the largest image's decoding
    overlaps: bool = True  # images are loaded while a step runs, else between steps
    load_copies: float = 1.0  # of the weights, while they are loaded
    threads: int = 1
    peak_flops_per_s: float | None = None
    memory_bandwidth_bytes_per_s: float | None = None
    fits_head: bool = False  # the classifier is fitted before anything else trains
    by_limit: bool = False  # RLIMIT_DATA holds the cap
    cache: CacheRequest | None = None
    no_cache_because: str | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run may do. Every step's selection is clipped to it, so the prediction bounds every step."""

    format_version: int = PLAN_FORMAT_VERSION
    model: str
    method: str
    optimizer: OptimizerName
    split_block: int
    trained_blocks: int
    ever_trained_blocks: int
    embeddings_train: bool
    draws: bool
    token_ceiling: tuple[int, ...]
    token_floor: float
    token_score: TokenScore
    batch_size: int
    micro_batch: int
    accumulation: int
    recompute: tuple[Recompute, ...]  # of each block where it trains
    recompute_frozen: Recompute  # at least, of a frozen block that gradient passes through
    updates_in_backward: bool
    keeps_state: bool  # else the optimizer state of blocks that a step does not train is dropped
    half_frozen: bool  # weights below the split are stored as bfloat16
    evaluation_batch: int
    prefix: CachedPrefix | None  # read from a cache
    cache_batch: int  # images that go through it at once while it is made
    overlaps: bool  # images are loaded while a step runs
    memory_binds: bool  # a larger or faster plan was refused
    kept_free_bytes: int  # of the cap, beside what every process and every live byte takes
    threads: int
    cap_bytes: int
    runtime_bytes: int
    predicted: StepCost
    predicted_peak_bytes: int
    predicted_phase_bytes: dict[str, int]
    predicted_step_seconds: float | None
    explanation: tuple[str, ...]


class Lossy(msgspec.Struct, frozen=True):
    """Choices that change what is learnt, and so come after every lossless one."""

    split_block: int
    trained_blocks: int
    token_ceiling: tuple[int, ...]
    embeddings_train: bool
    keeps_state: bool


class Lossless(msgspec.Struct, frozen=True):
    """Choices that change time and memory alone: the same gradients, the same updates."""

    micro_batch: int
    recompute: tuple[Recompute, ...]
    recompute_frozen: Recompute
    updates_in_backward: bool


def with_levels(
    trains: tuple[bool, ...],
    tokens: tuple[int, ...],
    embeddings_train: bool,
    recompute: tuple[Recompute, ...],
    recompute_frozen: Recompute,
) -> Selection:
    """The selection with each block's recompute level, which depends on whether it trains."""
    plain = Selection(trains, tokens, embeddings_train)
    if not any(recompute) and recompute_frozen is Recompute.NOTHING:
        return plain
    levels = tuple(
        Recompute.NOTHING
        if state is BlockState.BELOW
        else recompute[block]
        if state is BlockState.TRAINED
        else max(recompute[block], recompute_frozen)
        for block, state in enumerate(block_states(plain))
    )
    return Selection(trains, tokens, embeddings_train, levels)


def accumulation_of(request: PlanRequest, micro_batch: int) -> int:
    return -(-request.batch_size // micro_batch)
