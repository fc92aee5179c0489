"""Find each method's default learning rate: every method at several rates on the bundled task, the best one wins.

    python benchmarks/defaults.py             # writes benchmarks/defaults.md
    python benchmarks/defaults.py --data DIR --model NAME --weights FILE   # the same on a task of your own

Validation accuracy decides, so these are tuned on the task they are shown on: a starting point, not a claim.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RATES = {
    "full": (3e-4, 1e-3, 3e-3),
    "last-k": (1e-3, 3e-3, 1e-2),
    "random-k": (3e-4, 1e-3, 3e-3),
    "alast": (3e-4, 1e-3, 3e-3),
    "head": (1e-2, 3e-2, 1e-1),
}
SCALES = {"adamw": 1.0, "momentum": 10.0, "sgd": 100.0}


def run(method: str, rate: float, seed: int, extra: list[str]) -> dict[str, Any]:
    """One run's report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "edgetune",
            "finetune",
            "--json",
            "--quiet",
            "--split",
            "lowest",
            "--method",
            method,
        ]
        command += ["--lr", f"{rate:g}", "--seed", str(seed), "--output", f"{folder}/run", *extra]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def table(rows: list[tuple[str, float, list[float]]], header: str) -> str:
    lines = [
        header,
        "",
        "| method | learning rate | validation accuracy (each seed) | mean | |",
        "|---|---|---|---|---|",
    ]
    best: dict[str, float] = {}
    for method, _, scores in rows:
        best[method] = max(best.get(method, 0.0), sum(scores) / len(scores))
    for method, rate, scores in rows:
        mean = sum(scores) / len(scores)
        mark = "best" if mean == best[method] else ""
        lines.append(f"| {method} | {rate:g} | {', '.join(f'{score:.3f}' for score in scores)} | {mean:.3f} | {mark} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--opt", choices=sorted(SCALES), default="adamw")
    parser.add_argument("--methods", nargs="+", choices=sorted(RATES), default=list(RATES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args, extra = parser.parse_known_args()
    extra += ["--epochs", str(args.epochs), "--opt", args.opt]
    rows, versions = [], {}
    for method in args.methods:
        for rate in RATES[method]:
            reports = [run(method, rate * SCALES[args.opt], seed, extra) for seed in range(args.seeds)]
            versions = reports[0]["versions"]
            rows.append((method, rate * SCALES[args.opt], [float(report["val_accuracy"]) for report in reports]))
            print(*rows[-1], flush=True)
    header = (
        f"# Learning rates\n\nMade by `python benchmarks/defaults.py {' '.join(sys.argv[1:])}`: {args.epochs} epochs, "
        f"{args.opt}, batch 32, {platform.machine()}, torch {versions.get('torch')}, timm {versions.get('timm')}. "
        f"Task: {reports[0]['model']} on {reports[0]['train_images']} training and {reports[0]['val_images']} "
        "validation images."
    )
    args.output.write_text(table(rows, header), encoding="utf-8")


if __name__ == "__main__":
    main()
