"""The table and the scatter plot of `memory_model.py`, out of its points. No torch.

Kept beside the table: a small file of rows for every torch that was tried (`results/memory_model*.json`), so that a run
with another version adds its row without the first one's being run again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import msgspec
from writing import machine, table

from edgetune.units import MIB

MOST_BELOW, MOST_ABOVE, MOST_FLOPS = 0.005, 0.02, 0.01
COLUMNS = ("family", "steps", "worst below", "worst above", "mean absolute error", "FLOPs, from", "to")
COLOURS = ("#2a78d6", "#d1495b", "#3a7d44", "#b8860b", "#7b4fa3", "#0f8b8d", "#555555", "#e07a5f")


class Point(NamedTuple):
    """One step. Bytes at the peak; the FLOPs' relative error where they were counted."""

    family: str
    predicted_bytes: int
    measured_bytes: int
    flops_error: float | None

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


class Row(msgspec.Struct, frozen=True):
    """Relative errors of a family's steps: 0.01 is 1 % above what was measured. 0 where none is below, or above."""

    family: str
    steps: int
    worst_below: float
    worst_above: float
    mean_absolute: float
    flops_lowest: float | None
    flops_highest: float | None


class Results(msgspec.Struct, frozen=True):
    label: str
    command: str
    machine: str
    rows: list[Row]  # a family each, then all


def summarize(family: str, points: Sequence[Point]) -> Row:
    errors = [point.error for point in points]
    flops = [point.flops_error for point in points if point.flops_error is not None]
    return Row(
        family=family,
        steps=len(points),
        worst_below=min(0.0, *errors),
        worst_above=max(0.0, *errors),
        mean_absolute=sum(map(abs, errors)) / len(errors),
        flops_lowest=min(flops, default=None),
        flops_highest=max(flops, default=None),
    )


def rows(points: Sequence[Point]) -> list[Row]:
    families = dict.fromkeys(point.family for point in points)
    each = [summarize(family, [point for point in points if point.family == family]) for family in families]
    return [*each, summarize("all", points)]


def cells(row: Row, name: str | None = None) -> list[str]:
    errors = (row.worst_below, row.worst_above, row.mean_absolute, row.flops_lowest, row.flops_highest)
    below, above, mean, *flops = ("-" if error is None else f"{round(100 * error, 3) + 0.0:+.3f} %" for error in errors)
    return [name or row.family, str(row.steps), below, above, mean.lstrip("+"), *flops]


def verdict(row: Row) -> str:
    """Whether all steps are inside the bars."""
    flops = [abs(error) for error in (row.flops_lowest, row.flops_highest) if error is not None]
    checks = [
        (f"never more than {MOST_BELOW:.1%} below what was measured", -row.worst_below <= MOST_BELOW),
        (f"within {MOST_ABOVE:.0%} of it", max(row.worst_above, -row.worst_below) <= MOST_ABOVE),
    ]
    if flops:
        checks.append((f"FLOPs within {MOST_FLOPS:.0%}", max(flops) <= MOST_FLOPS))
    return "Bars: " + "; ".join(f"{bar}: {'met' if met else '**missed**'}" for bar, met in checks) + "."


def markdown(main: Results | None, others: Sequence[Results], picture: str) -> str:
    parts = [
        "# The memory model against the allocator",
        "Predicted and measured peak of live tensor bytes of one optimizer step: weights, optimizer state, images, "
        "gradients, activations, workspace. Random steps of whole timm models: image size, batch, micro-batches, split, "
        "trained blocks, token counts, recompute levels, frozen weights as bfloat16, optimizer, updates in the backward, one or two threads. Measured "
        "by the events of torch's CPU allocator; FLOPs by `torch.utils.flop_counter`, attention on the math path, in a "
        "quarter of the steps. oneDNN is off, as in every run.",
    ]
    if main is not None:
        parts += [
            f"Made by `{main.command}` on {main.machine}.",
            table(COLUMNS, [cells(row) for row in main.rows]),
            verdict(main.rows[-1]),
            f"![predicted against measured]({picture})",
        ]
    if others:
        parts += [
            "## Other versions of torch",
            table(("version", *COLUMNS[1:]), [cells(other.rows[-1], other.label) for other in others]),
            *(f"{other.label}: `{other.command}` on {other.machine}. {verdict(other.rows[-1])}" for other in others),
        ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, points: Sequence[Point], *, command: str, label: str | None) -> str:
    """Write `memory_model.md` in the folder, and the picture unless it is another version's row (`label`).

    Returns: the Markdown.
    """
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    own = Results(label or "", command, machine(), rows(points))
    suffix = (
        ""
        if label is None
        else "-" + "".join(letter if letter.isalnum() or letter in ".+" else "_" for letter in label)
    )
    encoded = msgspec.json.format(msgspec.json.encode(own), indent=1)
    (results / f"memory_model{suffix}.json").write_bytes(encoded + b"\n")
    kept = [msgspec.json.decode(path.read_bytes(), type=Results) for path in sorted(results.glob("memory_model*.json"))]
    main = next((each for each in kept if not each.label), None)
    text = markdown(main, [each for each in kept if each.label], "memory_model.svg")
    (folder / "memory_model.md").write_text(text, encoding="utf-8")
    if label is None:
        (folder / "memory_model.svg").write_text(scatter(points), encoding="utf-8")
    return text


# The picture: predicted against measured on the left, what lies between the two on the right.

SIDE, GAP, LEFT, TOP, BOTTOM = 380, 92, 62, 44, 52
WIDTH, HEIGHT = LEFT + SIDE + GAP + SIDE + 16, TOP + SIDE + BOTTOM
RIGHT = LEFT + SIDE + GAP
STEPS_MIB = (50, 100, 200, 500, 1000, 2000, 5000)


class _Axis(NamedTuple):
    """From a value to a pixel; logarithmic."""

    low: float
    high: float

    def at(self, value: float) -> float:
        return SIDE * math.log(value / self.low) / math.log(self.high / self.low)


def scatter(points: Sequence[Point]) -> str:
    sizes = [size / MIB for point in points for size in (point.predicted_bytes, point.measured_bytes)]
    axis = _Axis(min(sizes) / 1.15, max(sizes) * 1.15)
    # Room for the band, and for what falls outside it.
    low = min(-1.25 * MOST_BELOW, 1.1 * min(point.error for point in points))
    high = max(1.1 * MOST_ABOVE, 1.1 * max(point.error for point in points))
    families = list(dict.fromkeys(point.family for point in points))
    colours = {family: COLOURS[number % len(COLOURS)] for number, family in enumerate(families)}

    def right(error: float) -> float:
        return TOP + SIDE * (high - error) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_legend(colours),
        _band_left(axis),
        f'<rect x="{RIGHT}" y="{right(MOST_ABOVE):.1f}" width="{SIDE}" '
        f'height="{right(-MOST_BELOW) - right(MOST_ABOVE):.1f}" fill="#e8f0e4"/>',
    ]
    for step in (size for size in STEPS_MIB if axis.low < size < axis.high):
        place = axis.at(step)
        for left in (LEFT, RIGHT):
            parts.append(_line(left + place, TOP, left + place, TOP + SIDE))
            parts.append(_text(left + place, TOP + SIDE + 16, str(step), "middle"))
        parts.append(_line(LEFT, TOP + SIDE - place, LEFT + SIDE, TOP + SIDE - place))
        parts.append(_text(LEFT - 6, TOP + SIDE - place + 4, str(step), "end"))
    for error in (-MOST_BELOW, 0.0, MOST_ABOVE / 2, MOST_ABOVE):
        parts.append(_line(RIGHT, right(error), RIGHT + SIDE, right(error)))
        parts.append(_text(RIGHT - 6, right(error) + 4, f"{100 * error:+.1f} %" if error else "0", "end"))
    for point in points:
        x, colour = axis.at(point.measured_bytes / MIB), colours[point.family]
        y = TOP + SIDE - axis.at(point.predicted_bytes / MIB)
        parts.append(_dot(LEFT + x, y, colour))
        parts.append(_dot(RIGHT + x, right(point.error), colour))
    below = "measured peak of live bytes, MiB"
    parts += [_text(left + SIDE / 2, TOP + SIDE + 36, below, "middle") for left in (LEFT, RIGHT)]
    parts += [_turned(LEFT - 44, "predicted, MiB"), _turned(RIGHT - 54, "predicted / measured - 1")]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(colours: dict[str, str]) -> list[str]:
    parts, x = [], float(LEFT)
    for family, colour in colours.items():
        parts += [_dot(x, 18, colour), _text(x + 8, 22, family, "start")]
        x += 26 + 7 * len(family)
    parts.append(f'<rect x="{x}" y="12" width="16" height="12" fill="#cfe0c6"/>')
    parts.append(_text(x + 22, 22, f"{-MOST_BELOW:.1%} to {MOST_ABOVE:+.0%}", "start"))
    return parts


def _band_left(axis: _Axis) -> str:
    """Where the prediction is between the two bars."""
    shifts = [SIDE * math.log1p(error) / math.log(axis.high / axis.low) for error in (-MOST_BELOW, MOST_ABOVE)]
    corners = [(LEFT, TOP + SIDE - shift) for shift in shifts]
    corners += [(LEFT + SIDE, TOP - shift) for shift in reversed(shifts)]
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}" fill="#cfe0c6"/>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ccc" stroke-width="0.6"/>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}" fill-opacity="0.65"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444">{escape(text)}</text>'


def _turned(x: float, text: str) -> str:
    y = TOP + SIDE / 2
    return f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle" fill="#444">{text}</text>'
