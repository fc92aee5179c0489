"""Processes that eat memory or are watched eating it, from outside, by the kernel's own figures."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from running import environment

LONGEST_SECONDS = 300

# The planner believes that a run needs SCALE of what it predicts; the rest is the command line.
DRIVER = """
import sys
import msgspec
import edgetune.engines.torch as engine
from edgetune import planner
from edgetune.errors import DoesNotFit
scale, data_mib, *arguments = sys.argv[1:]
scale = float(scale)
def optimistic(request, **more):
    runtime, cap = request.runtime_bytes, request.cap_bytes
    def less(size):
        return runtime + int(scale * (size - runtime)) + 2
    try:
        larger = msgspec.structs.replace(request, cap_bytes=runtime + int((cap - runtime) / scale))
        made = planner.plan(larger, **more)
    except DoesNotFit as error:
        raise DoesNotFit(str(error), less(error.smallest_cap_bytes)) from None
    phases = {phase: less(size) for phase, size in made.predicted_phase_bytes.items()}
    peak = less(made.predicted_peak_bytes)
    return msgspec.structs.replace(made, cap_bytes=cap, predicted_phase_bytes=phases, predicted_peak_bytes=peak)
if scale != 1:
    engine.make_plan = optimistic
if float(data_mib):
    import resource
    from edgetune import run, system
    warm_up = run.warm_up
    def then_limit(*given):
        judge = warm_up(*given)
        bound = system.process_status()["VmData"] + int(float(data_mib) * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
        return judge
    run.warm_up = then_limit
sys.argv = ["edgetune", *arguments]
from edgetune.__main__ import entry
entry()
"""

EATER = """
import sys, time
eaten = bytearray(int(sys.argv[1]))
for place in range(0, len(eaten), 4096):
    eaten[place] = 1
print("full", flush=True)
time.sleep(3600)
"""


class Watched(NamedTuple):
    """What a process did, and its memory while it did, as sampled: bytes."""

    code: int
    out: str
    err: str
    high_water_bytes: int  # the kernel's, which misses nothing
    most_over_limit_bytes: int  # VmData less the soft RLIMIT_DATA, where there was one; negative: never reached


def edgetune(
    *arguments: str | Path, scale: float = 1.0, data_mib: float = 0, look: Callable[[int], object] = lambda _pid: None
) -> Watched:
    """`edgetune ...` by DRIVER. `data_mib`: a hard RLIMIT_DATA so far above the warmed-up process, set by somebody else.

    `look` is called with the process's id every few milliseconds.
    """
    given = [sys.executable, "-c", DRIVER, str(scale), str(data_mib), *map(str, arguments)]
    process = subprocess.Popen(
        given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), bufsize=-1
    )
    high, over, deadline = 0, -(2**62), time.monotonic() + LONGEST_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        sizes, limit = status(process.pid), data_limit(process.pid)
        high = max(high, sizes.get("VmHWM", 0))
        if limit is not None and "VmData" in sizes:
            over = max(over, sizes["VmData"] - limit)
        look(process.pid)
        time.sleep(0.005)
    process.kill()
    out, err = process.communicate()
    return Watched(process.returncode, out, err, high, over)


def status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, bytes; empty once it has gone."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _text(f"/proc/{pid}/status"), re.MULTILINE)
    return {name: int(size) * 1024 for name, size in lines}


def data_limit(pid: int) -> int | None:
    found = re.search(r"^Max data size\s+(\d+)", _text(f"/proc/{pid}/limits"), re.MULTILINE)
    return int(found[1]) if found else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@contextmanager
def eater(size: int) -> Iterator[None]:
    """A process that has touched so many bytes, for the length of a with block."""
    process = subprocess.Popen([sys.executable, "-c", EATER, str(size)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        yield
    finally:
        process.kill()
        process.communicate()


def rss_by_row(file: Path) -> tuple[list[tuple[int, int]], Callable[[int], None]]:
    """(rows of a table so far, RSS in bytes) pairs, and what adds one for a process."""
    points: list[tuple[int, int]] = []

    def look(pid: int) -> None:
        sizes = status(pid)
        if "VmRSS" in sizes and file.exists():
            points.append((file.read_bytes().count(b"\n") - 1, sizes["VmRSS"]))

    return points, look


def available_bytes() -> int:
    """MemAvailable."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
