"""What was really used: the peaks of this process's memory over a run and over each phase of it.

The figure a cap is held against is RSS plus swap of this process and its children. The resident peak comes from the
kernel's high-water mark (VmHWM), which also sees what lived between two samples; swap and children are sampled.
`ru_maxrss` is never used: it survives exec. Nothing here imports torch; CUDA is asked where torch is loaded already.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]

from edgetune import process, system
from edgetune.allocator import heap_bytes, limit_allocator
from edgetune.process import MemorySnapshot, snapshot

__all__ = ["MemoryMeter", "MemoryPeaks", "MemorySnapshot", "available_bytes", "limit_allocator", "snapshot"]

TIMELINE_POINTS = 512
_SAMPLING_SHARE = 0.02  # a slow board samples less often rather than spend more than this


class MemoryPeaks(msgspec.Struct, frozen=True, kw_only=True):
    """Peaks from `MemoryMeter.start` on, in bytes; None where the system doesn't tell.

    `peak_bytes` is the capped figure. The anonymous peaks count what is swapped out. `training_*` is what came on top
    of the runtime since `mark_runtime`; were pages of the runtime dropped meanwhile, it is that much too small, never
    negative. `runtime_peak_bytes` is the peak before the mark. `cuda_peak_bytes` is what torch's allocator held on all
    GPUs, not part of `peak_bytes`.
    `peak_live_bytes`: what the C heap had in use above the mark, as sampled (`current` samples too): tensors, nearly all
    of it. None before glibc 2.33 and elsewhere.
    `exact`: resident peaks are the kernel's own high-water marks; otherwise samples may have missed a short one.
    `timeline`: (seconds since start, highest capped figure since the point before), at most TIMELINE_POINTS.
    """

    peak_bytes: int
    peak_rss_bytes: int
    peak_anonymous_bytes: int | None
    peak_file_bytes: int | None
    peak_swap_bytes: int | None
    children_peak_bytes: int
    peak_live_bytes: int | None
    cuda_peak_bytes: int | None
    runtime_bytes: int
    runtime_anonymous_bytes: int | None
    runtime_file_bytes: int | None
    runtime_peak_bytes: int
    training_peak_bytes: int
    training_anonymous_peak_bytes: int | None
    phases: dict[str, int]
    exact: bool
    timeline: tuple[tuple[float, int], ...] = ()


def available_bytes() -> int:
    """RAM this process can still take: the machine's MemAvailable, bounded by what every cgroup above it has left."""
    return system.available_ram_bytes()


class MemoryMeter:
    """Watches this process from a thread; use it as a context manager, or `start` and `stop` it.

    Phases don't overlap: a phase inside another takes over until it ends. The high-water mark is read, then reset, when
    a phase begins; what another thread both takes and gives back between the two (some ten microseconds) is lost. It is
    reset with every sample while there is swap or a child process, since only peaks of the same moment add up.
    """

    def __init__(self, interval_s: float = 0.02) -> None:
        self.interval_s = interval_s
        self._pid = 0
        self._lock = threading.RLock()  # re-entrant: a signal handler may ask for `current` in the middle of a sample
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._result: MemoryPeaks | None = None

    def __enter__(self) -> MemoryMeter:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> MemoryMeter:
        """Begin with fresh peaks; the runtime is what the process has now until `mark_runtime` says otherwise."""
        if self._running:
            return self
        self._pid, self._lock, self._stopping = os.getpid(), threading.RLock(), threading.Event()
        self._result = None
        self._started = time.monotonic()
        self._phase, self._phases = "", dict[str, int]()
        self._highest: dict[str, int] = {}
        self._timeline = _Timeline()
        self._exact = process.reset_works()
        self._last, high = process.measure()
        self._seen_high = 0 if self._exact else high or 0
        _reset_cuda_peak()
        self.mark_runtime()
        self._thread = threading.Thread(target=self._watch, args=(self._stopping,), name="edgetune-memory", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> MemoryPeaks:
        """End and return the peaks; called again, the same ones.

        Raises: RuntimeError if the meter was never started.
        """
        if self._result is None:
            self._result = self.peaks()
            self._stopping.set()
            if self._thread is not None and self._pid == os.getpid():
                self._thread.join(timeout=2)
        return self._result

    def enter(self, phase: str) -> None:
        """From now on peaks belong to this phase ("" for none); a phase may come back any number of times."""
        if self._running:
            with self._lock:
                now = self._sample(close=True)
                self._phase = phase
                self._fold(now, now, now.rss_bytes)

    @property
    def at_hand(self) -> str:
        """The phase that peaks belong to now."""
        return self._phase

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`enter` for the length of a with block, then back to the phase before."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def mark_runtime(self) -> MemorySnapshot:
        """What the process has now is the runtime (call it after a warm-up step); later peaks are training's."""
        if self._running:
            with self._lock:
                now = self._runtime = self._sample(close=True)
                self._runtime_heap = heap_bytes() or 0
                self._runtime_peak = self._highest["total"]
                self._highest = {key: top for key, top in self._highest.items() if not key.endswith(" since mark")}
                self._fold(now, now, now.rss_bytes)
        return self._runtime

    def current(self) -> MemorySnapshot:
        """This process now: one more sample."""
        return self._sample() if self._running else process.snapshot()

    def peaks(self) -> MemoryPeaks:
        """The peaks up to now.

        Raises: RuntimeError if the meter was never started.
        """
        if self._result is not None:
            return self._result
        if self._pid == 0:
            raise RuntimeError("a MemoryMeter has no peaks before start()")
        if not self._running:
            return self._summary()
        with self._lock:
            self._sample()
            return self._summary()

    def _summary(self) -> MemoryPeaks:
        high, runtime = self._highest, self._runtime
        anonymous = high.get("anonymous since mark")
        anonymous_base = runtime.own_anonymous_bytes or 0
        heap = high.get("heap since mark")
        return MemoryPeaks(
            peak_bytes=high["total"],
            peak_rss_bytes=high["rss"],
            peak_anonymous_bytes=high.get("anonymous"),
            peak_file_bytes=high.get("file"),
            peak_swap_bytes=high.get("swap"),
            children_peak_bytes=high["children"],
            peak_live_bytes=None if heap is None else max(0, heap - self._runtime_heap),
            cuda_peak_bytes=_cuda_peak_bytes(),
            runtime_bytes=runtime.total_bytes,
            runtime_anonymous_bytes=runtime.own_anonymous_bytes,
            runtime_file_bytes=runtime.file_bytes,
            runtime_peak_bytes=self._runtime_peak,
            # Neither is ever negative: the mark itself was the first to be folded in.
            training_peak_bytes=high["total since mark"] - runtime.total_bytes,
            training_anonymous_peak_bytes=None if anonymous is None else anonymous - anonymous_base,
            phases=dict(self._phases),
            exact=self._exact,
            timeline=self._timeline.points(),
        )

    @property
    def _running(self) -> bool:
        """False in a forked child too: the thread stayed behind, and so may have done whoever holds the lock."""
        return self._pid == os.getpid() and self._result is None

    def _watch(self, stopping: threading.Event) -> None:
        wait_s = self.interval_s
        while not stopping.wait(wait_s):
            began = time.thread_time()
            # Under a memory limit even a sample may find none; the high-water mark will tell the next one.
            with contextlib.suppress(MemoryError, OSError, psutil.Error):
                self._sample()
            wait_s = max(self.interval_s, (time.thread_time() - began) / _SAMPLING_SHARE)

    def _sample(self, close: bool = False) -> MemorySnapshot:
        """Fold in all that happened since the last sample; `close` makes the high-water mark start anew."""
        with self._lock:
            if not self._running:  # stopped while this thread waited
                return self._last
            now, high = process.measure()
            before, self._last = self._last, now
            # A mark no higher than at its last reading belongs to an earlier moment, and was folded in then.
            rose = high is not None and high > self._seen_high
            self._fold(before, now, high if high is not None and rose else now.rss_bytes)
            self._seen_high = max(self._seen_high, high or 0)
            beside = any(moment.total_bytes > moment.rss_bytes for moment in (before, now))
            if self._exact and (close or beside):
                self._exact = process.reset_high_water()
                self._seen_high = 0 if self._exact else self._seen_high
            return now

    def _fold(self, before: MemorySnapshot, now: MemorySnapshot, rss_bytes: int) -> None:
        """Raise the peaks to what the time between two snapshots had at most, given its resident peak."""
        swap = max(before.swap_bytes or 0, now.swap_bytes or 0)
        children = max(before.children_bytes, now.children_bytes)
        total = rss_bytes + swap + children
        seen = {"total": total, "total since mark": total, "rss": rss_bytes, "children": children}
        if now.anonymous_bytes is not None and now.file_bytes is not None:
            # The kernel marks no anonymous peak: it is the resident one less the file pages, which seldom go away.
            file = max(before.file_bytes or 0, now.file_bytes)
            anonymous = max(now.anonymous_bytes, rss_bytes - file) + swap
            seen |= {"anonymous": anonymous, "anonymous since mark": anonymous, "file": file}
        if now.swap_bytes is not None:
            seen["swap"] = swap
        heap = heap_bytes()
        if heap is not None:
            seen["heap since mark"] = heap
        for name, size in seen.items():
            self._highest[name] = max(size, self._highest.get(name, 0))
        if self._phase:
            self._phases[self._phase] = max(total, self._phases.get(self._phase, 0))
        self._timeline.add(time.monotonic() - self._started, total)


class _Timeline:
    """The highest figure of each stretch of time. Full, it merges neighbours, so it never outgrows TIMELINE_POINTS."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._stretch: list[tuple[float, int]] = []
        self._samples, self._samples_a_point = 0, 1

    def add(self, seconds: float, size_bytes: int) -> None:
        point = (seconds, size_bytes)
        self._stretch = [max([*self._stretch, point], key=_size)]
        self._samples += 1
        if self._samples < self._samples_a_point:
            return
        self._points += self._stretch
        self._stretch, self._samples = [], 0
        if len(self._points) == TIMELINE_POINTS:
            self._points = [max(pair, key=_size) for pair in zip(self._points[::2], self._points[1::2], strict=True)]
            self._samples_a_point *= 2

    def points(self) -> tuple[tuple[float, int], ...]:
        return (*self._points, *self._stretch)


def _size(point: tuple[float, int]) -> int:
    return point[1]


def _cuda() -> Any:
    """torch.cuda where this process uses it already, else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)  # absent while another thread imports torch
    return cuda if is_initialized is not None and is_initialized() else None


def _reset_cuda_peak() -> None:
    if cuda := _cuda():
        for index in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(index)


def _cuda_peak_bytes() -> int | None:
    cuda = _cuda()
    return sum(int(cuda.max_memory_reserved(index)) for index in range(cuda.device_count())) if cuda else None
