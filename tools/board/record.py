"""Results of `make board BOARD_FLAGS=--record`: a line a board in benchmarks/results/board.jsonl, and their table, benchmarks/board.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

import check  # noqa: E402
import startup  # noqa: E402
from writing import table  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results" / "board.jsonl"
JOBS = ("run", "resume", "evaluate", "killed", "promised", "refused")
MIB = check.MIB
# Named below the table, beside what the board's system is made of.
PACKAGES = ("edgetune", "torch", "numpy", "pillow", "safetensors", "msgspec")


def add(out: Path, what: str, found: dict[str, Any]) -> None:
    """Keep what a board left, in place of what an equal one left before, and write the table."""
    qemu = subprocess.run(["qemu-system-aarch64", "--version"], capture_output=True, text=True, check=True).stdout
    line = {
        "what": what,
        "qemu": qemu.splitlines()[0],
        "board": check.facts(out),
        "packages": (out / "packages.txt").read_text().split(),
        "startup": found,
        "report": json.loads((out / "report.json").read_text()),
        "limit_bytes": check.limit_bytes(out),
        "rss_anon_bytes": {job: check.peak_bytes(out, job) for job in JOBS},
        "vm_hwm_bytes": {job: check.peak_bytes(out, job, "VmHWM") for job in JOBS},
        "refused_said": check.said(out, "refused")[-600:],
    }
    kept = [each for each in results() if each["what"] != what]
    RESULTS.write_text("".join(json.dumps(each) + "\n" for each in [*kept, line]))
    (BENCHMARKS / "board.md").write_text(text(results()), encoding="utf-8")


def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def text(found: list[dict[str, Any]]) -> str:
    columns = [
        "board", "edgetune beside torch, before the model", "time, of `import torch`", "RssAnon: run, resume, evaluate",
        "report: peak of cap", "one process can have", "too large, unwatched", "promised 4 GiB", "under the board's own cap",
    ]  # fmt: skip
    return (
        "# Emulated boards\n\n"
        "`make board BOARD_FLAGS=--record` (with `MEM`, `CPU`, `PROFILE`, `CONSTRAINTS`): the bundled model on 80 of the bundled\n"
        "images, interrupted after a step, resumed and evaluated. MiB; anonymous + file-backed; RssAnon as it was seen from\n"
        "outside, twice a second. Emulated times say nothing about a board's speed; only ratios within one boot are given.\n\n"
        f"{table(columns, [_row(each) for each in found])}\n\n" + "\n".join(_versions(each) for each in found) + "\n"
    )


def _row(each: dict[str, Any]) -> list[str]:
    own, report, memory = startup.added(each["startup"], "torch", "ready"), each["report"], each["rss_anon_bytes"]
    return [
        each["what"],
        f"{own['anonymous_bytes'] / MIB:.1f} + {own['file_bytes'] / MIB:.1f}",
        f"{own['of_torch']:.2f}",
        ", ".join(f"{memory[job] / MIB:.0f}" for job in ("run", "resume", "evaluate")),
        f"{report['device_peak_bytes'] / MIB:.0f} of {report['cap_bytes'] / MIB:.0f}",
        f"{each['limit_bytes'] / MIB:.0f}",
        f"killed by the kernel ({each['board']['killed.rc']})",
        f"exit {each['board']['promised.rc']}",
        f"exit {each['board']['refused.rc']}: {each['refused_said'].splitlines()[-1][:200]}",
    ]


def _versions(each: dict[str, Any]) -> str:
    named = [name for name in each["packages"] if name.split("==")[0].lower() in PACKAGES]
    board = each["board"]
    return f"- {each['what']}: {board['kernel']}, Debian 12, {int(board['mem_total_kb']) // 1024} MiB seen, {each['qemu']}; {', '.join(named)}"
