"""What came back from the board, judged from outside: the job's exit codes, its memory as the board's kernel counted it,
and the report of the run. Nothing is taken from edgetune's word alone.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

MIB = 2**20
KILLED = 137
# DoesNotFit, and memory ran out under ever tighter plans: what a run ends with that does not fit (README, exit codes).
ENDED_BY_ITSELF = (3, 4)
INTERRUPTED = 143
STAYS = ("install", "requirements", "startup")


class Missing(Exception):
    """The board left no such figure: it did not come so far."""


def facts(folder: Path) -> dict[str, str]:
    """What the job noted, `name=value` a line."""
    path = folder / "facts.txt"
    if not path.is_file():
        raise Missing(f"{path}: the board left nothing; its console says why")
    return dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if "=" in line)


def peak_bytes(folder: Path, job: str, field: str = "RssAnon") -> int:
    """The highest figure that was seen of a job from outside."""
    path = folder / f"{job}.memory"
    found = (
        re.findall(rf"^{field}:\s+(\d+) kB", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else []
    )
    if not found:
        raise Missing(f"nothing was seen of the memory of {job}")
    return max(map(int, found)) * 1024


def number(found: dict[str, str], name: str) -> int:
    try:
        return int(found[name])
    except (KeyError, ValueError) as error:
        raise Missing(f"the board left no figure for {name}") from error


def said(folder: Path, job: str) -> str:
    path = folder / f"{job}.log"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def limit_bytes(folder: Path) -> int:
    """How much anonymous memory one process had when the board's kernel ended it."""
    sizes = [int(line) for line in said(folder, "limit").splitlines() if line.isdigit()]
    if not sizes:
        raise Missing("nothing was seen of how much the board gives one process")
    return sizes[-1]


def problems(folder: Path, *, usable_anonymous_bytes: int | None, lean: bool) -> list[str]:
    """What is not as it has to be; empty: all of it is. `lean`: whether edgetune added no more than it may."""
    try:
        return list(_problems(folder, facts(folder), usable_anonymous_bytes, lean))
    except Missing as missing:
        return [str(missing)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"what the board left can't be read: {type(error).__name__}: {error}"]


def _problems(folder: Path, found: dict[str, str], usable: int | None, lean: bool) -> Any:
    for job in STAYS:
        if number(found, f"{job}.rc"):
            yield f"{job} ended with {found[f'{job}.rc']}: {said(folder, job)[-300:]}"
    if not lean:
        yield "edgetune added more to bare torch than it may (startup.json)"
    wanted = {"run": INTERRUPTED, "resume": 0, "evaluate": 0}
    for job, code in wanted.items():
        if number(found, f"{job}.rc") != code:
            yield f"{job} ended with {found[f'{job}.rc']}, not {code}: {said(folder, job)[-300:]}"
    killed = number(found, "evaluate.oom_kills") - number(found, "limit.kills")
    if killed:
        yield f"the kernel killed {killed} processes for memory while edgetune ran"
    for job in wanted:
        peak = peak_bytes(folder, job)
        if usable is not None and peak > usable:
            yield f"{job} took {peak / MIB:.0f} MiB of anonymous memory, of the profile's {usable / MIB:.0f}"
    yield from _report_problems(json.loads((folder / "report.json").read_text(encoding="utf-8")), folder)
    if number(found, "killed.rc") != KILLED or number(found, "killed.oom_kills") <= number(found, "evaluate.oom_kills"):
        yield f"what does not fit was not killed by the kernel (exit code {found['killed.rc']})"
    if number(found, "promised.rc") not in (*ENDED_BY_ITSELF, KILLED):
        yield f"what was promised memory that isn't there was neither stopped nor killed (exit code {found['promised.rc']})"
    if number(found, "refused.rc") not in ENDED_BY_ITSELF or not said(folder, "refused"):
        yield f"what does not fit did not end by itself and say why (exit code {found['refused.rc']})"
    if number(found, "refused.oom_kills") != number(found, "promised.oom_kills"):
        yield "what was to end by itself was killed by the kernel"


def _report_problems(report: dict[str, Any], folder: Path) -> Any:
    if report["simulated"]:
        yield "the run took itself for a simulation: this board is not the profile's"
    if report["within_cap"] is not True or report["device_peak_bytes"] > report["cap_bytes"]:
        yield f"not within the cap: {report['device_peak_bytes']} of {report['cap_bytes']} bytes"
    seen = peak_bytes(folder, "resume", "VmHWM")
    if report["device_peak_bytes"] < 0.9 * seen:
        yield f"the report's peak is {report['device_peak_bytes'] / MIB:.0f} MiB; from outside {seen / MIB:.0f} were seen"


def closing_line(folder: Path, *, usable_anonymous_bytes: int | None, what: str) -> str:
    """The figures in a line."""
    found, report = facts(folder), json.loads((folder / "report.json").read_text(encoding="utf-8"))
    peak = max(peak_bytes(folder, job) for job in ("run", "resume", "evaluate"))
    of = "" if usable_anonymous_bytes is None else f" of {usable_anonymous_bytes / MIB:.0f}"
    killed = number(found, "evaluate.oom_kills") - number(found, "limit.kills")
    return (
        f"board: {what}: exit {found['resume.rc']}, within cap ({report['device_peak_bytes'] / MIB:.0f} of "
        f"{report['cap_bytes'] / MIB:.0f} MiB), RssAnon {peak / MIB:.0f}{of} MiB, oom_kill {killed}; "
        f"too large: killed ({found['killed.rc']}), promised 4 GiB: exit {found['promised.rc']}, under its cap: exit "
        f"{found['refused.rc']}; "
        f"one process can have {limit_bytes(folder) / MIB:.0f} MiB here"
    )


if __name__ == "__main__":
    sys.exit("\n".join(problems(Path(sys.argv[1]), usable_anonymous_bytes=None, lean=True)) or 0)
