"""`edgetune plan`: what it prints, what it imports, when it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from edgetune.cli import app
from edgetune.errors import DoesNotFit, UnknownDevice
from edgetune.units import MIB

TINY = ["--model", "deit_tiny_patch16_224"]


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_plan_shows_every_kind_of_bytes_and_the_peak_against_the_cap() -> None:
    text = plan("--device", "jetson-nano", *TINY)
    for word in (
        "runtime",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "workspace",
        "margin",
        "peak",
        "2670 MiB",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            [],
            "looks at its images first and may split elsewhere, under the same cap (--split lowest, or --no-pretrained",
        ),
        (["--split", "auto", "--method", "random-k"], "looks at its images first"),
        (["--epochs", "2"], "a run splits as here: looking at its images for a better split pays from 3 epochs on"),
        (["--images", "31"], "a run splits as here: fewer than 32 images can't say where else"),
        (["--split", "lowest"], None),
        (["--split", "8"], None),
        (["--trained-blocks", "3"], None),
        (["--method", "random-k"], None),
        (["--method", "full", "--split", "auto"], None),
    ],
)
def test_a_plan_says_whether_a_run_would_look_for_another_split(flags: list[str], words: str | None) -> None:
    text = plan("--device", "jetson-nano", *TINY, *flags)
    assert words in text if words else ("a run looks" not in text and "a run splits" not in text)


def test_json_is_the_plan_itself_and_within_the_cap() -> None:
    made = json.loads(plan("--device", "jetson-nano", "--ram-cap", "500MiB", "--json", *TINY))
    assert made["cap_bytes"] == 500 * MIB
    assert made["predicted_peak_bytes"] <= 500 * MIB
    assert made["micro_batch"] < made["batch_size"]


def test_the_smallest_cap_fits_and_one_mib_less_does_not() -> None:
    smallest = float(plan("--device", "jetson-nano", "--min-cap", *TINY).split()[0])
    plan("--device", "jetson-nano", "--ram-cap", f"{smallest}MiB", *TINY)
    with pytest.raises(DoesNotFit, match="needs at least"):
        plan("--device", "jetson-nano", "--ram-cap", f"{smallest - 1}MiB", *TINY)


def test_all_devices_says_for_each_whether_it_fits() -> None:
    rows = json.loads(plan("--all-devices", "--json", "--model", "vit_base_patch16_224"))
    fits = {row["device"]: row["fits"] for row in rows}
    assert fits["jetson-orin-nano-8gb"]
    assert not fits["raspberry-pi-zero-2w"]


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(UnknownDevice, match="jetson-nano"):
        plan("--device", "jetson-nan", *TINY)


def test_a_plan_for_a_known_model_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from edgetune.cli import app\n"
        "try: app(['plan', '--device', 'jetson-nano', '--model', 'vit_base_patch16_224'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
