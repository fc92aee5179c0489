"""A whole run imports nothing that a small board has no room for, and computes what it computes with timm's own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from doubles import make_images

# A run of the command line in a fresh process, that then says what it imported. With THROUGH_TIMM no model is known.
SCRIPT = """
import json, os, sys
import torch
before = set(sys.modules)
if os.environ.get("THROUGH_TIMM"):
    import edgetune.vit.known, edgetune.vit.models
    edgetune.vit.models.described = lambda source: None  # as if none were known
from edgetune.__main__ import main
stop_after = int(os.environ.get("STOP_AFTER", 0))
if stop_after:
    import signal
    from edgetune.cli.progress import Terminal
    shown = Terminal.step
    def step(self, event):
        shown(self, event)
        if event.step == stop_after:
            signal.raise_signal(signal.SIGINT)
    Terminal.step = step
sys.argv = ["edgetune", *json.loads(os.environ["ARGUMENTS"])]
try:
    main()
except SystemExit as end:
    assert end.code == (130 if stop_after else 0) or not stop_after and end.code is None, end.code
with open(os.environ["IMPORTED"], "w") as file:
    json.dump(sorted(set(sys.modules) - before), file)
"""
FORBIDDEN = ("timm", "torchvision", "torch._dynamo", "torch._inductor", "sympy", "huggingface_hub", "onnx", "sklearn")


def _run(folder: Path, *arguments: str, through_timm: bool = False, stop_after: int = 0) -> set[str]:
    """What the process imported beside torch."""
    imported = folder / "imported.json"
    environment = {**os.environ, "ARGUMENTS": json.dumps(arguments), "IMPORTED": str(imported)}
    if through_timm:
        environment["THROUGH_TIMM"] = "1"
    if stop_after:
        environment["STOP_AFTER"] = str(stop_after)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(imported.read_text()))


def _losses(run: Path) -> list[str]:
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    assert rows
    column = header.split(",").index("loss")
    return [row.split(",")[column] for row in rows]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", {"cat": 10, "dog": 8})


@pytest.mark.slow
@pytest.mark.parametrize("model", ["edgetune_micro", "deit_tiny_patch16_224", "vit_base_patch32_clip_quickgelu_224"])
def test_a_run_imports_none_of_it_from_its_start_to_its_end(model: str, images: Path, tmp_path: Path) -> None:
    options = () if model == "edgetune_micro" else ("--no-pretrained", "--image-size", "64", "--method", "full")
    task = ("--data", str(images), "--model", model, "--batch-size", "4", "--steps", "2", *options, "-q")
    run = tmp_path / "run"
    imported = _run(tmp_path, "finetune", *task, "--output", str(run))
    assert imported.isdisjoint(FORBIDDEN)
    assert {name.split(".")[0] for name in imported}.isdisjoint(FORBIDDEN)
    assert _run(tmp_path, "evaluate", str(run)).isdisjoint(FORBIDDEN)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--method", "last-k", "--split", "8")], ids=["alast", "cached"])
def test_a_run_that_was_stopped_goes_on_as_lean_as_it_began(
    options: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    task = (
        "--data",
        str(images),
        "--model",
        "edgetune_micro",
        "-b",
        "4",
        "--epochs",
        "2",
        *options,
        "-q",
        "--output",
        str(run),
    )
    _run(tmp_path, "finetune", *task, stop_after=1)
    assert _run(tmp_path, "finetune", "--resume", str(run), "-q").isdisjoint(FORBIDDEN)
    assert json.loads((run / "report.json").read_bytes())["stopped_because"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("edgetune_micro", ()),
        ("deit_tiny_patch16_224", ("--no-pretrained", "--image-size", "64")),
        ("deit_tiny_distilled_patch16_224", ("--no-pretrained", "--image-size", "64", "--method", "full")),
    ],
)
def test_losses_are_the_same_bits_as_with_timms_own_model(
    model: str, options: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    task = (
        "--data",
        str(images),
        "--model",
        model,
        "--batch-size",
        "4",
        "--steps",
        "4",
        *options,
        "-q",
        "--threads",
        "1",
    )
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    assert "timm" not in _run(tmp_path, "finetune", *task, "--output", str(own))
    assert "timm" in _run(tmp_path, "finetune", *task, "--output", str(theirs), through_timm=True)
    assert _losses(own) == _losses(theirs)
    assert (own / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_what_is_known_from_data_alone_is_what_needs_no_timm() -> None:
    from edgetune.shapes import _load
    from edgetune.vit.known import known_models

    assert set(_load()) == {"edgetune_micro", *known_models()}
