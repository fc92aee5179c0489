"""The peak memory of a process, from outside it: what a cap has to be held against.

Read are the kernel's high-water mark of resident memory (VmHWM) plus swap in /proc/<pid>/status, every POLL_SECONDS until
the process ends; the highest reading counts. They are polled because edgetune's own meter resets the mark between phases,
after which the kernel's figure at exit (`ru_maxrss`, which `/usr/bin/time -v` prints) has forgotten what came before. That
figure, from wait4, is taken too where it is higher. It survives exec, so it begins at what the parent held at its highest
and counts only above that: the parent imports no torch and stays far below any run. A run starts no processes itself.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.003
RUN_SECONDS = 600
# The kernel adds up resident pages a few at a time on each core, so two readings of one peak may differ by so much.
_COUNTED_LATE_BYTES = 1 << 20


def watch(command: Sequence[str], errors: Path, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(exit code, peak bytes of RSS plus swap) of a process, as the module says; killed after RUN_SECONDS.

    Its standard error goes to the file `errors`.
    """
    with errors.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # what it began at is no more
    deadline, peak = time.monotonic() + RUN_SECONDS, 0
    # Popen returns after exec, so what is read here is never this process's own memory.
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, held_bytes(Path(f"/proc/{process.pid}/status")))
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    at_exit = usage.ru_maxrss * 1024
    return process.returncode, max(peak, at_exit if at_exit > own_peak + _COUNTED_LATE_BYTES else 0)


def held_bytes(status: Path) -> int:
    """VmHWM plus VmSwap of a process's status file; 0 once it has gone."""
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM:", "VmSwap:")))
