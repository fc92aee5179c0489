"""Fine-tuning from artifacts where torch can't be imported: the same trainer, cache, report and folder, and torch's losses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doubles import make_images
from running import SECONDS, Witness, cli, environment, finetune, interrupt_after, losses, resume, settings

pytest.importorskip("torch", reason="torch makes the artifacts, and the run to compare with")
import timm

from edgetune.artifacts.reading import read_manifest
from edgetune.backends.ort import OrtBackend
from edgetune.checkpoint import load_tensors
from edgetune.errors import ArtifactsError, Interrupted
from edgetune.report import RunReport, read_report
from edgetune.run import settings_of_replay
from edgetune.selections import SELECTIONS_FILE, read_selections
from edgetune.units import MIB

# As in an environment where they are not installed.
WITHOUT_TORCH = "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'torchvision', 'onnx'))); "
DRIVER = WITHOUT_TORCH + "from edgetune.__main__ import entry; entry()"
TRAIN = ("--batch-size", "8", "--epochs", "2", "--opt", "sgd", "--threads", "1", "--quiet")


def without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`edgetune ...` in a process that has no torch."""
    command = [sys.executable, "-c", DRIVER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "data", {"cat": 14, "dog": 14, "eel": 14, "fox": 14})


@pytest.fixture(scope="module")
def trained(artifacts: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a cached prefix, from artifacts."""
    output = tmp_path_factory.mktemp("ort") / "run"
    done = without_torch(
        "finetune", "--backend", "ort", "--artifacts", artifacts, "--data", images, "--split", "2", *TRAIN,
        "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output


def test_importing_the_runner_takes_less_than_80_mib_and_no_torch() -> None:
    script = WITHOUT_TORCH + (
        "import edgetune.run, edgetune.engines.ort, edgetune.backends.ort; from edgetune.backends.ort_runtime import training_api; "
        "training_api(); from edgetune.process import snapshot; print(snapshot().rss_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert int(done.stdout) < 80 * MIB


def test_torch_stays_out_where_it_is_installed() -> None:
    script = (
        "import sys; from edgetune.backends.ort_runtime import training_api, inference; training_api(); inference(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "False"


def test_the_folder_is_a_runs_and_plain_timm_loads_what_was_learnt(trained: Path, artifacts: Path) -> None:
    report = read_report(trained)
    assert (report.backend, report.stopped_because, report.within_cap) == ("onnxruntime", "finished", True)
    assert report.cached_blocks == 2
    assert report.classes == ("cat", "dog", "eel", "fox")
    model = timm.create_model(f"local-dir:{trained}", pretrained=True)
    own = load_tensors(trained / "model.safetensors")
    start = load_tensors(artifacts / "model.safetensors")
    assert set(model.state_dict()) == set(own)
    changed = {name for name in own if (own[name] != start[name]).any()}
    assert changed
    assert all(name.startswith(("blocks.2", "blocks.3", "norm", "head")) for name in changed)
    manifest = read_manifest(artifacts)
    assert report.predicted_peak_bytes is not None
    assert report.device_peak_bytes is not None
    assert report.device_peak_bytes <= report.predicted_peak_bytes
    assert manifest.variant("upper-2").measured is not None


def test_evaluate_reads_the_folder_as_any_other(trained: Path) -> None:
    done = cli("evaluate", trained, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(read_report(trained).val_accuracy)


def test_a_torch_run_is_replayed_from_artifacts_with_its_losses(
    tiny_model: Path, artifacts: Path, images: Path, tmp_path: Path
) -> None:
    done = cli(
        "finetune", "--model", f"local-dir:{tiny_model}", "--data", images, "--split", "0", "--no-cache", "--initial-budget", "0.5", "--alpha", "1", *TRAIN,
        "--no-head-first",  # two fits of a classifier would be compared, whose features differ by rounding
        "--output", tmp_path / "torch",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = without_torch(
        "finetune", "--replay", tmp_path / "torch", "--backend", "ort", "--artifacts", artifacts, "--no-cache",
        "--threads", "1", "--quiet", "--output", tmp_path / "ort",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ort" / SELECTIONS_FILE).read_bytes() == (tmp_path / "torch" / SELECTIONS_FILE).read_bytes()
    assert len({selection.tokens for selection in read_selections(tmp_path / "torch")}) > 1
    here, there = losses(tmp_path / "torch"), losses(tmp_path / "ort")
    assert len(here) == len(there) == 12
    for (step, loss, rate), (other_step, other_loss, other_rate) in zip(here, there, strict=True):
        assert (step, rate) == (other_step, other_rate)
        assert float(other_loss) == pytest.approx(float(loss), abs=1e-4)
    one, other = (load_tensors(tmp_path / name / "model.safetensors") for name in ("torch", "ort"))
    assert max(abs(one[name] - other[name]).max() for name in one) < 1e-4


def ort_run(artifacts: Path, images: Path, output: Path, listener: Witness | None = None, **more: Any) -> RunReport:
    """Twelve steps of the upper two blocks, in this process."""
    return finetune(
        images, output, listener, model="tiny", device="auto", backend="ort", artifacts=str(artifacts), split_block=2, steps=12,
        checkpoint_every=3, seed=2, **more,
    )  # fmt: skip


def test_a_run_from_artifacts_is_replayed_by_torch(artifacts: Path, images: Path, tmp_path: Path) -> None:
    """Its folder says which model it is of, and its artifacts hold the weights that it began from."""
    ort_run(artifacts, images, tmp_path / "ort", optimizer="sgd", head_first=False, cache_precision="float32")
    done = cli("finetune", "--replay", tmp_path / "ort", "--threads", "1", "--quiet", "--output", tmp_path / "torch")
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "torch").backend == "pytorch"
    here, there = losses(tmp_path / "ort"), losses(tmp_path / "torch")
    assert len(here) == len(there) == 12
    for (_, loss, rate), (_, other_loss, other_rate) in zip(here, there, strict=True):
        assert rate == other_rate
        assert float(other_loss) == pytest.approx(float(loss), abs=1e-4)
    done = cli("finetune", "--replay", tmp_path / "ort", "--model", "x", "--output", tmp_path / "no")
    assert done.returncode == 2
    assert "settles --model" in done.stderr
    copy = tmp_path / "copy"
    shutil.copytree(artifacts, copy)
    ort_run(copy, images, tmp_path / "moved")
    (copy / "model.safetensors").rename(tmp_path / "elsewhere")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactsError, match="is a link"):
        settings_of_replay(tmp_path / "moved", settings(images))


@pytest.mark.parametrize("step", [2, 6, 9])
def test_a_run_from_artifacts_that_was_stopped_ends_with_the_same_bits(
    artifacts: Path, images: Path, tmp_path: Path, step: int
) -> None:
    ort_run(artifacts, images, tmp_path / "whole")
    with pytest.raises(Interrupted):
        ort_run(artifacts, images, tmp_path / "stopped", interrupt_after(step))
    report = resume(tmp_path / "stopped")
    assert (report.backend, report.steps, report.stopped_because) == ("onnxruntime", 12, "finished")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_artifacts_that_moved_are_named_where_a_run_goes_on(
    artifacts: Path, tiny_model: Path, images: Path, tmp_path: Path
) -> None:
    ort_run(artifacts, images, tmp_path / "whole")
    place, moved = tmp_path / "artifacts", tmp_path / "moved"
    shutil.copytree(artifacts, place)
    with pytest.raises(Interrupted):
        ort_run(place, images, tmp_path / "run", interrupt_after(6))
    place.rename(moved)
    with pytest.raises(
        ArtifactsError, match=rf"artifacts/manifest.json can't be read.*--resume {tmp_path}/run --artifacts"
    ):
        resume(tmp_path / "run")
    done = without_torch("finetune", "--resume", tmp_path / "run", "--artifacts", moved, "--quiet")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert whole == stopped
    done = without_torch("finetune", "--replay", tmp_path / "run", "--backend", "torch", "--output", tmp_path / "again")
    assert done.returncode == 1
    assert "began from artifacts there: put them back" in done.stderr


@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_artifacts_of_another_model_are_told_where_a_run_goes_on(
    artifacts: Path, images: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        ort_run(artifacts, images, tmp_path / "run", interrupt_after(6))
    original = OrtBackend.__init__

    def other(self: OrtBackend, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        values = dict(self._stored)
        if change == "more":
            values["norm_pre.bias"] = values["norm.bias"]
        elif change == "less":
            del values["blocks.0.norm1.bias"]
        else:
            values["blocks.0.norm1.bias"] = values["blocks.0.norm1.bias"][:3]
        self._stored = values

    monkeypatch.setattr(OrtBackend, "__init__", other)
    with pytest.raises(
        ArtifactsError, match=rf"artifacts in {artifacts} are of another model.*(norm_pre|norm1).bias.*--artifacts"
    ):
        resume(tmp_path / "run")


def test_a_step_from_artifacts_that_ran_out_of_memory_is_done_again_under_a_tighter_plan(
    artifacts: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort_run(artifacts, images, tmp_path / "calm", batch_size=40)
    original, left = OrtBackend.step, [1]

    def failing(self: OrtBackend, *args: Any, **more: Any) -> Any:
        if left[0] and len(losses(tmp_path / "short")) == 4:
            left[0] -= 1
            # As onnxruntime's arena says it.
            raise RuntimeError(
                "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 4096"
            )
        return original(self, *args, **more)

    monkeypatch.setattr(OrtBackend, "step", failing)
    report = ort_run(artifacts, images, tmp_path / "short", batch_size=40)
    assert left == [0]
    assert (report.steps, report.stopped_because, report.within_cap) == (12, "finished", True)
    assert len(report.tightenings) == 1
    assert all(told.startswith("step 5: memory ran out (BFCArena") for told in report.tightenings)
    calm, short = losses(tmp_path / "calm"), losses(tmp_path / "short")
    assert short[:4] == calm[:4]
    assert [(number, rate) for number, _, rate in short] == [(number, rate) for number, _, rate in calm]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--backend", "ort"), 2, "name it with --artifacts"),
        (("--artifacts", "ARTIFACTS"), 2, "--backend ort"),
        (("--backend", "ort", "--artifacts", "ARTIFACTS", "--split", "1"), 2, "these artifacts hold all"),
        (("--backend", "ort", "--artifacts", "ARTIFACTS", "--split", "auto"), 2, "--split auto"),
        (("--backend", "ort", "--artifacts", "ARTIFACTS", "--augment"), 2, "--hflip"),
        (("--backend", "ort", "--artifacts", "ARTIFACTS", "--model", "x"), 2, "--model"),
        (("--backend", "ort", "--artifacts", "ARTIFACTS", "--image-size", "64"), 2, "--image-size"),
        (("--backend", "ort", "--artifacts", "ARTIFACTS", "--ram-cap", "85MiB"), 3, "needs at least"),
        (("--backend", "ort", "--artifacts", "ARTIFACTS", "--device", "jetson-nano"), 1, "states no runtime for ONNX"),
        (("--backend", "ort", "--artifacts", "/nowhere"), 1, "edgetune export"),
    ],
)
def test_what_can_not_be_is_refused_in_words_and_leaves_no_folder(
    artifacts: Path, images: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    given = [str(artifacts) if each == "ARTIFACTS" else each for each in arguments]
    done = without_torch("finetune", *given, "--data", images, "--output", tmp_path / "run", *TRAIN[:4])
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_data_with_more_classes_than_there_are_logits_is_refused(artifacts: Path, tmp_path: Path) -> None:
    data = make_images(tmp_path / "five", dict.fromkeys("abcde", 4))
    done = without_torch(
        "finetune", "--backend", "ort", "--artifacts", artifacts, "--data", data, "--output", tmp_path / "run"
    )
    assert done.returncode == 1
    assert "5 classes, the artifacts room for 4" in done.stderr


def test_a_damaged_artifact_is_refused_before_a_run_begins(artifacts: Path, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "artifacts"
    shutil.copytree(artifacts, copy)
    graph = copy / "upper-2" / "training_model.onnx"
    content = bytearray(graph.read_bytes())
    content[1000] ^= 1
    graph.write_bytes(content)
    done = without_torch(
        "finetune",
        "--backend",
        "ort",
        "--artifacts",
        copy,
        "--data",
        images,
        "--split",
        "2",
        "--output",
        tmp_path / "run",
    )
    assert done.returncode == 1
    assert "SHA-256 differs" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("machine", "python", "there"),
    [("x86_64", (3, 11), True), ("x86_64", (3, 13), False), ("aarch64", (3, 11), False), ("AMD64", (3, 12), True)],
)
def test_for_which_platforms_there_is_a_wheel(machine: str, python: tuple[int, int], there: bool) -> None:
    from edgetune.backends.ort_runtime import has_wheel

    assert has_wheel("Linux", machine, python) is there
    assert has_wheel("Darwin", machine, python) is (python < (3, 13))


def test_a_missing_runtime_is_told_with_what_to_install(artifacts: Path, images: Path, tmp_path: Path) -> None:
    hidden = (  # from Python and from pip
        "sys.modules['onnxruntime'] = None\n"
        "from importlib import metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
    )
    driver = WITHOUT_TORCH + hidden + "from edgetune.__main__ import entry; entry()"
    command: list[Any] = [sys.executable, "-c", driver, "finetune", "--backend", "ort", "--artifacts", artifacts]
    done = subprocess.run(
        [*map(str, command), "--data", str(images), "--output", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=SECONDS, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'edgetune[ort]'" in done.stderr
