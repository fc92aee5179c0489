"""What the limit promises, tried on real processes; cgroups on a made-up kernel, for want of a machine that has them."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from edgetune import errors, system
from edgetune.enforce import Limit, enforce, is_out_of_memory, left_bytes, limits, short_of_memory
from edgetune.errors import UsageError
from edgetune.units import GIB, MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds memory on Linux only")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")

PRELUDE = """
import json, resource, sys, threading
from edgetune.allocator import limit_allocator
from edgetune.enforce import enforce, is_out_of_memory, left_bytes
MIB = 2**20
limit_allocator()

def enforced(mib):
    return enforce("rlimit", growth_bytes=int(mib * MIB), simulated=True)

def told(error):
    return [type(error).__name__, str(error), is_out_of_memory(error, left_bytes=None, needed_bytes=None)]
"""


def _run(script: str, setting: str = "import numpy as np\n") -> Any:
    """The JSON that a fresh process prints last; it must not have been killed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + setting + script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- RLIMIT_DATA


@linux
def test_what_may_be_touched_is_the_growth_to_a_few_mebibytes() -> None:
    below, above, kind, steps = _run("""
with enforced(64) as limit:
    below = len(np.ones(56 * MIB, np.uint8))
    try:
        above = len(np.ones(72 * MIB, np.uint8))
    except MemoryError as error:
        above = told(error)
    kept = []
    try:
        while True:
            kept.append(np.ones(MIB // 4, np.uint8))
    except MemoryError:
        steps = len(kept) / 4
    del kept
print(json.dumps([below, above, limit.kind, steps]))
""")
    assert below == 56 * MIB
    assert above[2] is True
    assert kind == "rlimit"
    assert 60 < steps < 66


@linux
def test_threads_that_start_under_the_limit_take_nothing_of_it() -> None:
    before, after, size = _run("""
with enforced(48) as limit:
    before = left_bytes(limit)
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    after = left_bytes(limit)
    size = len(np.ones(40 * MIB, np.uint8))
    done.set()
print(json.dumps([before, after, size]))
""")
    assert abs(before - 48 * MIB) < MIB
    assert before - after < MIB
    assert size == 40 * MIB


@linux
def test_the_limit_ends_with_the_block_though_an_error_ended_it() -> None:
    before, inside, after = _run("""
before = resource.getrlimit(resource.RLIMIT_DATA)
try:
    with enforced(16) as limit:
        inside = resource.getrlimit(resource.RLIMIT_DATA)
        assert inside[0] == limit.limit_bytes
        np.ones(32 * MIB, np.uint8)
except MemoryError:
    np.ones(32 * MIB, np.uint8)
print(json.dumps([before, inside, resource.getrlimit(resource.RLIMIT_DATA)]))
""")
    assert before == after
    assert inside[0] != before[0]
    assert inside[1] == before[1]


@linux
@pytest.mark.parametrize("which", ["soft", "hard"])
def test_a_tighter_limit_from_outside_stays_and_is_said(which: str) -> None:
    bound, limit, description, after = _run(f"""
from edgetune import system
bound = system.process_status()["VmData"] + 80 * MIB
resource.setrlimit(resource.RLIMIT_DATA, (bound, bound if {which == "hard"} else resource.RLIM_INFINITY))
with enforced(400) as limit:
    pass
print(json.dumps([bound, limit.limit_bytes, limit.description, resource.getrlimit(resource.RLIMIT_DATA)[0]]))
""")
    assert limit == bound == after
    assert "set from outside" in description
    assert "400 MiB was planned" in description


@linux
def test_the_verdict_is_given_when_not_a_byte_is_left() -> None:
    verdicts, left = _run("""
known, unknown, bug = RuntimeError("std::bad_alloc"), RuntimeError("odd"), TypeError("not memory")
hoard, verdicts = [], []
with enforced(16) as limit:
    try:
        while True:
            hoard.append(bytearray(300))
    except MemoryError as error:
        left = left_bytes(limit)
        for each in (error, known, unknown, bug):
            verdicts.append(is_out_of_memory(each, left_bytes=left, needed_bytes=4 * MIB))
    hoard.clear()
print(json.dumps([verdicts, left]))
""")
    assert verdicts == [True, True, True, False]
    assert left < MIB


@lru_cache(maxsize=1)
def _torch_child() -> Any:
    return _run(
        """
found = {}
def attempt(name, function):
    try:
        function()
        found[name] = "ok"
    except BaseException as error:
        found[name] = told(error)

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))

def step(model, rows):
    model(torch.ones(rows, 256)).sum().backward()

def gelu(rows):
    torch.nn.functional.gelu(torch.ones(rows, 300, requires_grad=True)).sum().backward()

model = net()
step(model, 1)
gelu(8)
mkldnn = torch.backends.mkldnn
with enforced(24) as limit:
    found["onednn"] = [mkldnn.enabled]
    attempt("allocation", lambda: torch.ones(32 * MIB // 4))
    attempt("half the limit", lambda: torch.ones(16 * MIB // 4))
    attempt("step", lambda: step(model, 8192))  # 8 MiB an activation
    model.zero_grad(set_to_none=True)
    attempt("smaller step", lambda: step(model, 256))
    model.zero_grad(set_to_none=True)
    many = torch.ones(2**21)
    attempt("vector", lambda: many.topk(1))  # sorts in a std::vector of 16 bytes an element
    del many
    before = left_bytes(limit)
    for rows in range(100, 160):
        gelu(rows)
    found["shapes"] = (before - left_bytes(limit)) / MIB
found["onednn"].append(mkldnn.enabled)
attempt("step afterwards", lambda: step(model, 8192))
inputs = torch.ones(500, 300, requires_grad=True)
with enforced(0.1 + inputs.nbytes / MIB) as limit:  # room for the result, not for the code that makes it
    mkldnn.enabled = True
    attempt("primitive", lambda: torch.nn.functional.gelu(inputs))
print(json.dumps(found))
""",
        "import os; os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'\nimport torch\ntorch.set_num_threads(2)\n",
    )


@linux
@needs_torch
@pytest.mark.parametrize("case", ["allocation", "step", "vector"])
def test_torch_runs_out_with_an_error_that_is_recognised(case: str) -> None:
    name, words, recognised = _torch_child()[case]
    assert name == "RuntimeError", words
    assert recognised, words
    assert ("bad_alloc" in words) == (case == "vector"), words


@linux
@needs_torch
def test_what_fits_runs_under_the_limit_and_after_an_allocation_failed() -> None:
    found = _torch_child()
    assert [found[name] for name in ("half the limit", "smaller step", "step afterwards")] == ["ok"] * 3


@linux
@needs_torch
def test_new_shapes_compile_nothing_under_the_limit() -> None:
    found = _torch_child()
    assert found["onednn"] == [False, True]
    assert abs(found["shapes"]) < 1


@linux
@needs_torch
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="which operations compile depends on the CPU")
def test_onednn_out_of_memory_is_recognised() -> None:
    name, words, recognised = _torch_child()["primitive"]
    assert (name, recognised) == ("RuntimeError", True), words


@pytest.mark.parametrize("kind", ["none", "auto"])
def test_where_the_host_is_the_device_auto_only_watches(kind: Any) -> None:
    with enforce(kind, growth_bytes=MIB, simulated=False) as limit:
        assert limit == Limit(kind="none", limit_bytes=None, description="watched, not enforced")
        assert left_bytes(limit) is None


@linux
def test_a_simulated_device_is_enforced_by_default() -> None:
    with enforce("auto", growth_bytes=2 * GIB, simulated=True) as limit:
        assert limit.description == "enforced by RLIMIT_DATA: 2048 MiB above the warmed-up process"
        left = left_bytes(limit)
        assert left is not None
        assert 2 * GIB - 64 * MIB < left <= 2 * GIB + 64 * MIB


@pytest.mark.parametrize("lacking", ["Linux", "a kernel that holds it"])
def test_without_the_means_auto_says_so_and_an_explicit_wish_is_an_error(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "Linux":
        monkeypatch.setattr(limits.sys, "platform", "darwin")
        reason = "on Linux only, this is darwin"
    else:
        monkeypatch.setattr(limits.sys, "platform", "linux")
        monkeypatch.setattr(limits.system, "process_status", lambda: {"VmData": MIB})
        monkeypatch.setattr(limits, "_limit_holds", lambda data_bytes: False)
        reason = "takes RLIMIT_DATA and doesn't hold it"
    with enforce("auto", growth_bytes=MIB, simulated=True) as limit:
        assert limit.kind == "none"
        assert limit.description.startswith("watched, not enforced (")
        assert reason in limit.description
    with pytest.raises(UsageError, match=reason), enforce("rlimit", growth_bytes=MIB, simulated=True):
        pass


@linux
def test_the_probe_tells_a_limit_that_holds_from_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    data = system.process_status()["VmData"]
    assert limits._limit_holds(data)
    monkeypatch.setattr(limits.resource, "setrlimit", lambda which, bounds: None)
    assert not limits._limit_holds(data)


def test_no_growth_is_no_limit() -> None:
    with pytest.raises(ValueError, match="nothing is left"), enforce("none", growth_bytes=0, simulated=True):
        pass


# --- cgroup v2


class Kernel:
    """A cgroup v2 tree in a folder, with the kernel's rules for moving, switching controllers and removing."""

    MEMORY = {"memory.max": "max", "memory.current": "0", "memory.swap.max": "max"}  # noqa: RUF012

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, controllers: str = "memory pids") -> None:
        self.root, self.top = root, root / "sys/fs/cgroup"
        self.own = self.top / "app.slice/shell.scope"
        for folder in ("proc/self", "sys/fs/cgroup/app.slice/shell.scope"):
            (root / folder).mkdir(parents=True)
        mount = "30 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
        (root / "proc/self/mountinfo").write_text(mount)
        (root / "proc/meminfo").write_text("MemTotal: 4000000 kB\nMemAvailable: 3000000 kB\n")
        self._fill(self.own, controllers, self.MEMORY)
        self._fill(self.top / "app.slice", controllers, self.MEMORY)
        self._enter(self.own, str(os.getpid()))
        self._plain_write = limits._write
        mkdir, rmdir = pathlib.Path.mkdir, pathlib.Path.rmdir

        def make(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            mkdir(path, mode, parents, exist_ok)
            if self.top in path.parents:
                on = "memory" in (path.parent / "cgroup.subtree_control").read_text()
                self._fill(path, "memory" if on else "", self.MEMORY if on else {})

        def remove(path: Path) -> None:
            if self.top in path.parents:
                if (path / "cgroup.procs").read_text():
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                for file in path.iterdir():
                    file.unlink()
            rmdir(path)

        monkeypatch.setattr(pathlib.Path, "mkdir", make)
        monkeypatch.setattr(pathlib.Path, "rmdir", remove)
        monkeypatch.setattr(limits, "_write", self.write)

    def write(self, path: Path, text: str) -> None:
        folder = path.parent
        if path.name == "cgroup.procs":
            self._refuse(bool((folder / "cgroup.subtree_control").read_text()))
            self._enter(folder, text)
        elif path.name == "cgroup.subtree_control":
            self._refuse(text[0] == "+" and bool((folder / "cgroup.procs").read_text()))
            path.write_text("memory" if text[0] == "+" else "")
            for child in (entry for entry in folder.iterdir() if entry.is_dir()):
                for name, value in self.MEMORY.items():
                    (child / name).write_text(value) if text[0] == "+" else (child / name).unlink()
        else:
            self._plain_write(path, text)

    def _refuse(self, busy: bool) -> None:
        if busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _fill(self, folder: Path, controllers: str, memory: dict[str, str]) -> None:
        files = {"cgroup.procs": "", "cgroup.controllers": controllers, "cgroup.subtree_control": "", **memory}
        for name, text in files.items():
            (folder / name).write_text(text)

    def _enter(self, folder: Path, pid: str) -> None:
        for procs in self.top.rglob("cgroup.procs"):
            procs.write_text("".join(f"{one}\n" for one in procs.read_text().split() if one != pid))
        (folder / "cgroup.procs").write_text((folder / "cgroup.procs").read_text() + f"{pid}\n")
        (self.root / "proc/self/cgroup").write_text(f"0::/{folder.relative_to(self.top)}\n")


def test_a_cgroup_is_made_entered_limited_left_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, pid = Kernel(tmp_path, monkeypatch), str(os.getpid())
    child = kernel.own / f"edgetune-{pid}"
    with enforce("cgroup", growth_bytes=300 * MIB, simulated=True, root=tmp_path) as limit:
        assert (child / "cgroup.procs").read_text().split() == [pid]
        # What the process had stays charged where it was, so what it may grow by is the whole limit.
        assert int((child / "memory.max").read_text()) == limit.limit_bytes == 300 * MIB
        assert (child / "memory.swap.max").read_text()[0] == "0"
        assert limit.description == "enforced by cgroup memory.max: 300 MiB above the warmed-up process"
        (child / "memory.current").write_text(str(120 * MIB))
        assert left_bytes(limit, tmp_path) == 180 * MIB
    assert not child.exists()
    assert (kernel.own / "cgroup.procs").read_text().split() == [pid]
    assert (kernel.own / "cgroup.subtree_control").read_text() == ""


@pytest.mark.parametrize("obstacle", ["another process in it", "no memory controller", "not in sight", "read-only"])
def test_where_no_cgroup_can_be_made_the_error_says_what_to_type(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path, monkeypatch, "pids" if obstacle == "no memory controller" else "memory")
    if obstacle == "another process in it":
        (kernel.own / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    elif obstacle == "not in sight":
        (tmp_path / "proc/self/cgroup").write_text("0::/../elsewhere\n")
    elif obstacle == "read-only":

        def refuse(path: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    monkeypatch.setattr(sys, "orig_argv", ["edgetune", "finetune", "my images"])
    with (
        pytest.raises(UsageError) as caught,
        enforce("cgroup", growth_bytes=100 * MIB, simulated=True, root=tmp_path),
    ):
        pass
    said = str(caught.value)
    assert {
        "another process in it": "busy",
        "no memory controller": "cgroup_enable=memory",
        "not in sight": "not in sight",
        "read-only": "Permission denied",
    }[obstacle] in said
    assert "systemd-run --user --scope -p MemoryMax=" in said
    assert said.endswith("-p MemorySwapMax=0 -- edgetune finetune 'my images'")
    assert "--enforce rlimit, which needs no privilege" in said
    wanted = int(said.split("MemoryMax=")[1].split()[0])
    assert 100 * MIB < wanted < 100 * MIB + 4 * GIB
    left_there = (kernel.own / "cgroup.procs").read_text().split()
    assert str(os.getpid()) in left_there
    assert not [entry for entry in kernel.own.iterdir() if entry.is_dir()]


def test_a_scope_that_is_tight_enough_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path, monkeypatch)
    (kernel.top / "app.slice/memory.max").write_text(str(2 * GIB))
    (kernel.own / "memory.max").write_text(str(200 * MIB))
    (kernel.own / "memory.current").write_text(str(150 * MIB))
    with enforce("cgroup", growth_bytes=8 * GIB, simulated=True, root=tmp_path) as limit:
        assert limit.limit_bytes == 200 * MIB
        assert limit.description.startswith("enforced by cgroup memory.max of 200 MiB (set from outside; ")
        assert left_bytes(limit, tmp_path) == 50 * MIB
    assert [entry.name for entry in kernel.own.iterdir() if entry.is_dir()] == []


# --- Before a step


def test_too_little_in_the_machine_is_said_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path, monkeypatch)
    (kernel.root / "proc/meminfo").write_text(f"MemAvailable: {400 * 1024} kB\n")
    limits._limited_cgroups.cache_clear()
    assert short_of_memory(400 * MIB, tmp_path) is None
    said = short_of_memory(401 * MIB, tmp_path)
    assert said is not None
    assert "401 MiB" in said
    assert "400 MiB" in said
    (kernel.own / "memory.max").write_text(str(100 * MIB))
    (kernel.own / "memory.current").write_text(str(90 * MIB))
    limits._limited_cgroups.cache_clear()
    said = short_of_memory(11 * MIB, tmp_path)
    assert said is not None
    assert "10.0 MiB" in said
    limits._limited_cgroups.cache_clear()


@linux
def test_the_look_before_a_step_costs_less_than_a_fifth_of_a_millisecond() -> None:
    short_of_memory(1)
    costs = []
    for _ in range(200):
        began = time.perf_counter()
        short_of_memory(1)
        costs.append(time.perf_counter() - began)
    assert min(costs) < 0.2e-3


# --- What running out looks like


class CudaOutOfMemory(RuntimeError):
    """As torch.OutOfMemoryError is one."""


class Unprintable(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no")


OUT = [
    MemoryError(),
    MemoryError("Unable to allocate 1.00 GiB for an array with shape (1, 2) and data type float32"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    CudaOutOfMemory(""),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 121200 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at CPUAllocator.cpp:56] posix_memalign(&data, gAlignment, nbytes) == 0. 12 vs 0"),
    RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 364742208 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("bad allocation"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload with ONEDNN_VERBOSE"),
    RuntimeError("could not create a memory object"),
    RuntimeError("could not execute a primitive"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.0 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":995, please'
    ),
    RuntimeError('!handles_.at(i) INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":430, please'),
    RuntimeError("NvMapMemAllocInternalTagged: 1075072515 error 12"),
    RuntimeError("unable to mmap 9989150328 bytes from file </w.safetensors>: Cannot allocate memory (12)"),
    OSError("out of memory error when reading image file"),
    ImportError("libopenblas.so: failed to map segment from shared object"),
    SystemError("out of memory"),
    Exception("Error -4 while decompressing data: insufficient memory"),
    Exception("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 643840"),
    Exception("I/O error: Cannot allocate memory (os error 12)"),
]
NOT_OUT = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x192 and 768x10)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    ImportError("/lib/aarch64-linux-gnu/libgomp.so.1: cannot allocate memory in static TLS block"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("odd"),
    Unprintable(),
    RuntimeError("can't start new thread"),
]
NEVER = [
    TypeError("out of memory"),
    ValueError("out of memory"),
    KeyError("std::bad_alloc"),
    AssertionError("can't allocate memory"),
    NotImplementedError("out of memory"),
    RecursionError("out of memory"),
    ZeroDivisionError("out of memory"),
    errors.EdgetuneError("not enough memory"),
    errors.CapExceeded("out of memory"),
    KeyboardInterrupt("out of memory"),
]


def _says(error: BaseException, left: int | None = None, needed: int | None = None) -> bool:
    return is_out_of_memory(error, left_bytes=left, needed_bytes=needed)


@pytest.mark.parametrize("error", OUT, ids=repr)
def test_every_known_wording_counts_whatever_is_left(error: BaseException) -> None:
    assert _says(error)
    assert _says(error, left=GIB, needed=1)


@pytest.mark.parametrize("error", NOT_OUT, ids=lambda error: type(error).__name__)
def test_other_errors_do_not_count_where_enough_is_left(error: BaseException) -> None:
    assert not _says(error)
    assert not _says(error, left=None, needed=GIB)


@pytest.mark.parametrize("kind", [RuntimeError, SystemError, OSError, Unprintable])
def test_an_unrecognised_error_counts_when_less_is_left_than_the_step_needs(kind: type[Exception]) -> None:
    error = kind("odd words")
    assert _says(error, left=99, needed=100)
    assert not _says(error, left=100, needed=100)
    assert not _says(error, left=99, needed=None)


def test_an_error_whose_cause_the_kernel_names_does_not_count_when_little_is_left() -> None:
    assert not _says(OSError(errno.ENOSPC, "No space left on device"), left=0, needed=100)
    assert not _says(FileNotFoundError(errno.ENOENT, "No such file"), left=0, needed=100)
    assert _says(OSError(errno.EAGAIN, "Resource temporarily unavailable"), left=0, needed=100)


@pytest.mark.parametrize("error", NEVER, ids=repr)
def test_mistakes_in_the_program_never_count(error: BaseException) -> None:
    error.__context__ = MemoryError()
    assert not _says(error, left=0, needed=100)


def test_a_thread_that_can_not_start_counts_under_a_limit_only() -> None:
    assert _says(RuntimeError("can't start new thread"), left=GIB, needed=1)
    assert not _says(RuntimeError("can't start new thread"), left=None, needed=1)


def test_an_error_counts_for_what_it_was_raised_from_or_amid() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise RuntimeError("the backward pass failed") from cause
    except RuntimeError as error:
        from_cause: BaseException = error
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise OSError("broken image") from None
    except OSError as error:
        amid: BaseException = error
    assert _says(from_cause)
    assert _says(amid)
    loop = RuntimeError("a")
    loop.__context__ = RuntimeError("b")
    loop.__context__.__context__ = loop
    assert not _says(loop)


def test_a_cache_miss_on_the_way_to_a_mistake_is_no_sign() -> None:
    error = RuntimeError("shapes differ")
    error.__context__ = KeyError("out of memory")
    assert not _says(error)


# --- GPU: on a made-up one, for want of a machine that has one


class _Cuda:
    def __init__(self, *total_bytes: int) -> None:
        self._total, self.fractions = total_bytes, [1.0] * len(total_bytes)

    def is_available(self) -> bool:
        return bool(self._total)

    def device_count(self) -> int:
        return len(self._total)

    def get_device_properties(self, number: int) -> Any:
        return type("Properties", (), {"total_memory": self._total[number]})

    def set_per_process_memory_fraction(self, share: float, number: int) -> None:
        self.fractions[number] = share


def _with_gpus(monkeypatch: pytest.MonkeyPatch, *total_bytes: int) -> _Cuda:
    cuda = _Cuda(*total_bytes)
    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": cuda}))
    return cuda


@linux
def test_with_a_limit_a_gpu_gives_as_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _with_gpus(monkeypatch, 4 * GIB, 512 * MIB)
    with enforce("rlimit", growth_bytes=GIB, simulated=True) as limit:
        assert cuda.fractions == [0.25, 1.0]
        assert limit.description.endswith(", at most 25.0%, 100.0% of the GPU's memory")
    assert cuda.fractions == [1.0, 1.0]


@pytest.mark.parametrize(("kind", "totals"), [("none", (4 * GIB,)), ("rlimit", ())])
@linux
def test_without_a_limit_or_a_gpu_nothing_is_said_of_one(
    monkeypatch: pytest.MonkeyPatch, kind: Any, totals: tuple[int, ...]
) -> None:
    cuda = _with_gpus(monkeypatch, *totals)
    with enforce(kind, growth_bytes=GIB, simulated=True) as limit:
        assert cuda.fractions == [1.0] * len(totals)
        assert "GPU" not in limit.description


def test_past_the_fraction_the_error_counts_as_lack_of_memory() -> None:
    words = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 3.87 GiB of which 1.2 MiB is free."
    assert is_out_of_memory(RuntimeError(words), left_bytes=None, needed_bytes=None)
