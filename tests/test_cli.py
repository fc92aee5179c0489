"""The command line as a user meets it: exit codes, what is printed where, hostile arguments and files."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer.main
from doubles import make_images
from running import SECONDS, cli, command, environment, finetune

from edgetune.__main__ import main
from edgetune.cli import app

QUICK = ["--model", "edgetune_micro", "--device", "jetson-nano", "--threads", "1", "--steps", "1", "-b", "4"]
QUICK += ["--method", "head"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def edgetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`edgetune ...` in this process: what `main` exits with and prints."""

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["edgetune", *map(os.fspath, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"ant": 10, "bee": 10})


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder; tests that change it copy it."""
    pytest.importorskip("torch")
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("runs") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        finetune(images, folder, method="head", steps=4)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return loaded


# ---------------------------------------------------------------------------------------------------------------- help

COMMANDS: dict[tuple[str, ...], Any] = {}


def _walk(found: Any, path: tuple[str, ...] = ()) -> None:
    COMMANDS[path] = found
    for name, inner in getattr(found, "commands", {}).items():
        _walk(inner, (*path, name))


_walk(typer.main.get_command(app))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_names_every_flag(path: tuple[str, ...], edgetune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    result = edgetune(*path, "--help")
    assert result.code == 0
    assert result.err == ""
    flags = [flag for parameter in COMMANDS[path].params for flag in parameter.opts if flag.startswith("-")]
    assert [flag for flag in flags if flag not in result.out] == []
    assert [name for name in getattr(COMMANDS[path], "commands", {}) if name not in result.out] == []


def test_the_flags_of_the_main_job_are_timms_where_timm_has_them() -> None:
    flags = {flag for parameter in COMMANDS[("finetune",)].params for flag in parameter.opts}
    wanted = "--model --batch-size -b --lr --epochs --opt --img-size --seed --output --grad-accum-steps --workers -j"
    assert set(wanted.split()) <= flags


@pytest.mark.parametrize("path", [(), ("finetune",), ("predict",), ("devices",)], ids=" ".join)
def test_help_imports_nothing_heavy(path: tuple[str, ...]) -> None:
    program = (
        "import sys; from edgetune.__main__ import main; sys.argv = ['edgetune', *sys.argv[1:], '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *path], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert "Usage: edgetune" in done.stdout
    assert done.stderr == "[]\n"


def test_the_module_runs_and_knows_its_version() -> None:
    done = cli("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("edgetune ")
    assert done.stderr == ""


def test_no_command_shows_help_and_the_exit_codes(edgetune: Run) -> None:
    result = edgetune("--help")
    for words in ("0 done", "1 what was named", "2 the command line", "3 does not fit", "4 the run", "130 and 143"):
        assert words in " ".join(result.out.split())


def test_ctrl_c_at_any_moment_gives_code_130_and_no_traceback(edgetune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgetune.__main__._main", interrupted)
    assert edgetune("finetune") == (
        130,
        "",
        "edgetune: interrupted. A run folder that was begun can be gone on with: --resume RUN\n",
    )


# ---------------------------------------------------------------------------------------------------- exit codes, output


@pytest.mark.slow
def test_a_run_prints_its_report_as_json_and_nothing_else(images: Path, made: Path, tmp_path: Path) -> None:
    done = cli("finetune", *QUICK, "--data", images, "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == report_of(tmp_path / "r")
    assert "accuracy" in done.stderr
    assert f"run folder: {tmp_path / 'r'}" in done.stderr


@pytest.mark.slow
def test_a_quiet_run_prints_nothing(images: Path, made: Path, tmp_path: Path) -> None:
    done = cli("finetune", *QUICK, "--data", images, "--output", tmp_path / "r", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert report_of(tmp_path / "r")["stopped_because"] == "finished"


@pytest.mark.slow
def test_a_run_on_the_bundled_sample_needs_no_options_but_a_length(made: Path, tmp_path: Path) -> None:
    done = cli("finetune", "--steps", "1", "--threads", "1", cwd=tmp_path, env=environment(PYTHONPATH=str(Path.cwd())))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-edgetune_micro-auto")
    assert report_of(folder)["classes"] == list("0123456789")
    assert "within cap" in done.stdout
    assert "memory" in done.stdout


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_loss_speed_and_memory(images: Path, made: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    wanted = command("finetune", *QUICK, "--data", images, "--output", tmp_path / "r", "--ram-cap", "900MiB")
    env = environment(TERM="xterm", COLUMNS="220")
    with subprocess.Popen(wanted, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"Traceback" not in shown
    assert re.search(rb"train .* 1/1 +loss \d.*images/s.*ETA.*memory \d+ MiB of 900 \(\d+ %\)", shown), shown
    assert b"accuracy" in shown


@pytest.mark.slow
def test_codes_of_what_is_not_understood_and_of_what_can_not_be_used(images: Path, made: Path, tmp_path: Path) -> None:
    wanted = ["finetune", *QUICK, "--data", images, "--output", tmp_path / "r"]
    assert cli(*wanted, "--weights", tmp_path / "none.safetensors").returncode == 1
    assert cli(*wanted, "--surprise").returncode == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_run_that_passes_its_cap_stops_with_code_4_and_a_complete_folder(
    images: Path, made: Path, tmp_path: Path
) -> None:
    plan = json.loads((made / "plan.json").read_bytes())
    plan["predicted_peak_bytes"] = plan["runtime_bytes"] + 1024  # a plan that lies: training needs more than that
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = cli(
        "finetune", "--model", "edgetune_micro", "--device", "jetson-nano", "--data", images, "--json",
        "--plan", tmp_path / "plan.json", "--output", tmp_path / "r", "--steps", "5", "--ram-cap", "317MiB", "--enforce", "none",
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "over cap by" in done.stderr
    report = report_of(tmp_path / "r")
    assert json.loads(done.stdout) == report
    assert (report["stopped_because"], report["within_cap"], report["steps"]) == ("over the cap", False, 1)
    assert (tmp_path / "r" / "model.safetensors").is_file()


@pytest.mark.slow
def test_output_cut_off_by_head_gives_no_traceback(images: Path, made: Path, tmp_path: Path) -> None:
    for arguments in (
        ["devices", "list"],
        ["finetune", "--help"],
        ["finetune", *QUICK, "--data", images, "--output", tmp_path / "r"],
    ):
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(PYTHONUNBUFFERED="1")
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
        process.stderr.close()
        process.wait(timeout=SECONDS)
        assert "Traceback" not in err
        assert "BrokenPipe" not in err


# ------------------------------------------------------------------------------------------------- what isn't understood


def _id(value: object) -> str:
    return ascii(" ".join(value)) if isinstance(value, list) else ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "jetson-nanno"], "Did you mean jetson-nano"),
        (["--lr", "nan"], "--lr must be between"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--epochs", "-3"], "--epochs must be between"),
        (["--batch-size", "0"], "--batch-size must be between"),
        (["--split", "half"], "--split takes"),
        (["--split", "²"], "--split takes"),
        (["--workers", "4"], "no worker processes"),
        (["--ram-cap", "banana"], "not a size in bytes"),
        (["--ram-cap", "0"], "not a size in bytes"),
        (["--weights", "w.safetensors", "--no-pretrained"], "contradict"),
        (["--plan", "p.json", "--method", "full", "--lr", "0.1", "-b", "3"], "the plan settles --batch-size, --method:"),
        (["--resume", "r", "--img-size", "48", "--opt", "sgd", "--alpha", "1"], "--alpha, --image-size, --opt can't be"),
        (["--method", "magic"], "magic"),
        (["--epochs", "three"], "--epochs"),
        (["--seed", "-1"], "--seed must be between"),
        (["--data", "caf\udce9"], "is not UTF-8"),
        (["--output", "caf\udce9"], "is not UTF-8"),
    ],
    ids=_id,
)  # fmt: skip
def test_a_wrong_value_is_named_with_code_2_and_nothing_is_written(
    edgetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    result = edgetune("finetune", *arguments)
    assert result.code == 2
    assert words in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "deit_tinny"], "Did you mean deit_tiny"),
        (["--model", "resnet_of_dreams"], "Try edgetune_micro"),
        (["--split", "99"], "--split must be"),
        (["--trained-blocks", "13"], "--trained-blocks must be between 1 and 12"),
        (["--image-size", "33"], "Try 32 or 36"),
        (["--grad-accum-steps", "99"], "--grad-accum-steps must be between"),
    ],
    ids=_id,
)
def test_what_only_the_model_can_tell_is_named_with_code_2_and_nothing_is_left(
    edgetune: Run, images: Path, made: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    given = ["--data", images, "--device", "jetson-nano", "--output", tmp_path / "r", "--model", "edgetune_micro"]
    result = edgetune("finetune", *given, "--threads", "1", *arguments)
    assert result.code == 2
    assert words in result.err
    assert not (tmp_path / "r").exists()


# -------------------------------------------------------------------------------------------------- what can't be used


def test_an_output_that_can_not_be_made_is_named(edgetune: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "r"):
        result = edgetune("finetune", *QUICK, "--output", output)
        assert result.code == 1
        assert str(output) in result.err


def break_images(data: Path) -> None:
    for number in range(3):
        path = data / "ant" / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:200])


def empty_class(data: Path) -> None:
    shutil.rmtree(data / "ant")
    (data / "ant").mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "can't be read"),
        (lambda data: shutil.rmtree(data / "ant"), "only one class folder"),
        (break_images, "3 of 20 images can't be used"),
        (empty_class, "no images in class 'ant'"),
    ],
)
def test_data_that_can_not_be_used_is_named_and_leaves_no_folder(
    edgetune: Run, images: Path, made: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    spoil(data)
    result = edgetune("finetune", *QUICK, "--data", data, "--output", tmp_path / "r")
    assert result.code == 1
    assert words in result.err
    assert not (tmp_path / "r").exists()


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_code_in_a_weights_file_is_not_executed(
    edgetune: Run, images: Path, made: Path, tmp_path: Path, form: str
) -> None:
    weights, target = tmp_path / "w.pth", tmp_path / "owned"
    if form == "pickle":
        weights.write_bytes(pickle.dumps({"head.weight": Payload(target)}))
    else:
        import torch

        torch.save({"head.weight": Payload(target)}, weights)
    result = edgetune("finetune", *QUICK, "--data", images, "--weights", weights, "--output", tmp_path / "r")
    assert result.code == 1
    assert "never unpickles code" in result.err
    assert not target.exists()
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------------- hostile names


@pytest.mark.slow
def test_names_of_all_kinds_go_through_a_run_and_come_out_printable(edgetune: Run, made: Path, tmp_path: Path) -> None:
    names = {"with space": 6, "Überall 猫": 6, "line\nbreak": 6, "[bold red]markup": 6}
    data = make_images(tmp_path / "data", names)
    for number in range(2):
        shutil.move(
            data / "with space" / f"00{number}.png", os.fsencode(data / "with space") + b"/\xff\xfe%d.png" % number
        )
    flags = [*QUICK, "--data", data, "--output", tmp_path / "r"]
    done = cli("finetune", *flags, env=environment(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0, done.stderr
    assert "\\xdcberall" in done.stdout
    assert "[bold red]markup" in done.stdout
    assert done.stdout.isascii()
    labels = (tmp_path / "r" / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert labels == sorted(["with space", "Überall 猫", "line\\nbreak", "[bold red]markup"])
    picture = os.fsencode(data / "with space") + b"/\xff\xfe1.png"
    predicted = edgetune("predict", tmp_path / "r", os.fsdecode(picture), "--threads", "1")
    assert predicted.code == 0
    assert "\\udcff\\udcfe1.png" in predicted.out


# ------------------------------------------------------------------------------------------------- evaluate and predict


def test_evaluate_gives_the_reports_accuracy(edgetune: Run, made: Path) -> None:
    result = edgetune("evaluate", made, "--json", "--threads", "1")
    assert result.code == 0
    scores, report = json.loads(result.out), report_of(made)
    assert scores["images"] == report["val_images"]
    assert scores["accuracy"] == report["val_accuracy"]
    assert scores["recall"] == report["val_recall"]
    assert scores["loss"] == pytest.approx(report["val_loss"], abs=1e-5)
    plain = edgetune("evaluate", made, "--threads", "1", "-b", "1")
    assert f"accuracy {report['val_accuracy']:.4f}" in plain.out
    assert "ant" in plain.out


def test_evaluate_on_other_images_takes_val_or_the_class_folders(edgetune: Run, made: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "d" / "val", {"ant": 3, "bee": 2}, seed=9)
    for data in (tmp_path / "d", tmp_path / "d" / "val"):
        result = edgetune("evaluate", made, "--data", data, "--json", "--threads", "1")
        assert result.code == 0
        assert json.loads(result.out)["images"] == 5


def test_evaluate_refuses_classes_that_the_model_does_not_know(edgetune: Run, made: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "d", {"ant": 3, "yak": 2})
    result = edgetune("evaluate", made, "--data", tmp_path / "d")
    assert result.code == 1
    assert "classes that were not trained on: yak" in result.err
    assert edgetune("evaluate", made, "--data", tmp_path / "nowhere").code == 1


def test_evaluate_says_when_the_runs_own_images_have_changed(
    edgetune: Run, images: Path, copy: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    stored = json.loads((copy / "run.json").read_bytes())
    stored["settings"]["data"] = str(data)
    (copy / "run.json").write_text(json.dumps(stored))
    assert edgetune("evaluate", copy, "--threads", "1").err == (
        "There is no val/: 16 images train and 4 validate, split class by class with seed 0.\n"
    )
    make_images(data, {"ant": 12}, seed=5)
    changed = edgetune("evaluate", copy, "--threads", "1")
    assert changed.code == 0
    assert "the images have changed since the run" in changed.err
    make_images(data, {"cow": 3})
    other = edgetune("evaluate", copy, "--threads", "1")
    assert other.code == 1
    assert "other classes" in other.err


def test_predict_prints_classes_with_probabilities(edgetune: Run, images: Path, made: Path) -> None:
    picture = images / "ant" / "001.png"
    plain = edgetune("predict", made, picture, "--threads", "1")
    assert plain.code == 0
    assert plain.out.startswith(str(picture))
    assert "ant" in plain.out
    (result,) = json.loads(edgetune("predict", made, picture, "--json", "--top", "1", "--threads", "1").out)
    (best,) = result["classes"]
    assert best["class"] in ("ant", "bee")
    assert 0.5 <= best["probability"] <= 1
    (both,) = json.loads(edgetune("predict", made, picture, "--json", "--threads", "1").out)
    assert sum(entry["probability"] for entry in both["classes"]) == pytest.approx(1)


def test_an_image_that_can_not_be_read_does_not_stop_the_others(
    edgetune: Run, images: Path, made: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((images / "ant" / "000.png").read_bytes()[:300])
    pictures = [images / "ant" / "001.png", tmp_path / "missing.png", broken, images / "bee" / "001.png"]
    plain = edgetune("predict", made, *pictures, "--threads", "1")
    assert plain.code == 1
    assert len(plain.out.splitlines()) == 2
    assert "missing.png: No such file" in plain.err
    assert "broken.png" in plain.err
    result = edgetune("predict", made, *pictures, "--json", "--threads", "1")
    assert result.code == 1
    assert ["error" in entry for entry in json.loads(result.out)] == [False, True, True, False]


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_what_is_no_run_folder_or_a_damaged_one_is_named(
    edgetune: Run, images: Path, copy: Path, tmp_path: Path, name: str
) -> None:
    more = [images / "ant" / "001.png"] if name == "predict" else []
    for folder in (tmp_path, tmp_path / "nowhere", images / "ant" / "001.png"):
        result = edgetune(name, folder, *more)
        assert result.code == 1
        assert "Wanted: a run folder" in result.err
    model = (copy / "model.safetensors").read_bytes()
    for content in (model[: len(model) // 2], b"", b"\xff" * 100):
        (copy / "model.safetensors").write_bytes(content)
        result = edgetune(name, copy, *more)
        assert result.code == 1
        assert "model.safetensors can't be loaded as weights" in result.err
    (copy / "model.safetensors").unlink()
    assert "no weights file" in edgetune(name, copy, *more).err
    (copy / "config.json").write_text("{")
    assert edgetune(name, copy, *more).code == 1
    (copy / "run.json").write_text("{")
    assert "run.json is damaged" in edgetune(name, copy, *more).err


def test_weights_that_are_no_numbers_give_no_probabilities(edgetune: Run, images: Path, copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["norm.bias"] = np.full_like(tensors["norm.bias"], np.nan)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    result = edgetune("predict", copy, images / "ant" / "001.png", "--json", "--threads", "1")
    assert result.code == 1
    assert "no finite number" in json.loads(result.out)[0]["error"]
    evaluated = edgetune("evaluate", copy, "--threads", "1")
    assert evaluated.code == 0
    assert "accuracy not known" in evaluated.out
    assert json.loads(edgetune("evaluate", copy, "--json", "--threads", "1").out)["accuracy"] is None
