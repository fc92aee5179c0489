"""Which device `--device` means: a bundled profile, a user's own, a file, or the machine at hand. No torch.

Bundled profiles come with the package; a user's own lie in `devices/` of the platform's config folder
(EDGETUNE_CONFIG_DIR overrides it). A user's file never shadows a bundled id: that is refused by name, so that
`--device jetson-nano` means the same everywhere. `auto` is the machine at hand: as `edgetune devices detect --save`
wrote it, with memory and cores read anew. What a profile holds is in `profiles`, how a machine is read in `detect`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgetune import detect, system
from edgetune.errors import ProfileError, UnknownDevice
from edgetune.profiles import Accelerator, DeviceProfile, Runtime, Runtimes, load_profile, save_profile, shown
from edgetune.units import MIB

__all__ = [
    "AUTO",
    "AUTO_CAP_SHARE",
    "Accelerator",
    "DeviceProfile",
    "Runtime",
    "Runtimes",
    "default_cap_bytes",
    "detect_device",
    "find_device",
    "find_path",
    "list_devices",
    "load_profile",
    "save_profile",
]

AUTO = "auto"
# Of what is available now, the share a run may take on the machine it runs on when no cap is given. The rest is for
# what other processes take while it runs, the kernel's watermarks, and page cache without which the disk crawls.
AUTO_CAP_SHARE = 0.8


def find_device(name: str) -> DeviceProfile:
    """The profile `--device` names: an id, `auto`, or the path of a TOML file (it has a separator or ends in .toml).

    Raises: UnknownDevice with the nearest ids; ProfileError for a file that is wrong or shadows a bundled id.
    """
    if name == AUTO:
        return _auto()
    return load_profile(find_path(name))


def find_path(name: str) -> Path:
    """The file `find_device` reads for an id or a path. Raises: as `find_device`."""
    if name.endswith(".toml") or "/" in name or os.sep in name:
        return Path(name).expanduser() if name.startswith("~/") else Path(name)
    bundled, own = _files(bundled_dir()), _files(user_dir())
    if name in bundled and name in own:
        raise ProfileError(_shadows(own[name]))
    path = bundled.get(name) or own.get(name)
    if path is None:
        raise UnknownDevice(_unknown(name, sorted({*bundled, *own})))
    return path


def list_devices(warn: Callable[[str], object] | None = None) -> list[DeviceProfile]:
    """All bundled and user profiles by id. A broken user file is left out and `warn` (standard error) is told why."""
    if warn is None:
        warn = _to_stderr
    profiles = {name: load_profile(path) for name, path in _files(bundled_dir()).items()}
    for name, path in _files(user_dir()).items():
        if name in profiles:
            warn(_shadows(path))
            continue
        try:
            profiles[name] = load_profile(path)
        except ProfileError as error:
            warn(str(error))
    return [profiles[name] for name in sorted(profiles)]


def bundled_dir() -> Path:
    """The profiles that come with edgetune: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "device_profiles"
    return inside if inside.is_dir() else package.parent / "device_profiles"


def user_dir() -> Path:
    """Where a user's own profiles lie: `devices/` in EDGETUNE_CONFIG_DIR or the platform's config folder."""
    folder = os.environ.get("EDGETUNE_CONFIG_DIR")
    if folder:
        return Path(folder).expanduser() / "devices"
    import platformdirs

    return Path(platformdirs.user_config_dir("edgetune")) / "devices"


def saved_auto_path() -> Path:
    """The file that `edgetune devices detect --save` writes and `--device auto` reads."""
    return user_dir() / f"{AUTO}.toml"


# ---------------------------------------------------------------------------------------------- the machine at hand


def detect_device(
    measure_speed: bool, *, measure_runtime: bool = False, root: Path = system.ROOT, id: str = AUTO
) -> DeviceProfile:
    """This machine as this process may use it: cgroup limits of all ancestors, affinity and quota counted.

    `measure_speed` takes about a second (numpy: float32 products, copies); `measure_runtime` starts a process that
    imports what a run with torch imports, where torch is installed. `root` is the tree to read, for tests.
    """
    ram = max(system.total_ram_bytes(root), 32 * MIB)
    # A full cgroup leaves nothing: still a valid profile, under which nothing fits.
    usable = min(ram, max(system.available_ram_bytes(root), MIB))
    cpu = detect.cpu_name(root)
    gpu = detect.find_gpu(root)
    child = detect.measure_torch_runtime() if measure_runtime else None
    torch = None
    if child is not None:
        torch = Runtime(
            bytes=child.peak_bytes,
            anonymous_bytes=child.anonymous_bytes,
            version=child.version,
            source="a fresh process on this machine: imports only",
            verified=True,
        )
    speeds = "measured with numpy, float32" if measure_speed else "speeds not measured"
    return DeviceProfile(
        id=id,
        name=detect.machine_name(root) or f"this machine ({cpu})"[:300],
        ram_bytes=ram,
        usable_ram_bytes=usable,
        cores=system.usable_cores(root),
        cpu=cpu,
        peak_flops_per_s=detect.measure_flops_per_s() if measure_speed else None,
        memory_bandwidth_bytes_per_s=detect.measure_bandwidth_bytes_per_s(usable) if measure_speed else None,
        accelerator=None if gpu is None else msgspec.convert(gpu, Accelerator),
        runtime=Runtimes(torch=torch),
        source=f"detected: memory and cores as this process may use them; {speeds}",
        verified=True,
    )


def default_cap_bytes(profile: DeviceProfile, is_host: bool, held_bytes: int = 0) -> int:
    """The cap of a run without `--ram-cap`: the profile's usable RAM, or on the machine at hand AUTO_CAP_SHARE of what
    is available now (a saved figure may be hours old), what this process holds of it already (`held_bytes`) counted in.
    """
    return int(AUTO_CAP_SHARE * (system.available_ram_bytes() + held_bytes)) if is_host else profile.usable_ram_bytes


def _auto() -> DeviceProfile:
    """This machine. Speeds and runtime come from the saved file; memory and cores are as they are now, and a file saved
    on another machine (a shared home folder) or, for the runtime, with other versions of torch does not count."""
    now = detect_device(measure_speed=False)
    path = _files(user_dir()).get(AUTO)
    if path is None:
        return now
    saved = load_profile(path)
    if saved.cpu != now.cpu:
        return now
    torch = saved.runtime.torch
    if torch is not None and torch.version != detect.torch_version():
        torch = None
    return msgspec.structs.replace(
        now,
        peak_flops_per_s=saved.peak_flops_per_s,
        memory_bandwidth_bytes_per_s=saved.memory_bandwidth_bytes_per_s,
        runtime=Runtimes(torch=torch, ort=saved.runtime.ort),
        source=f"memory and cores: detected now; speeds and runtime: {saved.source}"[:4000],
        verified=saved.verified,
        notes=saved.notes,
    )


def _files(folder: Path) -> dict[str, Path]:
    """Id -> file. A folder that is missing or can't be listed has none."""
    try:
        return {path.stem: path for path in sorted(folder.glob("*.toml")) if not path.name.startswith(".")}
    except OSError:
        return {}


def _shadows(path: Path) -> str:
    return (
        f"{path}: has the id of a bundled profile. Rename the file and its id (my-{path.stem}), "
        f"or pass the file's path instead of the id."
    )


def _unknown(name: str, ids: list[str]) -> str:
    wanted = name[:100].lower().replace("_", "-").replace(" ", "-")
    near = [known for known in ids if wanted and known.startswith(wanted)]
    near += [known for known in difflib.get_close_matches(wanted, ids, n=3, cutoff=0.5) if known not in near]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"no device {shown(name)}. {hint}`edgetune devices list` shows all; {AUTO} is this machine."


def _to_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
