"""`edgetune finetune`: the main job."""

from __future__ import annotations

import os
import signal
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli.options import (
    SPLIT_CHOICES,
    BackendChoice,
    CachePrecision,
    Embeddings,
    Enforce,
    FrozenWeights,
    MethodName,
    OptimizerChoice,
    OptimizerState,
    RecomputeLevel,
    TokenScore,
    parse_split,
    parse_views,
    plan_settings,
)
from edgetune.errors import EdgetuneError, Interrupted, UsageError
from edgetune.units import parse_bytes

if TYPE_CHECKING:
    from edgetune.settings import RunSettings

# Settings whose flag has another name than theirs.
FLAGS = {
    "image_px": "image-size",
    "ram_cap_bytes": "ram-cap",
    "accumulation": "grad-accum-steps",
    "learning_rate": "lr",
    "optimizer": "opt",
    "label_smoothing": "smoothing",
    "split_block": "split",
    "balanced_class_weights": "class-weights",
    "updates_in_backward": "step-in-backward",
    "keeps_state": "optimizer-state",
    "half_frozen": "frozen-weights",
    "prefix_cache": "no-cache",
    "cache_dir": "cache",
    "cache_limit_bytes": "cache-limit",
    "alast": "layer-choice, --token-share, --initial-budget, --alpha",
}
# What a plan has settled: asking for something else beside --plan would be ignored.
OF_THE_PLAN = {
    "method", "batch_size", "accumulation", "optimizer", "trained_blocks", "split_block", "split", "token_floor", "threads", "split_tokens",
    "token_ceiling", "token_score", "embeddings", "recompute", "updates_in_backward", "keeps_state", "half_frozen",
}  # fmt: skip
# What may be another than it was where a run is replayed.
OF_THE_HOST = {"backend", "artifacts", "data", "device", "ram_cap_bytes", "enforce", "threads", "prefix_cache"}
MODEL, DATA, METHOD, TRAIN, MEMORY, OUTPUT = "Model", "Data", "Method", "Training", "Memory", "Run folder and output"


class ClassWeights(str, Enum):
    none = "none"
    balanced = "balanced"


class LayerChoice(str, Enum):
    multinomial = "multinomial"
    top = "top"


class TokenShare(str, Enum):
    compound = "compound"
    absolute = "absolute"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def finetune(
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Device to train for: an id of `edgetune devices list`, a TOML file, or `auto`, this machine (default). "
            "On another machine the device is simulated under its cap.",
            show_default=False,
        ),
    ] = None,
    ram_cap: Annotated[
        str | None,
        typer.Option("--ram-cap", help="RAM cap in place of the device's, such as 512MiB.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "--model",
            help="timm name, `edgetune_micro`, or local-dir:FOLDER. Default: deit_tiny_patch16_224 for --data, "
            "edgetune_micro for the bundled sample.",
            panel=MODEL,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        _option(
            "--weights",
            help="Pretrained weights: .safetensors, or .pth with tensors only. Default: timm's hub.",
            panel=MODEL,
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        _option(
            "--pretrained/--no-pretrained",
            help="Start from pretrained weights (default) or from random ones.",
            panel=MODEL,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        _option(
            "--image-size",
            "--img-size",
            help="Input size in pixels; position embeddings are resized. Default: the model's.",
            panel=MODEL,
        ),
    ] = None,
    backend: Annotated[
        BackendChoice | None,
        _option(
            "--backend", help="What computes: torch (default), or ort, from artifacts and without torch.", panel=MODEL
        ),
    ] = None,
    artifacts: Annotated[
        Path | None,
        _option("--artifacts", help="Folder that `edgetune export` wrote, for --backend ort.", panel=MODEL),
    ] = None,
    data: Annotated[
        Path | None,
        _option(
            "--data",
            help="Folder of images: train/ and val/ with a folder a class, or just a folder a class. "
            "Default: the bundled sample of handwritten digits.",
            panel=DATA,
        ),
    ] = None,
    val_share: Annotated[
        float | None,
        _option("--val-share", help="Share of a folder without val/ kept for validation (default 0.2).", panel=DATA),
    ] = None,
    max_bad: Annotated[
        float | None,
        _option(
            "--max-bad",
            help="Share of unreadable images that is skipped instead of refused (default 0.01).",
            panel=DATA,
        ),
    ] = None,
    hflip: Annotated[
        float | None,
        _option("--hflip", help="Probability of mirroring a training image (default 0; timm's is 0.5).", panel=DATA),
    ] = None,
    augment: Annotated[
        bool | None,
        _option("--augment", help="timm's training augmentation: random resized crop, flip, colour.", panel=DATA),
    ] = None,
    augment_views: Annotated[
        str | None,
        _option(
            "--augment-views",
            help="With --augment or --hflip: so many fixed views of each image instead of a new one every epoch, which can be cached; `auto`: half as many as there are epochs, at most 8 and as far as the disk has room; where that is fewer than 2, or nothing is cached, a new one every epoch.",
            panel=DATA,
        ),
    ] = None,
    weighting: Annotated[
        ClassWeights | None,
        _option("--class-weights", help="`balanced`: rare classes weigh more in the loss (default none).", panel=DATA),
    ] = None,
    method: Annotated[
        MethodName | None,
        _option(
            "--method",
            help="What trains: everything, the head, the last K blocks, K random blocks a step, or ALaST's choice (default).",
            panel=METHOD,
        ),
    ] = None,
    trained_blocks: Annotated[
        int | None,
        _option("--trained-blocks", help="K: blocks that train in a step. Default: the plan's choice.", panel=METHOD),
    ] = None,
    split: Annotated[
        str | None,
        _option(
            "--split",
            help="Block below which nothing ever trains. `auto` (default for alast, from three passes over the images on): found by a quick look at the images; `lowest`: the lowest that fits.",
            panel=METHOD,
        ),
    ] = None,
    token_floor: Annotated[
        float | None,
        _option(
            "--token-floor",
            help="Least share of its patch tokens that a block passes on under ALaST. Default: so that a quarter reaches the last block.",
            panel=METHOD,
        ),
    ] = None,
    token_ceiling: Annotated[
        float | None,
        _option(
            "--token-ceiling",
            help="Largest share of its patch tokens that a block may pass on under ALaST. Default: all, or what fits.",
            panel=METHOD,
        ),
    ] = None,
    split_tokens: Annotated[
        float | None,
        _option(
            "--split-tokens",
            help="Share of the patch tokens that goes on at the split (default: all, or as --split auto finds).",
            panel=METHOD,
        ),
    ] = None,
    token_score: Annotated[
        TokenScore | None,
        _option(
            "--token-score",
            help="Which patch tokens go on where some are dropped: those that the class token attends to most (`attention`, "
            "default) or those farthest from the mean of all (`distance`). --split auto tries both.",
            panel=METHOD,
        ),
    ] = None,
    head_first: Annotated[
        bool | None,
        _option(
            "--head-first/--no-head-first",
            help="Fit the classifier to what the pretrained model puts out before anything else trains (default but for full and head).",
            panel=METHOD,
        ),
    ] = None,
    layer_choice: Annotated[
        LayerChoice | None,
        _option(
            "--layer-choice",
            help="ALaST: draw K blocks from softmax(budgets) (`multinomial`, default) or take the `top` K.",
            panel=METHOD,
        ),
    ] = None,
    token_share: Annotated[
        TokenShare | None,
        _option(
            "--token-share",
            help="ALaST: a budget is a share of the tokens that are left (`compound`, default) or of all (`absolute`).",
            panel=METHOD,
        ),
    ] = None,
    initial_budget: Annotated[
        float | None,
        _option("--initial-budget", help="ALaST: budget of every block at first (default 0.9).", panel=METHOD),
    ] = None,
    alpha: Annotated[
        float | None,
        _option(
            "--alpha",
            help="ALaST: how fast budgets follow the class token. Default: learning rate x batch size.",
            panel=METHOD,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option(
            "--batch-size",
            "-b",
            help="Images an optimizer step (default 32). Unlike timm's this is the effective batch: the plan cuts it into micro-batches that fit.",
            panel=TRAIN,
        ),
    ] = None,
    grad_accum_steps: Annotated[
        int | None,
        _option(
            "--grad-accum-steps",
            help="Cut each step into this many micro-batches instead of the plan's choice. Unlike timm's it does not multiply the batch.",
            panel=TRAIN,
        ),
    ] = None,
    epochs: Annotated[
        int | None, _option("--epochs", help="Passes over the training images (default 10).", panel=TRAIN)
    ] = None,
    steps: Annotated[
        int | None, _option("--steps", help="Stop after this many optimizer steps instead.", panel=TRAIN)
    ] = None,
    lr: Annotated[
        float | None,
        _option(
            "--lr",
            help="Peak learning rate. Default: of the method, the optimizer and (AdamW) the model's width.",
            panel=TRAIN,
        ),
    ] = None,
    opt: Annotated[OptimizerChoice | None, _option("--opt", help="Optimizer (default adamw).", panel=TRAIN)] = None,
    weight_decay: Annotated[
        float | None, _option("--weight-decay", help="Weight decay of matrices (default 0.05).", panel=TRAIN)
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        _option(
            "--warmup-epochs",
            help="Epochs of linear warm-up before the cosine (default 1, at most a quarter of the run).",
            panel=TRAIN,
        ),
    ] = None,
    smoothing: Annotated[
        float | None, _option("--smoothing", help="Label smoothing (default 0; timm's is 0.1).", panel=TRAIN)
    ] = None,
    embeddings: Annotated[
        Embeddings | None,
        _option(
            "--embeddings",
            help="`train` or `freeze` the patch and position embeddings under --method full (`auto`, default: trained where it fits); "
            "`train` under alast and random-k too, which then freeze no block for good.",
            panel=MEMORY,
        ),
    ] = None,
    recompute: Annotated[
        RecomputeLevel | None,
        _option(
            "--recompute",
            help="What blocks compute again in the backward instead of keeping it: `none`, the `mlp` half, the whole `block`, or what fits and is fastest (`auto`, default). Changes no result.",
            panel=MEMORY,
        ),
    ] = None,
    step_in_backward: Annotated[
        bool | None,
        _option(
            "--step-in-backward/--step-after-backward",
            help="Update each weight inside the backward, so that no gradient outlives its use; one micro-batch only. Default: where it helps.",
            panel=MEMORY,
        ),
    ] = None,
    optimizer_state: Annotated[
        OptimizerState | None,
        _option(
            "--optimizer-state",
            help="`evict` drops the state of blocks that a step does not train (their moments start anew), `keep` keeps it; `auto` (default) keeps it where anything fits so.",
            panel=MEMORY,
        ),
    ] = None,
    frozen_weights: Annotated[
        FrozenWeights | None,
        _option(
            "--frozen-weights",
            help="Store the weights of blocks below the split as `bfloat16`: half the bytes, rounded (default float32).",
            panel=MEMORY,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        _option(
            "--cache",
            help="Keep what the frozen blocks put out for each image in this folder, which other runs may share. Default: `cache` in the run folder, where that pays.",
            panel=MEMORY,
        ),
    ] = None,
    no_cache: Annotated[
        bool, _option("--no-cache", help="Compute the frozen blocks anew in every step.", panel=MEMORY)
    ] = False,
    cache_limit: Annotated[
        str | None,
        _option(
            "--cache-limit",
            help="Most that the cache may take on disk, such as 200MB: as many images as fit are kept. Default: nine tenths of what is free.",
            panel=MEMORY,
        ),
    ] = None,
    cache_precision: Annotated[
        CachePrecision | None,
        _option(
            "--cache-precision",
            help="How it is stored: `float16` (default) or `float32`, twice as large and without any rounding.",
            panel=MEMORY,
        ),
    ] = None,
    enforce: Annotated[
        Enforce | None,
        _option(
            "--enforce",
            help="What holds the cap: `rlimit` (RLIMIT_DATA; default when a device is simulated), `cgroup`, or `none`: the run watches and stops.",
            panel=MEMORY,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        _option("--threads", help="CPU threads. Default: the device's cores, at most this machine's.", panel=TRAIN),
    ] = None,
    seed: Annotated[
        int | None, _option("--seed", help="Everything random follows from it (default 0; timm's is 42).", panel=TRAIN)
    ] = None,
    workers: Annotated[
        int | None,
        _option(
            "--workers",
            "-j",
            help="Accepted for timm's sake and must be 0: one thread loads ahead, no processes (they die on 4 GB boards).",
            panel=TRAIN,
        ),
    ] = None,
    plan: Annotated[
        Path | None, _option("--plan", help="Replay the plan.json of another run instead of planning.", panel=TRAIN)
    ] = None,
    replay: Annotated[
        Path | None,
        _option(
            "--replay",
            help="Do the steps of another run again, the same images and the same selections, on either backend.",
            panel=TRAIN,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            help="The run folder itself; must be new or empty. Default: runs/<time>-<model>-<device>.",
            panel=OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        Path | None, _option("--resume", help="Go on with an interrupted run, as it was started.", panel=OUTPUT)
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        _option(
            "--checkpoint-every",
            help="Write a checkpoint every so many steps, besides the one each epoch.",
            panel=OUTPUT,
        ),
    ] = None,
    quiet: Annotated[bool, _option("--quiet", "-q", help="Print errors only.", panel=OUTPUT)] = False,
    json: Annotated[
        bool,
        _option(
            "--json",
            help="Print the report as JSON on standard output, everything else on standard error.",
            panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Fine-tune a model on images, within a device's memory.

    With no options: the bundled model on the bundled digits, on this machine.
    """
    if workers:
        raise UsageError(f"--workers {workers}: edgetune loads with one thread and no worker processes. Leave it out.")
    given: dict[str, Any] = {
        "model": _absolute_model(model),
        "weights": None if weights is None else _absolute(str(weights)),
        "pretrained": pretrained,
        "image_px": image_size,
        "backend": None if backend is None else backend.value,
        "artifacts": None if artifacts is None else _absolute(str(artifacts)),
        # Absolute: a run is resumed from elsewhere too.
        "data": None if data is None else _absolute(str(data)),
        "device": _absolute(device) if device is not None and (device.endswith(".toml") or "/" in device) else device,
        "ram_cap_bytes": None if ram_cap is None else parse_bytes(ram_cap),
        "method": None if method is None else method.value,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": grad_accum_steps,
        "learning_rate": lr,
        "optimizer": None if opt is None else opt.value,
        "weight_decay": weight_decay,
        "warmup_epochs": warmup_epochs,
        "label_smoothing": smoothing,
        "trained_blocks": trained_blocks,
        "split_block": parse_split(split),
        "split": split if split in SPLIT_CHOICES else None,
        "augment_views": parse_views(augment_views),
        "head_first": head_first,
        "prefix_cache": False if no_cache else None if cache is None else True,
        "cache_dir": None if cache is None else _absolute(str(cache)),
        "cache_limit_bytes": None if cache_limit is None else parse_bytes(cache_limit),
        "cache_precision": None if cache_precision is None else cache_precision.value,
        "enforce": None if enforce is None else enforce.value,
        "hflip": hflip,
        "augment": augment,
        "balanced_class_weights": None if weighting is None else weighting is ClassWeights.balanced,
        "max_bad": max_bad,
        "val_share": val_share,
        "checkpoint_every": checkpoint_every,
        "threads": threads,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    given |= plan_settings(
        token_floor=token_floor,
        token_ceiling=token_ceiling,
        split_tokens=split_tokens,
        token_score=token_score,
        embeddings=embeddings,
        recompute=recompute,
        step_in_backward=step_in_backward,
        optimizer_state=optimizer_state,
        frozen_weights=frozen_weights,
    )
    adaptive = {
        "layer_choice": None if layer_choice is None else layer_choice.value,
        "token_share": None if token_share is None else token_share.value,
        "initial_budget": initial_budget,
        "alpha": alpha,
    }
    adaptive = {name: value for name, value in adaptive.items() if value is not None}
    if adaptive:
        given["alast"] = adaptive
    from edgetune.cli.progress import Terminal
    from edgetune.report import RunReport

    _end_on_signals()
    with Terminal(quiet=quiet, json=json) as terminal:
        try:
            if resume is not None:
                report = _resume(resume, given, output, plan, terminal)
            else:
                settled = OF_THE_PLAN & set(given)
                if plan is not None and settled:
                    raise UsageError(f"the plan settles {_flags(settled)}: leave it out, or leave --plan out.")
                from edgetune import run

                settings = _settings(given) if replay is None else _replayed(replay, given, plan)
                report = run.finetune(settings, output=output, plan_file=plan, listener=terminal)
        except EdgetuneError as error:
            if isinstance(error.report, RunReport):
                terminal.finished(error.report)
            raise
        terminal.finished(report)


def _end_on_signals() -> None:
    """Until the loop takes over, a signal ends the run with what was begun taken back, and says so."""

    def end(number: int, _frame: object) -> None:
        raise Interrupted("interrupted while nothing was being trained: what was there before is as it was", number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - pathlib does not fold `..`


def _absolute_model(model: str | None) -> str | None:
    if model is None or not model.startswith("local-dir:"):
        return model
    return "local-dir:" + _absolute(model.removeprefix("local-dir:"))


def _resume(folder: Path, given: dict[str, Any], output: Path | None, plan: Path | None, terminal: Any) -> Any:
    files = {"output": output, "plan": plan}
    changed = set(given) - {"data", "artifacts"} | {name for name, file in files.items() if file is not None}
    if changed:
        raise UsageError(
            f"--resume goes on with the run as it was started; {_flags(changed)} can't be changed. "
            "Only --data and --artifacts may be given with it, if the images or the artifacts have moved."
        )
    from edgetune import run

    return run.resume(folder, data=given.get("data"), artifacts=given.get("artifacts"), listener=terminal)


def _replayed(replay: Path, given: dict[str, Any], plan: Path | None) -> RunSettings:
    settled = set(given) - OF_THE_HOST | ({"plan"} if plan else set())
    if settled:
        raise UsageError(f"the run that is replayed settles {_flags(settled)}: leave it out.")
    from edgetune.run import settings_of_replay

    return settings_of_replay(Path(_absolute(str(replay))), _settings(given))


def _flags(names: set[str]) -> str:
    return ", ".join(f"--{FLAGS.get(name, name.replace('_', '-'))}" for name in sorted(names))


def _settings(asked: dict[str, Any]) -> RunSettings:
    from edgetune.settings import RunSettings

    given = dict(asked)
    if given.get("backend") == "ort" and "artifacts" in given:
        from edgetune.artifacts.reading import read_manifest

        if "model" in given:
            raise UsageError("--model: the artifacts are of a model. Leave it out.")
        given["model"] = read_manifest(Path(given["artifacts"])).model
    if "model" not in given:
        given["model"] = "deit_tiny_patch16_224" if "data" in given else "edgetune_micro"
    if "alast" in given:
        from edgetune.alast import AlastSettings

        given["alast"] = AlastSettings(**given["alast"])
    return RunSettings(**given)
