"""Whose runtime counts, which cap holds, what is compared with it. No torch."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from edgetune import devices, judge, system
from edgetune.judge import Judge, is_this_machine, judge_for
from edgetune.memory import MemoryMeter, MemoryPeaks
from edgetune.profiles import DeviceProfile, Runtime, Runtimes
from edgetune.units import GIB, MIB


@pytest.fixture
def meter() -> Iterator[MemoryMeter]:
    with MemoryMeter() as meter:
        yield meter


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> DeviceProfile:
    """A 4 GB board with four cores, while this machine is a PC, whatever the tests run on."""
    on(monkeypatch, "x86_64", ram_bytes=64 * GIB, cores=8)
    return DeviceProfile(
        id="board",
        name="Board",
        ram_bytes=4 * GIB,
        usable_ram_bytes=3 * GIB,
        cores=4,
        runtime=Runtimes(torch=Runtime(bytes=316 * MIB, version="torch", source="a test", verified=True)),
        source="a test",
        verified=True,
    )


def on(monkeypatch: pytest.MonkeyPatch, machine: str, *, ram_bytes: int, cores: int) -> None:
    """Let this machine be another one."""
    monkeypatch.setattr(judge.platform, "machine", lambda: machine)
    monkeypatch.setattr(system, "total_ram_bytes", lambda: ram_bytes)
    monkeypatch.setattr(system, "usable_cores", lambda: cores)


def with_anonymous_limit(profile: DeviceProfile, limit: int, runtime_anonymous: int | None) -> DeviceProfile:
    assert profile.runtime.torch is not None
    torch = msgspec.structs.replace(profile.runtime.torch, anonymous_bytes=runtime_anonymous)
    return msgspec.structs.replace(profile, usable_anonymous_bytes=limit, runtime=Runtimes(torch=torch))


def test_a_simulated_device_is_judged_by_its_own_runtime(board: DeviceProfile, meter: MemoryMeter) -> None:
    made = judge_for(board, None, meter)
    assert made.simulated
    assert made.device == "board"
    assert made.device_runtime_bytes == 316 * MIB
    assert made.cap_bytes == board.usable_ram_bytes
    assert made.host_runtime_bytes == meter.peaks().runtime_bytes > MIB
    assert made.notes == ()


def test_a_given_cap_takes_the_place_of_the_devices(board: DeviceProfile, meter: MemoryMeter) -> None:
    assert judge_for(board, 512 * MIB, meter).cap_bytes == 512 * MIB


def test_a_device_without_a_torch_runtime_gets_this_machines_and_a_note(
    board: DeviceProfile, meter: MemoryMeter
) -> None:
    made = judge_for(msgspec.structs.replace(board, runtime=Runtimes()), None, meter)
    assert made.device_runtime_bytes % judge.RUNTIME_ROUNDING_BYTES == 0
    assert 0 <= made.device_runtime_bytes - made.host_runtime_bytes < judge.RUNTIME_ROUNDING_BYTES
    assert "board states no runtime for torch" in made.notes[0]


def test_the_tighter_of_the_two_memory_bounds_holds(board: DeviceProfile, meter: MemoryMeter) -> None:
    # 316 MiB of runtime, 200 of them anonymous: 1000 MiB of anonymous memory leave 800 for training.
    tight = judge_for(with_anonymous_limit(board, 1000 * MIB, 200 * MIB), None, meter)
    assert tight.cap_bytes == (800 + 316) * MIB
    assert "anonymous memory binds on board" in tight.notes[0]
    loose = judge_for(with_anonymous_limit(board, 3 * GIB, 200 * MIB), None, meter)
    assert loose.cap_bytes == board.usable_ram_bytes
    assert loose.notes == ()


@pytest.mark.parametrize(("cap", "runtime_anonymous"), [(2 * GIB, 200 * MIB), (None, None)])
def test_a_given_cap_or_an_unknown_anonymous_runtime_leaves_the_bound_out(
    board: DeviceProfile, meter: MemoryMeter, cap: int | None, runtime_anonymous: int | None
) -> None:
    made = judge_for(with_anonymous_limit(board, 1000 * MIB, runtime_anonymous), cap, meter)
    assert made.cap_bytes == (cap or board.usable_ram_bytes)


def test_the_machine_at_hand_is_judged_as_it_is(
    board: DeviceProfile, meter: MemoryMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "available_ram_bytes", lambda: 10 * GIB)
    made = judge_for(msgspec.structs.replace(board, id=devices.AUTO), None, meter)
    assert not made.simulated
    held = meter.mark_runtime().anonymous_bytes or 0
    assert held > MIB
    assert made.cap_bytes == pytest.approx(devices.AUTO_CAP_SHARE * (10 * GIB + held), abs=8 * MIB)
    assert made.cap_bytes > devices.AUTO_CAP_SHARE * (10 * GIB + held / 2)
    assert made.device_runtime_bytes - made.host_runtime_bytes < judge.RUNTIME_ROUNDING_BYTES
    assert judge_for(msgspec.structs.replace(board, id=devices.AUTO), GIB, meter).cap_bytes == GIB


@pytest.mark.parametrize(
    ("machine", "ram_bytes", "cores", "same"),
    [
        ("aarch64", int(3.6 * GIB), 4, True),  # the kernel and firmware keep some
        ("aarch64", 3 * GIB, 4, True),  # and a GPU some more
        ("arm64", 4 * GIB, 4, True),
        ("x86_64", 4 * GIB, 4, False),
        ("aarch64", 8 * GIB, 4, False),
        ("aarch64", 2 * GIB, 4, False),
        ("aarch64", 4 * GIB, 2, False),
    ],
)
def test_an_arm_board_with_the_profiles_ram_and_cores_is_the_device(
    board: DeviceProfile, monkeypatch: pytest.MonkeyPatch, machine: str, ram_bytes: int, cores: int, same: bool
) -> None:
    on(monkeypatch, machine, ram_bytes=ram_bytes, cores=cores)
    assert is_this_machine(board) is same
    assert not is_this_machine(msgspec.structs.replace(board, cores=None))
    assert is_this_machine(msgspec.structs.replace(board, id=devices.AUTO))


def make_peaks(**changes: int) -> MemoryPeaks:
    values = dict.fromkeys(MemoryPeaks.__struct_fields__)
    return MemoryPeaks(**{**values, "phases": {}, "exact": True, "timeline": (), **changes})  # type: ignore[arg-type]


def test_the_verdicts_figure_is_the_devices_runtime_plus_training_or_the_process_itself() -> None:
    peaks = make_peaks(peak_bytes=900 * MIB, training_peak_bytes=150 * MIB)
    values = {"device": "board", "cap_bytes": GIB, "host_runtime_bytes": 750 * MIB, "device_runtime_bytes": 316 * MIB}
    assert Judge(simulated=True, **values).device_peak_bytes(peaks) == 466 * MIB  # type: ignore[arg-type]
    assert Judge(simulated=False, **values).device_peak_bytes(peaks) == 900 * MIB  # type: ignore[arg-type]


@pytest.mark.parametrize("simulated", [True, False])
def test_memory_of_a_gpu_that_shares_the_ram_is_part_of_the_figure(simulated: bool) -> None:
    peaks = make_peaks(peak_bytes=900 * MIB, training_peak_bytes=150 * MIB, cuda_peak_bytes=200 * MIB)
    none = msgspec.structs.replace(peaks, cuda_peak_bytes=None)
    values = {"device": "board", "cap_bytes": GIB, "host_runtime_bytes": 750 * MIB, "device_runtime_bytes": 316 * MIB}
    own = Judge(simulated=simulated, **values)  # type: ignore[arg-type]
    shared = msgspec.structs.replace(own, gpu_shares_ram=True)
    assert shared.device_peak_bytes(peaks) == own.device_peak_bytes(peaks) + 200 * MIB
    assert shared.device_peak_bytes(none) == own.device_peak_bytes(none)


@pytest.mark.parametrize(("device", "shares"), [("jetson-nano", True), ("raspberry-pi-4-4gb", False)])
def test_a_profile_says_whether_a_gpu_shares_the_ram(meter: MemoryMeter, device: str, shares: bool) -> None:
    assert judge_for(devices.find_device(device), None, meter).gpu_shares_ram is shares


def test_timm_is_counted_once_and_only_where_it_is_needed(board: DeviceProfile, meter: MemoryMeter) -> None:
    assert board.runtime.torch is not None
    alone = msgspec.structs.replace(board.runtime.torch, bytes=240 * MIB, timm_bytes=90 * MIB, version="torch 2.9.1")
    lean = msgspec.structs.replace(board, runtime=Runtimes(torch=alone))
    assert judge_for(lean, None, meter).device_runtime_bytes == 240 * MIB
    assert judge_for(lean, None, meter, packages=("torch", "timm")).device_runtime_bytes == 330 * MIB
    with_timm = msgspec.structs.replace(alone, bytes=316 * MIB, version="torch 2.9.1 + timm 1.0.22")
    counted = msgspec.structs.replace(board, runtime=Runtimes(torch=with_timm))
    assert judge_for(counted, None, meter, packages=("torch", "timm")).device_runtime_bytes == 316 * MIB
