"""Draw the pictures of the README from a run folder: the summary as a terminal shows it, and the run's curves.

python tools/make_pictures.py runs/demo --output docs
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

from rich.console import Console

from edgetune.report import print_summary, read_report
from edgetune.units import MIB

WIDTH, HEIGHT, MARGIN = 720, 260, 46
COLOURS = {"accuracy": "#2a78d6", "loss": "#d1495b", "memory": "#3a7d44"}


def summary_svg(run: Path) -> str:
    console = Console(record=True, width=124, force_terminal=True, file=io.StringIO())
    print_summary(read_report(run), console)
    return console.export_svg(title="edgetune finetune --device jetson-nano")


def curves_svg(run: Path) -> str:
    """Training loss, memory of each step as a share of the cap, and validation accuracy, over the steps."""
    report = read_report(run)
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = max(int(row["step"]) for row in rows)
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    top = max(loss for _, loss in losses)
    curves = {
        "loss": [(step, loss / top) for step, loss in losses],
        "accuracy": [(int(row["step"]), float(row["val_accuracy"])) for row in rows if row["val_accuracy"]],
        "memory": [
            (int(row["step"]), int(row["memory_bytes"]) / (report.cap_bytes or 1))
            for row in rows
            if row["memory_bytes"]
        ],
    }
    labels = {
        "loss": f"training loss (top: {top:.2f})",
        "accuracy": f"validation accuracy ({report.val_accuracy or 0:.3f})",
        "memory": f"memory, share of the cap ({(report.cap_bytes or 0) / MIB:.0f} MiB)",
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        y = _y(share)
        parts.append(f'<line x1="{MARGIN}" y1="{y}" x2="{WIDTH - 10}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end" fill="#555">{share:g}</text>')
    for place, (name, points) in enumerate(curves.items()):
        path = " ".join(f"{_x(step, last):.1f},{_y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.6"/>')
        x = MARGIN + place * 225
        parts.append(f'<text x="{x}" y="16" fill="{COLOURS[name]}">{labels[name]}</text>')
    parts.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end" fill="#555">step {last}</text></svg>')
    return "\n".join(parts) + "\n"


def _x(step: int, last: int) -> float:
    return MARGIN + (WIDTH - 10 - MARGIN) * step / max(1, last)


def _y(share: float) -> float:
    return HEIGHT - 24 - (HEIGHT - 24 - 30) * min(1.0, share)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the README's pictures from a run folder.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "summary.svg").write_text(summary_svg(args.run), encoding="utf-8")
    (args.output / "curves.svg").write_text(curves_svg(args.run), encoding="utf-8")


if __name__ == "__main__":
    main()
