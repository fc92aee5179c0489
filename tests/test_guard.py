"""What is left under a cap, and the plan that comes next when memory ran out. No torch, but in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from edgetune import guard, system
from edgetune.enforce import Limit, is_out_of_memory, room_bytes
from edgetune.errors import BackendUnavailable, CapExceeded, DataError, DoesNotFit
from edgetune.guard import CHOICES, TIGHTENED_SHARE, UNCOUNTED_BYTES, Guard, guarded, memory_ends
from edgetune.judge import Judge
from edgetune.memory import MemoryMeter
from edgetune.methods import METHODS, space_of
from edgetune.planner import Plan, PlanRequest, plan
from edgetune.shapes import known_shape
from edgetune.units import GIB, MIB

RUNTIME = 300 * MIB


@pytest.fixture
def meter() -> Iterator[MemoryMeter]:
    # What earlier tests left must not go meanwhile.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with MemoryMeter() as meter:
        yield meter


def judge_of(meter: MemoryMeter, *, simulated: bool = True, cap: int = 2 * GIB) -> Judge:
    own = meter.mark_runtime().total_bytes
    return Judge(
        device="board",
        simulated=simulated,
        cap_bytes=cap if simulated else own + cap,  # this process, after other tests, may be of any size
        host_runtime_bytes=own,
        device_runtime_bytes=RUNTIME if simulated else own,
    )


@pytest.fixture
def watching(meter: MemoryMeter) -> Iterator[Guard]:
    with guarded("none", judge_of(meter), meter) as made:
        yield made


# ----------------------------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("kind", ["auto", "rlimit", "cgroup", "none"])
@pytest.mark.parametrize("simulated", [True, False])
def test_a_process_may_grow_by_what_the_cap_leaves_above_the_runtime(
    meter: MemoryMeter, monkeypatch: pytest.MonkeyPatch, kind: Any, simulated: bool
) -> None:
    asked: list[int] = []

    @contextmanager
    def enforce(_kind: str, *, growth_bytes: int, simulated: bool) -> Iterator[Limit]:
        asked.append(growth_bytes)
        yield Limit(kind="none", limit_bytes=None, description="")

    monkeypatch.setattr(guard, "enforce", enforce)
    judge = judge_of(meter, simulated=simulated)
    taken = bytearray(40 * MIB)
    taken[:: 2**12] = b"1" * len(taken[:: 2**12])  # since the runtime was marked
    with guarded(kind, judge, meter):
        pass
    growth = judge.cap_bytes - (RUNTIME if simulated else judge.host_runtime_bytes) - len(taken)
    # Code that is paged in later counts in the cap and not in RLIMIT_DATA.
    growth -= UNCOUNTED_BYTES if kind == "rlimit" or (kind == "auto" and simulated) else 0
    assert asked[0] == pytest.approx(growth, abs=2 * MIB)


def test_a_step_needs_what_its_plan_adds_less_what_is_there_already(watching: Guard) -> None:
    made = plan(request_for("full", 2 * GIB))
    growth = made.predicted_peak_bytes - made.runtime_bytes
    assert watching.needed_bytes(made) == pytest.approx(growth, abs=2 * MIB)
    taken = b"1" * (50 * MIB)
    assert watching.needed_bytes(made) == pytest.approx(growth - len(taken), abs=2 * MIB)


@pytest.mark.parametrize("left_mib", [0, 99, 101])
def test_a_machine_that_has_less_than_a_step_needs_is_short_of_it(
    watching: Guard, monkeypatch: pytest.MonkeyPatch, left_mib: int
) -> None:
    made = plan(request_for("full", 2 * GIB))
    monkeypatch.setattr(Guard, "needed_bytes", lambda *_: 100 * MIB)
    monkeypatch.setattr(system, "available_ram_bytes", lambda *_: left_mib * MIB)
    assert (watching.shortage(made) is None) == (left_mib > 100)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds memory on Linux only")
@pytest.mark.parametrize(("which", "size"), [("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")])
def test_a_limit_that_somebody_else_set_is_seen(which: str, size: str) -> None:
    script = f"""
import json, resource
from edgetune import system
from edgetune.enforce import room_bytes
before = room_bytes()
bound = system.process_status()[{size!r}] + 80 * 2**20
resource.setrlimit(resource.{which}, (bound, bound))
print(json.dumps([before, room_bytes()]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before > 100 * MIB
    assert 78 * MIB < after <= 80 * MIB


def test_what_the_machine_has_left_bounds_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "available_ram_bytes", lambda *_: 7 * MIB)
    assert room_bytes() == 7 * MIB


# ------------------------------------------------------------------------------------------------- the plan that comes next


def request_for(method: str, cap: int, **changes: Any) -> PlanRequest:
    shape = known_shape("deit_tiny_patch16_224", 10)
    assert shape is not None
    given = METHODS[method]
    options: dict[str, Any] = {
        "shape": shape,
        "space": space_of(given, shape, trained_blocks=None, split_block=None),
        "batch_size": 16,
        "optimizer": "adamw",
        "cap_bytes": cap,
        "runtime_bytes": RUNTIME,
    }
    return PlanRequest(**{**options, **changes})


def descent(watching: Guard, request: PlanRequest, start: Plan) -> list[Plan]:
    """The plans one after the other, as often as memory runs out, to the least."""
    plans = [start]
    while len(plans) < 40:
        try:
            plans.append(watching.tighter(request, plans[-1]))
        except DoesNotFit:
            return plans
    raise AssertionError("it never ends")


@pytest.mark.parametrize("method", list(METHODS))
def test_each_plan_needs_less_than_the_one_before_down_to_the_least(watching: Guard, method: str) -> None:
    request = request_for(method, 2 * GIB)
    plans = descent(watching, request, plan(request))
    assert len(plans) > 2
    for before, after in itertools.pairwise(plans):
        growths = [
            max(size for phase, size in each.predicted_phase_bytes.items() if phase != "load") - RUNTIME
            for each in (before, after)
        ]
        assert growths[1] < growths[0]
        assert growths[1] <= TIGHTENED_SHARE * growths[0] or after == plans[-1]
        assert after.split_block >= before.split_block
        assert after.evaluation_batch <= before.evaluation_batch
        assert after.predicted_phase_bytes["load"] == before.predicted_phase_bytes["load"]
        assert after.predicted_peak_bytes == max(after.predicted_phase_bytes.values())
        for same in ("cap_bytes", "runtime_bytes", "batch_size", "threads", "method", "optimizer", "model"):
            assert getattr(after, same) == getattr(before, same), same
    with pytest.raises(DoesNotFit) as error:
        plan(msgspec.structs.replace(request, cap_bytes=RUNTIME, load_copies=0.0))
    assert plans[-1].predicted_phase_bytes["train"] <= error.value.smallest_cap_bytes


def test_a_plan_is_no_larger_than_what_there_is_room_for(watching: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for("full", 2 * GIB)
    monkeypatch.setattr(guard, "room_bytes", lambda: 120 * MIB)
    made = watching.tighter(request, plan(request))
    assert made.predicted_peak_bytes - RUNTIME <= 122 * MIB


def test_where_less_is_left_than_anything_needs_the_least_is_tried(
    watching: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("full", 2 * GIB)
    least = descent(watching, request, plan(request))[-1]
    monkeypatch.setattr(guard, "room_bytes", lambda: MIB)
    made = watching.tighter(request, plan(request))
    assert all(getattr(made, name) == getattr(least, name) for name in CHOICES)
    with pytest.raises(DoesNotFit):
        watching.tighter(request, made)


def test_a_plan_that_says_too_little_of_itself_is_not_believed(watching: Guard) -> None:
    """As a plan.json that was edited: all of the batch at once, and still the peak of one image."""
    request = request_for("full", 2 * GIB)
    large, least = plan(request), descent(watching, request, plan(request))[-1]
    lying = msgspec.structs.replace(
        large, predicted_phase_bytes=least.predicted_phase_bytes, predicted_peak_bytes=least.predicted_peak_bytes
    )
    assert watching.tighter(request, lying).micro_batch < lying.micro_batch
    bare = msgspec.structs.replace(large, predicted_phase_bytes={})
    assert watching.tighter(request, bare).micro_batch < bare.micro_batch


def test_what_a_replayed_plan_froze_stays_frozen(watching: Guard) -> None:
    """Its split was asked for in another run; checkpoints hold nothing below it."""
    request = request_for("alast", 2 * GIB)
    space = space_of(METHODS["alast"], request.shape, trained_blocks=None, split_block=8)
    replayed = plan(msgspec.structs.replace(request, space=space))
    after = watching.tighter(request, replayed)
    assert after.split_block >= replayed.split_block == 8
    assert plan(msgspec.structs.replace(request, cap_bytes=after.predicted_peak_bytes)).split_block < 8


# ------------------------------------------------------------------------------------ where nothing can be done again


def test_memory_that_ends_a_run_ends_it_as_a_passed_cap(watching: Guard) -> None:
    class Buffer:
        pass

    held: list[weakref.ref[Buffer]] = []

    def fail() -> None:
        buffer = Buffer()
        held.append(weakref.ref(buffer))
        raise RuntimeError("std::bad_alloc\nmore")

    said = r"ran out loading the model \(std::bad_alloc\)\. .*--ram-cap"
    with pytest.raises(CapExceeded, match=said), memory_ends("loading the model", watching):
        fail()
    gc.collect()
    assert held[0]() is None


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), DataError("gone"), KeyboardInterrupt()])
def test_other_errors_pass(watching: Guard, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, memory_ends("loading the model", watching):
        raise error
    assert caught.value is error


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds memory on Linux only")
def test_the_limit_goes_when_memory_ends_a_run(meter: MemoryMeter) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with guarded("rlimit", judge_of(meter), meter) as made:
        assert resource.getrlimit(resource.RLIMIT_DATA) != before
        with pytest.raises(CapExceeded), memory_ends("loading the model", made):
            raise MemoryError
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def says(error: BaseException, **more: Any) -> bool:
    return is_out_of_memory(error, **{"left_bytes": None, "needed_bytes": None, **more})


def raised_from(error: Exception, cause: BaseException) -> Exception:
    try:
        raise error from cause
    except Exception as made:
        return made


def test_an_error_of_our_own_counts_for_what_it_was_raised_from() -> None:
    image = raised_from(DataError("a.png: not enough memory to decode it"), MemoryError())
    assert says(image)
    assert says(raised_from(BackendUnavailable("no torch"), ImportError("libtorch.so: failed to map segment")))
    assert says(raised_from(DataError("outer"), image))
    assert not says(raised_from(DataError("a.png: broken"), OSError("image file is truncated")))
    assert not says(raised_from(DataError("a.png: broken"), ValueError("out of memory")))
    assert not says(DataError("out of memory"))


def test_a_broken_image_is_no_lack_of_memory_where_little_is_left() -> None:
    broken = raised_from(DataError("a.png: broken"), RuntimeError("odd"))
    assert not says(broken, left_bytes=0, needed_bytes=100)


# ------------------------------------------------------------------------------------------------------- the rehearsal

REHEARSAL = """
import json, os, sys
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
from edgetune import process
from edgetune.enforce import rehearse
rehearse()  # nothing to rehearse without torch
assert "torch" not in sys.modules
import torch
from edgetune.allocator import limit_allocator
limit_allocator()
net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
def step(rows):
    net(torch.ones(1, 64).expand(rows, 64)).softmax(1).sum().backward()
step(8)
def adds(action):
    before = process.snapshot().file_bytes
    action()
    return (process.snapshot().file_bytes - before) / 2**20
def fail():
    for rows in (2**50, 2**52):
        try:
            step(rows)
        except RuntimeError:
            pass
first = adds(fail) if sys.argv[1] == "cold" else adds(rehearse)
print(json.dumps([first, adds(fail)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file-backed pages are told on Linux")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_after_the_rehearsal_a_failed_allocation_adds_nothing_to_the_process() -> None:
    def run(how: str) -> list[float]:
        done = subprocess.run([sys.executable, "-c", REHEARSAL, how], capture_output=True, text=True, check=True)
        figures: list[float] = json.loads(done.stdout)
        return figures

    cold, warm = run("cold"), run("warm")
    assert cold[0] > 1
    assert warm[0] > 1
    assert warm[1] < 0.3
