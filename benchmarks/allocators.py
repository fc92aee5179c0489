"""What an allocator keeps, and what it costs to make it keep less: glibc's settings, jemalloc and mimalloc.

    python benchmarks/allocators.py          # writes benchmarks/allocators.md; --quick prints a small one

Every row is processes of their own, one a round; the rounds interleave the rows so that a busy machine hits all alike.
A process takes optimizer steps of ALaST's kind, whose token counts change each time; every tenth is the largest there
is, so what the peak grows between the tenth and the last of them is what the allocator failed to use again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import allocator_steps
import msgspec
from allocator_steps import LARGEST_EVERY, TOKEN_MULTIPLE, WORKLOADS, Job, Sample, Workload
from writing import machine, table

from edgetune.allocator import MMAP_THRESHOLD_BYTES
from edgetune.units import KIB, MIB

WARM_STEPS = 5  # left out of the times
# Which setting is picked: see `conclusion`.
MOST_TIME = 2.0
SAME_PEAK = 0.01


class Variant(msgspec.Struct, frozen=True):
    """An allocator: glibc under a threshold, or a library by its name with what its environment says."""

    name: str
    threshold_bytes: int | None = None
    library: str = ""
    environment: dict[str, str] = {}


class Figures(msgspec.Struct, frozen=True):
    """One row: the largest bytes of all rounds, and times relative to glibc's default."""

    peak_bytes: int
    growth_bytes: int
    median_time: float
    best_time: float
    best_step_seconds: float
    faults_a_step: float


DEFAULT = "glibc's default"
VARIANTS = (
    Variant(DEFAULT),
    *(
        Variant(f"glibc, threshold {size // KIB} KiB", threshold_bytes=size)
        for size in (MIB, 256 * KIB, 64 * KIB, 32 * KIB)
    ),
    Variant("jemalloc", library="jemalloc"),
    Variant(
        "jemalloc, pages back at once",
        library="jemalloc",
        environment={"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0"},
    ),
    Variant("mimalloc", library="mimalloc"),
    # The first is its name up to 2.0, the second from 2.1 on.
    Variant(
        "mimalloc, pages back at once",
        library="mimalloc",
        environment={"MIMALLOC_DECOMMIT_DELAY": "0", "MIMALLOC_PURGE_DELAY": "0"},
    ),
)
LIBRARY_FOLDERS = ("/usr/lib/*-linux-gnu*", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/usr/local/lib64")


def find_library(name: str, folders: Sequence[str] = LIBRARY_FOLDERS) -> str | None:
    """The newest `lib<name>.so*` in the usual places."""
    found = [
        path
        for folder in folders
        for place in sorted(Path("/").glob(folder.lstrip("/")))
        for path in sorted(place.glob(f"lib{name}.so*"), reverse=True)
    ]
    return str(found[0]) if found else None


def measure(variant: Variant, workload: Workload, steps: int, libraries: dict[str, str | None]) -> Sample | str:
    """One process; what kept it from running, in words, where it did not."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    preloaded = ""
    if variant.library:
        library = libraries.get(variant.library)
        if library is None:
            return "not installed"
        preloaded = library
        environment |= {"LD_PRELOAD": library, **variant.environment}
    job = Job(workload, steps, variant.threshold_bytes, preloaded)
    command = [sys.executable, allocator_steps.__file__, msgspec.json.encode(job).decode()]
    done = subprocess.run(command, capture_output=True, env=environment)
    if done.returncode:
        print(done.stderr.decode(errors="replace"), file=sys.stderr)
        return (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit {done.returncode}"])[-1][:80]
    return msgspec.json.decode(done.stdout, type=Sample)


def figures(rounds: list[Sample], default: list[Sample]) -> Figures:
    """One row out of its rounds. Step i is compared with step i of the default: they do the same work.

    `median_time`: over all steps and rounds, each against the default's of the same round. `best_time`: the sum over the
    steps of each one's fastest round.
    """
    warm = min(WARM_STEPS, len(rounds[0].cpu_seconds) - 1)
    ratios = [
        mine / other
        for here, there in zip(rounds, default, strict=True)
        for mine, other in zip(here.cpu_seconds[warm:], there.cpu_seconds[warm:], strict=True)
    ]
    return Figures(
        peak_bytes=max(sample.peak_bytes for sample in rounds),
        growth_bytes=max(sample.growth_bytes for sample in rounds),
        median_time=statistics.median(ratios),
        best_time=sum(_best(rounds)[warm:]) / sum(_best(default)[warm:]),
        best_step_seconds=statistics.mean(_best(rounds)[warm:]),
        faults_a_step=statistics.mean(count for sample in rounds for count in sample.faults[warm:]),
    )


def _best(rounds: list[Sample]) -> list[float]:
    return [min(times) for times in zip(*(sample.cpu_seconds for sample in rounds), strict=True)]


COLUMNS = (
    "allocator",
    "peak above the warmed-up process, MiB",
    "of the default's",
    "growth after step 10, MiB",
    "CPU time a step, of the default's: median",
    "best",
    "mean of best steps, s",
    "page faults a step",
)


def task_table(variants: Sequence[Variant], results: dict[str, Figures | str]) -> str:
    """The Markdown table of one workload; a variant that did not run has the reason in its row."""
    default = results[DEFAULT]
    rows = []
    for variant in variants:
        row = results[variant.name]
        if isinstance(row, str) or isinstance(default, str):
            rows.append([variant.name, str(row) if isinstance(row, str) else "-", *["-"] * (len(COLUMNS) - 2)])
            continue
        rows.append(
            [
                variant.name,
                f"{row.peak_bytes / MIB:.1f}",
                f"{row.peak_bytes / default.peak_bytes:.2f}",
                f"{row.growth_bytes / MIB:.1f}",
                f"{row.median_time:.2f}",
                f"{row.best_time:.2f}",
                f"{row.best_step_seconds:.3f}",
                f"{row.faults_a_step:,.0f}",
            ]
        )
    return table(COLUMNS, rows)


def conclusion(variants: Sequence[Variant], results: Sequence[dict[str, Figures | str]]) -> str:
    """Which setting is picked and why.

    The rule: memory is what a cap is on, so the lowest peak wins (mean over the workloads, relative to glibc's default)
    among the settings that a process can make for itself and that cost at most MOST_TIME on each workload; of those
    within SAME_PEAK of it the fastest.
    """
    scores = {
        variant.name: score for variant in variants if (score := _score(variant.name, results)) is not None
    }  # name: (peak, time, the most time on one workload), all relative to the default
    own = [variant for variant in variants if variant.name in scores and not variant.library]
    allowed = [variant for variant in own if scores[variant.name][2] <= MOST_TIME]
    if not allowed:
        return "Nothing is picked: glibc's default could not be measured."
    lowest = min(scores[variant.name][0] for variant in allowed)
    near = [variant for variant in allowed if scores[variant.name][0] <= lowest + SAME_PEAK]
    picked = min(near, key=lambda variant: scores[variant.name][1])
    peak, seconds, _ = scores[picked.name]
    lines = [
        f"**Picked: {picked.name}.** Over both tasks its peak is {peak:.2f} of the default's at {seconds:.2f} times the "
        f"CPU time a step (best). The rule: of what a process can set for itself, the lowest peak, since memory is what "
        f"a cap is on, unless it costs more than {MOST_TIME} times the default's CPU on a task; of those within "
        f"{SAME_PEAK:.2f} of the lowest, the fastest."
    ]
    others = [
        f"{variant.name} {scores[variant.name][0]:.2f} at {scores[variant.name][1]:.2f}"
        for variant in own
        if variant is not picked
    ]
    lines.append(f"The others: {'; '.join(others)}.")
    preloaded = [variant.name for variant in variants if variant.library and variant.name in scores]
    if preloaded:
        best = min(preloaded, key=lambda name: scores[name][0])
        than = "lower" if scores[best][0] < peak else "no lower"
        lines.append(
            f"Preloaded, the lowest peak is that of {best}: {scores[best][0]:.2f} at {scores[best][1]:.2f}, {than} than "
            "the picked one's. A process can't preload a library into itself, and boards have none installed: no default."
        )
    if picked.threshold_bytes == MMAP_THRESHOLD_BYTES:
        lines.append("It is what `edgetune.allocator` sets.")
    else:
        lines.append(f"`edgetune.allocator` sets {MMAP_THRESHOLD_BYTES // KIB} KiB: not what these numbers pick.")
    return " ".join(lines)


def _score(name: str, results: Sequence[dict[str, Figures | str]]) -> tuple[float, float, float] | None:
    peaks, times = [], []
    for task in results:
        mine, default = task[name], task[DEFAULT]
        if isinstance(mine, str) or isinstance(default, str):
            return None
        peaks.append(mine.peak_bytes / default.peak_bytes)
        times.append(mine.best_time)
    return statistics.mean(peaks), statistics.mean(times), max(times)


def run_rounds(
    workload: Workload, rounds: int, steps: int, libraries: dict[str, str | None]
) -> dict[str, Figures | str]:
    """All variants on one workload; each round begins with another one."""
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in VARIANTS}
    failures: dict[str, str] = {}
    for number in range(rounds):
        shift = number * len(VARIANTS) // rounds
        for variant in (*VARIANTS[shift:], *VARIANTS[:shift]):
            if variant.name in failures:
                continue
            seen = measure(variant, workload, steps, libraries)
            if isinstance(seen, str):
                failures[variant.name] = seen
                print(f"{workload.name}: {variant.name}: {seen}", flush=True)
                continue
            samples[variant.name].append(seen)
            print(
                f"{workload.name}, round {number + 1}: {variant.name}: {seen.peak_bytes / MIB:.1f} MiB, "
                f"{statistics.median(seen.cpu_seconds):.3f} s a step",
                flush=True,
            )
    if DEFAULT in failures:
        raise SystemExit(f"{DEFAULT} did not run: {failures[DEFAULT]}")
    return {
        variant.name: failures[variant.name]
        if variant.name in failures
        else figures(samples[variant.name], samples[DEFAULT])
        for variant in VARIANTS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--jemalloc", default=find_library("jemalloc"), metavar="PATH")
    parser.add_argument("--mimalloc", default=find_library("mimalloc"), metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="one round of 20 steps, printed instead of written")
    args = parser.parse_args()
    rounds, steps = (1, 20) if args.quick else (args.rounds, args.steps)
    libraries = {"jemalloc": args.jemalloc, "mimalloc": args.mimalloc}
    results = [run_rounds(workload, rounds, steps, libraries) for workload in WORKLOADS]
    named = ", ".join(
        f"{name} {Path(path).resolve().name if path else 'not installed'}" for name, path in libraries.items()
    )
    parts = [
        "# What allocators keep",
        f"Made by `python benchmarks/allocators.py --rounds {rounds} --steps {steps}` on {machine()}; {named}. One thread, "
        f"AdamW, {steps} steps a process, {rounds} interleaved process(es) a row. Bytes are the largest of the rounds; "
        f"times leave out the first {WARM_STEPS} steps. Token counts change every step (multiples of {TOKEN_MULTIPLE}); "
        f"every {LARGEST_EVERY}th step is the largest, so growth after step {LARGEST_EVERY} (the peak at the end less the "
        "peak then) is memory that was not used again. Under a threshold there are two arenas at most.",
        *(
            f"## {workload.name}\n\n{task_table(VARIANTS, result)}"
            for workload, result in zip(WORKLOADS, results, strict=True)
        ),
        conclusion(VARIANTS, results),
    ]
    text = "\n\n".join(parts) + "\n"
    if args.quick:
        print(text)
    else:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
