"""The table and the picture of the memory model's benchmark say what its points say."""

from __future__ import annotations

import importlib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

from edgetune.units import MIB


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("memory_figures")


def _points(figures: ModuleType, *errors: float, family: str = "plain", flops: float | None = None) -> list[object]:
    size = 1000 * MIB
    return [figures.Point(family, round(size * (1 + error)), size, flops) for error in errors]


def test_each_family_has_a_row_and_all_have_one(figures: ModuleType) -> None:
    points = _points(figures, 0.01, -0.004, flops=0.002) + _points(figures, 0.0, family="base", flops=-0.001)
    plain, base, everything = figures.rows(points)
    assert (plain.family, plain.steps, base.family, base.steps) == ("plain", 2, "base", 1)
    assert plain.worst_below == pytest.approx(-0.004)
    assert plain.worst_above == pytest.approx(0.01)
    assert plain.mean_absolute == pytest.approx(0.007)
    assert (base.worst_below, base.worst_above) == (0, 0)
    assert (everything.family, everything.steps) == ("all", 3)
    assert (everything.flops_lowest, everything.flops_highest) == (-0.001, 0.002)
    assert figures.cells(plain) == ["plain", "2", "-0.400 %", "+1.000 %", "0.700 %", "+0.200 %", "+0.200 %"]
    assert figures.cells(figures.summarize("x", _points(figures, -1e-7)))[2:] == [
        *["+0.000 %"] * 2,
        "0.000 %",
        "-",
        "-",
    ]


@pytest.mark.parametrize(
    ("error", "flops", "missed"),
    [
        (0.0199, 0.009, 0),
        (-0.0049, None, 0),
        (0.021, None, 1),
        (-0.006, None, 1),
        (-0.03, None, 2),
        (0.0, -0.011, 1),
    ],
)
def test_a_missed_bar_is_said(figures: ModuleType, error: float, flops: float | None, missed: int) -> None:
    text = figures.verdict(figures.summarize("all", _points(figures, error, 0.0, flops=flops)))
    assert text.count("**missed**") == missed
    assert text.count("met") == (2 if flops is None else 3) - missed


def test_another_versions_run_adds_a_row_and_leaves_the_rest(figures: ModuleType, tmp_path: Path) -> None:
    figures.write(tmp_path, _points(figures, 0.001, 0.002), command="first", label=None)
    picture = (tmp_path / "memory_model.svg").read_text(encoding="utf-8")
    for label, error in (("torch 2.5.1", 0.004), ("torch 2.15.0+cpu", -0.003), ("torch 2.5.1", 0.005)):
        text = figures.write(tmp_path, _points(figures, error), command=label, label=label)
    assert text == (tmp_path / "memory_model.md").read_text(encoding="utf-8")
    assert (tmp_path / "memory_model.svg").read_text(encoding="utf-8") == picture
    lines = text.splitlines()
    assert "| plain | 2 | +0.000 % | +0.200 % | 0.150 % | - | - |" in lines
    assert [line for line in lines if line.startswith("| torch")] == [
        "| torch 2.15.0+cpu | 1 | -0.300 % | +0.000 % | 0.300 % | - | - |",
        "| torch 2.5.1 | 1 | +0.000 % | +0.500 % | 0.500 % | - | - |",
    ]
    # And the first one run again keeps those rows.
    again = figures.write(tmp_path, _points(figures, 0.001), command="again", label=None)
    assert again.count("| torch 2.") == 2
    assert "Made by `again`" in again


def test_the_picture_shows_every_point_twice_and_in_the_band_what_is_in_it(figures: ModuleType) -> None:
    points = _points(figures, 0.0, 0.015, 0.05, family="q/k <norm>")
    root = ElementTree.fromstring(figures.scatter(points))
    name = "{http://www.w3.org/2000/svg}"
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter(f"{name}circle")]
    assert len(dots) == 2 * 3 + 1  # and the legend's
    band = next(box for box in root.iter(f"{name}rect") if box.get("width") == str(figures.SIDE))
    top, height = float(band.get("y", "")), float(band.get("height", ""))
    right = [y for x, y in dots if x > figures.RIGHT]
    assert [top <= y <= top + height for y in right] == [True, True, False]
    assert any(text.text == "q/k <norm>" for text in root.iter(f"{name}text"))
