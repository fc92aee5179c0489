"""The fine-tuning methods. Each is a space for the planner and a way to choose a step; all run on the same loop."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from edgetune import alast
from edgetune.cost import Selection, ViTShape
from edgetune.errors import UnsupportedModel, UsageError
from edgetune.optim import OptimizerName
from edgetune.planner import EmbeddingsChoice, MethodSpace, Plan

# Most blocks that train in a step, of all: the one known configuration of ALaST trains 9 of 12. Above a split at a quarter
# of the depth and higher that is all there are: to draw 3 of 4 costs accuracy (docs/decisions/0009-prefix-cache.md).
DRAWN_SHARE = 0.75
LAST_K_SHARE = 1 / 3
# Whether the embeddings train under `full`, best first.
EMBEDDINGS: dict[EmbeddingsChoice, tuple[bool, ...]] = {"auto": (True, False), "train": (True,), "freeze": (False,)}


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """A method's name and its defaults. Rates are those of `benchmarks/defaults.md` (found by `benchmarks/defaults.py` on a
    model of width 96), see `default_rate`.
    """

    name: str
    learning_rate: dict[OptimizerName, float]
    draws: bool = False
    prunes_tokens: bool = False
    head_first: bool = True  # the classifier is fitted before anything else trains
    help: str = ""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="full",
            learning_rate={"adamw": 3e-4, "momentum": 3e-3, "sgd": 3e-2, "adafactor": 1e-2},
            head_first=False,  # the plain recipe, which others are compared with
            help="every parameter",
        ),
        Method(
            name="head",
            learning_rate={"adamw": 3e-2, "momentum": 1e-1, "sgd": 3e-1, "adafactor": 3e-1},
            head_first=False,
            help="the classifier and the norm before it",
        ),
        Method(
            name="last-k",
            learning_rate={"adamw": 1e-3, "momentum": 1e-2, "sgd": 1e-1, "adafactor": 3e-2},
            help="the last K blocks",
        ),
        Method(
            name="random-k",
            learning_rate={"adamw": 1e-3, "momentum": 1e-2, "sgd": 1e-1, "adafactor": 3e-2},
            draws=True,
            help="K blocks drawn anew each step",
        ),
        Method(
            name="alast",
            learning_rate={"adamw": 1e-3, "momentum": 1e-2, "sgd": 1e-1, "adafactor": 3e-2},
            draws=True,
            prunes_tokens=True,
            help="K blocks drawn by budget, tokens pruned by attention (arXiv 2408.08670)",
        ),
    )
}


# The width of the model that the default rates were found on.
_TUNED_WIDTH = 96


def default_rate(method: Method, optimizer: OptimizerName, width: int) -> float:
    """Peak learning rate for a model of this width. Adam's steps have a size of their own, so what a layer's output
    changes by grows with its width: the rate falls with it (Yang et al., arXiv 2203.03466). A head alone is one layer on
    normalised features, and the other optimizers scale their steps by the gradient or the weight.
    """
    rate = method.learning_rate[optimizer]
    return rate * min(1.0, _TUNED_WIDTH / width) if optimizer == "adamw" and method.name != "head" else rate


def adaptive_obstacle(shape: ViTShape) -> str | None:
    """Why ALaST can't run on this model, or None if it can."""
    if not shape.class_token:
        return "it has no class token, from which ALaST takes its budgets and the ranking of tokens"
    if not shape.token_pool:
        return "its head does not read the class token (global_pool is not 'token')"
    if not shape.fused_qkv:
        return "its attention is not timm's plain one with a joint `attn.qkv`, from which the class token's row is read"
    return None


def check_model(method: Method, shape: ViTShape, obstacle: str | None, *, split_tokens: float | None = None) -> None:
    """Raises: UnsupportedModel if ALaST, or dropping tokens at the split, can't run on the model, naming why and what
    works.
    """
    if split_tokens is not None and obstacle is not None:
        raise UnsupportedModel(f"--split-tokens: no tokens can be dropped in {shape.name}: {obstacle}. Leave it out.")
    if method.prunes_tokens and obstacle is not None:
        raise UnsupportedModel(
            f"ALaST can't train {shape.name}: {obstacle}. "
            f"Methods that work on it: {', '.join(name for name in METHODS if name != method.name)}."
        )


def space_of(
    method: Method,
    shape: ViTShape,
    *,
    trained_blocks: int | None,
    split_block: int | None,
    embeddings: EmbeddingsChoice = "auto",
) -> MethodSpace:
    """What the planner may choose from, most preferred first.

    Raises: UsageError if K or the split does not exist in this model, or the method has no use for it.
    """
    depth = shape.depth
    _check_options(method, depth, trained_blocks, split_block)
    if embeddings == "train" and not (method.name == "full" or method.draws):
        raise UsageError(f"--embeddings train: --method {method.name} leaves them frozen; --method full trains them.")
    if embeddings == "train" and split_block:
        raise UsageError(f"--embeddings train: with --split {split_block} nothing below that block trains.")
    if method.name == "full":
        splits: tuple[int, ...] = (0,)
        counts: dict[int, tuple[int, ...]] = {0: (depth,)}
    elif method.name == "head":
        splits, counts = (depth,), {depth: (0,)}
    elif method.name == "last-k":
        most = trained_blocks or (
            depth - split_block if split_block is not None else max(1, round(depth * LAST_K_SHARE))
        )
        least = most if trained_blocks or split_block is not None else 1
        splits = tuple(depth - count for count in range(most, least - 1, -1))
        counts = {split: (depth - split,) for split in splits}
    else:
        splits = (split_block,) if split_block is not None else tuple(range(depth - (trained_blocks or 1) + 1))
        if embeddings == "train":
            splits = (0,)
        counts = {split: _drawn_counts(depth - split, depth, trained_blocks) for split in splits}
    return MethodSpace(
        name=method.name,
        splits=splits,
        trained_blocks=counts,
        embeddings=EMBEDDINGS[embeddings] if method.name == "full" or embeddings == "train" else (False,),
        prunes_tokens=method.prunes_tokens,
        draws=method.draws,
    )


def everything(space: MethodSpace, depth: int) -> MethodSpace:
    """A drawing method's space with nothing frozen for good: all blocks and the embeddings at every step, then fewer. For a
    pretrained model that has little of what a task needs.
    """
    counts = {0: (depth, *(count for count in space.trained_blocks[0] if count < depth))}
    return msgspec.structs.replace(space, splits=(0,), trained_blocks=counts, embeddings=(True, False))


def _drawn_counts(above_split: int, depth: int, asked: int | None) -> tuple[int, ...]:
    """K for a number of blocks above the split: at most three quarters of the depth, down to half of them where memory
    binds.
    """
    if asked is not None:
        return (asked,)
    most, least = min(above_split, max(1, round(DRAWN_SHARE * depth))), max(1, above_split // 2)
    return tuple(range(most, least - 1, -1))


def _check_options(method: Method, depth: int, trained_blocks: int | None, split_block: int | None) -> None:
    if trained_blocks is not None and not 1 <= trained_blocks <= depth:
        raise UsageError(f"--trained-blocks must be between 1 and {depth}, the model's depth, not {trained_blocks}.")
    if split_block is not None and not 0 <= split_block < depth:
        hint = " The head alone is trained by --method head." if split_block == depth else ""
        raise UsageError(f"--split must be `auto` or between 0 and {depth - 1}, not {split_block}.{hint}")
    if method.name in ("full", "head") and (trained_blocks is not None or split_block not in (None, 0)):
        raise UsageError(f"--trained-blocks and --split mean nothing to --method {method.name}: try last-k or alast.")
    if trained_blocks is not None and split_block is not None:
        above = depth - split_block
        if trained_blocks > above:
            raise UsageError(
                f"--trained-blocks {trained_blocks} is more than the {above} blocks above --split {split_block}."
            )
        if method.name == "last-k" and trained_blocks != above:
            raise UsageError(
                f"--method last-k trains all {above} blocks above --split {split_block}: leave --trained-blocks out."
            )


Proposer = Callable[[random.Random], Selection]


def proposer(method: Method, plan: Plan, state: alast.AlastState | None, settings: alast.AlastSettings) -> Proposer:
    """The way this method chooses a step, given the randomness of that step."""
    depth = len(plan.token_ceiling)
    if method.prunes_tokens and state is not None:
        return lambda rng: alast.propose(
            state,
            patch_tokens=plan.token_ceiling[0],
            split_block=plan.split_block,
            count=plan.trained_blocks,
            settings=settings,
            rng=rng,
            split_tokens=plan.token_ceiling[plan.split_block],
            embeddings_train=plan.embeddings_train,
        )
    if method.draws:
        flat = [1.0] * depth
        return lambda rng: Selection(
            alast.draw_blocks(flat, plan.split_block, plan.trained_blocks, "multinomial", rng),
            plan.token_ceiling,
            plan.embeddings_train,
        )
    fixed = Selection(
        tuple(block >= depth - plan.trained_blocks for block in range(depth)), plan.token_ceiling, plan.embeddings_train
    )
    return lambda _rng: fixed
