"""Runs that were stopped and go on: by Ctrl-C, SIGTERM or SIGKILL, with what changed meanwhile refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles import make_images
from running import SECONDS, Witness, cli, command, environment, finetune, interrupt_after, losses, resume

pytest.importorskip("torch")
pytest.importorskip("timm")

from edgetune.errors import Interrupted, RunFolderError
from edgetune.report import read_report

# 32 training images: an epoch is four steps, so the run is stopped before, at and after its first evaluation.
RUN: dict[str, Any] = {"steps": 8, "checkpoint_every": 3, "method": "alast", "hflip": 0.5, "seed": 2}
# In a process of its own, so long that a signal meets it in the middle.
LONG = RUN | {"steps": 20}
FLAGS = ["--model", "edgetune_micro", "--device", "jetson-nano", "-b", "8", "--threads", "1", "--seed", "2"]
FLAGS += ["--steps", "20", "--checkpoint-every", "3", "--hflip", "0.5"]


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"ant": 20, "bee": 20})


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        finetune(images, folder, **RUN)
    return folder


@pytest.fixture(scope="module")
def long(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the long run that was never stopped."""
    folder = tmp_path_factory.mktemp("long") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        finetune(images, folder, **LONG)
    return folder


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run stopped after step 5; tests copy it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        with pytest.raises(Interrupted):
            finetune(images, folder, interrupt_after(5), **RUN)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def assert_equal_runs(one: Path, other: Path) -> None:
    """Same losses and rates in every step, same model to the byte, same scores."""
    assert losses(one) == losses(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    first, second = read_report(one), read_report(other)
    for field in ("val_accuracy", "val_accuracy_before", "val_recall", "val_loss", "best_epoch", "steps", "flops"):
        assert getattr(first, field) == getattr(second, field), field
    assert first.tokens_share == second.tokens_share


def complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("model.safetensors", "config.json", "report.json", "run.json"))


# --------------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize("step", [1, 4, 7, 8])
def test_a_run_stopped_after_a_step_goes_on_to_the_same_end(
    images: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    with pytest.raises(
        Interrupted, match=f"stopped after step {step}. Go on with: edgetune finetune --resume"
    ) as error:
        finetune(images, tmp_path / "r", interrupt_after(step), **RUN)
    assert error.value.exit_code == 130
    assert complete(tmp_path / "r")
    report = read_report(tmp_path / "r")
    assert (report.stopped_because, report.steps) == ("interrupted", step)
    resumed = resume(tmp_path / "r")
    assert (resumed.stopped_because, resumed.steps) == ("finished", 8)
    assert_equal_runs(tmp_path / "r", whole)
    assert f"resumed at step {step}: this host's memory figures are of the part after it" in resumed.notes


def test_a_run_stopped_twice_goes_on_to_the_same_end_and_counts_all_its_time(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted) as first:
        finetune(images, tmp_path / "r", interrupt_after(2), **RUN)
    with pytest.raises(Interrupted) as second:
        resume(tmp_path / "r", interrupt_after(6))
    last = resume(tmp_path / "r")
    assert_equal_runs(tmp_path / "r", whole)
    times = [error.value.report.total_seconds for error in (first, second)]  # type: ignore[union-attr]
    assert times[0] < times[1] < last.total_seconds  # type: ignore[operator]
    assert last.train_seconds + last.eval_seconds < last.total_seconds  # type: ignore[operator]


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_run_stopped_in_an_evaluation_goes_on_to_the_same_end(
    images: Path, whole: Path, tmp_path: Path, evaluation: int
) -> None:
    """The first evaluation is that of the model as it starts."""
    witness, seen = Witness(), [0]

    def progress(what: str, done: int, total: int) -> None:
        if what == "evaluate":
            seen[0] += done == total
            if seen[0] == evaluation - 1 and done < total:
                signal.raise_signal(signal.SIGINT)

    witness.progress = progress  # type: ignore[method-assign]
    options = RUN | {"val_share": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        from edgetune.planner import phases

        patch.setattr(phases, "PASS_TOKENS", 4 * 65)
        with pytest.raises(Interrupted):
            finetune(images, tmp_path / "r", witness, **options)
    assert read_report(tmp_path / "r").steps == [0, 4, 8][evaluation - 1]
    assert complete(tmp_path / "r")
    resume(tmp_path / "r")
    assert losses(tmp_path / "r") == losses(whole)
    assert read_report(tmp_path / "r").val_accuracy == read_report(whole).val_accuracy


def test_before_the_first_evaluation_the_saved_model_is_that_of_the_last_step(images: Path, tmp_path: Path) -> None:
    plain = {**RUN, "head_first": False}  # with a fitted classifier the start is the best so far
    models = []
    with pytest.raises(Interrupted):
        finetune(images, tmp_path / "r", interrupt_after(1), **plain)
    models.append((tmp_path / "r" / "model.safetensors").read_bytes())
    with pytest.raises(Interrupted):
        resume(tmp_path / "r", interrupt_after(3))
    models.append((tmp_path / "r" / "model.safetensors").read_bytes())
    with pytest.raises(Interrupted):
        finetune(images, tmp_path / "three", interrupt_after(3), **plain)
    models.append((tmp_path / "three" / "model.safetensors").read_bytes())
    assert models[0] != models[1] == models[2]


def test_a_stop_that_no_signal_asked_for_is_an_interruption_too(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune import session

    def stop_at_once(job: Any) -> None:
        job.stop.set()
        train(job)

    train = session.train
    monkeypatch.setattr(session, "train", stop_at_once)
    with pytest.raises(Interrupted) as error:
        finetune(images, tmp_path / "r", **RUN)
    assert error.value.exit_code == 130


def test_signals_mean_what_they_meant_after_a_run(stopped: Path) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ------------------------------------------------------------------------------------------------ what may not change


def test_a_finished_run_has_nothing_to_resume(whole: Path) -> None:
    before = (whole / "report.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"is finished \(8 steps\).*--model local-dir:"):
        resume(whole)
    assert (whole / "report.json").read_bytes() == before


def test_a_run_killed_after_its_last_checkpoint_gets_its_report(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "r"))
    (folder / "report.json").unlink()
    resume(folder)
    assert_equal_runs(folder, whole)


def test_what_is_no_run_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="Wanted: a run folder"):
        resume(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(RunFolderError, match="Wanted: a run folder"):
        resume(tmp_path / "nowhere")


def test_images_that_have_moved_are_given_with_data(images: Path, whole: Path, copy: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    resume(copy, data=str(moved))
    assert_equal_runs(copy, whole)


def add_class(data: Path) -> None:
    make_images(data, {"cow": 4})


def rename_class(data: Path) -> None:
    (data / "bee").rename(data / "wasp")


def add_image(data: Path) -> None:
    shutil.copy(data / "ant" / "000.png", data / "ant" / "zzz.png")


def take_image(data: Path) -> None:
    (data / "ant" / "003.png").unlink()


def take_two(data: Path) -> None:
    take_image(data)
    (data / "bee" / "000.png").unlink()


def change_image(data: Path) -> None:
    shutil.copy(data / "bee" / "000.png", data / "ant" / "003.png")


def odd_name(data: Path) -> None:
    shutil.copy(data / "ant" / "000.png", data / "ant" / os.fsdecode(b"\xff 1.png"))


def swap_image(data: Path) -> None:
    (data / "ant" / "003.png").rename(data / "ant" / "a03.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_class, "other classes than the run: ant, bee, cow instead of ant, bee"),
        (rename_class, "other classes than the run"),
        (add_image, r"not those that the run started with: ant/zzz\.png \(new\)\. Put"),
        (take_image, r"not those that the run started with: ant/003\.png \(not there any more\)\. Put"),
        (take_two, r": ant/003\.png and 1 more \(not there any more\)\. Put"),
        (swap_image, r": ant/003\.png \(not there any more\), ant/a03\.png \(new\)\. Put"),
        (change_image, r": ant/003\.png \(changed\)\. Put"),
        (odd_name, r": ant/\\udcff 1\.png \(new\)\. Put"),
    ],
)
def test_other_images_than_the_run_started_with_are_refused(
    images: Path, copy: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    change(data)
    before = sorted(path.name for path in copy.rglob("*"))
    with pytest.raises(RunFolderError, match=words):
        resume(copy, data=str(data))
    assert sorted(path.name for path in copy.rglob("*")) == before


@pytest.mark.parametrize("known", [b"", b"damaged", None])
def test_a_run_that_does_not_know_its_images_by_name_counts_them(
    images: Path, copy: Path, tmp_path: Path, known: bytes | None
) -> None:
    if known is None:
        (copy / "images.txt").unlink()
    else:
        (copy / "images.txt").write_bytes(known)
    data = Path(shutil.copytree(images, tmp_path / "data"))
    swap_image(data)
    with pytest.raises(RunFolderError, match="run started with: as many, but with other names or sizes"):
        resume(copy, data=str(data))
    (data / "ant" / "a03.png").unlink()
    with pytest.raises(RunFolderError, match="run started with: 31 for training and 8 for validation instead of 32"):
        resume(copy, data=str(data))


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000], ids=range(6))
def test_a_damaged_file_is_named(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=f"{name} is damaged"):
        resume(copy)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("run.json", ("settings", "method"), "sideways"),
        ("run.json", ("settings", "batch_size"), -1),
        ("run.json", ("settings", "surprise"), 1),
        ("run.json", ("images_sha256",), "0"),
        ("plan.json", ("micro_batch",), 0),
        ("plan.json", ("optimizer",), "sgd"),
    ],
)
def test_an_edited_file_is_refused(copy: Path, name: str, path: tuple[str, ...], value: object) -> None:
    content = json.loads((copy / name).read_bytes())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (copy / name).write_text(json.dumps(content))
    with pytest.raises(RunFolderError):
        resume(copy)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(copy: Path, whole: Path) -> None:
    newest = max((copy / "checkpoints").glob("step-*"))
    with (newest / "tensors.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    witness = Witness()
    resume(copy, witness)
    assert any("Going on from step 4 instead" in note for note in witness.notes)
    assert_equal_runs(copy, whole)


def test_without_a_checkpoint_that_loads_there_is_nothing_to_resume(copy: Path) -> None:
    (copy / "checkpoints" / "base.safetensors").write_bytes(b"short")
    with pytest.raises(RunFolderError, match="damaged"):
        resume(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunFolderError, match="no checkpoint"):
        resume(copy)


def test_checkpoints_of_another_model_are_refused(images: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        finetune(images, tmp_path / "large", interrupt_after(1), **{**RUN, "image_px": 48})
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(tmp_path / "large" / "checkpoints", copy / "checkpoints")
    with pytest.raises(RunFolderError, match="does not belong to the run's model"):
        resume(copy)


# ----------------------------------------------------------------------------------------------- as a user would stop it


def start(images: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """The run of FLAGS as a process of its own."""
    return subprocess.Popen(
        command("finetune", "--data", images, *FLAGS, "--output", output, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.csv has the row of that step."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.csv").exists() and len(losses(folder)) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step}: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_with_its_code_and_a_folder_that_goes_on(
    images: Path, long: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    folder = tmp_path / "r"
    process = start(images, folder)
    wait_for_step(folder, 1, process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"Go on with: edgetune finetune --resume {folder}" in err
    assert complete(folder)
    assert read_report(folder).stopped_because == "interrupted"
    assert "interrupted after" in out
    resume(folder)
    assert_equal_runs(folder, long)


@pytest.mark.slow
def test_a_killed_process_goes_on_from_its_last_checkpoint(images: Path, long: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    process = start(images, folder)
    wait_for_step(folder, 5, process)
    process.kill()
    process.communicate(timeout=SECONDS)
    assert not (folder / "report.json").exists()
    done = cli("finetune", "--resume", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stopped_because"] == "finished"
    assert_equal_runs(folder, long)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_leaves_no_folder(
    images: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    folder = tmp_path / "r"
    process = start(images, folder)
    deadline = time.monotonic() + SECONDS
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.3)  # torch is being imported
    process.send_signal(sent)
    _, err = process.communicate(timeout=SECONDS)
    # Python ends itself by the signal when Ctrl-C met an exec of text (in an import, say); a shell shows 130 then too.
    assert process.returncode in (code, -sent), err
    assert "Traceback" not in err
    assert not folder.exists()


@pytest.mark.slow
def test_a_folder_that_a_run_writes_is_not_resumed_by_another(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    process = start(images, folder)
    try:
        wait_for_step(folder, 1, process)
        done = cli("finetune", "--resume", folder)
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)
    assert done.returncode == 1
    assert f"being written by another run (process {process.pid})" in done.stderr


def test_resume_takes_no_other_flags(copy: Path) -> None:
    done = cli("finetune", "--resume", copy, "--lr", "0.1", "--ram-cap", "1GiB", "--output", copy)
    assert done.returncode == 2
    assert "--lr, --output, --ram-cap can't be changed" in done.stderr
