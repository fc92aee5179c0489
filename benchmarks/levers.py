"""What each lever does to memory and accuracy, on the bundled model and digits: one process a run.

    python benchmarks/levers.py            # writes benchmarks/levers.md

Memory is what training added to the runtime; accuracy the best epoch's on the validation images. Lossless levers must
end with the same losses to the last digit where they change no order of sums, which the table says too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from writing import machine, table

from edgetune.units import MIB

BASES: dict[str, list[str]] = {
    "full": ["--method", "full"],
    "last 4 blocks": ["--method", "last-k", "--trained-blocks", "4"],
    "9 random blocks": ["--method", "random-k", "--trained-blocks", "9"],
}
LEVERS: list[tuple[str, str, list[str]]] = [
    ("full", "none", []),
    ("full", "--recompute mlp", ["--recompute", "mlp"]),
    ("full", "--recompute block", ["--recompute", "block"]),
    ("full", "--step-in-backward", ["--step-in-backward"]),
    ("full", "--grad-accum-steps 4", ["--grad-accum-steps", "4"]),
    ("full", "--embeddings freeze", ["--embeddings", "freeze"]),
    ("full", "--opt momentum", ["--opt", "momentum"]),
    ("full", "--opt adafactor", ["--opt", "adafactor"]),
    ("last 4 blocks", "none", []),
    ("last 4 blocks", "--frozen-weights bfloat16", ["--frozen-weights", "bfloat16"]),
    ("last 4 blocks", "--cache-precision float32", ["--cache-precision", "float32"]),
    ("last 4 blocks", "--cache-precision float16", ["--cache-precision", "float16"]),
    ("9 random blocks", "none", []),
    ("9 random blocks", "--recompute block", ["--recompute", "block"]),
    ("9 random blocks", "--optimizer-state evict", ["--optimizer-state", "evict"]),
]


class Run(NamedTuple):
    report: dict[str, Any]
    losses: list[str]


def run(arguments: list[str], epochs: int, seed: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        command = [sys.executable, "-m", "edgetune", "finetune", "--device", "jetson-nano", "--json", "--quiet"]
        command += [
            "--no-head-first",
            "--split",
            "lowest",
            "--epochs",
            str(epochs),
            "--seed",
            str(seed),
            "--threads",
            "1",
            "--output",
            str(output),
            *arguments,
        ]
        command += [] if "--cache-precision" in arguments else ["--no-cache"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        losses = [line.split(",")[2] for line in (output / "metrics.csv").read_text().splitlines()[1:]]
        return Run(json.loads(done.stdout), [loss for loss in losses if loss])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    plain: dict[str, list[Run]] = {}
    rows = []
    for base, lever, arguments in LEVERS:
        runs = [run([*BASES[base], *arguments], given.epochs, seed) for seed in range(given.seeds)]
        plain.setdefault(base, runs)
        memory = max(found.report["training_peak_bytes"] for found in runs)
        reference = max(found.report["training_peak_bytes"] for found in plain[base])
        same = all(ours.losses == theirs.losses for ours, theirs in zip(runs, plain[base], strict=True))
        accuracies = " ".join(f"{found.report['val_accuracy']:.3f}" for found in runs)
        rows.append(
            [base, lever, f"{memory / MIB:.0f}", f"{memory / reference:.2f}", accuracies, "yes" if same else "no"]
        )
        print(" | ".join(rows[-1]), flush=True)
    head = ["trains", "lever", "training MiB", "of none", "accuracy, one a seed", "same losses as none"]
    Path(__file__).with_suffix(".md").write_text(
        "# What the levers do\n\n"
        f"Made by `python benchmarks/levers.py --epochs {given.epochs} --seeds {given.seeds}` on {machine()}. The bundled "
        f"model and digits, batch 32, {given.epochs} epochs, seeds 0 to {given.seeds - 1}, one thread.\n\n"
        + table(head, rows)
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
