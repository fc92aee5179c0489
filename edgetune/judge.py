"""Host and device kept apart: whose runtime counts, which cap holds, what the verdict compares.

When the host is the device, the capped figure is this process's RSS plus swap, nothing subtracted. When the host only
simulates it, the device's runtime (from its profile) plus what training added here is held against the device's cap.
"""

from __future__ import annotations

import platform

import msgspec

from edgetune import devices, runtimes, system
from edgetune.errors import BackendUnavailable
from edgetune.memory import MemoryMeter, MemoryPeaks
from edgetune.profiles import DeviceProfile, Runtime
from edgetune.units import MIB, format_bytes

# A measured runtime differs by a part of a MiB from run to run; a plan must not.
RUNTIME_ROUNDING_BYTES = 2 * MIB
# For `edgetune plan` where a profile states none: torch 2.9's CPU build and edgetune, the upper of the figures
# measured on emulated Arm boards.
ASSUMED_RUNTIME_BYTES = 266 * MIB
# What timm adds where it has to build a model, measured there too: torchvision, torch._dynamo and sympy come with it.
ASSUMED_TIMM_BYTES = 102 * MIB
# The same for ONNX Runtime's training API without torch: the upper of the figures measured on x86.
ASSUMED_ORT_BYTES = 56 * MIB
# The kernel and firmware keep part of the RAM, so a board's MemTotal is below its label; 96 MiB for the GPU of a 512 MB
# Raspberry Pi are common. The next smaller board of a kind has half.
SAME_RAM_TOLERANCE = 0.3


class Judge(msgspec.Struct, frozen=True, kw_only=True):
    """What a run's memory is held against."""

    device: str
    simulated: bool
    cap_bytes: int
    host_runtime_bytes: int
    device_runtime_bytes: int
    gpu_shares_ram: bool = False
    notes: tuple[str, ...] = ()

    def device_peak_bytes(self, peaks: MemoryPeaks) -> int:
        """The judged figure of a run: what the verdict compares with the cap."""
        host = self.device_runtime_bytes + peaks.training_peak_bytes if self.simulated else peaks.peak_bytes
        # What an integrated GPU was given is RAM that no figure of the process shows.
        return host + (peaks.cuda_peak_bytes or 0) if self.gpu_shares_ram else host


def is_this_machine(profile: DeviceProfile) -> bool:
    """Whether the run is on the device itself: `auto`, or an Arm board with the profile's RAM and cores."""
    if profile.id == devices.AUTO:
        return True
    if platform.machine() not in ("aarch64", "arm64", "armv7l") or profile.cores is None:
        return False
    ram = system.total_ram_bytes()
    return (1 - SAME_RAM_TOLERANCE) * profile.ram_bytes <= ram <= profile.ram_bytes and (
        profile.cores == system.usable_cores()
    )


def threads_for(profile: DeviceProfile) -> int:
    """CPU threads to run a device's work with here: its cores, at most this machine's."""
    return min(profile.cores or 2**10, system.usable_cores())


def stated_runtime(profile: DeviceProfile, backend: str) -> Runtime | None:
    """What a profile says that a backend's runtime takes ("torch" or "ort"); None if it says nothing."""
    found: Runtime | None = getattr(profile.runtime, backend)
    return found


def stated_bytes(runtime: Runtime, *, timm: bool) -> int:
    """A stated runtime, with what timm adds to it where a model needs timm and the figure has not counted it."""
    if not timm or "timm" in runtime.version:
        return runtime.bytes
    return runtime.bytes + (runtime.timm_bytes or ASSUMED_TIMM_BYTES)


def default_cap_bytes(profile: DeviceProfile, backend: str = "torch", held_bytes: int = 0) -> int:
    """The cap without `--ram-cap`: what is usable, and on a device that bounds anonymous memory apart, what that leaves."""
    here = is_this_machine(profile)
    cap = devices.default_cap_bytes(profile, here, held_bytes)
    stated, anonymous = stated_runtime(profile, backend), profile.usable_anonymous_bytes
    if here or anonymous is None or stated is None or stated.anonymous_bytes is None:
        return cap
    # What training adds is nearly all anonymous, so the tighter of the two bounds holds for it.
    return min(cap, anonymous - stated.anonymous_bytes + stated.bytes)


def judge_for(
    profile: DeviceProfile,
    ram_cap_bytes: int | None,
    meter: MemoryMeter,
    backend: str = "torch",
    packages: tuple[str, ...] = runtimes.TORCH,
) -> Judge:
    """Mark the runtime (call it after the warm-up, made of these packages) and settle the cap."""
    here = is_this_machine(profile)
    notes: list[str] = []
    marked = meter.mark_runtime()
    measured = marked.total_bytes
    rounded = -(-measured // RUNTIME_ROUNDING_BYTES) * RUNTIME_ROUNDING_BYTES
    if here:  # where a device is simulated, the warm-up runs out of memory too, for which code is paged in
        runtimes.remember(runtimes.versions(packages), rounded)
    # The process is a part of its own cap. Its file-backed pages are no loss: MemAvailable counts them among what can be had.
    cap = ram_cap_bytes or default_cap_bytes(profile, backend, marked.anonymous_bytes or 0)
    timm = "timm" in packages
    runtime = rounded
    if not here:
        stated = stated_runtime(profile, backend)
        if stated is None and backend == "ort":
            raise BackendUnavailable(
                f"{profile.id} states no runtime for ONNX Runtime ([runtime.ort] in its profile), so nothing can be said of "
                "its memory there. Train for it with torch (--backend torch), or name a phone's profile: "
                "edgetune devices list."
            )
        if stated is None:
            notes.append(
                f"{profile.id} states no runtime for {backend}: this machine's {format_bytes(rounded)} is used in its place"
            )
        else:
            runtime = stated_bytes(stated, timm=timm)
        if ram_cap_bytes is None and cap < profile.usable_ram_bytes:
            notes.append(f"anonymous memory binds on {profile.id}: the cap is {format_bytes(cap)}")
    return Judge(
        device=profile.id,
        simulated=not here,
        cap_bytes=cap,
        host_runtime_bytes=measured,
        device_runtime_bytes=runtime,
        gpu_shares_ram=profile.accelerator is not None and profile.accelerator.memory == "shared",
        notes=tuple(notes),
    )
