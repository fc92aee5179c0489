"""What the user asked for, as one value: stored with the run, read back by `--resume` and `evaluate`. Pure."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from edgetune.alast import AlastSettings
from edgetune.cost import TokenScore
from edgetune.data import Preprocess
from edgetune.enforce import EnforceKind
from edgetune.errors import UsageError
from edgetune.methods import METHODS
from edgetune.optim import OptimizerName
from edgetune.planner import EmbeddingsChoice, RecomputeChoice

Augment = Literal["none", "timm"]
SplitChoice = Literal["auto", "lowest"]
BackendName = Literal["torch", "ort"]
Precision = Literal["float16", "float32"]


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All choices of a run that are not the plan's. None: the default of the method, the model or the planner."""

    format_version: int = 1
    model: str
    weights: str | None = None
    pretrained: bool = True
    image_px: int | None = None
    backend: BackendName = "torch"
    artifacts: str | None = None  # the folder that --backend ort trains from
    replay: str | None = None  # the run whose steps are done again
    data: str | None = None  # None: the bundled sample
    device: str = "auto"
    ram_cap_bytes: int | None = None
    method: str = "alast"
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 32
    accumulation: int | None = None
    learning_rate: float | None = None
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    trained_blocks: int | None = None
    split_block: int | None = None
    split: SplitChoice | None = None  # where no block is named; None: as `looks_for_split` says
    token_floor: float | None = None
    token_ceiling: float | None = None
    split_tokens: float | None = None
    token_score: TokenScore | None = None  # by which tokens are dropped; None: as the look finds, else "attention"
    head_first: bool | None = None  # None: as the method has it
    prefix_cache: bool | None = None  # None: where it pays
    cache_dir: str | None = None  # None: the run folder's own
    cache_limit_bytes: int | None = None
    cache_precision: Precision = "float16"
    augment_views: int | None = None  # fixed views of each image; 0: as many as are worth a cache
    embeddings: EmbeddingsChoice = "auto"
    recompute: RecomputeChoice = "auto"
    updates_in_backward: bool | None = None
    keeps_state: bool | None = None
    half_frozen: bool = False
    enforce: EnforceKind = "auto"
    hflip: float = 0.0
    augment: bool = False
    balanced_class_weights: bool = False
    max_bad: float = 0.01
    val_share: float = 0.2
    checkpoint_every: int | None = None
    threads: int | None = None
    seed: int = 0
    alast: AlastSettings = AlastSettings()

    @property
    def fits_head(self) -> bool:
        """Whether the classifier is fitted to the pretrained model before anything else trains."""
        return self.pretrained and (METHODS[self.method].head_first if self.head_first is None else self.head_first)


class StoredRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`run.json`: what is needed to resume, evaluate or predict from a run folder."""

    format_version: int = 1
    settings: RunSettings
    classes: tuple[str, ...]
    train_images: int
    val_images: int
    # Of their relative paths and labels in order: with other images, the steps to come would see others.
    images_sha256: str
    preprocess: Preprocess
    architecture: str
    model_args: dict[str, object]


def check(settings: RunSettings) -> None:
    """Raises: UsageError for a value that makes no sense, naming the flag."""
    limits = (
        ("--epochs", settings.epochs, 1, 100_000),
        ("--steps", settings.steps, 1, 10**9),
        ("--batch-size", settings.batch_size, 1, 65_536),
        ("--lr", settings.learning_rate, 0.0, 100.0),
        ("--weight-decay", settings.weight_decay, 0.0, 10.0),
        ("--warmup-epochs", settings.warmup_epochs, 0.0, 100_000.0),
        ("--smoothing", settings.label_smoothing, 0.0, 0.999),
        ("--hflip", settings.hflip, 0.0, 1.0),
        ("--max-bad", settings.max_bad, 0.0, 1.0),
        ("--val-share", settings.val_share, 0.01, 0.9),
        ("--checkpoint-every", settings.checkpoint_every, 1, 10**9),
        ("--image-size", settings.image_px, 1, 4096),
        ("--seed", settings.seed, 0, 2**63 - 1),
        ("--threads", settings.threads, 1, 1024),
        ("--initial-budget", settings.alast.initial_budget, 0.01, 1.0),
        ("--alpha", settings.alast.alpha, 0.0, 1e9),
        ("--token-floor", settings.token_floor, 0.01, 1.0),
        ("--token-ceiling", settings.token_ceiling, 0.01, 1.0),
        ("--split-tokens", settings.split_tokens, 0.01, 1.0),
        ("--cache-limit", settings.cache_limit_bytes, 0, 2**62),
        ("--augment-views", settings.augment_views, 0, 1000),
    )
    for flag, value, least, most in limits:
        # `not least <= value` also catches NaN.
        if value is not None and not least <= value <= most:
            raise UsageError(f"{flag} must be between {least} and {most}, not {value}.")
    if settings.learning_rate == 0:
        raise UsageError("--lr must be above 0.")
    if settings.method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)}, not {settings.method!r}.")
    if settings.method != "alast" and names_budgets(settings):
        raise UsageError(
            "--token-floor, --token-ceiling, --alpha, --initial-budget, --layer-choice and --token-share belong to --method alast, "
            f"not to {settings.method}."
        )
    if settings.keeps_state is False and not METHODS[settings.method].draws:
        raise UsageError(
            f"--optimizer-state evict: --method {settings.method} trains the same blocks in every step, so no state is left behind."
        )
    if settings.split_tokens is not None and settings.method in ("full", "head"):
        raise UsageError(
            f"--split-tokens: --method {settings.method} has no split to drop tokens at. Try last-k or alast."
        )
    if settings.token_score not in (None, *get_args(TokenScore)):
        raise UsageError(f"--token-score must be attention or distance, not {settings.token_score!r}.")
    if settings.token_score is not None and settings.method in ("full", "head"):
        raise UsageError(f"--token-score: --method {settings.method} drops no tokens. Try alast.")
    if settings.prefix_cache is False and settings.cache_dir is not None:
        raise UsageError("--cache and --no-cache contradict each other: leave one of them out.")
    if settings.augment_views is not None and not (settings.augment or settings.hflip):
        raise UsageError("--augment-views keeps views that differ: give --augment or --hflip with it.")
    _check_backend(settings)
    if settings.weights is not None and not settings.pretrained:
        raise UsageError("--weights and --no-pretrained contradict each other: leave one of them out.")
    texts = {
        "--model": settings.model,
        "--weights": settings.weights,
        "--data": settings.data,
        "--device": settings.device,
        "--cache": settings.cache_dir,
        "--artifacts": settings.artifacts,
        "--replay": settings.replay,
    }
    for flag, text in texts.items():
        if text is not None:
            check_text(flag, text)


def looks_for_split(settings: RunSettings) -> bool:
    """Whether images are to say where to split: where it was asked for, and by default under ALaST. Baselines do what their
    name says, and artifacts are cut already.
    """
    if settings.split is None:
        return settings.method == "alast" and settings.backend == "torch"
    return settings.split == "auto"


def names_what_trains(settings: RunSettings) -> bool:
    """Whether the split or the number of blocks that train is said."""
    return (settings.split_block, settings.trained_blocks) != (None, None)


def names_budgets(settings: RunSettings) -> bool:
    """Whether anything is said of how tokens are pruned by budget."""
    asked = (settings.alast, settings.token_floor, settings.token_ceiling)
    return asked != (AlastSettings(), None, None)


def _check_backend(settings: RunSettings) -> None:
    """What artifacts have settled, or can't do."""
    if settings.backend == "torch":
        if settings.artifacts is not None:
            raise UsageError("--artifacts is what --backend ort trains from: give both, or neither.")
        return
    if settings.token_score == "distance":
        raise UsageError(
            "--backend ort: artifacts drop tokens by attention. Leave --token-score distance out; a run that dropped them so "
            "can't be replayed here."
        )
    if settings.artifacts is None:
        raise UsageError("--backend ort trains from a folder that `edgetune export` wrote: name it with --artifacts.")
    settled = {
        "--weights": settings.weights is not None,
        "--no-pretrained": not settings.pretrained,
        "--image-size": settings.image_px is not None,
    }
    for flag, given in settled.items():
        if given:
            raise UsageError(f"{flag}: the artifacts are of a model with its weights and its size. Leave it out.")
    if settings.augment:
        raise UsageError("--augment is timm's, which needs torch: with --backend ort use --hflip.")
    if settings.split == "auto":
        raise UsageError("--split auto looks at every block; artifacts are cut already. Name one of their blocks.")


def check_text(flag: str, text: str) -> None:
    """Raises: UsageError for a path or name with bytes that are not UTF-8: JSON and safetensors can't hold them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag} {text!r} is not UTF-8. Rename it, or give a link to it.") from error
