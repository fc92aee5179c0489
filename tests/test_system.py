"""The kernel's files, read from folders that look like other machines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgetune import system
from edgetune.units import GIB, MIB

V1_NO_LIMIT = "9223372036854771712\n"
MEMINFO = (
    "MemTotal:        4051044 kB\nMemFree:          312000 kB\nMemAvailable:    3145728 kB\nHugePages_Total:       0\n"
)


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _v2(root: Path, own: str, files: dict[str, str], mount_root: str = "/", mount: str = "/sys/fs/cgroup") -> Path:
    return _tree(
        root,
        {
            "proc/self/cgroup": f"0::{own}\n",
            "proc/self/mountinfo": "22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw\n"
            f"30 22 0:26 {mount_root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        },
    )


def _v1(root: Path, own: str, files: dict[str, str], mount_root: str = "/") -> Path:
    return _tree(
        root,
        {
            "proc/self/cgroup": f"5:cpu,cpuacct:{own}\n4:memory:{own}\n1:name=systemd:/\n0::/\n",
            "proc/self/mountinfo": f"33 31 0:30 {mount_root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup c rw,cpu,cpuacct\n"
            f"35 31 0:32 {mount_root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n",
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        },
    )


def test_meminfo_is_in_bytes_and_leaves_out_counts_of_pages(tmp_path: Path) -> None:
    info = system.meminfo(_tree(tmp_path, {}))
    assert info["MemTotal"] == 4051044 * 1024
    assert "HugePages_Total" not in info


def test_v2_the_tightest_limit_of_all_ancestors_counts(tmp_path: Path) -> None:
    root = _v2(
        tmp_path,
        "/user.slice/app.scope",
        {
            "user.slice/app.scope/memory.max": f"{2 * GIB}\n",
            "user.slice/app.scope/memory.current": f"{100 * MIB}\n",
            "user.slice/memory.max": f"{GIB}\n",
            "user.slice/memory.current": f"{700 * MIB}\n",
            "user.slice/memory.stat": f"anon 5\ninactive_file {200 * MIB}\nactive_file {50 * MIB}\n",
        },
    )
    assert system.cgroup_memory(root) == (GIB, 524 * MIB)
    assert system.total_ram_bytes(root) == GIB
    assert system.available_ram_bytes(root) == 524 * MIB


def test_v2_a_full_ancestor_leaves_less_than_a_tighter_empty_child(tmp_path: Path) -> None:
    root = _v2(
        tmp_path,
        "/a/b",
        {
            "a/b/memory.max": str(512 * MIB),
            "a/b/memory.current": "0",
            "a/memory.max": str(GIB),
            "a/memory.current": str(GIB - 10 * MIB),
        },
    )
    assert system.cgroup_memory(root) == (512 * MIB, 10 * MIB)


def test_v2_max_and_missing_files_limit_nothing(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a/b", {"a/b/memory.max": "max\n", "a/b/memory.current": "4096\n"})
    assert system.cgroup_memory(root) == (None, None)
    assert system.total_ram_bytes(root) == 4051044 * 1024
    assert system.available_ram_bytes(root) == 3 * GIB


def test_v2_usage_over_the_limit_leaves_nothing_not_less(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a", {"a/memory.max": str(MIB), "a/memory.current": str(2 * MIB)})
    assert system.cgroup_memory(root) == (MIB, 0)


def test_v2_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a", {"a/memory.max": str(GIB), "a/memory.high": str(300 * MIB), "a/memory.current": "0"})
    assert system.cgroup_memory(root) == (300 * MIB, 300 * MIB)


@pytest.mark.parametrize(
    ("own", "mount_root"),
    [
        ("/", "/"),
        ("/docker/abc", "/docker/abc"),
        ("/docker/abc", "/"),
        ("/../../x", "/"),
        ("/", "/.."),
        ("/../x", "/.."),
    ],
)
def test_v2_a_container_finds_its_limit_however_its_paths_are_written(
    tmp_path: Path, own: str, mount_root: str
) -> None:
    root = _v2(tmp_path, own, {"memory.max": str(256 * MIB), "memory.current": str(MIB)}, mount_root=mount_root)
    assert system.cgroup_memory(root) == (256 * MIB, 255 * MIB)


def test_v2_a_mount_of_somebody_elses_cgroup_is_not_ours(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/mine", {"memory.max": str(MIB)}, mount_root="/other")
    assert system.cgroup_memory(root) == (None, None)


def test_v2_a_namespace_path_is_followed_below_its_mount(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/../x", {"x/memory.max": str(7 * MIB), "x/memory.current": "0"}, mount_root="/..")
    assert system.cgroup_memory(root) == (7 * MIB, 7 * MIB)


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/", {}, mount=r"/mnt/my\040cgroups")
    _tree(root, {"mnt/my cgroups/memory.max": str(MIB)})
    assert system.cgroup_memory(root) == (MIB, MIB)


def test_v1_the_tightest_limit_of_all_ancestors_counts(tmp_path: Path) -> None:
    root = _v1(
        tmp_path,
        "/outer/inner",
        {
            "memory/memory.limit_in_bytes": V1_NO_LIMIT,
            "memory/outer/memory.limit_in_bytes": f"{400 * MIB}\n",
            "memory/outer/memory.usage_in_bytes": f"{350 * MIB}\n",
            "memory/outer/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\n",
            "memory/outer/inner/memory.limit_in_bytes": V1_NO_LIMIT,
            "memory/outer/inner/memory.usage_in_bytes": "4096\n",
        },
    )
    assert system.cgroup_memory(root) == (400 * MIB, 150 * MIB)


def test_v1_the_huge_number_means_no_limit(tmp_path: Path) -> None:
    root = _v1(
        tmp_path,
        "/",
        {
            "memory/memory.limit_in_bytes": V1_NO_LIMIT,
            "memory/memory.usage_in_bytes": "4096",
            "memory/memory.stat": f"hierarchical_memory_limit {V1_NO_LIMIT}",
        },
    )
    assert system.cgroup_memory(root) == (None, None)


def test_v1_a_limit_above_what_a_container_sees_is_read_from_its_stat_file(tmp_path: Path) -> None:
    root = _v1(
        tmp_path,
        "/docker/abc",
        {
            "memory/memory.limit_in_bytes": V1_NO_LIMIT,
            "memory/memory.usage_in_bytes": str(20 * MIB),
            "memory/memory.stat": f"hierarchical_memory_limit {128 * MIB}\n",
        },
        mount_root="/docker/abc",
    )
    assert system.cgroup_memory(root) == (128 * MIB, 108 * MIB)


@pytest.mark.parametrize("text", ["", "garbage", "-5", "9" * 5000, "1 2 3", "\x00\xff"])
def test_nonsense_in_a_limit_file_is_no_limit(tmp_path: Path, text: str) -> None:
    root = _v2(tmp_path, "/a", {"a/memory.max": text, "a/cpu.max": text, "a/memory.stat": f"inactive_file {text}"})
    assert system.cgroup_memory(root) == (None, None)
    assert system.cpu_quota(root) is None


@pytest.mark.parametrize("text", ["", "garbage\n", "1 2 3\n", "a:b\n", " - cgroup2\n", "::::\n"])
def test_nonsense_in_the_process_files_is_no_limit(tmp_path: Path, text: str) -> None:
    root = _tree(tmp_path, {"proc/self/cgroup": text, "proc/self/mountinfo": text})
    assert system.cgroup_memory(root) == (None, None)


def test_v2_cpu_quota_is_the_tightest_of_all_ancestors(tmp_path: Path) -> None:
    root = _v2(tmp_path, "/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"})
    assert system.cpu_quota(root) == 1.5


def test_v1_cpu_quota_reads_the_joint_controller(tmp_path: Path) -> None:
    files = {"cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}
    root = _v1(tmp_path, "/job", {**files, "cpu,cpuacct/cpu.cfs_quota_us": "-1\n"})
    assert system.cpu_quota(root) == 0.5


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity masks")
@pytest.mark.parametrize(("quota", "cores"), [("max", 4), ("50000", 1), ("150000", 2), ("900000", 4)])
def test_usable_cores_is_affinity_bounded_by_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 5})
    assert system.usable_cores(_v2(tmp_path, "/", {"cpu.max": f"{quota} 100000"})) == cores


def test_process_status_reads_sizes_and_swap_in_bytes(tmp_path: Path) -> None:
    status = "Name:\tpython 3 kB\nVmHWM:\t  700000 kB\nVmRSS:\t  500000 kB\nVmSwap:\t   1234 kB\nThreads:\t9\n"
    found = system.process_status(42, _tree(tmp_path, {"proc/42/status": status}))
    assert found == {"VmHWM": 700000 * 1024, "VmRSS": 500000 * 1024, "VmSwap": 1234 * 1024}


def test_a_process_that_is_gone_has_no_status(tmp_path: Path) -> None:
    assert system.process_status(42, tmp_path) == {}


def test_descendants_are_the_children_of_every_thread_and_theirs(tmp_path: Path) -> None:
    lists = {"proc/1/task/1/children": "2 3 ", "proc/1/task/9/children": "4 ", "proc/3/task/3/children": "5 "}
    root = _tree(tmp_path, {**lists, "proc/2/task/2/children": "", "proc/5/task/5/children": "6 "})
    assert sorted(system.descendants(1, root) or []) == [2, 3, 4, 5, 6]
    assert system.descendants(2, root) == []


def test_a_kernel_without_child_lists_is_not_taken_for_one_without_children(tmp_path: Path) -> None:
    assert system.descendants(1, _tree(tmp_path, {"proc/1/task/1/status": ""})) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads this machine's /proc")
def test_this_machine_makes_sense() -> None:
    assert 0 < system.available_ram_bytes() <= system.total_ram_bytes()
    assert 1 <= system.usable_cores() <= (os.cpu_count() or 1)
    assert system.process_status()["VmRSS"] > MIB


def test_a_device_with_fewer_cores_keeps_to_as_many_and_gives_them_back() -> None:
    before = os.sched_getaffinity(0)
    with system.pinned_cores(1):
        assert len(os.sched_getaffinity(0)) == 1
        assert system.usable_cores() == 1
    assert os.sched_getaffinity(0) == before
    with system.pinned_cores(len(before)), system.pinned_cores(None), system.pinned_cores(10_000):
        assert os.sched_getaffinity(0) == before
