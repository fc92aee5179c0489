"""Memory that runs out in whole runs of the bundled model, made to run out where a test says so.

Under real limits: `test_cap_holds.py`. The loop alone: `test_replay.py`.
"""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles import make_images
from running import Witness, finetune, interrupt_after, losses, resume

pytest.importorskip("torch")
pytest.importorskip("timm")

import edgetune.engines.torch as torch_engine
from edgetune import prepare, run, session, store, system
from edgetune.backends.pytorch import TorchBackend
from edgetune.checkpoint import latest_checkpoint
from edgetune.data import images as images_module
from edgetune.errors import CapExceeded, Interrupted, UsageError
from edgetune.guard import growth_to_come
from edgetune.optim import Optimizer
from edgetune.report import RunReport, read_report
from edgetune.store import read_plan
from edgetune.units import MIB

RUN: dict[str, Any] = {"steps": 6, "method": "alast", "split": "lowest", "seed": 2, "checkpoint_every": 1}
WORDS = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 to train on, so four steps an epoch."""
    return make_images(tmp_path_factory.mktemp("images"), {"ant": 20, "bee": 20})


@pytest.fixture(scope="module")
def calm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that had memory enough."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        finetune(images, folder, **RUN)
    return folder


def once_warm(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], object]) -> None:
    """Call `begin` when a run's warm-up, which takes steps of its own, is over."""
    warm_up = run.warm_up

    def warm_up_and_begin(*args: Any) -> Any:
        judge = warm_up(*args)
        begin()
        return judge

    monkeypatch.setattr(run, "warm_up", warm_up_and_begin)


def fail(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Callable[[int], bool]) -> list[int]:
    """Let these calls (from 1) of a function run out of memory, after they have done what they do; returns the count."""
    original, count = getattr(owner, name), [0]

    def failing(*args: Any, **more: Any) -> Any:
        count[0] += 1
        result = original(*args, **more)
        if calls(count[0]):
            raise RuntimeError(WORDS)
        return result

    once_warm(monkeypatch, lambda: monkeypatch.setattr(owner, name, failing))
    return count


def short_steps(monkeypatch: pytest.MonkeyPatch, step: int, times: int) -> None:
    """Let a step (from 1) fail so many times, before any weight is updated."""
    original, left = Optimizer.step, [times]

    def failing(self: Optimizer, *args: Any, **more: Any) -> None:
        if max(self.steps.values(), default=0) == step - 1 and left[0]:
            left[0] -= 1
            raise RuntimeError(WORDS)
        original(self, *args, **more)

    once_warm(monkeypatch, lambda: monkeypatch.setattr(Optimizer, "step", failing))


def complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("model.safetensors", "config.json", "report.json", "run.json"))


def checkpoint_step(folder: Path) -> int:
    found = latest_checkpoint(folder)
    assert found is not None
    return found.checkpoint.step


# ------------------------------------------------------------------------------------------------------------- in steps


@pytest.mark.parametrize("times", [1, 3])
def test_a_step_that_failed_is_done_again_and_the_report_tells_of_it(
    images: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    short_steps(monkeypatch, 3, times)
    witness = Witness()
    report = finetune(images, tmp_path / "r", witness, **RUN)
    assert (report.stopped_because, report.steps, report.within_cap) == ("finished", 6, True)
    assert len(report.tightenings) == times
    assert all(told.startswith(f"step 3: memory ran out ({WORDS}") for told in report.tightenings)
    assert [note for note in witness.notes if "ran out" in note] == list(report.tightenings)
    assert read_report(tmp_path / "r") == report
    plan, before = read_plan(tmp_path / "r" / "plan.json"), read_plan(calm / "plan.json")
    assert plan.predicted_peak_bytes == report.predicted_peak_bytes
    # Down to four fifths of what the plan adds each time; the cap that is answered to stays.
    assert growth_to_come(plan) <= 0.8**times * growth_to_come(before)
    assert (plan.cap_bytes, plan.batch_size) == (before.cap_bytes, before.batch_size)
    mine, theirs = losses(tmp_path / "r"), losses(calm)
    assert mine[:2] == theirs[:2]
    assert [(step, rate) for step, _, rate in mine] == [(step, rate) for step, _, rate in theirs]


@pytest.mark.slow
def test_where_only_lossless_levers_are_pulled_the_losses_stay(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = RUN | {"method": "last-k", "trained_blocks": 4, "batch_size": 10}
    finetune(images, tmp_path / "calm", **options)
    short_steps(monkeypatch, 2, 2)
    finetune(images, tmp_path / "short", **options)
    calm, short = losses(tmp_path / "calm"), losses(tmp_path / "short")
    assert calm[0] == short[0]
    for one, other in zip(calm, short, strict=True):
        assert float(one[1]) == pytest.approx(float(other[1]), rel=1e-3)


def test_the_fourth_time_ends_the_run_with_a_folder_that_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        short_steps(patch, 4, 4)
        with pytest.raises(CapExceeded, match=r"ran out after step 3 \(.*too\)\. .* up to step 3.*--resume") as error:
            finetune(images, tmp_path / "r", **RUN)
    assert error.value.exit_code == 4
    assert complete(tmp_path / "r")
    report = read_report(tmp_path / "r")
    assert error.value.report == report
    assert (report.stopped_because, report.steps, len(report.tightenings)) == ("out of memory", 3, 3)
    assert checkpoint_step(tmp_path / "r") == 3
    resumed = resume(tmp_path / "r")
    # As a run ends that went on under the same plan by itself.
    short_steps(monkeypatch, 4, 3)
    lucky = finetune(images, tmp_path / "lucky", **RUN)
    assert losses(tmp_path / "r") == losses(tmp_path / "lucky")
    model, other = (tmp_path / name / "model.safetensors" for name in ("r", "lucky"))
    assert model.read_bytes() == other.read_bytes()
    for field in ("tightenings", "enforced_by", "val_accuracy", "val_recall", "steps", "flops", "tokens_share"):
        if field != "enforced_by":  # what is left to grow by is another figure in another process
            assert getattr(resumed, field) == getattr(lucky, field), field
    assert resumed.enforced_by.startswith(lucky.enforced_by.split(":")[0])


@pytest.mark.slow
def test_a_step_that_updated_some_weights_is_finished_by_the_next_attempt(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = RUN | {"method": "last-k", "trained_blocks": 2, "head_first": False}
    finetune(images, tmp_path / "calm", **options)
    updates = fail(monkeypatch, Optimizer, "_update", lambda call: call == 40)
    report = finetune(images, tmp_path / "short", **options)
    assert len(report.tightenings) == 1
    # Every weight was updated once a step: 28 of two blocks, norm and classifier.
    assert updates[0] == 6 * 28
    for one, other in zip(losses(tmp_path / "calm"), losses(tmp_path / "short"), strict=True):
        assert float(one[1]) == pytest.approx(float(other[1]), rel=0.05)


@pytest.mark.slow
def test_a_step_that_only_half_happened_is_no_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights are of step 3 already: gone on with, they would be updated twice."""
    options: dict[str, Any] = RUN | {"method": "last-k", "trained_blocks": 2}
    with monkeypatch.context() as patch:
        fail(patch, Optimizer, "_update", lambda call: call >= 2 * 28 + 10)
        with pytest.raises(CapExceeded, match=r"after step 2 .* complete up to step 2"):
            finetune(images, tmp_path / "r", **options)
    assert complete(tmp_path / "r")
    assert checkpoint_step(tmp_path / "r") == 2
    tightenings = read_report(tmp_path / "r").tightenings
    assert resume(tmp_path / "r").tightenings == tightenings
    short_steps(monkeypatch, 3, len(tightenings))
    finetune(images, tmp_path / "clean", **options)
    assert losses(tmp_path / "r") == losses(tmp_path / "clean")


@pytest.mark.slow
def test_a_half_done_step_leaves_the_checkpoint_before_and_says_which(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = RUN | {"method": "last-k", "trained_blocks": 2, "checkpoint_every": None}
    with monkeypatch.context() as patch:
        fail(patch, Optimizer, "_update", lambda call: call >= 2 * 28 + 10)
        with pytest.raises(CapExceeded, match=r"after step 2 .* complete up to step 0"):
            finetune(images, tmp_path / "r", **options)
    assert resume(tmp_path / "r").steps == 6


def test_an_image_that_there_is_no_memory_to_decode_counts(
    images: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, count = images_module._decode, [0]

    def failing(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 8 + 20:  # after eight to validate on, in the third step
            raise MemoryError
        return decode(*args)

    finetune(images, tmp_path / "scanned", **(RUN | {"steps": 1}))
    monkeypatch.setattr(images_module, "_decode", failing)
    report = finetune(images, tmp_path / "r", **RUN)
    (told,) = report.tightenings
    assert "not enough memory to decode it" in told
    assert report.steps == 6
    assert [step for step, *_ in losses(tmp_path / "r")] == [step for step, *_ in losses(calm)]


def test_an_evaluation_is_done_again_in_smaller_batches(
    images: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, TorchBackend, "evaluate", lambda call: call in (1, 3))
    report = finetune(images, tmp_path / "r", **RUN)
    assert [told.split(":")[0] for told in report.tightenings] == ["evaluation after step 0"] * 2
    assert report.tightenings[1].endswith("in batches of 1")
    assert losses(tmp_path / "r") == losses(calm)
    other = read_report(calm)
    for field in ("val_accuracy", "val_accuracy_before", "val_recall", "best_epoch"):
        assert getattr(report, field) == getattr(other, field), field


@pytest.mark.slow
def test_a_stop_asked_for_in_mid_tightening_ends_after_that_step(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopper(Witness):
        def note(self, text: str) -> None:
            super().note(text)
            if "ran out" in text:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        short_steps(patch, 3, 1)
        with pytest.raises(Interrupted, match="stopped after step 3") as error:
            finetune(images, tmp_path / "r", Stopper(), **RUN)
    assert error.value.exit_code == 130
    resumed = resume(tmp_path / "r")
    short_steps(monkeypatch, 3, 1)
    lucky = finetune(images, tmp_path / "lucky", **RUN)
    assert losses(tmp_path / "r") == losses(tmp_path / "lucky")
    assert resumed.tightenings == lucky.tightenings


@pytest.mark.slow
def test_a_kill_right_after_a_tightening_forgets_neither_it_nor_the_steps_before(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killer(Witness):
        def note(self, text: str) -> None:
            if "ran out" in text:
                raise KeyboardInterrupt

    options = RUN | {"checkpoint_every": None}
    short_steps(monkeypatch, 3, 1)
    with pytest.raises(KeyboardInterrupt):
        finetune(images, tmp_path / "r", Killer(), **options)
    assert checkpoint_step(tmp_path / "r") == 2
    resumed = resume(tmp_path / "r")
    short_steps(monkeypatch, 3, 1)
    lucky = finetune(images, tmp_path / "lucky", **options)
    assert resumed.tightenings == lucky.tightenings != ()
    assert losses(tmp_path / "r") == losses(tmp_path / "lucky")


# ---------------------------------------------------------------------------------------- something else takes memory


def test_a_machine_with_too_little_left_gets_a_plan_that_fits_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(event: Any) -> None:
        if event.step == 2:
            monkeypatch.setattr(system, "available_ram_bytes", lambda *_: 30 * MIB)

    report = finetune(images, tmp_path / "r", Witness(take), **(RUN | {"batch_size": 32}))
    assert report.steps == 6
    (told,) = report.tightenings
    assert told.startswith("step 3: memory ran out (the next step needs ")
    assert "and the machine has 30.0 MiB available: something else takes its memory" in told
    plan = read_plan(tmp_path / "r" / "plan.json")
    assert plan.predicted_peak_bytes - plan.runtime_bytes < 200 * MIB


@pytest.mark.slow
def test_a_machine_with_nothing_left_stops_the_run_until_there_is(
    images: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(event: Any) -> None:
        if event.step == 2:
            monkeypatch.setattr(system, "available_ram_bytes", lambda *_: 0)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        with pytest.raises(CapExceeded, match="something else takes its memory"):
            finetune(images, tmp_path / "r", Witness(take), **RUN)
    assert checkpoint_step(tmp_path / "r") == 2
    assert resume(tmp_path / "r").steps == 6
    assert losses(tmp_path / "r")[:2] == losses(calm)[:2]


# ------------------------------------------------------------------------------------- outside of steps and evaluations


@pytest.mark.parametrize(
    ("owner", "name", "what", "error"),
    [
        (prepare, "open_folder", "before the model was loaded", MemoryError()),
        (torch_engine, "make_plan", "before the model was loaded", MemoryError()),
        (run, "build", "loading the model", RuntimeError(WORDS)),
        (run, "write_start", "writing the run folder", MemoryError()),
        (store, "save_base", "writing the run folder", OSError(errno.ENOMEM, "Cannot allocate memory")),
        (TorchBackend, "reserve", "making the optimizer's state", RuntimeError(WORDS)),
    ],
)
def test_memory_that_runs_out_before_the_first_step_is_a_clear_error_and_leaves_no_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, what: str, error: Exception
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(CapExceeded, match=f"memory ran out {what} .* Free some"):
        finetune(images, tmp_path / "r", **RUN)
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (prepare, "open_folder", MemoryError()),
        (run, "build", RuntimeError(WORDS)),
        (TorchBackend, "restore", MemoryError()),
        (store, "read_base", OSError(errno.ENOMEM, "Cannot allocate memory")),
        (TorchBackend, "reserve", RuntimeError(WORDS)),
    ],
)
def test_memory_that_runs_out_while_a_run_is_resumed_leaves_the_folder_as_it_was(
    calm: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
) -> None:
    folder = tmp_path / "r"
    with pytest.raises(Interrupted):
        finetune(images, folder, interrupt_after(2), **RUN)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def failing(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(CapExceeded, match="memory ran out"):
            resume(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    resume(folder)
    assert losses(folder) == losses(calm)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [{3}, {3, 4}], ids=["once", "also the last time"])
def test_memory_that_runs_out_while_a_checkpoint_is_written_ends_the_run_with_one(
    images: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: set[int]
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, store, "save_checkpoint", lambda call: call in calls)  # the first call is that of the start
        saved = 2 if len(calls) == 1 else 1
        with pytest.raises(CapExceeded, match=f"ran out after step 2 .* complete up to step {saved}"):
            finetune(images, tmp_path / "r", **RUN)
    report = read_report(tmp_path / "r")
    assert (report.stopped_because, report.steps) == ("out of memory", 2)
    assert complete(tmp_path / "r")
    resume(tmp_path / "r")
    assert losses(tmp_path / "r") == losses(calm)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 4])
def test_memory_that_runs_out_while_the_best_model_is_saved_ends_the_run_and_it_goes_on(
    images: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, session, "write_model", lambda call: call == 1 + step // 4)  # the first is of the start
        with pytest.raises(CapExceeded, match=f"ran out after step {step}"):
            finetune(images, tmp_path / "r", **RUN)
    assert complete(tmp_path / "r")
    resumed = resume(tmp_path / "r")
    assert losses(tmp_path / "r") == losses(calm)
    assert (tmp_path / "r" / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    assert resumed.best_epoch == read_report(calm).best_epoch


def test_what_can_not_be_written_at_the_end_does_not_hide_why_it_ended(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, session, "write_model", lambda _call: True)
    fail(monkeypatch, session, "write_atomically", lambda _call: True)
    with pytest.raises(Interrupted, match="stopped after step 1"):
        finetune(images, tmp_path / "r", interrupt_after(1), **{**RUN, "head_first": False})


def test_a_mistake_in_the_program_is_no_lack_of_memory(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(TorchBackend, "evaluate", failing)
    with pytest.raises(TypeError, match="a bug"):
        finetune(images, tmp_path / "r", **RUN)


def test_the_limit_is_lifted_before_what_is_left_is_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    before, seen = resource.getrlimit(resource.RLIMIT_DATA), []
    original = store.save_checkpoint

    def look(*args: Any, **more: Any) -> Any:
        seen.append(resource.getrlimit(resource.RLIMIT_DATA))
        return original(*args, **more)

    monkeypatch.setattr(store, "save_checkpoint", look)
    short_steps(monkeypatch, 2, 4)
    with pytest.raises(CapExceeded):
        finetune(images, tmp_path / "r", **RUN, enforce="rlimit")
    assert seen[0] != before  # the start's, under the limit
    assert seen[-1] == before
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


# ------------------------------------------------------------------------------------------------------------ --enforce


@pytest.fixture
def reported(images: Path, tmp_path: Path) -> Callable[..., RunReport]:
    return lambda **changes: finetune(images, tmp_path / "r", method="head", steps=1, **changes)


@pytest.mark.parametrize(
    ("device", "enforce", "said"),
    [
        ("jetson-nano", "auto", "enforced by RLIMIT_DATA: "),
        ("jetson-nano", "rlimit", "enforced by RLIMIT_DATA: "),
        ("auto", "rlimit", "enforced by RLIMIT_DATA: "),
        ("jetson-nano", "none", "watched, not enforced"),
        ("auto", "auto", "watched, not enforced"),
    ],
)
def test_the_report_says_what_holds_the_cap(
    reported: Callable[..., RunReport], device: str, enforce: str, said: str
) -> None:
    report = reported(device=device, enforce=enforce)
    assert report.enforced_by.startswith(said)
    assert report.verdict.endswith(report.enforced_by)
    assert report.tightenings == ()


def test_a_cgroup_that_can_not_be_had_is_an_error_that_says_what_to_type(images: Path, tmp_path: Path) -> None:
    own = system.own_cgroup2()
    if own is not None and "memory" in (own / "cgroup.controllers").read_text():
        pytest.skip("this machine may have one")
    with pytest.raises(UsageError, match=r"--enforce rlimit.*systemd-run --user --scope -p MemoryMax=\d+") as error:
        finetune(images, tmp_path / "r", enforce="cgroup")
    assert error.value.exit_code == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_resumed_run_is_held_as_it_was(images: Path, tmp_path: Path) -> None:
    for enforce in ("none", "rlimit"):
        with pytest.raises(Interrupted):
            finetune(images, tmp_path / enforce, interrupt_after(2), **RUN, enforce=enforce)
        before = read_report(tmp_path / enforce).enforced_by
        after = resume(tmp_path / enforce).enforced_by
        assert before.split(":")[0] == after.split(":")[0]
    shutil.rmtree(tmp_path / "none")
