"""Weights that are not of the model that a manifest describes are told before anything is planned or trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from artifacts_cases import SHAPE, make_artifacts, tensors

from edgetune.artifacts.agreement import check_weights
from edgetune.artifacts.manifest import Manifest, ParameterEntry
from edgetune.checkpoint import save_tensors
from edgetune.errors import ArtifactsError


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_artifacts(tmp_path)


def test_of_each_tensor_its_place_in_the_file_comes_back(manifest: Manifest, tmp_path: Path) -> None:
    found = check_weights(tmp_path, manifest)
    data = (tmp_path / manifest.weights).read_bytes()
    assert found.keys() == tensors().keys()
    for name, values in tensors().items():
        begin, entry = found[name]
        assert entry.shape == values.shape
        np.testing.assert_array_equal(np.frombuffer(data[begin : begin + values.nbytes], "<f4"), values.reshape(-1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 5}, "it holds 4 blocks, not 5"),
        ({"depth": 1000}, "it holds 4 blocks, not 1000"),
        ({"width": 16}, "pos_embed has a width of 8, not 16"),
        ({"classes": 5}, r"the classifier is \[3, 8\], for 5 classes"),
        ({"patch_tokens": 64}, "pos_embed is of 17 tokens, not 64 and 1 before them"),
        ({"patch_tokens": 4}, "pos_embed is of 17 tokens, not 4"),
        ({"mlp_width": 64}, r"blocks.0.mlp.fc2.weight has widths of \(8, 32\), not \(8, 64\)"),
        ({"heads": 4}, r"blocks.0.attn.qkv.weight has widths of \(24, 8\), not \(48, 8\)"),
    ],
)
def test_a_shape_that_the_weights_do_not_have_is_refused(
    manifest: Manifest, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    more = {"blocks.0.mlp.fc2.weight": np.zeros((8, 32), np.float32)}
    more["blocks.0.attn.qkv.weight"] = np.zeros((24, 8), np.float32)
    save_tensors(tmp_path / manifest.weights, tensors() | more, {"format": "pt"})
    manifest = msgspec.structs.replace(manifest, classifier="head")
    check_weights(tmp_path, manifest)
    claimed = msgspec.structs.replace(manifest, shape=msgspec.structs.replace(SHAPE, **changes))
    with pytest.raises(
        ArtifactsError, match=rf"model.safetensors and the manifest contradict.*{words}.*Export it again"
    ):
        check_weights(tmp_path, claimed)


@pytest.mark.parametrize("classifier", ["nope", "norm", "", "blocks.0.mlp"])
def test_a_classifier_that_makes_no_logits_is_refused(manifest: Manifest, tmp_path: Path, classifier: str) -> None:
    with pytest.raises(ArtifactsError, match="the classifier"):
        check_weights(tmp_path, msgspec.structs.replace(manifest, classifier=classifier))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (ParameterEntry(name="../../evil", shape=(8,), trained=True), "it lacks parameter ../../evil"),
        (
            ParameterEntry(name="head.bias", shape=(1, 2, 3), trained=True),
            r"head.bias is float32 \[3\], not float32 \[1, 2, 3\]",
        ),
    ],
)
def test_a_parameter_that_the_weights_do_not_have_is_refused_by_its_name(
    manifest: Manifest, tmp_path: Path, entry: ParameterEntry, words: str
) -> None:
    first, *others = manifest.variants
    changed = msgspec.structs.replace(first, parameters=(*first.parameters[1:], entry))
    with pytest.raises(ArtifactsError, match=words):
        check_weights(tmp_path, msgspec.structs.replace(manifest, variants=(changed, *others)))


def test_weights_that_are_damaged_a_link_or_a_pipe_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    weights = tmp_path / manifest.weights
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactsError, match="is damaged"):
        check_weights(tmp_path, manifest)
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactsError, match="is a link"):
        check_weights(tmp_path, manifest)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ArtifactsError, match="no plain file"):
        check_weights(tmp_path, manifest)
