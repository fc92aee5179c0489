"""`report.json`: what a run was, what it reached and what it needed. Its schema is `docs/report.schema.json`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edgetune.checkpoint.files import disk_errors
from edgetune.data.folders import BadImage
from edgetune.errors import RunFolderError

FORMAT_VERSION = 1
REPORT_NAME = "report.json"
_MAX_REPORT_BYTES = 256 * 1024**2

Count = Annotated[int, msgspec.Meta(ge=0)]


def _is(description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description)


class RunReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one run was, reached and needed. Null: not known, or not known to this backend. Shares are from 0 to 1."""

    format_version: Annotated[int, _is("of this file")] = FORMAT_VERSION

    model: Annotated[str, _is("timm's name, or the bundled model's")]
    method: Annotated[str, _is("full, head, last-k, random-k, alast ...")]
    device: Annotated[str, _is("id of the device profile")]
    simulated: Annotated[bool, _is("the run was on another machine than the device; its runtime is the profile's")]
    backend: Annotated[str, _is("what computed the steps")]
    seed: Annotated[int, _is("of everything random")]
    threads: Annotated[int | None, _is("CPU threads")] = None
    versions: Annotated[dict[str, str], _is("of Python and the packages that computed")] = {}
    plan: Annotated[str, _is("file of the plan, in this folder")] = "plan.json"
    stopped_because: Annotated[str, _is("finished, interrupted, over the cap, out of memory, diverged or failed")]
    notes: Annotated[tuple[str, ...], _is("what the user was told")] = ()

    verdict: Annotated[str, _is("peak against cap in one line")] = ""
    within_cap: Annotated[bool | None, _is("device_peak_bytes <= cap_bytes")] = None
    enforced_by: Annotated[str, _is("what would have stopped the run at the cap")] = "watched, not enforced"
    tightenings: Annotated[
        tuple[str, ...], _is("steps for which memory ran out, why, and the plan under which they were done")
    ] = ()
    cap_bytes: Annotated[Count | None, _is("the most the run may use on the device, bytes")] = None
    device_peak_bytes: Annotated[Count | None, _is("the figure judged against cap_bytes, bytes")] = None
    predicted_peak_bytes: Annotated[Count | None, _is("what the plan foresaw for device_peak_bytes, bytes")] = None
    device_runtime_bytes: Annotated[Count | None, _is("the part of it that the device's runtime takes, bytes")] = None
    training_peak_bytes: Annotated[Count | None, _is("what training added to the runtime, bytes")] = None
    runtime_bytes: Annotated[Count | None, _is("this host's process before training, warmed up, bytes")] = None
    peak_rss_bytes: Annotated[Count | None, _is("this host's process with its runtime, resident, bytes")] = None
    peak_anonymous_bytes: Annotated[Count | None, _is("of that, anonymous, bytes")] = None
    peak_file_bytes: Annotated[Count | None, _is("of that, backed by files, bytes")] = None
    peak_swap_bytes: Annotated[Count | None, _is("this process's pages that were swapped out, bytes")] = None
    children_peak_bytes: Annotated[Count | None, _is("child processes, bytes")] = None
    peak_live_bytes: Annotated[
        Count | None, _is("C heap in use above the runtime, tensors nearly all of it, as sampled, bytes")
    ] = None
    cuda_peak_bytes: Annotated[Count | None, _is("GPU memory held by torch, bytes")] = None
    phases: Annotated[dict[str, int], _is("measured peak of each phase (load, train, ...), bytes")] = {}
    predicted_phases: Annotated[dict[str, int], _is("the plan's peak of each phase, bytes")] = {}

    classes: Annotated[tuple[str, ...], _is("names, in the order of the model's outputs")] = ()
    train_images: Annotated[Count | None, _is("images trained on")] = None
    val_images: Annotated[Count | None, _is("images evaluated on")] = None
    bad_images: Annotated[tuple[BadImage, ...], _is("images skipped; paths are relative to the data folder")] = ()
    token_score: Annotated[str | None, _is("by which patch tokens are dropped: attention or distance")] = None
    evaluation_tokens: Annotated[
        Count | None, _is("patch tokens of the last block with which the saved model is best, and evaluated")
    ] = None
    val_accuracy: Annotated[float | None, _is("of the saved model (the best epoch), share")] = None
    val_accuracy_before: Annotated[float | None, _is("before the first step, share")] = None
    val_balanced_accuracy: Annotated[float | None, _is("mean of val_recall over the classes with images, share")] = None
    val_topk_accuracy: Annotated[float | None, _is("right class among the best topk, share")] = None
    topk: Annotated[Count | None, _is("min(5, classes)")] = None
    val_loss: Annotated[float | None, _is("mean cross-entropy, nats")] = None
    val_recall: Annotated[dict[str, float | None], _is("by class, share; null without images")] = {}

    batch_size: Annotated[Count | None, _is("images of an optimizer step")] = None
    micro_batch: Annotated[Count | None, _is("images computed at once")] = None
    learning_rate: Annotated[float | None, _is("the highest of the schedule")] = None
    split_block: Annotated[Count | None, _is("blocks below it never train")] = None
    trained_blocks: Annotated[Count | None, _is("blocks that train in a step, at most")] = None
    cached_blocks: Annotated[Count | None, _is("blocks whose output was read from the prefix cache, 0: none")] = None
    cache_bytes: Annotated[Count | None, _is("the prefix cache on disk, bytes")] = None
    cache_written_bytes: Annotated[Count | None, _is("of it, written by this run (wear of flash), bytes")] = None
    cache_precision: Annotated[str | None, _is("float16 or float32")] = None
    pictures_written_bytes: Annotated[
        Count | None,
        _is("decoded images, and what a look made of some, kept on disk while they were needed (wear of flash), bytes"),
    ] = None
    look_seconds: Annotated[float | None, _is("looking for the split, before training")] = None
    cache_seconds: Annotated[float | None, _is("making the cache, part of train_seconds")] = None
    dropped_weights_bytes: Annotated[
        Count | None, _is("frozen weights that left memory once the cache was whole, bytes")
    ] = None
    steps: Annotated[Count | None, _is("optimizer steps done")] = None
    epochs: Annotated[float | None, _is("passes over the training images done")] = None
    best_epoch: Annotated[float | None, _is("epochs done when the saved model was taken")] = None
    train_seconds: Annotated[float | None, _is("steps and caching")] = None
    eval_seconds: Annotated[float | None, _is("evaluations")] = None
    total_seconds: Annotated[float | None, _is("the whole run, resumed parts included")] = None
    images_per_second: Annotated[float | None, _is("images trained on in a second of train_seconds")] = None
    flops: Annotated[Count | None, _is("floating-point operations of all training steps")] = None
    flops_full: Annotated[Count | None, _is("the same images under full fine-tuning")] = None
    flops_share: Annotated[float | None, _is("flops / flops_full")] = None
    tokens_share: Annotated[float | None, _is("patch tokens seen by the blocks, of all")] = None


def report_to_json(report: RunReport) -> bytes:
    """JSON with the fields in the order of `RunReport`; what is no finite number becomes null."""
    plain = _clean(msgspec.to_builtins(report, enc_hook=_numpy_scalar))
    return msgspec.json.format(msgspec.json.encode(plain), indent=2)


def read_report(path: Path) -> RunReport:
    """The report in a file, or in a run folder.

    Raises: RunFolderError if it is missing or damaged, or of another format than this edgetune's.
    """
    with disk_errors(path, "read"):
        file = path / REPORT_NAME if path.is_dir() else path
    with disk_errors(file, "read"):
        if file.stat().st_size > _MAX_REPORT_BYTES:
            raise RunFolderError(f"{file} is no report: none is as large. Name a run folder.")
        data = file.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise RunFolderError(
                f"{file} has format {version}; this edgetune reads format {FORMAT_VERSION}. Read it with the edgetune "
                "that wrote it."
            )
        return msgspec.json.decode(data, type=RunReport)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RunFolderError(f"{file} is no report of a run: {error}. Name a run folder.") from error


def report_schema() -> dict[str, Any]:
    """The JSON schema of `report.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(RunReport)}
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))  # defaults as JSON has them: no tuples
    return plain


class _Version(msgspec.Struct):
    format_version: int


def _numpy_scalar(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise NotImplementedError(f"a report can't hold a {type(value).__name__}")


def _clean(value: Any) -> Any:
    """Built-in values that JSON can hold: no NaN or infinity, no bytes of a file's name that are not UTF-8."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
