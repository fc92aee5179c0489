"""What the kernel's files say about this machine and this process: RAM, cgroup limits, CPU quota, process status.

Reading only, no policy and no torch. Every function takes `root`, so that a test can hand over a folder that looks like
another machine. A file that is missing, unreadable or nonsense reads as "nothing said", never as an error: containers,
old kernels and other systems each lack some of them.

Source of the formats: proc(5), cgroups(7), the kernel's admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]

ROOT = Path("/")

# cgroup v1 says "no limit" as the largest multiple of a page in 63 bits; no machine has an exabyte.
_NO_LIMIT_BYTES = 2**60
_KB_LINE = re.compile(rb"^(\S+?):\s+(\d{1,16}) kB$", re.MULTILINE)
_DIGITS = re.compile(r"[0-9]{1,20}")
_OCTAL = re.compile(r"\\([0-7]{3})")


def cache_dir() -> Path:
    """$EDGETUNE_CACHE_DIR, or the platform's folder for what can be made again."""
    chosen = os.environ.get("EDGETUNE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgetune"))


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """`/proc/meminfo` in bytes by the kernel's names (`MemTotal`, `MemAvailable`, ...); empty where there is none."""
    return _kilobyte_lines(_read_bytes(str(root / "proc/meminfo")))


def process_status(pid: int | str = "self", root: Path = ROOT) -> dict[str, int]:
    """The sizes of `/proc/PID/status` in bytes (`VmRSS`, `VmHWM`, `VmSwap`, ...); empty for a process that is gone."""
    return _kilobyte_lines(_read_bytes(f"{root}/proc/{pid}/status"))


def descendants(pid: int | str = "self", root: Path = ROOT) -> list[int] | None:
    """Processes below one, children of its every thread and theirs; None where the kernel keeps no such list."""
    found: list[int] = []
    waiting: list[int | str] = [pid]
    listed = False
    while waiting:
        tasks = f"{root}/proc/{waiting.pop()}/task"
        try:
            names = os.listdir(tasks)  # noqa: PTH208 - pathlib is ten times slower, and the meter comes here often
        except OSError:  # ended meanwhile
            continue
        for name in names:
            content = _read_bytes(f"{tasks}/{name}/children")
            listed = listed or bool(content) or Path(f"{tasks}/{name}/children").exists()
            children = [int(word) for word in content.split() if word.isdigit()]
            found += children
            waiting += children
    return found if listed else None


def total_ram_bytes(root: Path = ROOT) -> int:
    """RAM this process could ever have: the machine's, or the tightest cgroup limit above the process."""
    total = meminfo(root).get("MemTotal") or int(psutil.virtual_memory().total)
    limit, _ = cgroup_memory(root)
    return total if limit is None else min(total, limit)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version, and those of the packages that are installed, without importing them."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def available_ram_bytes(root: Path = ROOT, cgroups: Iterable[Path] | None = None) -> int:
    """RAM this process can take now without swapping: `MemAvailable`, bounded by what each cgroup above it has left.

    `cgroups`: those to look at, as `limited_cgroups` found them before; to find them takes most of the time.
    """
    info = meminfo(root)
    available = info.get("MemAvailable", info.get("MemFree"))
    if available is None:
        available = int(psutil.virtual_memory().available)
    _, left = cgroup_memory(root, cgroups)
    return available if left is None else min(available, left)


def cgroup_memory(root: Path = ROOT, cgroups: Iterable[Path] | None = None) -> tuple[int | None, int | None]:
    """(the tightest limit, the least left under one) in bytes over all cgroups this process is in, v1 and v2.

    What is left counts inactive page cache as free: the kernel drops it first. `memory.high` counts as a limit: above
    it a process is not killed, but stalled. (None, None) where nothing limits.
    """
    limits: list[int] = []
    left: list[int] = []
    for folder in _cgroup_folders("memory", root) if cgroups is None else cgroups:
        stat = _stat_file(folder / "memory.stat")
        bounds = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        # v1 repeats the tightest limit above even where a container can't see the folders above.
        bounds.append(stat.get("hierarchical_memory_limit"))
        limit = min((bound for bound in bounds if bound is not None), default=_NO_LIMIT_BYTES)
        if limit >= _NO_LIMIT_BYTES:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        limits.append(limit)
        left.append(max(0, limit - max(0, used - cache)))
    return min(limits, default=None), min(left, default=None)


def limited_cgroups(root: Path = ROOT) -> tuple[Path, ...]:
    """The cgroups above this process that limit its memory now, innermost first."""
    return tuple(folder for folder in _cgroup_folders("memory", root) if cgroup_memory(root, [folder])[0] is not None)


def cgroup_hard_limit(root: Path = ROOT) -> tuple[Path, int] | None:
    """(file, bytes) of the tightest limit above this process that the kernel kills for; None where there is none."""
    limits = [
        (size, folder / name)
        for folder in _cgroup_folders("memory", root)
        for name in ("memory.max", "memory.limit_in_bytes")
        if (size := _number(folder / name)) is not None and size < _NO_LIMIT_BYTES
    ]
    return next(((path, size) for size, path in sorted(limits)), None)


def own_cgroup2(root: Path = ROOT) -> Path | None:
    """The folder of this process's own cgroup in the v2 hierarchy; None where it isn't in sight."""
    path = _own_cgroups(root).get("")
    for controllers, mount_root, mount_point in _cgroup_mounts(root):
        if not controllers and path is not None and ".." not in path.split("/"):
            inner = _below(path, mount_root)
            if inner is not None:
                return root / mount_point.lstrip("/") / inner
    return None


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time the tightest cgroup above this process grants (1.5: one and a half); None without a quota."""
    quotas: list[float] = []
    for folder in _cgroup_folders("cpu", root):
        words = _read_text(folder / "cpu.max").split()  # v2: "max 100000" or "150000 100000", microseconds
        if len(words) != 2:
            words = [_read_text(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")]
        if all(_DIGITS.fullmatch(word) and int(word) > 0 for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may use: its affinity mask (not the machine's count), and a CPU quota rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


@contextmanager
def pinned_cores(cores: int | None) -> Iterator[None]:
    """Keep this thread, and those it starts, on so many of the cores it may use; on all of them where that is no fewer.

    Threads that outnumber the cores they run on cost two to four times as long, so a simulated device gets its own count.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores is None or cores >= len(allowed):
        yield
        return
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and of every ancestor in sight, innermost first, v1's and v2's hierarchy."""
    own = _own_cgroups(root)
    for controllers, mount_root, mount_point in _cgroup_mounts(root):
        if controllers and controller not in controllers:
            continue
        path = own.get(controller if controllers else "")
        inner = None if path is None else _below(path, mount_root)
        if inner is not None:
            base = root / mount_point.lstrip("/")
            yield from (base / part for part in [inner, *inner.parents])


def _own_cgroups(root: Path) -> dict[str, str]:
    """Controller ("" for v2's hierarchy) -> this process's cgroup path, from /proc/self/cgroup."""
    lines = [line.split(":", 2) for line in _read_text(root / "proc/self/cgroup").splitlines()]
    return {name: parts[2] for parts in lines if len(parts) == 3 for name in parts[1].split(",")}


def _cgroup_mounts(root: Path) -> Iterator[tuple[list[str], str, str]]:
    """(controllers among other options, empty for v2; root within the hierarchy; mount point), from mountinfo."""
    for line in _read_text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) >= 5 and len(kind) >= 3 and kind[0] in ("cgroup", "cgroup2"):
            mount_root, mount_point = (_OCTAL.sub(lambda m: chr(int(m[1], 8)), field) for field in fields[3:5])
            yield (kind[2].split(",") if kind[0] == "cgroup" else []), mount_root, mount_point


def _below(path: str, mount_root: str) -> PurePosixPath | None:
    """The process's cgroup relative to what a mount shows; None for a mount that shows only other cgroups.

    A cgroup namespace writes what lies outside it as "/..": then the names below the mount are unknown, and the mount's
    own folder is taken (a limit too tight can be overridden, one too loose gets the process killed).
    """
    try:
        inner = PurePosixPath(path).relative_to(mount_root)
    except ValueError:
        return PurePosixPath() if ".." in path.split("/") + mount_root.split("/") else None
    return PurePosixPath() if ".." in inner.parts else inner


def _stat_file(path: Path) -> dict[str, int]:
    pairs = [line.split() for line in _read_text(path).splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and _DIGITS.fullmatch(pair[1])}


def _number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if _DIGITS.fullmatch(text) else None


def _read_text(path: Path) -> str:
    return _read_bytes(str(path)).decode("utf-8", "replace")


def _read_bytes(path: str) -> bytes:
    """A small kernel file in as few calls as possible (the meter reads one every 20 ms); empty if unreadable."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return b""
    try:
        chunks = []
        while chunk := os.read(fd, 1 << 16):
            chunks.append(chunk)
        return b"".join(chunks)
    except OSError:  # the process ended between open and read
        return b""
    finally:
        os.close(fd)


def _kilobyte_lines(content: bytes) -> dict[str, int]:
    return {name.decode("ascii", "replace"): int(value) * 1024 for name, value in _KB_LINE.findall(content)}
