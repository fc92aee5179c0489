"""Real processes under real limits: plans that are too optimistic, profiles that lie, others that eat memory.

All memory is read from outside, from /proc. What can't be tried here: a cgroup's memory.max (no machine at hand has the
controller; `test_enforce.py` has a made-up kernel) and a machine that really is at its end.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from doubles import make_images
from eaters import Watched, available_bytes, eater, edgetune, rss_by_row
from running import cli, finetune, losses

pytest.importorskip("torch")
pytest.importorskip("timm")

from edgetune.report import RunReport, read_report
from edgetune.units import GIB, MIB, parse_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds memory, and /proc tells it, on Linux only"),
]
COMMON = ("--model", "edgetune_micro", "-b", "64", "--epochs", "3", "--threads", "2", "--seed", "1", "-q")
COMMON += ("--split", "lowest")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """88 to train on: an epoch is a step of 64 and one of 24."""
    return make_images(tmp_path_factory.mktemp("images"), {"ant": 40, "bee": 40, "cow": 30})


def finished(done: Watched, folder: Path, steps: int = 6) -> RunReport:
    """The report of a run that came to its end with every step done once."""
    assert done.code == 0, done.err
    report = read_report(folder)
    assert (report.stopped_because, report.steps, report.within_cap) == ("finished", steps, True)
    assert [int(step) for step, *_ in losses(folder)] == list(range(1, steps + 1))
    assert report.peak_rss_bytes is not None
    assert report.peak_rss_bytes >= 0.99 * done.high_water_bytes  # what it says of itself is what is seen from outside
    return report


def cap_above_least(method: str, more_mib: int) -> int:
    """A cap so much above the least under which the method works on the simulated device, in bytes."""
    done = cli(
        "plan", "--model", "edgetune_micro", "--device", "jetson-nano", "-b", "64", "--method", method, "--min-cap"
    )
    return parse_bytes(done.stdout) + more_mib * MIB


@pytest.mark.parametrize(("method", "more_mib", "scale"), [("full", 13, 0.7), ("last-k", 9, 0.6), ("alast", 38, 0.7)])
def test_a_plan_a_third_too_small_finishes_under_the_limit_and_loses_no_sample(
    images: Path, tmp_path: Path, method: str, more_mib: int, scale: float
) -> None:
    cap, folder = cap_above_least(method, more_mib), tmp_path / "r"
    flags = ["--device", "jetson-nano", "--ram-cap", str(cap), "--method", method, "--enforce", "rlimit"]
    flags += ["--initial-budget", "1"] if method == "alast" else []  # so that steps are what the plan is made for
    done = edgetune("finetune", "--data", images, *COMMON, *flags, "--output", folder, scale=scale)
    report = finished(done, folder)
    assert report.tightenings
    assert report.enforced_by.startswith("enforced by RLIMIT_DATA")
    assert report.runtime_bytes is not None
    assert report.device_runtime_bytes is not None
    room = cap - report.device_runtime_bytes
    assert done.high_water_bytes <= report.runtime_bytes + room
    assert done.most_over_limit_bytes <= 0
    if method == "last-k":  # nothing lossy in it: the run is the one that has memory enough
        assert report.batch_size == 64
        finetune(
            images,
            tmp_path / "calm",
            model="edgetune_micro",
            batch_size=64,
            epochs=3,
            steps=None,
            seed=1,
            method=method,
        )
        for one, other in zip(losses(folder), losses(tmp_path / "calm"), strict=True):
            # Not closer: where memory ran out inside the backward, the blocks above were updated before the rest was
            # done again through them, and AdamW's first steps amplify what rounding differs.
            assert float(one[1]) == pytest.approx(float(other[1]), rel=0.06)
            assert one[2] == other[2]


def test_the_look_for_the_split_and_what_it_chooses_stay_under(images: Path, tmp_path: Path) -> None:
    cap, folder = cap_above_least("alast", 38), tmp_path / "r"
    flags = ["--device", "jetson-nano", "--ram-cap", str(cap), "--split", "auto", "--enforce", "rlimit"]
    done = edgetune("finetune", "--data", images, *COMMON, *flags, "--output", folder)
    report = finished(done, folder)
    assert any(note.startswith("split: a classifier") for note in report.notes)
    assert "look" in report.phases
    assert report.tightenings == ()
    assert report.runtime_bytes is not None
    assert report.device_runtime_bytes is not None
    assert done.high_water_bytes <= report.runtime_bytes + cap - report.device_runtime_bytes
    assert done.most_over_limit_bytes <= 0


def test_on_the_device_itself_the_whole_process_stays_under(images: Path, tmp_path: Path) -> None:
    """The cap here is of the process with its runtime, which this machine's torch decides."""
    once = ("--data", images, *COMMON, "--device", "auto", "--steps", "1", "--json", "--output", tmp_path / "one")
    runtime = json.loads(cli("finetune", *once).stdout)["runtime_bytes"]  # in a process as small as the next
    cap, folder = runtime + 60 * MIB, tmp_path / "r"
    flags = ("--device", "auto", "--ram-cap", str(cap), "--method", "full", "--enforce", "rlimit")
    done = edgetune("finetune", "--data", images, *COMMON, *flags, "--output", folder, scale=0.7)
    report = finished(done, folder)
    assert report.tightenings
    assert done.high_water_bytes <= cap


@pytest.mark.parametrize("enforce", ["auto", "none"])
def test_a_profile_that_promises_more_than_there_is_costs_a_tightening(
    images: Path, tmp_path: Path, enforce: str
) -> None:
    profile = tmp_path / "liar.toml"
    profile.write_text(
        'id = "liar"\nname = "Liar"\nram_bytes = 8000000000\nusable_ram_bytes = 6000000000\ncores = 2\n'
        'source = "nobody"\nverified = false\n'
    )
    folder = tmp_path / "r"
    flags = ("--device", profile, "--method", "full", "--enforce", enforce, "--output", folder)
    done = edgetune("finetune", "--data", images, *COMMON, *flags, data_mib=110)
    report = finished(done, folder)
    assert 1 <= len(report.tightenings) <= 2
    assert ("set from outside" in report.enforced_by) == (enforce == "auto")
    assert done.most_over_limit_bytes <= 0


def test_a_plan_that_three_tightenings_do_not_mend_ends_cleanly_and_goes_on_later(images: Path, tmp_path: Path) -> None:
    cap, folder = cap_above_least("full", 8), tmp_path / "r"
    flags = ("--device", "jetson-nano", "--method", "full", "--ram-cap", str(cap), "--output", folder)
    done = edgetune("finetune", "--data", images, *COMMON, *flags, scale=0.2)
    assert done.code == 4, done.err
    assert "Traceback" not in done.err
    assert f"edgetune finetune --resume {folder}" in done.err
    report = read_report(folder)
    assert (report.stopped_because, report.within_cap, len(report.tightenings)) == ("out of memory", True, 3)
    # By a planner that knows better, the same folder and cap will do.
    again = cli("finetune", "--resume", folder, "--json")
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert (told["steps"], told["within_cap"], len(told["tightenings"])) == (6, True, 4)


@pytest.mark.parametrize("data_mib", [1, 20, 40])
def test_no_memory_even_for_the_model_is_a_clear_error(images: Path, tmp_path: Path, data_mib: int) -> None:
    folder = tmp_path / "r"
    flags = ("--device", "jetson-nano", "--method", "full", "--output", folder)
    done = edgetune("finetune", "--data", images, *COMMON, *flags, data_mib=data_mib)
    assert done.code == 4, done.err
    assert done.err.startswith("edgetune: memory ran out ")
    assert "Traceback" not in done.err
    if (folder / "report.json").exists():  # no step was taken, as a rule: then there is no folder
        assert read_report(folder).stopped_because == "out of memory"
    else:
        assert not folder.exists() or not list(folder.glob("*.safetensors"))


def test_a_cap_that_is_watched_only_still_stops_the_run(images: Path, tmp_path: Path) -> None:
    cap, folder = cap_above_least("full", 13), tmp_path / "r"
    flags = ("--device", "jetson-nano", "--ram-cap", str(cap), "--method", "full", "--enforce", "none")
    done = edgetune("finetune", "--data", images, *COMMON, *flags, "--output", folder, scale=0.5)
    assert done.code == 4, done.err
    report = read_report(folder)
    assert (report.stopped_because, report.within_cap, report.tightenings) == ("over the cap", False, ())
    assert report.steps == 1
    assert "over cap by" in done.err
    assert "watched, not enforced" in done.err


def test_a_process_that_eats_memory_meanwhile_makes_the_plan_tighter(images: Path, tmp_path: Path) -> None:
    """The plan says that it needs nearly all that is free (it does not), and then another process takes some of it."""
    free, eaten = available_bytes(), 3 * GIB
    if free < 2 * eaten:
        pytest.skip("too little memory is free to let a process eat some")
    finetune(images, tmp_path / "one", device="auto", steps=1, method="full", batch_size=8)
    plan: dict[str, Any] = json.loads((tmp_path / "one" / "plan.json").read_bytes())
    plan["predicted_peak_bytes"] = plan["runtime_bytes"] + free - eaten // 2
    plan["predicted_phase_bytes"]["train"] = plan["predicted_peak_bytes"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    folder, hungry, fed = tmp_path / "r", threading.Event(), threading.Event()
    done: list[Watched] = []

    def look(_pid: int) -> None:
        if not hungry.is_set() and (folder / "metrics.csv").exists() and len(losses(folder)) >= 3:
            hungry.set()

    flags = ("--device", "auto", "--ram-cap", str(1024 * GIB), "--steps", "120", "--seed", "1", "-q")
    arguments = ("finetune", "--data", images, "--model", "edgetune_micro", "--plan", tmp_path / "plan.json", *flags)
    run = threading.Thread(target=lambda: done.append(edgetune(*arguments, "--output", folder, look=look)))
    run.start()
    assert hungry.wait(120)
    with eater(eaten):
        fed.set()
        run.join()
    report = finished(done[0], folder, steps=120)
    assert any("something else takes its memory" in told for told in report.tightenings)
    step = int(report.tightenings[0].split(":")[0].removeprefix("step "))
    assert step > 3


def test_nothing_grows_with_the_steps(images: Path, tmp_path: Path) -> None:
    """240 steps of ALaST in micro-batches; budgets that move fast make token counts that keep changing."""
    folder = tmp_path / "r"
    points, look = rss_by_row(folder / "metrics.csv")
    flags = ("--device", "jetson-nano", "--split", "lowest", "--alpha", "3", "--steps", "240", "--threads", "1")
    arguments = ("--model", "edgetune_micro", "-b", "15", "--grad-accum-steps", "4", "-q", *flags, "--output", folder)
    done = edgetune("finetune", "--data", images, *arguments, look=look)
    report = finished(done, folder, steps=240)
    assert report.tightenings == ()
    shares = {line.split(b",")[9] for line in (folder / "metrics.csv").read_bytes().splitlines()[1:]}
    assert len(shares) > 20
    last = max(row for row, _ in points)
    quarters = [
        max(size for row, size in points if number * last / 4 <= row <= (number + 1) * last / 4) for number in range(4)
    ]
    assert quarters[3] <= quarters[1] + 2 * MIB, [round(size / MIB, 1) for size in quarters]
