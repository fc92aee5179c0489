"""Does the cap hold? Random runs under random caps, their memory read from outside.

    python benchmarks/cap.py                 # 60 runs, writes benchmarks/cap.md; --quick prints a few small ones

Each run is `edgetune finetune --device auto --ram-cap N` in a process of its own. Its cap lies between the smallest that
its model, batch and method can do with and a little more than they like best, both as `edgetune plan` says. Its peak is
read from outside: see `watching.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cap_draws import MODELS, QUICK_MODELS, Configuration, configurations, draw_cap
from PIL import Image
from watching import POLL_SECONDS, watch
from writing import machine, table

from edgetune.units import MIB, parse_bytes

REDRAWS = 8
CLASSES = 3
TRAIN_IMAGES, VAL_IMAGES = 60, 9
NO_BOUND = "1024GiB"
SHARE_BAR = 0.7
RECOMPUTE_NAMES = ("nothing", "MLP", "block")  # edgetune.cost.Recompute
TOO_SMALL = 3  # the exit code where no plan fits the cap


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one run. Bytes; None where the run did not come so far as to say."""

    configuration: Configuration
    cap_bytes: int
    measured_bytes: int
    exit_code: int
    runtime_bytes: int | None = None
    predicted_bytes: int | None = None
    larger_refused: bool | None = None
    micro_batch: int | None = None
    recompute: str = "-"
    enforced_by: str = "-"
    seconds: float = 0.0
    message: str = ""

    @property
    def over(self) -> bool:
        return self.measured_bytes > self.cap_bytes

    @property
    def share(self) -> float | None:
        """What training added to the runtime, of what the cap left for it."""
        if self.runtime_bytes is None or self.cap_bytes <= self.runtime_bytes:
            return None
        return (self.measured_bytes - self.runtime_bytes) / (self.cap_bytes - self.runtime_bytes)


def finetune_arguments(
    configuration: Configuration, cap_bytes: int, images: Path, output: Path, enforce: str | None
) -> list[str]:
    """The command line of a run, after `edgetune`. `enforce` None: edgetune's own default."""
    arguments = ["finetune", "--device", "auto", "--ram-cap", str(cap_bytes), *_model_arguments(configuration)]
    arguments += ["--no-pretrained", "--steps", str(configuration.steps), "--data", str(images)]
    arguments += ["--output", str(output), "--quiet"]
    return arguments if enforce is None else [*arguments, "--enforce", enforce]


def plan_arguments(configuration: Configuration, more: Sequence[str]) -> list[str]:
    return ["plan", "--device", "auto", *_model_arguments(configuration), "--classes", str(CLASSES), "--json", *more]


def _model_arguments(configuration: Configuration) -> list[str]:
    return [
        *("--model", configuration.model),
        *("--image-size", str(configuration.image_px)),
        *("-b", str(configuration.batch)),
        *("--method", configuration.method),
    ]


def edgetune(arguments: Sequence[str]) -> str:
    """Standard output of `edgetune ...`."""
    done = subprocess.run(_command(arguments), capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise SystemExit(f"edgetune {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "edgetune", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def needs(configuration: Configuration) -> tuple[int, int]:
    """(least, best liked) bytes that training adds to the runtime, as `edgetune plan` has them."""
    unbound = json.loads(edgetune(plan_arguments(configuration, ["--ram-cap", NO_BOUND])))
    smallest = json.loads(edgetune(plan_arguments(configuration, ["--ram-cap", NO_BOUND, "--min-cap"])))
    runtime = int(unbound["runtime_bytes"])
    return int(smallest["smallest_cap_bytes"]) - runtime, int(unbound["predicted_peak_bytes"]) - runtime


def run(configuration: Configuration, cap_bytes: int, images: Path, enforce: str | None) -> Row:
    """One run: its row, whatever became of it."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "run"), Path(folder, "stderr")
        began = time.monotonic()
        code, measured = watch(
            _command(finetune_arguments(configuration, cap_bytes, images, output, enforce)), errors, _environment()
        )
        report, plan = _read(output / "report.json"), _read(output / "plan.json")
        return Row(
            configuration=configuration,
            cap_bytes=cap_bytes,
            measured_bytes=measured,
            exit_code=code,
            runtime_bytes=report.get("runtime_bytes"),
            predicted_bytes=plan.get("predicted_peak_bytes"),
            larger_refused=larger_refused(plan) if plan else None,
            micro_batch=plan.get("micro_batch"),
            recompute=recompute_of(plan),
            enforced_by=report.get("enforced_by", "-"),
            seconds=time.monotonic() - began,
            message=errors.read_text(encoding="utf-8", errors="replace").strip(),
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except OSError:
        return {}
    return found


def larger_refused(plan: dict[str, Any]) -> bool:
    """Whether the plan's explanation names a larger plan that the cap refused."""
    return any("next larger plan" in line for line in plan["explanation"])


def recompute_of(plan: dict[str, Any]) -> str:
    """The plan's recompute levels in a few characters: `block x 8, nothing x 4`; `-` in a plan without."""
    levels = plan.get("recompute")
    if not isinstance(levels, list):
        return "-" if levels is None else str(levels)
    named = [RECOMPUTE_NAMES[level] if level in range(len(RECOMPUTE_NAMES)) else str(level) for level in levels]
    return ", ".join(f"{name} x {len(list(run))}" for name, run in groupby(named)) or "-"


COLUMNS = (
    "model",
    "px",
    "batch",
    "method",
    "photo-graphs",
    "cap MiB",
    "runtime",
    "predicted peak",
    "measured peak",
    "measured / cap",
    "training added / (cap - runtime)",
    "larger plan refused",
    "micro-batch",
    "recompute",
    "enforced by",
    "exit",
)


def cells(row: Row) -> list[str]:
    """A run's line of the table."""
    asked = row.configuration
    return [
        asked.model,
        str(asked.image_px),
        str(asked.batch),
        asked.method,
        "yes" if asked.photographs else "",
        f"{row.cap_bytes / MIB:.1f}",
        _mib(row.runtime_bytes),
        _mib(row.predicted_bytes),
        _mib(row.measured_bytes),
        f"{row.measured_bytes / row.cap_bytes:.3f}" + (" OVER" if row.over else ""),
        "-" if row.share is None else f"{row.share:.2f}",
        {True: "yes", False: "no", None: "-"}[row.larger_refused],
        str(row.micro_batch or "-"),
        row.recompute,
        row.enforced_by,
        str(row.exit_code),
    ]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.1f}"


def summary(rows: Sequence[Row], redrawn: int) -> list[str]:
    """The bar: no run over its cap; wherever a larger plan was refused, SHARE_BAR of the room is used."""
    over = sum(row.over for row in rows)
    failed = [row for row in rows if row.exit_code]
    shares = sorted(row.share for row in rows if row.larger_refused and row.share is not None)
    lines = [f"Runs over the cap: {over} of {len(rows)} (bar: 0, {'missed' if over else 'met'})."]
    if shares:
        below = sum(share < SHARE_BAR for share in shares)
        lines.append(
            f"Of the {len(shares)} runs whose plan names a larger one that was refused, the smallest share of "
            f"(cap - runtime) used is {shares[0]:.0%}, the median {statistics.median(shares):.0%} "
            f"(bar: {SHARE_BAR:.0%} in each, {f'missed by {below}' if below else 'met'})."
        )
    else:
        lines.append("No run's plan names a larger one that was refused.")
    errors = [row.measured_bytes / row.predicted_bytes for row in rows if row.predicted_bytes]
    if errors:
        lines.append(f"Measured / predicted peak: {min(errors):.3f} to {max(errors):.3f}.")
    lines.append(f"Runs that ended with another exit code than 0: {len(failed)}.")
    lines += [f"- {_name(row.configuration)}: exit {row.exit_code}: {row.message[-200:] or '-'}" for row in failed]
    lines.append(f"Caps redrawn because they were below the smallest that works (exit {TOO_SMALL}): {redrawn}.")
    return lines


def _name(asked: Configuration) -> str:
    return f"{asked.model} {asked.image_px} px batch {asked.batch} {asked.method}"


def make_images(folder: Path, *, photographs: bool) -> Path:
    """Noise at 64 px, and where asked for a few photographs of 3 megapixels among it."""
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for number in range(count):
            place = folder / part / f"class{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            large = photographs and number % 10 == 0
            pixels = rng.integers(0, 256, (1536, 2048, 3) if large else (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / (f"{number}.jpg" if large else f"{number}.png"))
    return folder


def smallest_named(message: str) -> int | None:
    """The cap that an edgetune which found no plan says would do."""
    match = re.search(r"--ram-cap ([\d.]+\s?[KMG]i?B)", message)
    return parse_bytes(match.group(1)) if match else None


def run_under_cap(
    configuration: Configuration, rng: random.Random, runtime_bytes: int, images: Path, enforce: str | None
) -> tuple[Row, int]:
    """(the run under a cap drawn until one works, how many did not)."""
    smallest, liked = needs(configuration)
    for redrawn in range(REDRAWS):
        row = run(configuration, draw_cap(rng, runtime_bytes, smallest, liked), images, enforce)
        if row.exit_code != TOO_SMALL:
            return row, redrawn
        # The run knows more than the plan before it: the images and its own runtime.
        named = smallest_named(row.message)
        smallest = max(smallest, (named or 0) - runtime_bytes)
    return row, REDRAWS


def measured_runtime(images: Path) -> int:
    """What a run here takes its own runtime to be, which its plan starts from."""
    asked = Configuration(model="edgetune_micro", image_px=32, batch=1, method="head", steps=1)
    with tempfile.TemporaryDirectory() as folder:
        edgetune(finetune_arguments(asked, parse_bytes(NO_BOUND), images, Path(folder, "run"), None))
        return int(_read(Path(folder, "run", "plan.json"))["runtime_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enforce", choices=("rlimit", "cgroup", "none"), help="for each run; default: edgetune's own")
    parser.add_argument("--quick", action="store_true", help="at most four small runs, printed instead of written")
    args = parser.parse_args()
    count, models = (min(args.runs, 4), QUICK_MODELS) if args.quick else (args.runs, MODELS)
    enforce = args.enforce
    if enforce is not None and "--enforce" not in edgetune(["finetune", "--help"]):
        print("this edgetune has no --enforce: left out", file=sys.stderr)
        enforce = None
    rows: list[Row] = []
    redrawn = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # What edgetune keeps of this machine (its runtime, checked images) is of these runs alone.
        os.environ["EDGETUNE_CACHE_DIR"] = f"{folder}/cache"
        images = {photos: make_images(Path(folder, f"images{photos}"), photographs=photos) for photos in (False, True)}
        runtime = measured_runtime(images[False])
        for number, asked in enumerate(configurations(count, args.seed, models)):
            rng = random.Random(f"cap {args.seed} {number}")
            row, more = run_under_cap(asked, rng, runtime, images[asked.photographs], enforce)
            rows.append(row)
            redrawn += more
            print(f"{number + 1}/{count} {row.seconds:.0f} s: {' | '.join(cells(row))}", flush=True)
    lines = summary(rows, redrawn)
    text = (
        "# Does the cap hold?\n\n"
        f"Made by `python benchmarks/cap.py --runs {count} --seed {args.seed}"
        f"{'' if enforce is None else f' --enforce {enforce}'}` on {machine()}; {len(rows)} runs in "
        f"{(time.monotonic() - began) / 60:.0f} minutes. Sizes are MiB of RSS plus swap of the whole process; the "
        f"measured peak is read from outside, every {POLL_SECONDS * 1000:.0f} ms. `runtime` is what the process held "
        "after its warm-up.\n\n" + "\n".join(lines) + f"\n\n{table(COLUMNS, [cells(row) for row in rows])}\n"
    )
    if args.quick:
        print(text)
    else:
        print("\n".join(lines))
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
