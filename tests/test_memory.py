"""What the meter says is what real processes did, and what a made-up kernel with swap would have told."""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from edgetune import memory, process, system
from edgetune.memory import MemoryMeter, MemoryPeaks, available_bytes, limit_allocator, snapshot
from edgetune.units import MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
ASLEEP = 60.0  # an interval in which no sample falls into a test

PRELUDE = """
import json, mmap, os, subprocess, sys, time
import numpy as np
from edgetune.memory import MemoryMeter, snapshot, limit_allocator
MIB = 2**20
"""
# What is freed leaves the process at once, so that the sizes below are exact.
EXACT = "limit_allocator()\n"


def _run(script: str, setting: str = EXACT) -> Any:
    """The JSON that a fresh Python process prints last."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + setting + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
def test_an_array_that_lives_between_two_samples_is_seen_to_the_mebibyte() -> None:
    found = _run("""
meter = MemoryMeter(60).start()
before = meter.current().rss_bytes
np.ones(100 * MIB, np.uint8)
after = meter.current().rss_bytes
peaks = meter.stop()
anonymous = peaks.training_anonymous_peak_bytes
print(json.dumps([before, after, peaks.peak_rss_bytes, peaks.peak_bytes, peaks.exact, anonymous]))
""")
    before, after, peak_rss, peak, exact, anonymous = found
    assert exact
    assert after - before < 10 * MIB
    assert abs(peak_rss - before - 100 * MIB) < 2 * MIB + (after - before)
    assert peak == peak_rss
    assert abs(anonymous - 100 * MIB) < 2 * MIB + (after - before)


@linux
def test_a_peak_stays_in_its_phase_and_comes_back_with_it() -> None:
    found = _run("""
meter = MemoryMeter(60).start()
np.ones(MIB, np.uint8)
base = meter.current().rss_bytes
with meter.phase("load"):
    np.ones(80 * MIB, np.uint8)
with meter.phase("train"):
    np.ones(20 * MIB, np.uint8)
    with meter.phase("save"):
        np.ones(60 * MIB, np.uint8)
    np.ones(30 * MIB, np.uint8)
with meter.phase("load"):
    np.ones(10 * MIB, np.uint8)
with meter.phase("idle"):
    pass
peaks = meter.stop()
print(json.dumps([{name: (size - base) / MIB for name, size in peaks.phases.items()}, (peaks.peak_bytes - base) / MIB]))
""")
    phases, peak = found
    wanted = {"load": 80, "train": 30, "save": 60, "idle": 0}
    assert phases == {name: pytest.approx(size, abs=2) for name, size in wanted.items()}
    assert peak == pytest.approx(80, abs=2)


@linux
def test_training_is_what_comes_on_top_of_the_runtime_and_never_negative() -> None:
    found = _run("""
def run(runtime, training):
    meter = MemoryMeter(60).start()
    kept = np.ones(runtime * MIB, np.uint8)
    np.ones(150 * MIB, np.uint8)
    meter.mark_runtime()
    del kept
    np.ones(training * MIB, np.uint8)
    return meter.stop()
both = run(10, 50), run(100, 20)
print(json.dumps([[p.training_peak_bytes / MIB, (p.runtime_peak_bytes - p.runtime_bytes) / MIB] for p in both]))
""")
    # The runtime shrinks after the mark in both; in the second by more than training takes.
    assert found[0] == [pytest.approx(40, abs=2), pytest.approx(150, abs=2)]
    assert found[1] == [pytest.approx(0, abs=0.5), pytest.approx(150, abs=2)]
    assert found[1][0] >= 0


@linux
def test_file_backed_and_anonymous_memory_are_told_apart() -> None:
    found = _run("""
import tempfile
meter = MemoryMeter(60).start()
before = meter.mark_runtime()
with tempfile.TemporaryFile() as file:
    file.write(bytes(50 * MIB)); file.flush()
    between = meter.mark_runtime()
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(mapped[i] for i in range(0, 50 * MIB, 4096))
    now = meter.current()
    peaks = meter.stop()
print(json.dumps([now.file_bytes - between.file_bytes, now.anonymous_bytes - between.anonymous_bytes,
    peaks.peak_file_bytes - between.file_bytes, peaks.training_peak_bytes, peaks.training_anonymous_peak_bytes]))
""")
    file, anonymous, peak_file, training, training_anonymous = (size / MIB for size in found)
    assert file == pytest.approx(50, abs=2)
    assert peak_file == pytest.approx(50, abs=2)
    assert training == pytest.approx(50, abs=2)
    assert abs(anonymous) < 2
    assert training_anonymous < 2


@linux
def test_children_and_their_children_count_while_they_live() -> None:
    found = _run("""
code = "b = bytearray(60 * 2**20); print(1, flush=True); input()"
shell = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, code]
with MemoryMeter(60) as meter:
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.read(1)
        alive = meter.current()
        child.communicate(b"\\n")
    gone = meter.current()
peaks = meter.stop()
added = peaks.peak_bytes - peaks.runtime_bytes
print(json.dumps([alive.children_bytes, gone.children_bytes, peaks.children_peak_bytes, added]))
""")
    alive, gone, peak_children, added = (size / MIB for size in found)
    assert 60 < alive < 100
    assert gone == 0
    assert peak_children == alive
    assert alive <= added < alive + 20


@linux
def test_a_child_that_has_not_yet_run_its_program_is_not_counted_twice() -> None:
    found = _run("""
ballast = np.ones(100 * MIB, np.uint8)
np.ones(50 * MIB, np.uint8)
release, hold = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(hold)
    os.read(release, 1)
    os._exit(0)
forked = snapshot()
os.close(hold)
os.waitpid(pid, 0)
print(json.dumps(forked.children_bytes))
""")
    assert found < 50 * MIB


@linux
def test_a_forked_child_may_use_the_meter_it_inherited_and_the_parents_goes_on() -> None:
    found = _run("""
meter = MemoryMeter(0.001).start()
codes = []
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        with meter.phase("child"):
            meter.current()
        meter.mark_runtime()
        meter.stop()
        os._exit(7)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
np.ones(40 * MIB, np.uint8)
peaks = meter.stop()
print(json.dumps([codes, "child" in peaks.phases, peaks.training_peak_bytes / MIB]))
""")
    assert found[0] == [7] * 20
    assert found[1] is False
    assert found[2] >= 39


def test_a_long_run_at_a_high_rate_keeps_a_bounded_timeline() -> None:
    with MemoryMeter(interval_s=0.001) as meter:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            meter.current()
            time.sleep(0.0005)
    peaks = meter.stop()
    assert 100 < len(peaks.timeline) <= memory.TIMELINE_POINTS
    seconds = [point[0] for point in peaks.timeline]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 1.9
    assert max(size for _, size in peaks.timeline) == peaks.peak_bytes


@pytest.mark.parametrize("samples", [1, 511, 512, 513, 1024, 5000])
def test_a_full_timeline_keeps_its_highest_point_and_covers_all_of_the_time(samples: int) -> None:
    timeline = memory._Timeline()
    for index in range(samples):
        timeline.add(float(index), 1000 if index == samples // 3 else index % 7)
    points = timeline.points()
    assert len(points) <= memory.TIMELINE_POINTS
    assert (float(samples // 3), 1000) in points
    assert points[-1][0] >= samples - 1 - 2 * samples / memory.TIMELINE_POINTS * 2


def test_stopping_is_quick_final_and_repeatable() -> None:
    meter = MemoryMeter(interval_s=ASLEEP).start()
    assert meter.start() is meter
    began = time.monotonic()
    first = meter.stop()
    assert time.monotonic() - began < 1
    assert not any(thread.name == "edgetune-memory" for thread in threading.enumerate())
    meter.enter("later")
    ballast = bytearray(30 * MIB)
    assert meter.stop() is first
    assert meter.peaks() is first
    assert meter.current().rss_bytes > 0
    del ballast


def test_a_meter_started_again_begins_anew() -> None:
    meter = MemoryMeter(interval_s=ASLEEP)
    with meter, meter.phase("first"):
        pass
    first = meter.stop()
    with meter, meter.phase("second"):
        pass
    assert set(first.phases) == {"first"}
    assert set(meter.stop().phases) == {"second"}


def test_a_meter_never_started_has_no_peaks() -> None:
    with pytest.raises(RuntimeError, match="before start"):
        MemoryMeter().stop()


def test_the_thread_survives_a_sample_that_finds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = process.measure

    def failing() -> Any:
        calls.append(1)
        if 4 <= len(calls) < 8:
            raise MemoryError
        return real()

    monkeypatch.setattr(process, "measure", failing)
    with MemoryMeter(interval_s=0.001) as meter:
        deadline = time.monotonic() + 5
        while len(calls) < 20 and time.monotonic() < deadline:
            time.sleep(0.002)
    assert len(calls) >= 20
    assert meter.stop().peak_bytes > MIB


class _Kernel:
    """A process as the kernel would describe it, with a high-water mark that follows its rules. Sizes in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, resettable: bool = True) -> None:
        self.rss, self.swap, self.mark, self.file, self.resettable = 100, 0, 900, 30, resettable
        monkeypatch.setattr(system, "process_status", lambda _pid="self": self.status())
        monkeypatch.setattr(process, "reset_high_water", self.reset)
        monkeypatch.setattr(process.sys, "platform", "linux")

    def status(self) -> dict[str, int]:
        sizes = {"VmRSS": self.rss, "VmHWM": self.mark, "VmSwap": self.swap, "RssAnon": self.rss - self.file}
        return {name: size * MIB for name, size in sizes.items()}

    def reset(self) -> bool:
        if self.resettable:
            self.mark = self.rss
        return self.resettable

    def becomes(self, rss: int, swap: int = 0) -> None:
        self.rss, self.swap, self.mark = rss, swap, max(self.mark, rss)


def _mib(peaks: MemoryPeaks, *names: str) -> list[float]:
    return [getattr(peaks, name) / MIB for name in names]


def test_what_moves_to_swap_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel(monkeypatch)
    meter = MemoryMeter(ASLEEP).start()
    kernel.becomes(400)
    meter.current()
    kernel.becomes(200, swap=200)
    assert meter.current().total_bytes == 400 * MIB
    kernel.becomes(250, swap=190)
    meter.current()
    peaks = meter.stop()
    assert peaks.exact
    # 450: the highest RSS and the highest swap of the last stretch, the tightest bound on their sum.
    assert _mib(peaks, "peak_bytes", "peak_rss_bytes", "peak_swap_bytes") == [450, 400, 200]
    assert _mib(peaks, "peak_anonymous_bytes", "peak_file_bytes", "training_peak_bytes") == [420, 30, 350]


def test_a_short_peak_on_top_of_swap_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel(monkeypatch)
    meter = MemoryMeter(ASLEEP).start()
    kernel.becomes(300)
    meter.current()
    kernel.becomes(100, swap=50)
    meter.current()
    kernel.becomes(280, swap=50)
    kernel.becomes(100, swap=50)
    assert _mib(meter.stop(), "peak_bytes", "peak_rss_bytes") == [330, 300]


def test_where_the_mark_cannot_be_reset_only_its_rise_counts_and_the_peaks_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = _Kernel(monkeypatch, resettable=False)
    meter = MemoryMeter(ASLEEP).start()
    kernel.becomes(200)
    meter.current()
    kernel.becomes(100)
    # 900 was reached before the meter started: not this run's peak.
    assert _mib(meter.peaks(), "peak_bytes") == [200]
    kernel.becomes(950)
    kernel.becomes(100)
    peaks = meter.stop()
    assert _mib(peaks, "peak_bytes", "peak_rss_bytes") == [950, 950]
    assert not peaks.exact


def test_a_sandbox_that_only_pretends_to_reset_the_mark_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel(monkeypatch, resettable=False)
    monkeypatch.setattr(process, "reset_high_water", lambda: True)
    peaks = MemoryMeter(ASLEEP).start().stop()
    assert not peaks.exact
    assert _mib(peaks, "peak_bytes") == [kernel.rss]


def test_where_the_kernel_tells_nothing_psutil_does_and_unknown_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "process_status", lambda _pid="self": {})
    now = snapshot()
    assert now.rss_bytes > MIB
    assert (now.anonymous_bytes, now.file_bytes, now.swap_bytes) == (None, None, None)
    peaks = MemoryMeter(ASLEEP).start().stop()
    assert peaks.peak_bytes >= peaks.peak_rss_bytes > MIB
    assert (peaks.peak_swap_bytes, peaks.training_anonymous_peak_bytes, peaks.exact) == (None, None, False)


def test_cuda_is_asked_only_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[int] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: False,
        device_count=lambda: 2,
        reset_peak_memory_stats=reset.append,
        max_memory_reserved=lambda index: (index + 1) * MIB,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert MemoryMeter(ASLEEP).start().stop().cuda_peak_bytes is None
    assert reset == []
    cuda.is_initialized = lambda: True
    assert MemoryMeter(ASLEEP).start().stop().cuda_peak_bytes == 3 * MIB
    assert reset == [0, 1]
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())  # as while it is being imported
    assert MemoryMeter(ASLEEP).start().stop().cuda_peak_bytes is None


def test_the_meter_never_imports_torch() -> None:
    assert _run("MemoryMeter().start().stop(); print(json.dumps('torch' in sys.modules))") is False


@linux
def test_a_snapshot_is_cheap_enough_for_every_step() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        snapshot()
        return time.perf_counter() - began

    assert min(seconds() for _ in range(200)) < 0.001  # 0.00003 here; the best of many, so a busy machine passes


def test_available_memory_is_positive_and_no_more_than_the_machine_has() -> None:
    assert 0 < available_bytes() <= system.total_ram_bytes()


@linux
def test_a_limited_allocator_gives_freed_blocks_back() -> None:
    script = """
blocks = [np.ones(100 * 1024, np.uint8) for _ in range(500)]
full = snapshot().anonymous_bytes
del blocks[::2]
print(json.dumps([said, (full - snapshot().anonymous_bytes) / MIB]))
"""
    said, given_back = _run(script, setting="said = limit_allocator()\n")
    if said.startswith("unchanged"):
        pytest.skip(said)
    _, given_back_by_default = _run(script, setting="said = ''\n")
    assert said == "glibc returns freed blocks from 32.0 KiB on, 2 arenas"
    assert given_back == pytest.approx(25, abs=4)
    assert given_back_by_default < 5


PASSES = """
import resource
from edgetune.allocator import arena_bytes, freed_blocks_kept

def passes(count=20, turned=lambda: None, stays=False):
    # The same sizes again and again, as a model's; its faults. stays: and something that stays until the last.
    before, stay = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(count):
        blocks = [np.ones(size * 1024, np.uint8) for size in (4000, 300)]
        if stays:
            stay.append(np.ones(MIB, np.uint8))
        blocks += [np.ones(size * 1024, np.uint8) for size in (900, 40, 2500)]
        del blocks
        turned()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


@linux
def test_what_is_freed_is_kept_for_as_long_as_it_is_asked_for() -> None:
    said, given_back, kept, left_mib, afterwards = _run(
        PASSES
        + """
passes()
start = snapshot().anonymous_bytes
given_back = passes()
with freed_blocks_kept(20 * MIB) as turned:
    kept = passes(turned=turned)
left = snapshot().anonymous_bytes - start
print(json.dumps([said, given_back, kept, left / MIB, passes()]))
""",
        setting="said = limit_allocator()\n",
    )
    if said.startswith("unchanged"):
        pytest.skip(said)
    assert given_back > 0.8 * 20 * 7740 * 1024 / mmap.PAGESIZE  # less what fits a hole that the heap happens to have
    assert kept < 0.25 * given_back
    assert left_mib < 1
    assert afterwards > 0.5 * given_back  # as it was; what the heap has left is used first


@linux
def test_a_heap_that_grows_all_the_same_is_given_back() -> None:
    said, grown_mib, bounded_mib, left_mib = _run(
        PASSES
        + """
before = arena_bytes()
with freed_blocks_kept(10**12) as turned:
    passes(100, turned, stays=True)
    grown = arena_bytes() - before
before, start, seen = arena_bytes(), snapshot().anonymous_bytes, []
with freed_blocks_kept(16 * MIB) as turned:
    passes(100, lambda: (seen.append(arena_bytes() - before), turned()), stays=True)
print(json.dumps([said, grown / MIB, max(seen) / MIB, (snapshot().anonymous_bytes - start) / MIB]))
""",
        setting="said = limit_allocator()\n",
    )
    if said.startswith("unchanged"):
        pytest.skip(said)
    assert grown_mib > 90  # all that stays, less what fits a hole
    assert bounded_mib <= 16 + 8  # and what one turn takes
    assert left_mib < 4


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (SimpleNamespace(), "not glibc"),
        (SimpleNamespace(gnu_get_libc_version=0, mallopt=lambda _option, _value: 0), "refuses a threshold of 32.0 KiB"),
    ],
)
def test_an_allocator_that_stays_as_it_is_says_why(
    monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace, reason: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    assert limit_allocator().startswith("unchanged: ")
    assert reason in limit_allocator()
