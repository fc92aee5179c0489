"""Whatever happens, the newest whole state of a run is found, and it is consistent."""

from __future__ import annotations

import errno
import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgetune.checkpoint import (
    Checkpoint,
    OptimizerRecord,
    Restored,
    latest_checkpoint,
    open_run_folder,
    read_base,
    save_base,
    save_checkpoint,
)
from edgetune.errors import RunFolderError


def state(step: int, **training: object) -> Checkpoint:
    optimizer = OptimizerRecord(name="adamw", steps={"head.weight": step})
    return Checkpoint(step=step, seed=3, optimizer=optimizer, training={"step": step, **training}, base_sha256="0")


def tensors(step: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"model.head.weight": np.full((10, 30), step, np.float32), "optimizer.count": np.full((), step, np.int64)}


def save(run: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run, state(step), tensors(step))


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def restored(run: Path) -> Restored:
    """The latest state, after checking that all its parts are of one step."""
    found = latest_checkpoint(run)
    assert found is not None
    step = found.checkpoint.step
    assert found.checkpoint.training["step"] == found.checkpoint.optimizer.steps["head.weight"] == step
    assert found.tensors.keys() == tensors(step).keys()
    assert all(np.array_equal(found.tensors[name], tensor) for name, tensor in tensors(step).items())
    return found


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, math.pi * 1e-300, 5e-324, 1e308, -0.0]
    save_checkpoint(tmp_path, state(7, values=values, flops=10**17 + 1, name="é", nothing=None), tensors(7))
    found = restored(tmp_path)
    assert found.notes == ()
    assert [value.hex() for value in found.checkpoint.training["values"]] == [value.hex() for value in values]
    assert found.checkpoint.training["flops"] == 10**17 + 1
    expected = msgspec.structs.replace(
        state(7, values=values, flops=10**17 + 1, name="é", nothing=None),
        tensors_sha256=found.checkpoint.tensors_sha256,
    )
    assert found.checkpoint == expected


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    save_base(tmp_path, tensors(0))
    assert latest_checkpoint(tmp_path) is None


def test_the_last_two_are_kept_and_the_base_stays(tmp_path: Path) -> None:
    digest = save_base(tmp_path, tensors(0))
    save(tmp_path, 1, 2, 3, 100_000_000)
    assert names(tmp_path) == ["base.safetensors", "step-00000003", "step-100000000"]
    assert restored(tmp_path).checkpoint.step == 100_000_000
    assert np.array_equal(dict(read_base(tmp_path, digest))["model.head.weight"], tensors(0)["model.head.weight"])


def test_the_base_is_never_replaced_under_a_checkpoint(tmp_path: Path) -> None:
    save_base(tmp_path, tensors(0))
    save_base(tmp_path, tensors(0))  # a run that was stopped before its first checkpoint starts anew
    save(tmp_path, 1)
    with pytest.raises(RunFolderError, match="holds checkpoints already"):
        save_base(tmp_path, tensors(1))


def test_a_damaged_base_is_an_error(tmp_path: Path) -> None:
    digest = save_base(tmp_path, tensors(0))
    save_base(tmp_path, tensors(1))
    with pytest.raises(RunFolderError, match="SHA-256"):
        dict(read_base(tmp_path, digest))


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    save_checkpoint(tmp_path, state(2, evaluated=True), tensors(2))
    assert restored(tmp_path).checkpoint.training["evaluated"] is True
    assert names(tmp_path) == ["step-00000001", "step-00000002-1"]
    save_checkpoint(tmp_path, state(2, evaluated=False), tensors(2))
    assert restored(tmp_path).checkpoint.training["evaluated"] is False
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002-2", "step-00000003"]


def damage_bit(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def damage_all_zero(folder: Path) -> None:
    file = folder / "state.json"
    file.write_bytes(bytes(file.stat().st_size))  # what a power cut leaves without fsync


def damage_outside(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"tensors.safetensors"', '"../base.safetensors"'))


DAMAGES: list[Callable[[Path], object]] = [
    damage_bit,
    damage_all_zero,
    damage_outside,
    lambda folder: (folder / "tensors.safetensors").unlink(),
    lambda folder: (folder / "tensors.safetensors").write_bytes(b""),
    lambda folder: (folder / "state.json").unlink(),
    lambda folder: (folder / "state.json").write_bytes(b"[" * 100_000),
    lambda folder: (folder / "state.json").write_bytes(b'{"format_version": 1}'),
    lambda folder: (folder / "state.json").write_bytes(b'{"format_version": 2}'),
    lambda folder: (folder / "state.json").write_bytes(b"\xff\xff"),
    lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"a file")),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step-00000002")
    found = restored(tmp_path)
    assert found.checkpoint.step == 1
    assert len(found.notes) == 1
    assert "step-00000002" in found.notes[0]
    assert "Going on from step 1" in found.notes[0]
    damage(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(RunFolderError, match=r"no checkpoint that can be read.*step-00000002.*step-00000001"):
        latest_checkpoint(tmp_path)


def test_after_a_fall_back_the_abandoned_states_go_and_the_good_ones_stay(tmp_path: Path) -> None:
    save(tmp_path, 100, 200)
    damage_bit(tmp_path / "checkpoints" / "step-00000200")
    assert restored(tmp_path).checkpoint.step == 100
    save(tmp_path, 150)
    assert names(tmp_path) == ["step-00000100", "step-00000150"]
    assert restored(tmp_path).notes == ()


def test_a_kill_at_any_file_operation_leaves_a_state_that_loads(tmp_path: Path, failing_at: Callable[..., Any]) -> None:
    steps_found = set()
    for point in itertools.count():
        run = tmp_path / str(point)
        run.mkdir()
        save(run, 1, 2)
        with failing_at(point) as happened:
            save(run, 3)
        found = restored(run)
        assert found.notes == ()
        steps_found.add(found.checkpoint.step)
        with open_run_folder(run):
            assert not [name for name in names(run) if name.startswith(".")]
        save(run, 3, 4)
        assert restored(run).checkpoint.step == 4
        assert names(run)[-1] == "step-00000004"
        assert len(names(run)) == 2
        if not happened():
            break
    assert steps_found == {2, 3}
    assert point > 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_of_a_state_is_on_the_disk_before_its_name_and_its_name_before_others_go(
    tmp_path: Path, order: list[str]
) -> None:
    save(tmp_path, 1, 2)
    order.clear()
    save(tmp_path, 3)
    named = order.index("name step-00000003")
    before = [step.partition(".tmp-")[0] for step in order[:named]]
    assert before == ["sync ", "name tensors.safetensors", "sync ", "sync ", "name state.json", "sync "]
    after = [step.partition(".tmp-")[0] for step in order[named + 1 :]]
    assert after == ["sync checkpoints", "name ", "remove"]


def test_a_disk_that_is_full_at_any_file_operation_leaves_a_state_that_loads(
    tmp_path: Path, failing_at: Callable[..., Any]
) -> None:
    refusals: list[str] = []
    for point in itertools.count():
        run = tmp_path / str(point)
        run.mkdir()
        save(run, 1, 2)
        with failing_at(point, lambda: OSError(errno.ENOSPC, "No space left on device")) as happened:
            try:
                save(run, 3)
            except RunFolderError as error:
                refusals.append(str(error))
        assert restored(run).notes == ()
        assert not happened() or len(names(run)) >= 2
        assert len([name for name in names(run) if name.startswith(".")]) <= 1  # what could not be removed
        if not happened():
            break
    assert len(refusals) >= 5
    assert all("Step 3 was not saved" in text and "No space left" in text for text in refusals)


def test_too_little_free_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.total, 1000))
    with pytest.raises(RunFolderError, match=r"Step 2 was not saved.*needs 1\.0 MiB, its disk has 1000 B free"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from test_checkpoint_states import latest_checkpoint, open_run_folder, restored, save
run, rng, step, found = Path(sys.argv[1]), random.Random(0), 0, 0
for _ in range(25):
    child = os.fork()
    if child == 0:
        with open_run_folder(run):
            for coming in range(step + 1, 10**6):
                save(run, coming)
    time.sleep(rng.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if latest_checkpoint(run) is not None:
        newest = restored(run)
        assert newest.notes == (), newest.notes
        assert newest.checkpoint.step >= step, (newest.checkpoint.step, step)
        step, found = newest.checkpoint.step, found + 1
assert step > 10 and found > 20, (step, found)
"""


def test_sigkill_at_random_moments_never_loses_the_run(tmp_path: Path) -> None:
    """25 times: a process that saves without a pause is killed, and the next one goes on from what it left."""
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
