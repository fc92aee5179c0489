"""What each step of the way from full fine-tuning to a cached, pruned suffix costs: time and memory of whole runs.

    python benchmarks/prefix_cache.py            # writes benchmarks/prefix_cache.md

Every row is runs of `edgetune finetune` in processes of their own; the rounds interleave the rows, so that a busy machine
hits all alike. Weights are random: what is measured is time and memory, and accuracy means nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from writing import machine, table

from edgetune.units import MIB

# `--method alast` as it is by default, but for the split and the tokens.
WAYS: list[tuple[str, list[str]]] = [
    ("full fine-tuning", ["--method", "full"]),
    ("nothing below block 8 trains", ["--split", "8", "--split-tokens", "1", "--no-cache"]),
    ("prefix cached", ["--split", "8", "--split-tokens", "1"]),
    ("2/3 of the tokens from the split on", ["--split", "8", "--split-tokens", "0.67"]),
    ("2/5 of the tokens from the split on", ["--split", "8", "--split-tokens", "0.4"]),
    ("the same, whole blocks recomputed", ["--split", "8", "--split-tokens", "0.4", "--recompute", "block"]),
]
# The default. On random images there is little to find, but to look takes as long; it looks at a pretrained model, which
# is the one that full fine-tuning made.
AUTO = "--split auto"

COLUMNS = (
    "what is left out, each row with those above",
    "an epoch, of full's",
    "looking and caching once, in full epochs",
    "the whole run, of full's",
    "peak live MiB",
    "of full's",
    "peak RSS above the runtime, MiB",
    "of full's",
    "on disk, MiB",
)


class Task(NamedTuple):
    """A model, how often it sees its images, and how many there are (a quarter more validate)."""

    model: str
    epochs: int
    images: int
    image_px: int = 224


TASKS = (Task("deit_tiny_patch16_224", 5, 96), Task("vit_base_patch16_224", 3, 48))


class Figures(NamedTuple):
    epoch_seconds: float  # of training, once the cache is there
    cache_seconds: float
    look_seconds: float
    total_seconds: float  # looking, caching and training, all epochs
    live_bytes: int
    added_bytes: int  # to the runtime's resident memory
    disk_bytes: int
    found: str = ""  # what was looked for


def make_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for part, images in (("train", count), ("val", count // 4)):
        for number in range(images):
            path = folder / part / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (224, 224, 3), np.uint8)).save(path)


def title(task: Task) -> str:
    return f"{task.model}, {task.image_px} px, batch 16, {task.epochs} epochs of {task.images} images"


def run(task: Task, data: Path, arguments: list[str], folder: Path, weights: Path | None = None) -> Figures:
    """`weights`: of a model that counts as pretrained; None: they are random."""
    command = [sys.executable, "-m", "edgetune", "finetune", "--device", "jetson-orin-nano-8gb", "--json", "--quiet"]
    command += ["--model", task.model, "--data", str(data), "-b", "16", "--threads", "1"]
    command += ["--image-size", str(task.image_px), "--epochs", str(task.epochs), "--output", str(folder), *arguments]
    command += ["--no-pretrained"] if weights is None else ["--weights", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    caching, looking = report["cache_seconds"] or 0.0, report["look_seconds"] or 0.0
    return Figures(
        epoch_seconds=(report["train_seconds"] - caching) / task.epochs,
        cache_seconds=caching,
        look_seconds=looking,
        total_seconds=report["train_seconds"] + looking,
        live_bytes=report["peak_live_bytes"],
        added_bytes=report["training_peak_bytes"],
        disk_bytes=report["cache_bytes"] or 0,
        found=" ".join(note for note in report["notes"] if note.startswith("split:")),
    )


def costs_of(task: Task, rounds: int, ways: Sequence[tuple[str, list[str]]]) -> str:
    """A table with a line a way, of which the first is what the others are compared with, and one of the default."""
    names = [name for name, _ in ways]
    found: dict[str, list[Figures]] = {name: [] for name in (*names, AUTO)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "images")
        make_images(data, task.images)
        trained = Path(folder, f"0 {names[0]}", "model.safetensors")
        for number in range(rounds):
            for name, arguments in (*ways, (AUTO, AUTO.split())):
                output = Path(folder, f"{number} {name.replace('/', ' of ')}")
                figures = run(task, data, arguments, output, trained if name == AUTO else None)
                print(f"{task.model}, round {number + 1}: {name}: {figures}", flush=True)
                found[name].append(figures)
    return costs_table(found, names[0], "in these images (noise, with the model that full fine-tuning made)")


def costs_table(found: Mapping[str, Sequence[Figures]], compared_with: str, in_what: str = "") -> str:
    """A line a way, of its best rounds, and what the default among them found."""
    base = _best(found[compared_with])
    rows = []
    for name, runs in found.items():
        best = _best(runs)
        before = best.look_seconds + best.cache_seconds
        rows.append(
            [
                f"the default, `{name}`" if name == AUTO else name,
                f"{best.epoch_seconds / base.epoch_seconds:.2f}",
                f"{before / base.epoch_seconds:.2f}" if before else "-",
                f"{best.total_seconds / base.total_seconds:.3f}",
                f"{best.live_bytes / MIB:.0f}",
                f"{best.live_bytes / base.live_bytes:.3f}",
                f"{best.added_bytes / MIB:.0f}",
                f"{best.added_bytes / base.added_bytes:.2f}",
                f"{best.disk_bytes / MIB:.1f}" if best.disk_bytes else "-",
            ]
        )
    told = "; ".join(dict.fromkeys(figures.found for figures in found[AUTO]))
    return f"{table(COLUMNS, rows)}\n\nWhat `{AUTO}` found{f' {in_what}' if in_what else ''}: {told}\n"


def _best(runs: Sequence[Figures]) -> Figures:
    """The least of each figure."""
    numbers = [name for name in Figures._fields if name != "found"]
    return Figures(*(min(getattr(figures, name) for figures in runs) for name in numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    parts = []
    for task in TASKS:
        parts += [f"## {title(task)}\n", costs_of(task, args.rounds, WAYS)]
    Path(__file__).with_suffix(".md").write_text(
        "# What a cached prefix saves\n\n"
        f"Made by `python benchmarks/prefix_cache.py --rounds {args.rounds}` on {machine()}. One thread, AdamW, random "
        f"weights, {args.rounds} interleaved rounds, the best of each. Times are of looking, caching and training, without "
        "evaluation; the cache is float16.\n\n" + "\n".join(parts),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
