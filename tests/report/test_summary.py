"""What a person reads at the end of a run."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from edgetune.data import BadImage
from edgetune.report import RunReport, print_summary, verdict_line

MIB = 1024**2


def printed(report: RunReport, *, encoding: str = "utf-8", terminal: bool = False, width: int = 80) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(file=file, force_terminal=terminal, width=width, color_system="standard" if terminal else None)
    print_summary(report, console)
    file.flush()
    return raw.getvalue().decode(encoding)


def changed(report: RunReport, **changes: Any) -> RunReport:
    return msgspec.structs.replace(report, **changes)


def test_everything_promised_is_printed(report: RunReport) -> None:
    text = printed(report)
    for part in (
        "deit_tiny_patch16_224, alast, on jetson-nano (simulated): finished after 450 steps",
        "95.3 % (25.0 % before training), balanced 90.0 %",
        "loss 0.1823",
        "best epoch 7",
        "900 training images, 100 for validation, 1 skipped",
        "skipped train/ant/1.jpg: truncated",
        "212.3 images/s, training 1 min 02 s, evaluation 3.1 s",
        "37.5 % of full fine-tuning's FLOPs (1.2 T of 3.2 T), 61.0 % of its tokens",
        "████████████████░░░░ 412 MiB of 512 MiB (80 %)",
        "predicted 430 MiB",
        "this host's own peak 705 MiB, its runtime 507 MiB, runtime on jetson-nano 214 MiB, training added 198 MiB",
        "  ant  100.0 % ████████████████████",
        "  bee   75.0 % ███████████████░░░░░",
        "  cat  no validation images",
        "the prefix was cached",
    ):
        assert part in text
    assert text.splitlines()[-1] == (
        "within cap: device peak 412 MiB of 512 MiB (80 %), predicted 430 MiB, watched, not enforced"
    )


def test_a_cached_prefix_and_tightened_steps_are_printed(report: RunReport) -> None:
    assert "cache" not in printed(changed(report, notes=(), cached_blocks=0, cache_bytes=None))
    text = printed(
        changed(
            report,
            cached_blocks=8,
            cache_bytes=41 * MIB,
            cache_written_bytes=0,
            cache_seconds=62.0,
            dropped_weights_bytes=13 * MIB,
            tightenings=("step 3: memory ran out; done again",),
        )
    )
    assert (
        "cache       8 blocks computed once, 41.0 MiB on disk, written by this run 0 B, made in 1 min 02 s, "
        "weights that left memory 13.0 MiB" in text
    )
    assert "tightened   step 3: memory ran out; done again" in text


def test_top_k_is_printed_only_where_it_says_something(report: RunReport) -> None:
    assert "top-" not in printed(report)  # 4 of 4 classes
    assert "top-5 99.0 %" in printed(changed(report, classes=tuple("abcdefg"), topk=5, val_topk_accuracy=0.99))


def test_no_colours_and_no_broken_lines_where_there_is_no_terminal(report: RunReport) -> None:
    text = printed(report, width=20)
    assert "\x1b" not in text
    assert report.verdict in text.splitlines()
    assert "\x1b[" in printed(report, terminal=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_ascii_is_enough(report: RunReport, encoding: str) -> None:
    odd = changed(report, val_recall={"çé中": 0.5, "\udce9": 0.25}, device="é", notes=("→",))
    text = printed(odd, encoding=encoding)
    assert text.isascii()
    assert "################.... 412 MiB of 512 MiB (80 %)" in text
    assert "\\xe7\\xe9\\u4e2d" in text


def test_names_can_neither_steer_the_terminal_nor_pass_for_markup(report: RunReport) -> None:
    evil = "\x1b]0;title\x07[bold]x[/nope]\r\n:smile:\u202e"
    text = printed(
        changed(
            report,
            model=evil,
            device=evil,
            notes=(evil,),
            bad_images=(BadImage(evil, evil),),
            val_recall={evil: 0.5},
            verdict=evil,
            stopped_because=evil,
        )
    )
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert text.count("[bold]x[/nope]") == 9
    assert text.count(":smile:") == 8  # the name of a class is cut


def test_few_classes_are_listed_in_order_and_of_many_the_worst(report: RunReport) -> None:
    def recall(count: int) -> dict[str, float | None]:
        return {f"class{i:02d}": None if i == 3 else 1 - i / count for i in range(count)}

    few = printed(changed(report, val_recall=recall(20)))
    assert [f"class{i:02d}" in few for i in range(20)] == [True] * 20
    many = printed(changed(report, val_recall=recall(37)))
    assert "the worst 10 of 37 classes" in many
    listed = [line.split()[0] for line in many.splitlines() if line.startswith("  class")]
    assert listed == [f"class{i:02d}" for i in range(36, 26, -1)]


def test_long_and_wide_names_keep_the_columns(report: RunReport) -> None:
    from rich.cells import cell_len

    text = printed(changed(report, val_recall={"n" * 255: 0.5, "中文" * 50: 0.5, "x": 0.5}))
    lines = [line for line in text.splitlines() if line.endswith("50.0 % ██████████░░░░░░░░░░")]
    assert len(lines) == 3
    assert len({cell_len(line) for line in lines}) == 1
    assert cell_len(lines[0]) <= 80


def test_a_run_of_which_nothing_is_known_is_printed_too() -> None:
    report = RunReport(
        model="m", method="full", device="d", simulated=True, backend="ort", seed=1, stopped_because="interrupted"
    )
    text = printed(report)
    assert "m, full, on d (simulated): interrupted" in text
    assert "accuracy    not known" in text
    assert "peak not known" in text
    assert "None" not in text


def test_many_notes_and_bad_images_do_not_bury_the_verdict(report: RunReport) -> None:
    text = printed(
        changed(
            report,
            notes=tuple(f"note {i}" for i in range(500)),
            bad_images=tuple(BadImage(f"{i}.jpg", "empty") for i in range(500)),
        )
    )
    assert "500 skipped" in text
    assert "490 more in report.json" in text
    assert "480 more notes in report.json" in text
    assert len(text.splitlines()) < 60


def verdict(peak: int | None, cap: int | None = 512 * MIB, predicted: int | None = 430 * MIB) -> str:
    return verdict_line(
        device_peak_bytes=peak, cap_bytes=cap, predicted_peak_bytes=predicted, enforced_by="watched, not enforced"
    )


def test_the_verdict_never_rounds_over_the_cap() -> None:
    assert verdict(512 * MIB).startswith("within cap: device peak 512 MiB of 512 MiB (100 %)")
    assert verdict(512 * MIB - 1).startswith("within cap: device peak 512 MiB of 512 MiB (99 %)")
    assert verdict(512 * MIB + 1).startswith("over cap by 1 B: device peak 512 MiB of 512 MiB (101 %)")
    assert verdict(700 * MIB) == (
        "over cap by 188 MiB: device peak 700 MiB of 512 MiB (137 %), predicted 430 MiB, watched, not enforced"
    )


def test_the_verdict_says_what_is_not_known() -> None:
    assert verdict(None) == "peak not known against a cap of 512 MiB, predicted 430 MiB, watched, not enforced"
    assert verdict(100 * MIB, None, None) == "no cap: device peak 100 MiB"
    assert verdict(100 * MIB, 0, None).startswith("over cap by 100 MiB")
