"""What a plan predicts against what a run of it measures: each row is a process of its own.

    python benchmarks/memory_plan.py          # writes benchmarks/memory_plan.md

All figures are what training adds to the runtime. `live` is tensors alike: predicted by `cost.py`, measured as what the
C heap has in use. `process` is resident memory: predicted with what data and the allocator add, measured by the kernel.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgetune.units import MIB

MICRO = ["--model", "edgetune_micro"]
TINY = ["--model", "deit_tiny_patch16_224", "--no-pretrained", "-b", "16"]
RUNS: list[tuple[str, list[str]]] = [
    (f"{model}, {method}", [*arguments, "--method", method])
    for model, arguments in (("edgetune_micro b32", MICRO), ("deit_tiny 224 px b16", TINY))
    for method in ("full", "last-k", "head", "random-k", "alast")
]
RUNS += [
    ("edgetune_micro b32, alast, 60 MiB to train in", [*MICRO, "--ram-cap", "376MiB"]),
    ("deit_tiny 224 px b16, alast, 200 MiB to train in", [*TINY, "--ram-cap", "516MiB"]),
    ("deit_tiny 224 px b16, alast, 100 MiB to train in", [*TINY, "--ram-cap", "416MiB"]),
    ("deit_tiny 224 px b16, full, 200 MiB to train in", [*TINY, "--ram-cap", "516MiB", "--method", "full"]),
]


def make_images(folder: Path) -> None:
    """Noise at 256 px: memory does not depend on what is in the pictures."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def measure(arguments: list[str], images: Path, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(report, plan) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgetune", "finetune", "--device", "jetson-nano", "--json", "--quiet"]
        command += ["--data", str(images), "--steps", str(steps), "--output", f"{folder}/run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout), json.loads(Path(folder, "run", "plan.json").read_text())


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    lines = [
        "| run | micro-batch | live predicted | measured | process predicted | measured | measured/predicted | within cap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        for name, arguments in RUNS:
            report, plan = measure(arguments, Path(folder), steps)
            versions = report["versions"]
            predicted = report["predicted_peak_bytes"] - report["device_runtime_bytes"]
            measured = report["training_peak_bytes"]
            live = report["peak_live_bytes"]
            lines.append(
                f"| {name} | {plan['micro_batch']} | {plan['predicted']['peak_bytes'] / MIB:.0f} | "
                f"{'-' if live is None else f'{live / MIB:.0f}'} | {predicted / MIB:.0f} | {measured / MIB:.0f} | "
                f"{measured / predicted:.2f} | {'yes' if report['within_cap'] else 'NO'} |"
            )
            print(lines[-1], flush=True)
    header = (
        f"# Planned and measured memory (MiB above the runtime)\n\nMade by `python benchmarks/memory_plan.py {steps}` on "
        f"{platform.machine()} with torch {versions.get('torch')}, timm {versions.get('timm')}, Python "
        f"{versions.get('python')}; {steps} steps a run. ALaST's prediction is for the worst draw at its token ceilings; "
        "what its budgets prune stays below.\n\n"
    )
    Path(__file__).with_suffix(".md").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
