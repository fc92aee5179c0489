"""The flat buffer that a phone hands back becomes the model that it trained, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from artifacts_cases import make_artifacts, tensors

from edgetune.artifacts.importing import import_parameters
from edgetune.artifacts.manifest import Manifest
from edgetune.checkpoint import load_tensors
from edgetune.errors import ArtifactsError, DataError, RunFolderError


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_artifacts(tmp_path / "artifacts")


def buffer_of(manifest: Manifest, name: str, path: Path, *, trained_only: bool = False) -> dict[str, np.ndarray]:
    """Write a variant's parameters, each one more than it was; returns what they are now."""
    values = tensors()
    own = [each for each in manifest.variant(name).parameters if each.trained or not trained_only]
    new = {each.name: values[each.name] + 1 for each in own}
    np.concatenate([new[each.name].reshape(-1) for each in own]).astype("<f4").tofile(path)
    return new


@pytest.mark.parametrize(("name", "trained_only"), [("all", False), ("all", True), ("upper-2", False), ("head", True)])
def test_each_parameter_lands_under_its_name_and_the_rest_stays(
    manifest: Manifest, tmp_path: Path, name: str, trained_only: bool
) -> None:
    new = buffer_of(manifest, name, tmp_path / "buffer", trained_only=trained_only)
    said = import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model")
    found = load_tensors(tmp_path / "model" / "model.safetensors")
    for key, value in (tensors() | new).items():
        np.testing.assert_array_equal(found[key], value)
    assert f"{name}: {len(new)} of its" in said[0]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architecture"] == "vit_tiny"
    assert (tmp_path / "model" / "labels.txt").read_text() == "ant\nbee\ncat\n"


def test_a_buffer_of_another_size_is_refused_with_the_sizes_that_there_are(manifest: Manifest, tmp_path: Path) -> None:
    np.zeros(7, "<f4").tofile(tmp_path / "buffer")
    with pytest.raises(ArtifactsError, match=r"holds 7 values; the variants have all \d+, upper-2 \d+, head 27"):
        import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model")
    (tmp_path / "buffer").write_bytes(b"abc")
    with pytest.raises(ArtifactsError, match="no multiple of 4"):
        import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_named_variant_is_the_one_or_an_error(manifest: Manifest, tmp_path: Path) -> None:
    buffer_of(manifest, "head", tmp_path / "buffer")
    with pytest.raises(ArtifactsError, match="holds 27 values"):
        import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model", "all")
    with pytest.raises(ArtifactsError, match="no variant 'upper-9'"):
        import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model", "upper-9")


def test_what_diverged_is_not_imported(manifest: Manifest, tmp_path: Path) -> None:
    buffer_of(manifest, "head", tmp_path / "buffer")
    values = np.fromfile(tmp_path / "buffer", "<f4")
    values[3] = np.nan
    values.tofile(tmp_path / "buffer")
    with pytest.raises(ArtifactsError, match="no finite numbers"):
        import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model")


def test_nothing_is_overwritten_and_a_missing_buffer_is_named(manifest: Manifest, tmp_path: Path) -> None:
    buffer_of(manifest, "head", tmp_path / "buffer")
    with pytest.raises(RunFolderError, match="not empty"):
        import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "artifacts")
    with pytest.raises(RunFolderError, match="missing"):
        import_parameters(tmp_path / "missing", tmp_path / "artifacts", tmp_path / "model")


def test_classes_named_on_the_device_come_back_by_their_names(tmp_path: Path) -> None:
    manifest = make_artifacts(tmp_path / "artifacts", classes=())
    buffer_of(manifest, "head", tmp_path / "buffer")
    labels = tmp_path / "labels.txt"
    labels.write_text("wasp\nhornet\n")
    import_parameters(tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model", labels=labels)
    names = ["wasp", "hornet", "class 2"]  # a spare one keeps its number
    assert (tmp_path / "model" / "labels.txt").read_text().splitlines() == names
    assert json.loads((tmp_path / "model" / "config.json").read_text())["label_names"] == names


@pytest.mark.parametrize("text", ["", "a\na\n", "a\n\nb\n", "a\nb\nc\nd\n", "a\nb\n"])
def test_names_that_do_not_fit_are_refused(manifest: Manifest, tmp_path: Path, text: str) -> None:
    buffer_of(manifest, "head", tmp_path / "buffer")
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=r"labels.txt (holds \d lines; wanted: 1 to 3|names other classes)"):
        import_parameters(
            tmp_path / "buffer", tmp_path / "artifacts", tmp_path / "model", labels=tmp_path / "labels.txt"
        )
    assert not (tmp_path / "model").exists()
