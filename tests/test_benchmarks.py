"""The parts of the benchmark scripts that compute: what is drawn, asked for, read from outside, and written."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from running import cli

from edgetune.units import MIB

FOLDER = Path(__file__).parents[1] / "benchmarks"


def _load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load(monkeypatch, "writing")


@pytest.fixture
def allocators(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load(monkeypatch, "allocators")


@pytest.fixture
def allocator_steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load(monkeypatch, "allocator_steps")


@pytest.fixture
def cap_draws(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load(monkeypatch, "cap_draws")


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load(monkeypatch, "watching")


@pytest.fixture
def cap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load(monkeypatch, "cap")


def test_a_table_has_as_many_cells_in_every_line(writing: ModuleType) -> None:
    lines = writing.table(["a", "b"], [["1", "x|y"], ["2", ""]]).splitlines()
    assert [line.count("|") for line in lines] == [3] * 4
    with pytest.raises(ValueError, match="1 cells for 2"):
        writing.table(["a", "b"], [["1"]])


def test_the_header_names_hardware_and_versions(writing: ModuleType) -> None:
    line = writing.machine()
    for word in (f"numpy {__import__('numpy').__version__}", "cores", "huge pages", "Python 3."):
        assert word in line


# allocators.py


def test_token_counts_change_every_step_in_multiples_of_8_and_every_tenth_is_the_largest(
    allocator_steps: ModuleType,
) -> None:
    steps = allocator_steps.draws(12, 196, 50)
    assert len(steps) == 50
    for number, (trains, tokens) in enumerate(steps):
        assert sum(trains) == 9
        assert list(tokens) == sorted(tokens, reverse=True)
        assert all(count % 8 == 0 or count == 196 for count in tokens)
        if number % 10 == 9:
            assert (trains, tokens) == ((True,) * 9 + (False,) * 3, (196,) * 12)
        if number:
            assert tokens != steps[number - 1][1]
    assert steps == allocator_steps.draws(12, 196, 50)


def test_steps_are_compared_with_the_defaults_own_steps(allocators: ModuleType) -> None:
    def sample(times: list[float], peak: int = 10 * MIB) -> Any:
        return allocators.Sample(peak, MIB, times, [100] * len(times))

    default = [sample([9.0] * 5 + [1.0, 2.0, 4.0]), sample([9.0] * 5 + [2.0, 2.0, 4.0])]
    slower = [
        sample([0.0] * 5 + [1.5, 3.0, 6.0], peak=8 * MIB),
        sample([0.0] * 5 + [3.0, 2.0, 6.0], peak=9 * MIB),
    ]
    row = allocators.figures(slower, default)
    assert row.median_time == pytest.approx(1.5)
    assert row.best_time == pytest.approx((1.5 + 2 + 6) / (1 + 2 + 4))
    assert row.peak_bytes == 9 * MIB  # a cap is on the largest
    assert row.faults_a_step == 100


def _figures(allocators: ModuleType, peak: float, seconds: float) -> Any:
    return allocators.Figures(round(peak * MIB), MIB, seconds, seconds, 1.0, 1000.0)


def _results(allocators: ModuleType, **changes: tuple[float, float]) -> list[dict[str, Any]]:
    rows: dict[str, Any] = {
        variant.name: "not installed" if variant.library else _figures(allocators, 100, 1.0)
        for variant in allocators.VARIANTS
    }
    for start, (peak, seconds) in changes.items():
        name = next(name for name in rows if start.replace("_", " ") in name)
        rows[name] = _figures(allocators, peak, seconds)
    return [rows, rows]


@pytest.mark.parametrize(
    ("changes", "picked"),
    [
        ({"32_KiB": (70, 1.4), "64_KiB": (80, 1.2)}, "32 KiB"),
        ({"32_KiB": (70, 1.4), "64_KiB": (70.5, 1.2)}, "64 KiB"),  # as low, and faster
        ({"32_KiB": (70, 9.0), "64_KiB": (80, 1.2)}, "64 KiB"),  # the lowest costs too much
        ({"jemalloc": (10, 1.0), "64_KiB": (80, 1.2)}, "64 KiB"),  # no process preloads into itself
    ],
)
def test_the_conclusion_follows_the_numbers(
    allocators: ModuleType, changes: dict[str, tuple[float, float]], picked: str
) -> None:
    text = allocators.conclusion(allocators.VARIANTS, _results(allocators, **changes))
    assert text.startswith(f"**Picked: glibc, threshold {picked}.**")
    assert ("It is what `edgetune.allocator` sets." in text) is picked.startswith(
        f"{allocators.MMAP_THRESHOLD_BYTES // 1024} "
    )
    assert ("jemalloc: 0.10 at 1.00, lower than" in text) is ("jemalloc" in changes)


def test_an_allocator_that_did_not_run_says_why_in_its_row(allocators: ModuleType) -> None:
    (task, _) = _results(allocators)
    text = allocators.task_table(allocators.VARIANTS, task)
    assert "| jemalloc | not installed | - |" in text
    assert f"| {allocators.DEFAULT} | 100.0 | 1.00 | 1.0 | 1.00 |" in text


def test_a_library_is_found_in_the_first_folder_that_has_it(allocators: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "libjemalloc.so.2").touch()
    assert allocators.find_library("jemalloc", [str(tmp_path)]) == str(tmp_path / "libjemalloc.so.2")
    assert allocators.find_library("mimalloc", [str(tmp_path)]) is None
    missing = allocators.Variant("mimalloc", library="mimalloc")
    assert allocators.measure(missing, allocators.WORKLOADS[0], 1, {"mimalloc": None}) == "not installed"


# cap.py


def test_runs_are_a_function_of_the_seed_and_cover_models_methods_and_batches(cap_draws: ModuleType) -> None:
    runs = cap_draws.configurations(60, 0)
    assert runs == cap_draws.configurations(60, 0)
    assert runs != cap_draws.configurations(60, 1)
    assert {run.model for run in runs} == {model.name for model in cap_draws.MODELS}
    assert {method: sum(run.method == method for run in runs) for method in cap_draws.METHODS} == dict.fromkeys(
        cap_draws.METHODS, 12
    )
    assert {run.batch for run in runs} >= {1, 2}
    assert max(run.batch for run in runs) > 16
    for run in runs:
        model = next(model for model in cap_draws.MODELS if model.name == run.model)
        assert 1 <= run.batch <= model.largest_batch
        assert run.image_px in model.image_px


def test_caps_lie_between_the_smallest_and_somewhat_above_what_is_liked(cap_draws: ModuleType) -> None:
    rng = random.Random(0)
    caps = [cap_draws.draw_cap(rng, 500 * MIB, 40 * MIB, 400 * MIB) for _ in range(300)]
    assert min(caps) >= 540 * MIB
    assert max(caps) <= 500 * MIB + cap_draws.LIKED_FACTOR * 400 * MIB
    assert sum(size < 900 * MIB for size in caps) > 200  # most of them bind
    assert any(size > 900 * MIB for size in caps)


@pytest.mark.parametrize("enforce", [None, "rlimit"])
def test_a_run_is_told_its_cap_in_bytes(cap: ModuleType, enforce: str | None) -> None:
    (asked,) = cap.configurations(1, 0)
    arguments = cap.finetune_arguments(asked, 123_456_789, Path("images"), Path("out"), enforce)
    pairs = dict(pairwise(arguments))
    assert pairs["--ram-cap"] == "123456789"
    assert (pairs["--model"], pairs["-b"], pairs["--method"]) == (asked.model, str(asked.batch), asked.method)
    assert pairs.get("--enforce") == enforce


def test_a_refused_larger_plan_is_found_in_a_real_plan(cap: ModuleType) -> None:
    (asked,) = cap.configurations(
        1, 0, [importlib.import_module("cap_draws").Model("deit_tiny_patch16_224", (224,), 1)]
    )
    asked = msgspec.structs.replace(asked, batch=32, method="full")
    bound = cap.plan_arguments(asked, ["--ram-cap", cap.NO_BOUND])
    roomy = json.loads(cli(*bound).stdout)
    assert not cap.larger_refused(roomy)
    tight = json.loads(cli(*bound[:-1], str(roomy["predicted_peak_bytes"] - MIB)).stdout)
    assert cap.larger_refused(tight)
    assert tight["runtime_bytes"] == roomy["runtime_bytes"]


def test_recompute_is_shown_in_runs(cap: ModuleType) -> None:
    assert cap.recompute_of({"recompute": [2, 2, 0]}) == "block x 2, nothing x 1"
    assert cap.recompute_of({"recompute": "mlp"}) == "mlp"
    assert cap.recompute_of({}) == "-"


def test_the_peak_of_another_process_is_seen_from_outside(watching: ModuleType, tmp_path: Path) -> None:
    """Also one that has passed, and that the process itself reset, as edgetune's meter does."""
    code = (
        "import time; x = b'1' * (200 << 20); time.sleep(0.1); del x\n"
        "open('/proc/self/clear_refs', 'w').write('5'); time.sleep(0.05); raise SystemExit(3)"
    )
    exit_code, peak = watching.watch([sys.executable, "-c", code], tmp_path / "stderr")
    assert exit_code == 3
    assert 200 * MIB < peak < 230 * MIB


def test_a_process_that_has_gone_holds_nothing(watching: ModuleType, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.05)
    assert watching.held_bytes(Path(f"/proc/{process.pid}/status")) > MIB
    process.kill()
    process.wait()
    assert watching.held_bytes(Path(f"/proc/{process.pid}/status")) == 0


def _row(cap: ModuleType, **changes: Any) -> Any:
    (asked,) = cap.configurations(1, 0)
    values = {"cap_bytes": 1000 * MIB, "measured_bytes": 900 * MIB, "runtime_bytes": 500 * MIB, "exit_code": 0}
    values |= {"predicted_bytes": 990 * MIB, "larger_refused": True, "micro_batch": 2, **changes}
    return cap.Row(configuration=asked, **values)


def test_the_bar_is_on_every_run(cap: ModuleType) -> None:
    good = _row(cap)
    assert good.share == pytest.approx(0.8)
    text = "\n".join(cap.summary([good, good], 3))
    assert "Runs over the cap: 0 of 2 (bar: 0, met)." in text
    assert "smallest share of (cap - runtime) used is 80%, the median 80% (bar: 70% in each, met)" in text
    assert text.endswith(": 3.")
    wasteful = _row(cap, measured_bytes=600 * MIB)
    roomy = _row(cap, measured_bytes=510 * MIB, larger_refused=False)  # nothing larger was refused: no bar on its share
    over = _row(cap, measured_bytes=1001 * MIB, exit_code=4, message="passed its cap")
    text = "\n".join(cap.summary([good, wasteful, roomy, over], 0))
    assert "Runs over the cap: 1 of 4 (bar: 0, missed)." in text
    assert "Of the 3 runs" in text
    assert "smallest share of (cap - runtime) used is 20%" in text
    assert "missed by 1)" in text
    assert "exit 4: passed its cap" in text
    assert "1.001 OVER" in cap.cells(over)


def test_a_run_that_left_nothing_still_has_a_row(cap: ModuleType) -> None:
    row = _row(cap, runtime_bytes=None, predicted_bytes=None, larger_refused=None, micro_batch=None, exit_code=-9)
    assert len(cap.cells(row)) == len(cap.COLUMNS)
    assert "No run's plan names a larger one" in "\n".join(cap.summary([row], 0))


def test_the_smallest_cap_is_read_from_a_refusal(cap: ModuleType) -> None:
    refused = cli("plan", "--device", "jetson-nano", "--ram-cap", "330MiB")
    assert refused.returncode == cap.TOO_SMALL
    named = cap.smallest_named(refused.stderr)
    assert named is not None
    assert cli("plan", "--device", "jetson-nano", "--ram-cap", str(named)).returncode == 0
    assert cap.smallest_named("no such thing") is None
