"""Device profiles: the files, the schema, finding one, this machine, and the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from edgetune import detect, devices, profiles, system
from edgetune.cli.devices import app
from edgetune.devices import DeviceProfile, Runtime, Runtimes, find_device, list_devices, load_profile, save_profile
from edgetune.errors import EdgetuneError, ProfileError, UnknownDevice, UsageError
from edgetune.units import GIB, MIB

FILES = sorted(devices.bundled_dir().glob("*.toml"))
EXPECTED = {
    *("jetson-nano", "jetson-orin-nano-8gb", "jetson-orin-nano-4gb", "raspberry-pi-5-4gb", "raspberry-pi-5-8gb"),
    *("raspberry-pi-4-2gb", "raspberry-pi-4-4gb", "raspberry-pi-4-8gb", "raspberry-pi-3b-plus", "raspberry-pi-zero-2w"),
    *("coral-dev-board-1gb", "coral-dev-board-4gb", "beaglebone-ai-64", "iphone-12-mini", "iphone-13-pro"),
    *("iphone-15-pro", "android-4gb", "android-8gb"),
}
GOOD = """
id = "board"
name = "A board"
ram_bytes = 4294967296
usable_ram_bytes = 3000000000
cores = 4
source = "data sheet"
verified = true
"""
RUNTIME = '[runtime.torch]\nbytes = 331350016\nversion = "torch 2.9"\nsource = "measured"\nverified = true\n'


@pytest.fixture(autouse=True)
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or writes the profiles of the person who runs it."""
    monkeypatch.setenv("EDGETUNE_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def write(folder: Path, text: str | bytes, name: str = "board.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert len(message) < 2000
    assert all(char.isprintable() or char == "\n" for char in message)
    return message


# ------------------------------------------------------------------------------------------------ the bundled files


def test_every_device_and_ram_size_has_a_profile() -> None:
    assert {path.stem for path in FILES} == EXPECTED
    assert {profile.id for profile in list_devices()} == EXPECTED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_profile_is_valid_and_a_run_has_room_in_it(path: Path) -> None:
    profile = load_profile(path)
    assert profile.format_version == 1
    runtime = profile.runtime.torch or profile.runtime.ort
    assert runtime is not None, "without a runtime cost nothing can be planned for a device that is not at hand"
    assert runtime.bytes + 50 * MIB < profile.usable_ram_bytes
    is_phone = path.stem.startswith(("iphone", "android"))
    assert (profile.runtime.ort is not None) == is_phone
    assert (profile.runtime.torch is not None) == (not is_phone)
    assert devices.default_cap_bytes(profile, is_host=False) == profile.usable_ram_bytes
    assert find_device(path.stem) == profile


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_has_its_source_in_a_comment(path: Path) -> None:
    commented = False
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            commented = True
        elif re.match(r"\w+ = [\d.]", line) and not line.startswith("format_version"):
            assert commented or "#" in line, line
            commented = line.startswith("cores")  # the cores' comment names the CPU as well
        elif line.startswith("cpu"):
            commented = False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unverified_profile_says_which_figure_is_not(path: Path) -> None:
    text = path.read_text()
    profile = load_profile(path)
    if not profile.verified:
        assert re.search(r"^verified = false  # .+", text, re.MULTILINE)
    if "Estimate" in text or "stimate:" in text:
        assert not profile.verified


def test_the_ram_in_the_id_is_the_ram_in_the_file() -> None:
    for profile in list_devices():
        if size := re.search(r"-(\d+)gb$", profile.id):
            assert profile.ram_bytes == int(size[1]) * GIB


def test_jetson_nano_lists_its_gpu_and_trains_on_its_cpu() -> None:
    profile = find_device("jetson-nano")
    assert profile.accelerator is not None
    assert profile.accelerator.memory == "shared"
    assert not profile.accelerator.usable_for_training
    assert "CPU build" in (profile.accelerator.note or "")
    assert profile.peak_flops_per_s is None, "236 GFLOP/s is the GPU's figure, not the CPU's"


# ---------------------------------------------------------------------------------------------------- the schema


def test_a_minimal_file_loads_and_absent_figures_are_none(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, GOOD))
    assert (profile.cores, profile.peak_flops_per_s, profile.accelerator) == (4, None, None)
    assert profile.runtime == Runtimes()


def test_windows_files_with_a_byte_order_mark_load(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    assert load_profile(write(tmp_path, text)).id == "board"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cores = 0", ("cores", "is 0", ">= 1")),
        ("cores = true", ("cores", "True", "int")),
        ("cores = 4.5", ("cores", "4.5", "int")),
        ('cores = "4"', ("cores", "'4'", "int")),
        ("cores = -4", ("cores", "-4", ">= 1")),
        ("cores = 1979-05-27", ("cores", "1979", "int")),
        ("cores = [4]", ("cores", "an array", "int")),
        ("ram_bytes = 4096", ("ram_bytes", "4096", ">= 33554432")),
        ("ram_bytes = 1" + "0" * 30, ("ram_bytes", "10000", "<= 17592186044416")),
        ("ram_bytes = 0x" + "f" * 9000, ("ram_bytes", "a huge number", "<=")),
        ("verified = 1", ("verified", "is 1", "bool")),
        ('name = ""', ("name", "''", "length >= 1")),
        ("id = 'Bad Id'", ("id", "'Bad Id'", "a-z0-9-")),
        ("peak_flops_per_s = nan", ("peak_flops_per_s", "nan", "float")),
        ("peak_flops_per_s = inf", ("peak_flops_per_s", "inf", "float")),
        ("peak_flops_per_s = -inf", ("peak_flops_per_s", "-inf", "float")),
        ("peak_flops_per_s = 236", ("peak_flops_per_s", "236", ">= 10000000")),
        ("memory_bandwidth_bytes_per_s = 25.6", ("memory_bandwidth_bytes_per_s", "25.6", ">=")),
        ("memory_bandwidth_bytes_per_s = true", ("memory_bandwidth_bytes_per_s", "True", "float")),
        ("runtime = 3", ("runtime", "is 3", "a table")),
        ("runtime.torch.bytes = 'x'", ("runtime.torch.bytes", "'x'", "int")),
        ("runtime.torch.bytes = 400000000", ("runtime.torch.version", "is missing")),
        ("accelerator = {name = 'G', kind = 'abacus', usable_for_training = false}", ("kind", "abacus", "gpu, tpu")),
        ("accelerator = {name = 'G', kind = 'gpu', memory = 'x'}", ("accelerator", "'x'", "shared, own")),
        ("usable_ram = 5", ("usable_ram", "not a field", "Did you mean usable_ram_bytes")),
        ("format_version = 2", ("format_version", "is 2", "reads 1")),
        ("format_version = true", ("format_version", "True", "reads 1")),
        ("usable_ram_bytes = 5000000000", ("usable_ram_bytes", "5000000000", "at most ram_bytes", "4294967296")),
        ("usable_anonymous_bytes = 3000000001", ("usable_anonymous_bytes", "at most usable_ram_bytes")),
        ("name = 'a\\u001b[2Jb'".replace("'", '"'), ("name", "\\x1b", "printable")),
        ('name = "a\\u202eb"', ("name", "\\u202e", "printable")),
        ('notes = "x\\u0000"', ("notes", "\\x00", "printable")),
    ],
)
def test_a_wrong_value_is_named_with_field_found_and_allowed(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    key = re.split(r"[ .=]", line)[0]
    kept = [good for good in GOOD.splitlines() if not good.startswith(f"{key} ")]
    message = refusal(write(tmp_path, "\n".join([*kept, line])))
    for word in ("board.toml", *words):
        assert word in message


@pytest.mark.parametrize("field", ["id", "name", "ram_bytes", "usable_ram_bytes", "source", "verified"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(f"{field} "))
    assert f"{field} is missing" in refusal(write(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("bytes = 3000000000", ("runtime.torch.bytes", "less")),
        ("bytes = 3000000001", ("runtime.torch.bytes", "at most usable_ram_bytes")),
        ("bytes = 331350016\nanonymous_bytes = 331350017", ("anonymous_bytes", "at most runtime.torch.bytes")),
        ("bytes = 331350016\nanonymous_bytes = 200000001", ("anonymous_bytes", "at most usable_anonymous_bytes")),
    ],
)
def test_a_runtime_that_leaves_nothing_is_refused(tmp_path: Path, change: str, words: tuple[str, ...]) -> None:
    text = GOOD + ("usable_anonymous_bytes = 200000000\n" if "200000001" in change else "")
    text += RUNTIME.replace("bytes = 331350016", change)
    message = refusal(write(tmp_path, text))
    assert all(word in message for word in words)


def test_the_id_must_be_the_file_name(tmp_path: Path) -> None:
    assert "id is 'board'" in refusal(write(tmp_path, GOOD, "other.toml"))
    assert "id is 'board'" in refusal(write(tmp_path, GOOD, "board.txt"))


# ------------------------------------------------------------------------------------------------- broken and hostile


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is missing"),
        (b"\x00\x01\xff\xfe", "not UTF-8"),
        (GOOD.encode("utf-16"), "not UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not UTF-8"),
        (b"{ \"id\": 1 }", "not valid TOML"),
        (b"id = 'a'\nid = 'b'\n", "not valid TOML"),
        (b"x = " + b"[" * 30_000, "nested deeper"),
        (b"x = " + b"{a=" * 20_000, "nested deeper"),
        (b"a" + b".a" * 30_000 + b" = 1", "nested deeper"),
        (b"x = " + b"9" * 60_000, "not valid TOML"),
        (b"# " + b"x" * (64 * 1024), "larger than"),
        (b"\"" + b"k" * 60_000 + b"\" = 1", "not a field"),
        (b"\"\x1b[31m\" = 1", "not valid TOML"),
        (b"\"\\u001b[31m\" = 1", "not a field"),
        (b"runtime" + b".a" * 150 + b" = 1", "not a field"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_hostile_file_is_refused_quickly_and_in_words(tmp_path: Path, content: bytes, word: str) -> None:
    start = time.perf_counter()
    assert word in refusal(write(tmp_path, content))
    assert time.perf_counter() - start < 2


def test_what_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing.toml")
    assert "is a folder" in refusal(tmp_path)
    assert "can't be read" in refusal(Path("a\0b.toml"))
    assert "can't be read" in refusal(Path("x" * 5000 + ".toml"))
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    assert "can't be read" in refusal(loop)
    os.mkfifo(tmp_path / "pipe.toml")
    assert "not a regular file" in refusal(tmp_path / "pipe.toml")
    if os.geteuid() != 0:  # root reads everything
        locked = write(tmp_path, GOOD, "locked.toml")
        locked.chmod(0)
        assert "Permission denied" in refusal(locked)


def test_a_profile_written_by_hand_into_the_struct_is_checked_before_it_is_saved(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, GOOD))
    with pytest.raises(ProfileError, match="cores is 0"):
        save_profile(msgspec.structs.replace(profile, cores=0), tmp_path / "board.toml")
    with pytest.raises(ProfileError, match="id is 'board'"):
        save_profile(profile, tmp_path / "other.toml")
    with pytest.raises(ProfileError, match="can't be written"):
        save_profile(profile, tmp_path / "board.toml" / "below" / "board.toml")
    (tmp_path / "taken" / "board.toml").mkdir(parents=True)
    with pytest.raises(ProfileError, match="can't be written"):
        save_profile(profile, tmp_path / "taken" / "board.toml")
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ["board.toml", "board.toml", "taken"], "nothing half-written stays"


# --------------------------------------------------------------------------------------------------------- finding


def test_a_saved_profile_is_found_by_id_and_by_path_and_equal(config_dir: Path) -> None:
    runtime = Runtime(bytes=300 * MIB, anonymous_bytes=200 * MIB, version="torch 2", source="here", verified=True)
    profile = msgspec.structs.replace(
        find_device("jetson-nano"), id="mine", runtime=Runtimes(torch=runtime), name='Mine "[red]" ünï', notes="a\nb"
    )
    path = config_dir / "devices" / "mine.toml"
    save_profile(profile, path)
    assert find_device("mine") == find_device(str(path)) == load_profile(path) == profile
    assert profile in list_devices()


def test_a_path_is_told_by_a_separator_or_the_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("board.toml", "./board.toml", str(tmp_path / "board.toml"), "~/board.toml"):
        assert find_device(name).id == "board"
    with pytest.raises(UnknownDevice):
        find_device("board")
    with pytest.raises(ProfileError, match="No such file"):
        find_device("../nowhere/jetson-nano")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("jetson_nano", "jetson-nano"),
        ("Jetson Nano", "jetson-nano"),
        ("jetsonnano", "jetson-nano"),
        ("raspberry-pi-5", "raspberry-pi-5-4gb"),
        ("raspberry-pi-5", "raspberry-pi-5-8gb"),
        ("raspbery-pi-zero", "raspberry-pi-zero-2w"),
        ("iphone-13", "iphone-13-pro"),
    ],
)
def test_an_unknown_id_gets_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        find_device(name)
    assert near in str(caught.value).partition("?")[0]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", " ", "\x1b[2J", "x" * 100_000, "..", "*", "[a", "%s{0}"])
def test_a_nonsense_id_is_refused_in_words(name: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        find_device(name)
    assert "devices list" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_user_file_never_shadows_a_bundled_id(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(config_dir / "devices", GOOD.replace('"board"', '"jetson-nano"'), "jetson-nano.toml")
    with pytest.raises(ProfileError, match="has the id of a bundled profile"):
        find_device("jetson-nano")
    assert {profile.id for profile in list_devices()} == EXPECTED
    assert "jetson-nano.toml" in capsys.readouterr().err


def test_one_broken_user_file_does_not_break_the_list(config_dir: Path) -> None:
    write(config_dir / "devices", GOOD)
    write(config_dir / "devices", b"\xff\xff", "broken.toml")
    (config_dir / "devices" / "folder.toml").mkdir()
    warnings: list[str] = []
    assert {profile.id for profile in list_devices(warnings.append)} == EXPECTED | {"board"}
    assert len(warnings) == 2
    assert any("broken.toml" in warning for warning in warnings)
    with pytest.raises(ProfileError, match=r"broken\.toml"):
        find_device("broken")


def test_the_config_folder_is_the_platforms_unless_the_variable_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETUNE_CONFIG_DIR", "/somewhere")
    assert devices.user_dir() == Path("/somewhere/devices")
    monkeypatch.setenv("EDGETUNE_CONFIG_DIR", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    if sys.platform == "linux":
        assert devices.user_dir() == Path("/xdg/edgetune/devices")


# ----------------------------------------------------------------------------------------------------- this machine


def fake_machine(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    files = {
        "proc/meminfo": "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: 6000000 kB\n",
        "proc/cpuinfo": "processor : 0\nmodel name : Test CPU\n",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mounts,
        **files,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n"


def test_a_cgroup_v2_limit_of_an_ancestor_bounds_ram_and_cores(tmp_path: Path) -> None:
    root = fake_machine(
        tmp_path,
        "0::/user.slice/app.scope\n",
        V2_MOUNT,
        {
            "sys/fs/cgroup/user.slice/memory.max": f"{1024 * MIB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{300 * MIB}\n",
            "sys/fs/cgroup/user.slice/memory.stat": f"inactive_file {100 * MIB}\n",
            "sys/fs/cgroup/user.slice/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/app.scope/memory.current": f"{250 * MIB}\n",
            "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000\n",
        },
    )
    profile = devices.detect_device(False, root=root)
    assert profile.ram_bytes == 1024 * MIB
    assert profile.usable_ram_bytes == (1024 - 300 + 100) * MIB
    assert (profile.cores, profile.cpu) == (1, "Test CPU")
    assert profile.peak_flops_per_s is profile.memory_bandwidth_bytes_per_s is profile.runtime.torch is None


def test_a_cgroup_v1_limit_of_an_ancestor_bounds_ram_and_cores(tmp_path: Path) -> None:
    mounts = (
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    )
    root = fake_machine(
        tmp_path,
        "4:memory:/pod/box\n1:cpu,cpuacct:/pod\n",
        mounts,
        {
            "sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": f"{512 * MIB}\n",
            "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": f"{112 * MIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
        },
    )
    profile = devices.detect_device(False, root=root)
    assert (profile.ram_bytes, profile.usable_ram_bytes, profile.cores) == (512 * MIB, 400 * MIB, 1)


def test_without_limits_the_kernels_figures_stand_and_affinity_counts_cores(tmp_path: Path) -> None:
    profile = devices.detect_device(False, root=fake_machine(tmp_path, "0::/\n", V2_MOUNT, {}))
    assert (profile.ram_bytes, profile.usable_ram_bytes) == (8_000_000 * 1024, 6_000_000 * 1024)
    if hasattr(os, "sched_getaffinity"):
        assert profile.cores == len(os.sched_getaffinity(0))


def test_a_full_cgroup_still_gives_a_valid_profile(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory.max": f"{64 * MIB}\n",
        "sys/fs/cgroup/memory.current": f"{64 * MIB}\n",
    }
    profile = devices.detect_device(False, root=fake_machine(tmp_path / "root", "0::/\n", V2_MOUNT, files))
    save_profile(profile, tmp_path / "auto.toml")
    assert load_profile(tmp_path / "auto.toml") == profile


@pytest.mark.parametrize(
    ("files", "name", "memory"),
    [
        ({"proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0"}, "NVIDIA Jetson Nano", "shared"),
        ({"dev/nvhost-gpu": ""}, "NVIDIA Tegra", "shared"),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x030200\n"}, "NVIDIA", "own"),
        ({"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x020000\n"}, None, None),
        ({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}, None, None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_files(tmp_path: Path, files: dict[str, str], name: str, memory: str) -> None:
    profile = devices.detect_device(False, root=fake_machine(tmp_path, "", "", files))
    if name is None:
        assert profile.accelerator is None
    else:
        assert profile.accelerator is not None
        assert name in profile.accelerator.name
        assert (profile.accelerator.memory, profile.accelerator.usable_for_training) == (memory, False)
    if "proc/device-tree/model" in files:
        assert profile.name == files["proc/device-tree/model"].rstrip("\0")


def test_auto_is_this_machine_detected_when_nothing_is_saved() -> None:
    profile = find_device("auto")
    assert profile.id == "auto"
    assert profile.ram_bytes == system.total_ram_bytes()
    assert profile.cores == system.usable_cores()
    assert profile.peak_flops_per_s is None


def test_auto_takes_speeds_from_the_saved_file_and_memory_from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    version = detect.torch_version() or "torch 0 + timm 0"
    monkeypatch.setattr(detect, "torch_version", lambda: version)
    runtime = Runtime(bytes=4 * MIB, version=version, source="measured", verified=True)
    saved = msgspec.structs.replace(
        find_device("auto"), peak_flops_per_s=5e10, usable_ram_bytes=33 * MIB, runtime=Runtimes(torch=runtime)
    )
    save_profile(saved, devices.saved_auto_path())
    auto = find_device("auto")
    assert (auto.peak_flops_per_s, auto.runtime.torch) == (5e10, runtime)
    assert auto.usable_ram_bytes != saved.usable_ram_bytes
    assert [profile.id for profile in list_devices() if profile.id not in EXPECTED] == ["auto"]

    monkeypatch.setattr(detect, "torch_version", lambda: "torch 99 + timm 99")
    assert find_device("auto").runtime.torch is None, "another torch costs something else"

    save_profile(msgspec.structs.replace(saved, cpu="Another CPU"), devices.saved_auto_path())
    assert find_device("auto").peak_flops_per_s is None, "a shared home folder: saved on another machine"


def test_a_broken_saved_file_is_an_error_that_names_it(config_dir: Path) -> None:
    write(config_dir / "devices", "id = 3", "auto.toml")
    with pytest.raises(ProfileError, match=r"auto\.toml"):
        find_device("auto")


def test_the_default_cap_here_is_a_share_of_what_is_available_now(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = find_device("auto")
    monkeypatch.setattr(system, "available_ram_bytes", lambda: 1000)
    assert devices.default_cap_bytes(profile, is_host=True) == 800
    assert devices.default_cap_bytes(profile, is_host=True, held_bytes=250) == 1000
    assert devices.default_cap_bytes(profile, is_host=False) == profile.usable_ram_bytes


def test_measured_speeds_are_those_of_a_computer() -> None:
    assert 1e8 < detect.measure_flops_per_s(0.05) < 1e14
    assert 1e8 < detect.measure_bandwidth_bytes_per_s(GIB, 0.05) < 1e13


def test_a_torch_that_does_not_import_has_no_measured_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "raise OSError('libcudart.so: cannot open')", "torch.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert detect.measure_torch_runtime() is None


@pytest.mark.slow
def test_the_runtime_of_torch_is_measured_in_a_process_of_its_own() -> None:
    pytest.importorskip("timm")
    child = detect.measure_torch_runtime()
    assert child is not None
    assert 50 * MIB < child.anonymous_bytes < child.peak_bytes < 8 * GIB
    assert child.version.startswith("torch ")


# ---------------------------------------------------------------------------------------------------- command line


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout, result.stderr


@pytest.fixture
def quick_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    child = detect.ChildMemory(8 * MIB, 4 * MIB, "torch 2 + timm 1")
    monkeypatch.setattr(detect, "measure_torch_runtime", lambda: child)
    monkeypatch.setattr(detect, "measure_flops_per_s", lambda: 5e10)
    monkeypatch.setattr(detect, "measure_bandwidth_bytes_per_s", lambda usable_bytes: 2e10)


def test_list_shows_every_id_whole_and_json_is_alone_on_stdout(config_dir: Path) -> None:
    write(config_dir / "devices", GOOD.replace("A board", "[red]A[/red] board"))
    write(config_dir / "devices", "x", "broken.toml")
    table, errors = run("list")
    assert all(any(line.startswith(f"{id} ") for line in table.splitlines()) for id in EXPECTED | {"board"})
    assert "broken.toml" in errors
    text, errors = run("list", "--json")
    assert {entry["id"] for entry in json.loads(text)} == EXPECTED | {"board"}
    assert "broken.toml" in errors


def test_show_prints_every_figure_and_what_is_not_known(config_dir: Path) -> None:
    write(config_dir / "devices", GOOD.replace("A board", "[red]A[/red] board"))
    table, errors = run("show", "jetson-nano")
    for words in ("2800000000", "25.6 GB/s", "236 GFLOP/s", "not known", "torch 2.9.1"):
        assert words in table
    assert "jetson-nano.toml" in errors
    assert "[red]A[/red] board" in run("show", "board")[0]
    text, errors = run("show", "jetson-nano", "--json")
    assert msgspec.json.decode(text, type=DeviceProfile) == find_device("jetson-nano")
    assert json.loads(run("show", "auto", "--json")[0])["id"] == "auto"


@pytest.mark.usefixtures("quick_detection")
def test_detect_saves_what_auto_then_uses_and_writes_a_profile_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "my-board.toml"
    text, errors = run("detect", "--save", "--output", str(output), "--json")
    shown = msgspec.json.decode(text, type=DeviceProfile)
    assert shown == load_profile(devices.saved_auto_path())
    assert msgspec.structs.replace(shown, id="my-board") == load_profile(output)
    assert shown.runtime.torch is not None
    assert (shown.runtime.torch.bytes, shown.peak_flops_per_s) == (8 * MIB, 5e10)
    assert find_device("auto").memory_bandwidth_bytes_per_s == 2e10
    assert "my-board.toml" in errors
    assert "50 GFLOP/s" in run("detect")[0]


@pytest.mark.usefixtures("quick_detection")
def test_detect_overwrites_no_file_of_the_users(tmp_path: Path) -> None:
    path = write(tmp_path, "mine")
    for name, words in [(str(path), "exists"), (str(tmp_path / "board.txt"), "must end in .toml")]:
        with pytest.raises(UsageError, match=words):
            run("detect", "--output", name)
    assert path.read_text() == "mine"
    with pytest.raises(ProfileError, match="My Board"):
        run("detect", "--output", str(tmp_path / "My Board.toml"))


def test_an_error_of_the_command_line_is_one_of_ours() -> None:
    with pytest.raises(EdgetuneError, match="Did you mean jetson-nano"):
        run("show", "jetson-nanoo")


def test_importing_devices_drags_in_neither_torch_nor_numpy_nor_rich_tables() -> None:
    code = (
        "import sys, edgetune.cli.devices as d; d.devices.find_device('auto'); "
        "print([m for m in ('torch', 'timm', 'numpy', 'rich.table', 'tomli_w', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_schema_and_the_architecture_agree_on_the_fields() -> None:
    names = {field.name for field in msgspec.structs.fields(profiles.DeviceProfile)}
    assert {"id", "ram_bytes", "usable_ram_bytes", "usable_anonymous_bytes", "cores", "runtime", "verified"} <= names
    assert all(name.endswith(("_bytes", "_per_s")) for name in names if "ram" in name or "peak" in name)
