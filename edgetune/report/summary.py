"""What a person sees at the end of a run: plain lines, coloured on a terminal, ASCII where that is all there is."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgetune.data.images import shown
from edgetune.report.run_report import RunReport
from edgetune.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

MAX_CLASSES = 20
WORST_CLASSES = 10
_LABEL_CELLS = 12
_NAME_CELLS = 40
_BAR_CELLS = 20
_MAX_NOTES = 20


def verdict_line(
    *, device_peak_bytes: int | None, cap_bytes: int | None, predicted_peak_bytes: int | None, enforced_by: str
) -> str:
    """`"within cap: device peak 412 MiB of 512 MiB (80 %), predicted 430 MiB, watched, not enforced"`."""
    predicted = "" if predicted_peak_bytes is None else f", predicted {format_bytes(predicted_peak_bytes)}"
    if device_peak_bytes is None:
        cap = "" if cap_bytes is None else f" against a cap of {format_bytes(cap_bytes)}"
        return f"peak not known{cap}{predicted}, {enforced_by}"
    if cap_bytes is None:
        return f"no cap: device peak {format_bytes(device_peak_bytes)}{predicted}"
    over_bytes = device_peak_bytes - cap_bytes
    judged = f"over cap by {format_bytes(over_bytes)}" if over_bytes > 0 else "within cap"
    return f"{judged}: device peak {_of_cap(device_peak_bytes, cap_bytes)}{predicted}, {enforced_by}"


def print_summary(report: RunReport, console: Console) -> None:
    """Print what the run reached and needed. Whatever is in the names, nothing but text reaches the terminal."""
    from rich.text import Text

    wide = _speaks_unicode(console.encoding)

    def line(text: str, style: str = "") -> None:
        text = shown(text) if wide else shown(text).encode("ascii", "backslashreplace").decode()
        console.print(Text(text, style=style), soft_wrap=True)

    line("")
    line(_title(report), "bold")
    for label, text in _facts(report, wide):
        line(f"{label:{_LABEL_CELLS}}{text}")
    for label, text in _tightening_lines(report):
        line(f"{label:{_LABEL_CELLS}}{text}")
    for text in _recall_lines(report, wide):
        line(text)
    for note in report.notes[:_MAX_NOTES]:
        line(f"{'note':{_LABEL_CELLS}}{' '.join(note.split())}")
    if len(report.notes) > _MAX_NOTES:
        line(f"{'':{_LABEL_CELLS}}{len(report.notes) - _MAX_NOTES} more notes in report.json")
    if report.verdict:
        styles = {True: "bold green", False: "bold red", None: "bold yellow"}
        line(report.verdict, styles[report.within_cap])


def _title(report: RunReport) -> str:
    device = f"{report.device} (simulated)" if report.simulated else report.device
    title = f"{report.model}, {report.method}, on {device}: {report.stopped_because}"
    return title if report.steps is None else f"{title} after {_plural(report.steps, 'step')}"


def _facts(report: RunReport, wide: bool) -> Iterator[tuple[str, str]]:
    """Label and text of each line; a figure that is not known is left out, except accuracy and peak."""
    before = (
        f" ({_share(report.val_accuracy_before)} before training)" if report.val_accuracy_before is not None else ""
    )
    yield (
        "accuracy",
        f"{_share(report.val_accuracy)}{before}"
        + _list(
            ("balanced", report.val_balanced_accuracy, _share),
            (
                f"top-{report.topk}",
                report.val_topk_accuracy if (report.topk or 0) < len(report.classes) else None,
                _share,
            ),
            ("loss", report.val_loss, lambda loss: f"{loss:.4f}"),
            ("best epoch", report.best_epoch, lambda epoch: f"{epoch:.4g}"),
        ),
    )
    if report.train_images is not None:
        text = _plural(report.train_images, "training image")
        text += f", {report.val_images} for validation" if report.val_images is not None else ""
        yield "data", text + (f", {len(report.bad_images)} skipped" if report.bad_images else "")
    for image in report.bad_images[:WORST_CLASSES]:
        yield "", f"skipped {image.path}: {image.reason}"
    if len(report.bad_images) > WORST_CLASSES:
        yield "", f"{len(report.bad_images) - WORST_CLASSES} more in report.json"
    if report.images_per_second is not None:
        yield (
            "speed",
            f"{report.images_per_second:.1f} images/s"
            + _list(
                ("training", report.train_seconds, format_seconds),
                ("evaluation", report.eval_seconds, format_seconds),
                ("looking for the split", report.look_seconds, format_seconds),
                ("in all", report.total_seconds, format_seconds),
            ),
        )
    if report.flops_share is not None:
        text = f"{_share(report.flops_share)} of full fine-tuning's FLOPs"
        if report.flops is not None and report.flops_full is not None:
            text += f" ({format_count(report.flops)} of {format_count(report.flops_full)})"
        yield "compute", text + (f", {_share(report.tokens_share)} of its tokens" if report.tokens_share else "")
    if report.cached_blocks and report.cache_bytes is not None:
        yield (
            "cache",
            f"{_plural(report.cached_blocks, 'block')} computed once, {format_bytes(report.cache_bytes)} on disk"
            + _list(
                ("written by this run", report.cache_written_bytes, format_bytes),
                ("kept beside it for a while", report.pictures_written_bytes or None, format_bytes),
                ("made in", report.cache_seconds, format_seconds),
                ("weights that left memory", report.dropped_weights_bytes, format_bytes),
            ),
        )
    yield "memory", _memory(report, wide)
    if report.predicted_peak_bytes is not None:
        yield "", f"predicted {format_bytes(report.predicted_peak_bytes)}"
    if report.simulated and report.peak_rss_bytes is not None:
        yield (
            "",
            f"this host's own peak {format_bytes(report.peak_rss_bytes)}"
            + _list(
                ("its runtime", report.runtime_bytes, format_bytes),
                (f"runtime on {report.device}", report.device_runtime_bytes, format_bytes),
                ("training added", report.training_peak_bytes, format_bytes),
            ),
        )


def _tightening_lines(report: RunReport) -> Iterator[tuple[str, str]]:
    for text in report.tightenings:
        yield "tightened", " ".join(text.split())


def _memory(report: RunReport, wide: bool) -> str:
    peak, cap = report.device_peak_bytes, report.cap_bytes
    if peak is None:
        return "peak not known"
    if not cap:
        return f"peak {format_bytes(peak)}"
    return f"{_bar(peak / cap, wide)} {_of_cap(peak, cap)}"


def _recall_lines(report: RunReport, wide: bool) -> Iterator[str]:
    """Recall by class: all of a few, the worst of many."""
    from rich.cells import cell_len, set_cell_size

    recall = [(shown(name), share) for name, share in report.val_recall.items()]
    title = "recall"
    if len(recall) > MAX_CLASSES:
        known = [(name, share) for name, share in recall if share is not None]
        title = f"recall, the worst {min(WORST_CLASSES, len(known))} of {len(recall)} classes"
        recall = [*sorted(known, key=lambda item: item[1])[:WORST_CLASSES]]
    if not wide:
        recall = [(name.encode("ascii", "backslashreplace").decode(), share) for name, share in recall]
    if recall:
        yield title
    names = [
        name if cell_len(name) <= _NAME_CELLS else set_cell_size(name, _NAME_CELLS - 3) + "..." for name, _ in recall
    ]
    cells = max(map(cell_len, names), default=0)
    for name, (_, share) in zip(names, recall, strict=True):
        text = "no validation images" if share is None else f"{_share(share):>7} {_bar(share, wide)}"
        yield f"  {set_cell_size(name, cells)}  {text}"


def _list(*items: tuple[str, float | None, Callable[[float], str]]) -> str:
    """`", label text"` for each value that is known."""
    return "".join(f", {label} {show(value)}" for label, value, show in items if value is not None)


def _of_cap(peak_bytes: int, cap_bytes: int) -> str:
    """`"412 MiB of 512 MiB (80 %)"`, rounded so that 100 % and less means within."""
    percent = 100 * peak_bytes / cap_bytes if cap_bytes else math.inf
    whole = percent if percent == math.inf else math.ceil(percent) if peak_bytes > cap_bytes else math.floor(percent)
    return f"{format_bytes(peak_bytes)} of {format_bytes(cap_bytes)} ({whole} %)"


def _bar(share: float, wide: bool) -> str:
    filled = min(_BAR_CELLS, max(0, round(share * _BAR_CELLS)))
    full, empty = ("█", "░") if wide else ("#", ".")
    return full * filled + empty * (_BAR_CELLS - filled)


def _share(share: float | None) -> str:
    return "not known" if share is None else f"{100 * share:.1f} %"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _speaks_unicode(encoding: str) -> bool:
    try:
        return codecs.lookup(encoding).name.startswith("utf-")
    except LookupError:
        return False
