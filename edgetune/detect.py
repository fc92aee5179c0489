"""Readings of the machine at hand that `system` does not give: CPU and GPU names, speeds, what importing torch costs.

Never imports torch: a GPU is known by the files of its driver, torch's cost by a process of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgetune.system import ROOT
from edgetune.units import MIB

_PCI_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_JETSON_NOTE = "shares the RAM with the CPU; whether the installed torch reaches it depends on the JetPack build"
_OTHER_NOTE = "found by its driver's files; edgetune trains on the CPU here"
# What a run with torch imports. VmHWM is the kernel's own peak of this very process; RssAnon what can't be dropped.
_CHILD = """
import json
import numpy, PIL.Image, torch, edgetune.backends.pytorch
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps({key: int(status[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon")}))
"""


class ChildMemory(msgspec.Struct, frozen=True):
    """What a fresh process took: peak resident bytes, anonymous bytes at its end, and the versions it imported."""

    peak_bytes: int
    anonymous_bytes: int
    version: str


def machine_name(root: Path = ROOT) -> str | None:
    """The board's own name from the device tree (`NVIDIA Jetson Nano Developer Kit`); None where there is none."""
    for place in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if name := _line(root / place):
            return name
    return None


def cpu_name(root: Path = ROOT) -> str:
    """The model in /proc/cpuinfo, else the architecture."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return _printable(value)
    import platform

    return _printable(platform.processor() or platform.machine() or "unknown")


def find_gpu(root: Path = ROOT) -> dict[str, object] | None:
    """The fields of an `Accelerator`, or None: a Jetson by its device tree or /dev/nvhost*, a discrete NVIDIA card by
    its driver (nvidia-smi), any other display controller by its PCI vendor."""
    board = machine_name(root) or ""
    if "jetson" in board.lower() or any((root / "dev").glob("nvhost*")):
        name = f"{board or 'NVIDIA Tegra'}: integrated GPU"
        return _gpu(name, "shared", False, _JETSON_NOTE)
    if root == ROOT and (card := _nvidia_smi()):
        return _gpu(card, "own", True, "nvidia-smi lists it; usable with a CUDA build of torch")
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = _PCI_VENDORS.get(_line(device / "vendor"))
        if vendor and _line(device / "class").startswith("0x03"):
            return _gpu(f"{vendor} GPU", "shared" if vendor == "Intel" else "own", False, _OTHER_NOTE)
    return None


def measure_flops_per_s(seconds: float = 0.4) -> float:
    """FLOP/s of numpy's float32 matrix product at the size of a ViT's layers, on all cores: the best run of those that
    fit into `seconds`, so that a busy moment does not count."""
    import numpy as np

    size = 768
    left = np.full((size, size), 0.5, np.float32)
    out = np.empty_like(left)
    return 2.0 * size**3 / _best_seconds(lambda: np.matmul(left, left, out=out), seconds)


def measure_bandwidth_bytes_per_s(usable_bytes: int, seconds: float = 0.4) -> float:
    """Bytes read plus written a second by copying an array larger than the caches, within a sixteenth of the RAM."""
    import numpy as np

    source = np.ones(max(MIB, min(128 * MIB, usable_bytes // 32)), np.uint8)
    out = np.empty_like(source)
    return 2.0 * source.nbytes / _best_seconds(lambda: np.copyto(out, source), seconds)


def torch_version() -> str | None:
    """`torch 2.14.1`, read from the installed package's metadata; None if it is missing."""
    import importlib.metadata

    try:
        return f"torch {importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError:
        return None


def measure_torch_runtime(timeout_seconds: float = 180) -> ChildMemory | None:
    """What importing torch and the backend costs a fresh process here; None without torch, or without Linux's /proc.

    The timeout is for a slow board: importing torch took 27 s on an emulated Cortex-A53.
    """
    import importlib.util
    import json
    import subprocess

    version = torch_version()
    if version is None or importlib.util.find_spec("torch") is None or not (ROOT / "proc/self/status").exists():
        return None
    command = [sys.executable, "-c", _CHILD]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=True)
        sizes = json.loads(done.stdout.splitlines()[-1])
        return ChildMemory(int(sizes["VmHWM"]), int(sizes["RssAnon"]), version)
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
        return None  # torch is installed but does not import: the run itself will say why


def _best_seconds(work: Callable[[], object], seconds: float) -> float:
    work()  # the first run pays for threads and pages
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, max(now - start, 1e-9))
        if now >= end:
            return best


def _gpu(name: str, memory: str, usable: bool, note: str) -> dict[str, object]:
    return {"name": name[:300], "kind": "gpu", "memory": memory, "usable_for_training": usable, "note": note}


def _nvidia_smi() -> str | None:
    import shutil
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # a driver that does not answer is no GPU to train on
    lines = done.stdout.strip().splitlines()
    return _printable(lines[0]) if lines else None


def _line(path: Path) -> str:
    """A one-line kernel file; the device tree ends its strings with NUL."""
    return _printable(_text(path).partition("\0")[0])


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).decode("utf-8", "replace")
    except OSError:
        return ""


def _printable(text: str) -> str:
    return "".join(char for char in text.strip() if char.isprintable())[:200]
