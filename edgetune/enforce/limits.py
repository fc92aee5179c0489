"""A memory limit that the kernel holds, and what is left under it.

`enforce` is entered after the warm-up step, with what the process may still grow by.
Sources: setrlimit(2), proc(5), the kernel's cgroup-v2.rst, and what was measured (the numbers below).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec

from edgetune import process, system
from edgetune.enforce.gpu import gpu_fraction
from edgetune.errors import UsageError
from edgetune.units import MIB, format_bytes

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

EnforceKind = Literal["auto", "rlimit", "cgroup", "none"]
WATCHED = "watched, not enforced"


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What holds the process. `limit_bytes` is the figure the kernel was given: RLIMIT_DATA or memory.max."""

    kind: Literal["rlimit", "cgroup", "none"]
    limit_bytes: int | None
    description: str


@contextlib.contextmanager
def enforce(kind: EnforceKind, *, growth_bytes: int, simulated: bool, root: Path = system.ROOT) -> Iterator[Limit]:
    """Let the process grow by `growth_bytes` and no further for the length of a with block.

    `auto` is `rlimit` when the device is simulated, else `none`: on the device itself the machine's own end of memory
    is the one that matters, and RLIMIT_DATA, which counts what is reserved and never touched, could end a run that fits.

    RLIMIT_DATA bounds private writable memory (nearly all that training takes) of each process by itself. Past it an
    allocation fails with an error; shared and read-only maps of files are not counted, private writable maps of files
    are, in full. A cgroup also counts page cache and child processes, and kills. Under `rlimit` torch runs without
    oneDNN, where it is loaded already. With either, torch's allocator may take as much of a GPU's memory and no more.
    Raises: UsageError where `rlimit` or `cgroup` was asked for and can't be had; ValueError if `growth_bytes` < 1.
    """
    if growth_bytes < 1:
        raise ValueError(f"nothing is left to grow by: {growth_bytes} bytes")
    with contextlib.ExitStack() as stack:
        limit = Limit(kind="none", limit_bytes=None, description=WATCHED)
        if kind == "cgroup":
            limit = stack.enter_context(_cgroup(growth_bytes, root))
        elif by_rlimit(kind, simulated=simulated):
            obstacle = _rlimit_obstacle()
            if obstacle is None:
                limit = stack.enter_context(_rlimit(growth_bytes))
            elif kind == "rlimit":
                raise UsageError(f"--enforce rlimit can't hold here: {obstacle}. Leave it out, or try --enforce none.")
            else:
                limit = msgspec.structs.replace(limit, description=f"{WATCHED} ({obstacle})")
        if limit.kind != "none":
            said = stack.enter_context(gpu_fraction(growth_bytes))
            limit = msgspec.structs.replace(limit, description=limit.description + said)
        yield limit


def by_rlimit(kind: EnforceKind, *, simulated: bool) -> bool:
    """Whether RLIMIT_DATA is what holds the cap, where it can be had."""
    return kind == "rlimit" or (kind == "auto" and simulated)


def left_bytes(limit: Limit, root: Path = system.ROOT) -> int | None:
    """What the process can still take under the limit now; None without a limit."""
    try:
        if limit.kind == "rlimit":
            data = system.process_status(root=root).get("VmData")
            # The file could not be read: there is no memory for it.
            return 0 if data is None else max(0, (limit.limit_bytes or 0) - data)
        if limit.kind == "cgroup":
            return system.cgroup_memory(root, _limited_cgroups(root))[1]
    except MemoryError:
        return 0
    return None


def room_bytes(root: Path = system.ROOT) -> int:
    """What the process can still take of all that bounds it: the machine, cgroups, resource limits whoever set them."""
    rooms = [system.available_ram_bytes(root, _limited_cgroups(root))]
    status = system.process_status(root=root)
    for name, size in (("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")):
        which = getattr(resource, name, None)
        if which is not None and size in status:
            soft = resource.getrlimit(which)[0]
            rooms += [soft - status[size]] if soft != resource.RLIM_INFINITY else []
    return max(0, min(rooms))


def short_of_memory(needed_bytes: int, root: Path = system.ROOT) -> str | None:
    """What to say when the machine has less available than the next step is predicted to add; None when it has enough."""
    available = system.available_ram_bytes(root, _limited_cgroups(root))
    if available >= needed_bytes:
        return None
    return (
        f"the next step needs {format_bytes(needed_bytes)} more and the machine has {format_bytes(available)} available: "
        "something else takes its memory"
    )


@lru_cache(maxsize=1)
def _limited_cgroups(root: Path) -> tuple[Path, ...]:
    """Found once: with two hierarchies to look through that takes 1.1 ms, ten times as long as all the rest."""
    return system.limited_cgroups(root)


# --- RLIMIT_DATA

# The stack of a thread that starts under the limit counts in full though hardly any of it is touched: 8.1 MiB a thread
# (glibc 2.36, ulimit -s 8192), of which 0.02 become resident. glibc keeps up to 40 MiB of the stacks of threads that
# ended and hands them out again. So threads are started and ended before VmData is read: four later ones then cost 0.02
# MiB each (a fifth again 8.0). An arena of its own, where `limit_allocator` was not called, is another 0.1 MiB.
# Little else starts threads in a run: torch's OpenMP threads exist after the warm-up step, and autograd's backward on
# the CPU runs in the calling thread. An OpenMP pool that has to grow under the limit and can't ends the process (libgomp
# calls exit), so the warm-up has to use the run's own thread count.
SPARE_STACKS = 4
_PROBE_BYTES = 64 * MIB
_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; so that the kernel's overcommit rule has no say


def _reserve_stacks() -> None:
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(SPARE_STACKS)]
    with contextlib.suppress(RuntimeError):  # a limit on threads: then later ones don't start either
        for thread in threads:
            thread.start()
    done.set()
    for thread in threads:
        if thread.ident is not None:
            thread.join()


def _rlimit_obstacle() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"RLIMIT_DATA bounds memory on Linux only, this is {sys.platform}"
    data = system.process_status().get("VmData")
    if data is None:
        return "/proc/self/status doesn't tell VmData"
    if not _limit_holds(data):
        return "this kernel takes RLIMIT_DATA and doesn't hold it (older than 4.7, a sandbox, or ignore_rlimit_data)"
    return None


def _limit_holds(data_bytes: int) -> bool:
    """Whether a mapping fails that would pass the limit; it is never touched, so it costs nothing where it succeeds."""
    with _soft_limit(data_bytes + _PROBE_BYTES):
        try:
            mmap.mmap(-1, 2 * _PROBE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE).close()
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _soft_limit(wanted_bytes: int) -> Iterator[int]:
    """Set the soft RLIMIT_DATA, never above the one found nor the hard one, and put the one found back."""
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = min(wanted_bytes, *(bound for bound in (before, hard) if bound != resource.RLIM_INFINITY), 2**63 - 1)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Torch's operations without oneDNN, where torch is loaded.

    It compiles a kernel for each shape it meets (GELU, convolutions, bf16), 0.81 MiB of VmData a shape of which 0.08
    become resident: a hundred token counts reserve 81 MiB. When the room for one can't be had, torch 2.14 either
    crashes (segmentation faults in 1 of 3 to 1 of 500 operations with less than 3 MiB left; none in 4,900 without it)
    or says "could not create a primitive", and from then on for every new shape in that thread, memory or not
    (oneDNN PR 5907). A ViT-Ti step takes as long and peaks as high without it.
    """
    mkldnn = getattr(getattr(sys.modules.get("torch"), "backends", None), "mkldnn", None)
    if mkldnn is None:
        yield
        return
    before, mkldnn.enabled = mkldnn.enabled, False
    try:
        yield
    finally:
        mkldnn.enabled = before


@contextlib.contextmanager
def _rlimit(growth_bytes: int) -> Iterator[Limit]:
    _reserve_stacks()
    # What is reserved and untouched now stays so: the limit is RssAnon + growth, moved by VmData - RssAnon.
    data = system.process_status()["VmData"]
    with _without_onednn(), _soft_limit(data + growth_bytes) as limit:
        description = f"enforced by RLIMIT_DATA: {format_bytes(max(0, limit - data))} above the warmed-up process"
        if limit < data + growth_bytes:
            description += f" (a limit set from outside; {format_bytes(growth_bytes)} was planned)"
        yield Limit(kind="rlimit", limit_bytes=limit, description=description)


# --- cgroup v2


@contextlib.contextmanager
def _cgroup(growth_bytes: int, root: Path) -> Iterator[Limit]:
    """A limit that is there already and tight enough, else one in a cgroup made for this process.

    Tested on a made-up tree and kernel only: no machine at hand had a cgroup v2 memory controller.
    """
    whole = process.snapshot().rss_bytes + growth_bytes
    _limited_cgroups.cache_clear()
    found = system.cgroup_hard_limit(root)
    if found is not None and found[1] <= whole:
        path, size = found
        wanted = f"; {format_bytes(whole)} was planned" if size < whole else ""
        description = f"enforced by cgroup {path.name} of {format_bytes(size)} (set from outside{wanted})"
        yield Limit(kind="cgroup", limit_bytes=size, description=description)
        return
    with contextlib.ExitStack() as undo:
        try:
            size = _move_into_child(growth_bytes, root, undo)
        except OSError as error:
            command = shlex.join(
                ["systemd-run", "--user", "--scope", "-p", f"MemoryMax={whole}", "-p", "MemorySwapMax=0"]
            )
            raise UsageError(
                f"--enforce cgroup can't hold here: {error}. Use --enforce rlimit, which needs no privilege, or start the "
                f"command in a scope of its own: {command} -- {shlex.join(sys.orig_argv)}"
            ) from error
        _limited_cgroups.cache_clear()
        undo.callback(_limited_cgroups.cache_clear)
        above = f"{format_bytes(growth_bytes)} above the warmed-up process"
        yield Limit(kind="cgroup", limit_bytes=size, description=f"enforced by cgroup memory.max: {above}")


def _move_into_child(growth_bytes: int, root: Path, undo: contextlib.ExitStack) -> int:
    """Make a cgroup below this process's own, move in, limit it; returns its memory.max. `undo` gets every way back.

    Raises: OSError.
    """
    own, pid = system.own_cgroup2(root), str(os.getpid())
    if own is None or pid not in _words(own / "cgroup.procs"):
        raise OSError("this process's cgroup v2 is not in sight")
    if "memory" not in _words(own / "cgroup.controllers"):
        raise OSError(
            f"{own} has no memory controller (a Raspberry Pi needs cgroup_enable=memory in its kernel command line)"
        )
    child, switch = own / f"edgetune-{pid}", own / "cgroup.subtree_control"
    child.mkdir(exist_ok=True)
    undo.callback(_try, child.rmdir)
    _write(child / "cgroup.procs", pid)
    undo.callback(_try, lambda: _write(own / "cgroup.procs", pid))
    # Only now: a cgroup that has processes of its own can't switch a controller on for those below it.
    if "memory" not in _words(switch):
        _write(switch, "+memory")
        undo.callback(_try, lambda: _write(switch, "-memory"))
    # What the process has stays charged to the cgroup it came from ("Memory Ownership"): only growth counts here.
    used = _words(child / "memory.current")
    size = (int(used[0]) if used else 0) + growth_bytes
    _write(child / "memory.max", str(size))
    if (child / "memory.swap.max").exists():
        _write(child / "memory.swap.max", "0")
    return size


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def _write(path: Path, text: str) -> None:
    """To a file of the kernel's, which is there or nothing is."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # which write says nothing of
    finally:
        os.close(descriptor)


def _try(undo: Callable[[], object]) -> None:
    """A cgroup that can't be left or removed does no harm, and must not hide what ended the run."""
    with contextlib.suppress(OSError):
        undo()
