"""What a phone hands back becomes a run folder: evaluated, asked, exported again; what it can't have is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import make_images
from running import resume

pytest.importorskip("torch")
pytest.importorskip("onnx", reason="the export extra makes artifacts")

from edgetune.artifacts.manifest import Schedule
from edgetune.artifacts.reading import read_manifest
from edgetune.backends.ort import OrtBackend
from edgetune.checkpoint import load_tensors
from edgetune.data import load_image
from edgetune.errors import ArtifactsError, DataError, RunFolderError
from edgetune.export.build import ExportRequest, build
from edgetune.export.command import model_of_run
from edgetune.export.inference import export_inference
from edgetune.export.returned import import_run
from edgetune.inference import evaluate, load_run, predict
from edgetune.optim import OptimizerSettings
from edgetune.store import read_stored

CLASSES = ("cat", "dog", "class 2", "class 3")


def silent(_text: str) -> None: ...


@pytest.fixture(scope="module")
def trained(artifacts: Path) -> OrtBackend:
    """The artifacts with another classifier, as if they had been trained from."""
    manifest = read_manifest(artifacts)
    backend = OrtBackend(artifacts, manifest, manifest.variant("upper-2"), OptimizerSettings(name="sgd"))
    backend.set_head(np.random.default_rng(0).standard_normal((4, 48), np.float32), np.arange(4, dtype=np.float32))
    return backend


@pytest.fixture(scope="module")
def returned(artifacts: Path, trained: OrtBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("returned")
    values = trained.model_tensors()
    own = trained.variant.parameters
    np.concatenate([np.asarray(values[each.name]).reshape(-1) for each in own]).astype("<f4").tofile(folder / "buffer")
    (folder / "labels.txt").write_text("cat\ndog\n")
    said = import_run(folder / "buffer", artifacts, folder / "run", labels=folder / "labels.txt")
    assert said[1].startswith(f"run folder: {folder / 'run'} ")
    return folder / "run"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "data", {"cat": 4, "dog": 4})


def test_it_answers_as_the_graphs_do_that_were_trained(returned: Path, trained: OrtBackend, images: Path) -> None:
    run = load_run(returned, threads=1)
    assert run.classes == CLASSES
    image = images / "cat" / "000.png"
    inputs: Any = load_image(image, run.preprocess)[None]
    np.testing.assert_allclose(run.logits(inputs), trained.evaluate(inputs), atol=1e-4)
    (answer,) = predict(run, [image], top=4)
    assert {each["class"] for each in answer["classes"]} == set(CLASSES)


def test_it_is_evaluated_on_images_that_are_named_and_has_none_of_its_own(returned: Path, tmp_path: Path) -> None:
    run = load_run(returned, threads=1)
    data = make_images(tmp_path / "data", dict.fromkeys(CLASSES, 2))
    assert evaluate(run, data, batch_size=4, note=silent)["images"] == 8
    with pytest.raises(DataError, match=r"another device trained, without its images. Name images with --data"):
        evaluate(run, None, batch_size=4, note=silent)


def test_it_is_exported_in_either_format_with_what_it_learnt(returned: Path, artifacts: Path, tmp_path: Path) -> None:
    assert "logits within" in export_inference(returned, tmp_path / "model.onnx")
    model, count, classes = model_of_run(returned)
    assert (count, classes) == (4, CLASSES)
    request = ExportRequest(
        model=model,
        class_count=count,
        classes=classes,
        splits=(4,),
        schedule=Schedule(peak_rate=1e-3, warmup_steps=1, total_steps=10),
        verify=False,
    )
    (tmp_path / "again").mkdir()
    manifest, _ = build(tmp_path / "again", request)
    before = read_manifest(artifacts)
    assert (manifest.architecture, manifest.preprocess) == (before.architecture, before.preprocess)
    own, there = load_tensors(returned / "model.safetensors"), load_tensors(tmp_path / "again" / manifest.weights)
    for name, values in own.items():
        np.testing.assert_array_equal(there[name], values)


def test_there_is_nothing_to_resume(returned: Path) -> None:
    before = sorted(path.name for path in returned.iterdir())
    with pytest.raises(RunFolderError, match=r"there is nothing to resume.*--model local-dir:"):
        resume(returned)
    assert sorted(path.name for path in returned.iterdir()) == before


def test_it_says_where_it_is_from(returned: Path, artifacts: Path) -> None:
    stored = read_stored(returned)
    assert (stored.settings.backend, stored.settings.artifacts) == ("ort", str(artifacts))
    assert json.loads((returned / "config.json").read_text())["label_names"] == list(CLASSES)


def test_what_is_refused_leaves_no_folder(artifacts: Path, tmp_path: Path) -> None:
    np.zeros(7, "<f4").tofile(tmp_path / "buffer")
    with pytest.raises(ArtifactsError, match="holds 7 values"):
        import_run(tmp_path / "buffer", artifacts, tmp_path / "run")
    assert not (tmp_path / "run").exists()
